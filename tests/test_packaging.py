"""What is installed: the wheel's contents, an import of it from elsewhere, and when the CUDA C++ library is built into it.

No compiler runs here: nvcc, cmake and ninja are scripts, torch is a file that names a version. tests/cuda/ runs the real ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
MAPPED = ("kernels", "benchmarks")  # folders at the top that are installed inside of the package
LIBRARY, RECORD = "vlattn_fast/cuda/libvlattn_cuda.so", "vlattn_fast/cuda/build.json"  # where a build leaves them; not in git
CMAKE = """
import pathlib, sys
option = "--build" if "--build" in sys.argv else "-B"
folder = pathlib.Path(sys.argv[sys.argv.index(option) + 1])
with open(pathlib.Path(__file__).with_name("cmake.log"), "a") as log:
    print(*sys.argv[1:], file=log)
if option == "-B":
    (folder / "CMakeCache.txt").write_text("OTHER:STRING=1\\nVLATTN_TARGETS:STRING=80-real;100-virtual\\n")
else:
    (folder / "libvlattn_cuda.so").write_text("the library")
"""
FAILING = "import sys; sys.exit('no such compiler')"


def copied(source: Path) -> Path:
    """The sources, so that neither leftovers in the tree get in nor the build's own files stay there; and a library in them
    as an editable install leaves it."""
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, source)
    for name in ("vlattn_fast", "csrc", *MAPPED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build.json"))
    (source / LIBRARY).write_text("an old library")
    return source


def machine(
    folder: Path,
    tools: tuple[str, ...] = ("nvcc", "cmake", "ninja"),
    nvcc: str = "release 13.0, V13.0.88",
    cmake: str = CMAKE,
    version: str = "2.13.0+cu130",
    cuda: str = "'13.0'",
) -> dict[str, str]:
    """The environment of a machine that has these tools and this torch, and nothing on PATH besides."""
    scripts = {"nvcc": f"print({nvcc!r})", "cmake": cmake, "ninja": ""}
    (folder / "bin").mkdir(parents=True)
    (folder / "torch").mkdir()
    for tool in tools:
        script = folder / "bin" / tool
        script.write_text(f"#!{sys.executable}\n{scripts[tool]}\n")
        script.chmod(0o755)
    (folder / "torch" / "version.py").write_text(
        f"from typing import Optional\n\n__version__ = '{version}'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n"
    )
    others = {name: value for name, value in os.environ.items() if not name.startswith(("VLATTN_", "CUDA"))}
    return {**others, "PATH": str(folder / "bin"), "CUDA_HOME": str(folder / "nowhere"), "PYTHONPATH": str(folder)}


def build(source: Path, target: Path, environment: dict[str, str], kind: str = "wheel") -> subprocess.CompletedProcess[str]:
    """As pip does it, into target/kind."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target / kind)!r})"
    (target / kind).mkdir()
    return subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, target = copied(tmp_path_factory.mktemp("source") / "copy"), tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source],
        check=True,
        capture_output=True,
        env=machine(tmp_path_factory.mktemp("machine") / "without", tools=()),
    )
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_is_pure_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_no_library_of_an_older_build_is_in_it(names):
    assert [name for name in names if name.endswith(".so")] == []


def test_nothing_but_the_package_at_the_top_level(names):
    tops = {name.split("/", 1)[0] for name in names if ".dist-info/" not in name}
    assert tops == {"vlattn_fast"}


def test_every_module_and_kernel_is_in_it(names):
    for folder, inside in (("vlattn_fast", "vlattn_fast"), *((name, f"vlattn_fast/{name}") for name in MAPPED)):
        wanted = {f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
        assert wanted <= names, sorted(wanted - names)


def test_every_data_file_is_in_it(names):
    files = [path for path in (ROOT / "vlattn_fast").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    wanted = {path.relative_to(ROOT).as_posix() for path in files} - {LIBRARY, RECORD}
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


def contents(folder: Path) -> tuple[str, set[str], dict[str, object], str | None]:
    """The only wheel's tags, names, build.json and library."""
    (built,) = folder.iterdir()
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        library = archive.read(LIBRARY).decode() if LIBRARY in names else None
        return built.stem.split("-", 2)[2], names, json.loads(archive.read(RECORD)), library


@pytest.mark.parametrize("asked", ["", "1"])
def test_the_library_is_built_into_the_wheel(asked, tmp_path):
    environment = machine(tmp_path / "machine", cuda="None" if asked else "'13.0'") | {"VLATTN_CUDA": asked}
    done = build(copied(tmp_path / "source"), tmp_path, environment)
    assert done.returncode == 0, done.stderr
    tags, names, record, library = contents(tmp_path / "wheel")
    assert tags.startswith("py3-none-linux_")  # neither Python's version nor torch's
    assert library == "the library"
    assert record.pop("seconds") < 60
    assert record == {"targets": ["80-real", "100-virtual"], "nvcc": "13.0", "torch": "2.13.0+cu130"}
    assert not any(name.startswith(("csrc", "CMake")) for name in names)
    configured, built = (tmp_path / "machine" / "bin" / "cmake.log").read_text().splitlines()
    assert f"-DVLATTN_TORCH={tmp_path / 'machine' / 'torch'}" in configured.split()
    assert built.endswith(f"--parallel {os.cpu_count()}")


def test_a_library_does_not_outlive_its_install(tmp_path):
    """One tree, three installs: with the library, without it, and one whose build fails."""
    source, environment = copied(tmp_path / "source"), machine(tmp_path / "machine")
    failing = machine(tmp_path / "failing", cmake=FAILING)
    for name, given, found in (
        ("with", environment, "the library"),
        ("without", {**environment, "VLATTN_CUDA": "0"}, None),
        ("failing", failing, None),
    ):
        (tmp_path / f"{name}-wheel").mkdir()
        done = build(source, tmp_path / f"{name}-wheel", given)
        assert done.returncode == 0, done.stderr
        _, _, record, library = contents(tmp_path / f"{name}-wheel" / "wheel")
        assert library == found
        assert found or f"the CUDA C++ library is not built: {record['reason']}\n" in done.stdout
    assert record == {"reason": "the build failed (an install with VLATTN_CUDA=1 shows how)"}
    assert (source / LIBRARY).read_text() == "an old library"  # that of an editable install is left alone


def test_an_editable_install_has_it_in_the_tree(tmp_path):
    source, environment = copied(tmp_path / "source"), machine(tmp_path / "machine")
    assert build(source, tmp_path, environment, "editable").returncode == 0
    assert (source / LIBRARY).read_text() == "the library"
    assert json.loads((source / RECORD).read_text())["nvcc"] == "13.0"
    shutil.rmtree(tmp_path / "editable")
    assert build(source, tmp_path, {**environment, "VLATTN_CUDA": "0"}, "editable").returncode == 0
    assert not (source / LIBRARY).exists()
    assert json.loads((source / RECORD).read_text()) == {"reason": "VLATTN_CUDA=0 left it out"}


@pytest.mark.parametrize(
    ("asked", "machinery", "words"),
    [
        (
            "1",
            {"tools": ("cmake", "ninja")},
            "VLATTN_CUDA=1: the CUDA C++ library cannot be built: nvcc was not found (of the CUDA "
            "toolkit, on PATH or in $CUDA_HOME/bin). VLATTN_CUDA=0 installs without it.",
        ),
        (
            "1",
            {"cmake": FAILING},
            "no such compiler\nVLATTN_CUDA=1: the CUDA C++ library cannot be built: the build failed (an "
            "install with VLATTN_CUDA=1 shows how). VLATTN_CUDA=0 installs without it.",
        ),
        ("yes", {}, "VLATTN_CUDA must be 0, 1 or unset; got 'yes'"),
    ],
)
def test_an_install_that_cannot_obey_fails(asked, machinery, words, tmp_path):
    environment = {**machine(tmp_path / "machine", **machinery), "VLATTN_CUDA": asked}
    done = build(copied(tmp_path / "source"), tmp_path, environment)
    assert done.returncode != 0 and list((tmp_path / "wheel").iterdir()) == []
    assert words in done.stderr


def test_the_source_distribution_can_build_it(tmp_path):
    done = build(copied(tmp_path / "source"), tmp_path, machine(tmp_path / "machine"), "sdist")
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "sdist").iterdir()
    with tarfile.open(made) as archive:
        found = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {"CMakeLists.txt", "csrc/binding.cpp", *wanted} <= found
    assert not {LIBRARY, RECORD} & found


def setup_module_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, imported where this is the environment and only its torch is there."""
    for name in ("PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, environment[name])
    spec = importlib.util.spec_from_file_location("vlattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SITE", [environment["PYTHONPATH"]])
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setitem(module.ENVIRONMENT, "PATH", environment["PATH"])  # without the scripts beside this Python
    return module


@pytest.mark.parametrize(
    ("asked", "machinery", "reason"),
    [
        ("", {}, None),
        ("1", {}, None),
        ("0", {}, "VLATTN_CUDA=0 left it out"),
        ("", {"tools": ()}, "nvcc was not found (of the CUDA toolkit, on PATH or in $CUDA_HOME/bin)"),
        ("", {"tools": ("nvcc", "ninja")}, "cmake was not found (pip install cmake)"),
        ("1", {"tools": ("nvcc", "cmake")}, "ninja was not found (pip install ninja)"),
        ("1", {"nvcc": "release 12.6, V12.6.20"}, "nvcc 12.6 was found, and sm_100 needs 12.8 or newer"),
        ("", {"nvcc": "release 12.8, V12.8.61"}, None),
        ("", {"nvcc": "Segmentation fault"}, "nvcc of unknown version was found, and sm_100 needs 12.8 or newer"),
        ("1", {"version": "2.9.1+cu130"}, "torch 2.9.1+cu130 was found, and 2.11 or newer is needed"),
        ("", {"version": "2.11.0a0+git0"}, None),
        ("", {"cuda": "None"}, "this torch is not built for CUDA; VLATTN_CUDA=1 builds anyway"),
        ("1", {"cuda": "None"}, None),
    ],
)
def test_what_stands_in_the_way(asked, machinery, reason, tmp_path, monkeypatch):
    assert setup_module_of(machine(tmp_path / "machine", **machinery), monkeypatch).obstacle(asked) == reason


def test_torch_is_found_where_it_cannot_be_imported(tmp_path, monkeypatch):
    """pip's build isolation takes the environment from sys.path; without any torch the install goes on."""
    environment = machine(tmp_path / "machine")
    setup = setup_module_of(environment, monkeypatch)
    assert setup.torch_folder() == tmp_path / "machine" / "torch"
    (tmp_path / "machine" / "torch" / "version.py").unlink()
    assert setup.obstacle("") == "torch was not found (install it first, then vlattn_fast again)"
    monkeypatch.undo()
    setup = setup_module_of(environment, monkeypatch)
    monkeypatch.setattr(setup, "SITE", [str(Path(torch.__file__).parents[1])])
    assert setup.torch_folder() == Path(torch.__file__).parent
    assert setup.torch_version(setup.torch_folder()) == (torch.__version__, torch.version.cuda is not None)
