"""What is installed: the wheel's contents, and an import of it from elsewhere."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = ("kernels", "benchmarks")  # folders at the top that are installed inside of the package


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that neither leftovers in the tree get in nor the build's own files stay there."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vlattn_fast", *MAPPED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source],
        check=True, capture_output=True,
    )  # fmt: skip
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_is_pure_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_nothing_but_the_package_at_the_top_level(names):
    tops = {name.split("/", 1)[0] for name in names if ".dist-info/" not in name}
    assert tops == {"vlattn_fast"}


def test_every_module_and_kernel_is_in_it(names):
    for folder, inside in (("vlattn_fast", "vlattn_fast"), *((name, f"vlattn_fast/{name}") for name in MAPPED)):
        wanted = {f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
        assert wanted <= names, sorted(wanted - names)


def test_every_data_file_is_in_it(names):
    files = [path for path in (ROOT / "vlattn_fast").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    assert "vlattn_fast/py.typed" in wanted
    assert {Path(name).suffix for name in wanted} >= {".safetensors", ".html"}
    assert wanted <= names, sorted(wanted - names)


def test_the_license_is_in_it(names):
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_works_from_where_it_was_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import importlib.util, pathlib, vlattn_fast, vlattn_fast.benchmarks, vlattn_fast.kernels\n"
        "from vlattn_fast import lab\n"
        f"assert pathlib.Path(vlattn_fast.__file__).is_relative_to({str(tmp_path)!r}), vlattn_fast.__file__\n"
        f"assert pathlib.Path(vlattn_fast.kernels.__file__).is_relative_to({str(tmp_path)!r})\n"
        "assert not any(map(importlib.util.find_spec, ('kernels', 'benchmarks')))\n"
        "lab.load_uniter()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_folders_are_found_where_the_tests_run(name):
    module = importlib.import_module(f"vlattn_fast.{name}")
    assert Path(module.__file__).is_relative_to(ROOT / name)
