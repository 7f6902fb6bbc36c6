"""The package of pyproject.toml: its wheel has all that a launch needs, and no file of this repository beside it."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ptx.running.library import BUILD

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]  # the folder of pyproject.toml
SUITE = """
import pytest, torch, triton, triton.language as tl
import ptx

@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + o, 2 * tl.load(x + o, mask=o < n), mask=o < n)

@pytest.mark.ptx(arch=90)
def test_double(ptx_launches):
    x = torch.ones(200)
    double[(2,)](x, 200, BLOCK=128)
    assert (x == 2).all() and ptx_launches[0].executed > 0

def test_where_it_lies():
    assert ptx.run(double, 2, torch.ones(200), 200, BLOCK=128, arch=80).findings == []
    assert ptx.__file__.startswith({site!r}), ptx.__file__
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `pip install .` installs, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "ptx", source / "ptx", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", folder, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_the_tree_and_nothing_else(site: Path) -> None:
    def files(folder: Path) -> set[str]:
        paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        return {str(path) for path in paths if "__pycache__" not in path.parts}

    assert files(site / "ptx") == files(ROOT / "ptx")
    assert {path.name for path in site.iterdir()} == {"ptx", "ptx_run-0.1.0.dist-info"}
    (facts,) = site.glob("*.dist-info")
    metadata = email.message_from_string((facts / "METADATA").read_text())
    assert metadata["Name"] == "ptx-run" and metadata.get_payload().startswith("# ptx\n")
    assert (facts / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_a_kernel_and_the_plugin_run_from_the_wheel_alone(site: Path, tmp_path: Path) -> None:
    """pytest finds the plugin by its entry point. The emulator that is built already serves, as its sources are the same."""
    (tmp_path / "test_suite.py").write_text(SUITE.replace("{site!r}", repr(str(site))))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "PYTHONPATH": str(site), "PTX_CACHE": str(BUILD), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--strict-markers", "test_suite.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def test_an_installed_package_keeps_its_emulator_in_the_users_cache(site: Path, tmp_path: Path) -> None:
    code = "from ptx.running.library import BUILD; print(BUILD)"
    environment = {name: value for name, value in os.environ.items() if name != "PTX_CACHE"}
    environment |= {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/ptx-run\n", done.stderr
    if "PTX_CACHE" not in os.environ:
        assert BUILD == ROOT / "build" / "ptx"


def test_no_file_names_the_package_whose_kernels_it_first_ran() -> None:
    """Nor imports it, in the package and in its tests: any other package may take ptx."""
    files = [path for folder in ("ptx", "tests") for path in (ROOT / folder).rglob("*")]
    files = [path for path in files if path.suffix in (".py", ".cpp", ".cu", ".h", ".txt") and path != Path(__file__).resolve()]
    assert len(files) > 80
    named = [str(path) for path in files if "vlattn" in path.read_text(encoding="utf-8")]
    assert named == []
