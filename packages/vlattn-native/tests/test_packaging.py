"""What a wheel has: the libraries, compiled for this system, and archives; and that it works where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from vlattn_native import building

ARCHIVE, LIBRARIES = "sm_80.zip", {"libvlattn_launch.so", "libvlattn_torch.so"}


def copied(source: Path) -> Path:
    """The sources without what was built, and a library as it lies in a clone."""
    left_out = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "compiled", "tests")
    shutil.copytree(building.ROOT, source, ignore=left_out)
    (source / "vlattn_native" / "compiled").mkdir()
    (source / "vlattn_native" / "compiled" / "libvlattn_launch.so").write_text("an old library")
    return source


def build(source: Path, target: Path, kind: str = "wheel", **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    target.mkdir()
    others = {name: value for name, value in os.environ.items() if not name.startswith(("VLATTN_", "PYTHONPATH"))}
    return subprocess.run([sys.executable, "-c", code], cwd=source, env=others | environment, capture_output=True, text=True)


INSTALLED = """
import sys, torch, vlattn_fast as va
from tests.helpers import launching
from vlattn_fast.kernels import score_attention  # whose launches are emulated from here on
from vlattn_native import archive, building
assert archive.LIBRARY.is_relative_to(sys.prefix), archive.LIBRARY
building.launcher = lambda: archive.LIBRARY
query, key, value = torch.randn(3, 2, 3, 20, 16, dtype=torch.float16)
with launching.emulated(archive.FOLDER, 80) as launches:
    out = va.score_attention(query, key, value, backend="triton")
assert [one.name for one in launches] == ["_forward_kernel"], launches
torch.testing.assert_close(out, va.reference.score_attention(query, key, value), rtol=1e-2, atol=1e-2)
"""


def test_an_installed_wheel_launches_its_kernels(tmp_path: Path) -> None:
    """In an environment that has it, and the other packages by their paths."""
    pytest.importorskip("ptx", reason="ptx, which emulates compiled kernels, is not installed: pip install packages/ptx")
    from ptx.testing import compiling

    source = copied(tmp_path / "source")
    compiling("tests.helpers.ahead.compile_one_call", source / "vlattn_native" / "compiled")
    done = build(source, tmp_path / "wheel")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as file:
        compiled = {name.rpartition("/")[2] for name in file.namelist() if name.startswith("vlattn_native/compiled/")}
    assert compiled == {ARCHIVE, *LIBRARIES}
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, wheel], check=True)
    (packages,) = environment.glob("lib/*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text(f"import site; [*map(site.addsitedir, {here})]\n{building.ROOT}\n")
    subprocess.run([python, "-c", INSTALLED], check=True, cwd=tmp_path)


def test_a_source_distribution_has_what_a_wheel_is_built_of(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    (source / "vlattn_native" / "compiled" / ARCHIVE).write_text("an archive")
    done = build(source, tmp_path / "sources", "sdist")
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "sources").iterdir()
    with tarfile.open(made) as sources:
        names = {name.partition("/")[2] for name in sources.getnames()}
    cpp = {path.relative_to(building.ROOT).as_posix() for path in (building.ROOT / "csrc").rglob("*.*")}
    assert names >= {"CMakeLists.txt", f"vlattn_native/compiled/{ARCHIVE}", *cpp}
    assert not [name for name in names if name.endswith(".so")]


def test_a_wheel_has_at_most_60_MB_of_compiled_kernels(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    with open(source / "vlattn_native" / "compiled" / "sm_90.zip", "wb") as file:
        file.truncate(61_400_000)
    done = build(source, tmp_path / "wheel")
    assert done.returncode != 0 and [*(tmp_path / "wheel").iterdir()] == []
    assert (
        "vlattn_native/compiled/ must have at most 60 MB of compiled kernels for a wheel; got 61 MB in sm_90.zip" in done.stderr
    )


def test_a_wheel_without_a_compiler_is_an_error(tmp_path: Path) -> None:
    done = build(copied(tmp_path / "source"), tmp_path / "wheel", PATH=str(tmp_path))
    assert done.returncode != 0 and "c++ must be installed to build a library" in done.stderr


def test_it_is_of_the_version_of_the_kernels_that_it_has() -> None:
    """Archives and structs belong to exact sources."""
    project = tomllib.loads((building.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == version("vlattn_fast")
    assert f"vlattn_fast=={version('vlattn_fast')}" in project["dependencies"]
