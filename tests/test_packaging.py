"""What is installed: the wheel's contents, an import of it from elsewhere, and when the C++ libraries are built into it.

No compiler runs here: c++, nvcc, cmake and ninja are scripts. tests/cpu/ and tests/cuda/ run the real ones.
"""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from vlattn_fast.backends import native

ROOT = Path(__file__).parents[1]
MAPPED = ("kernels", "benchmarks")  # folders at the top that are installed inside of the package
LIBRARY, CPU_LIBRARY = (f"vlattn_fast/backends/{name}/libvlattn_{name}.so" for name in ("cuda", "cpu"))
# Where a build leaves them; not in git.
RECORD, CPU_RECORD = (str(Path(library).with_name("build.json")) for library in (LIBRARY, CPU_LIBRARY))
CMAKE = """
import os, pathlib, shutil, sys
option = "--build" if "--build" in sys.argv else "-B"
folder = pathlib.Path(sys.argv[sys.argv.index(option) + 1])
with open(pathlib.Path(__file__).with_name("cmake.log"), "a") as log:
    print(*sys.argv[1:], file=log)
cache = folder / "CMakeCache.txt"
if option == "-B":
    folder.mkdir(parents=True, exist_ok=True)
    source, name = sys.argv[sys.argv.index("-S") + 1], "cpu" if "-DVLATTN_CPU=ON" in sys.argv else "cuda"
    print(f"CMAKE_HOME_DIRECTORY:INTERNAL={source}", f"CMAKE_CXX_COMPILER:STRING={os.environ.get('CXX')}", "OTHER:STRING=1",
        "VLATTN_TARGETS:STRING=80-real;100-virtual", "VLATTN_BUILT_SETS:INTERNAL=baseline;v3", "VLATTN_COMPILER:INTERNAL=GNU 12",
        f"lib={name}", sep="\\n", end="", file=cache.open("w"))
else:
    (folder / f"libvlattn_{cache.read_text().split('lib=')[1]}.so").write_text("the library")
"""
FAILING = "import sys; sys.exit('no such compiler')"


def copied(source: Path) -> Path:
    """The sources, so that neither leftovers in the tree get in nor the build's own files stay there; and libraries in them as
    an editable install leaves them."""
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, source)
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "build.json")
    for name in ("vlattn_fast", "csrc", *MAPPED):
        shutil.copytree(ROOT / name, source / name, ignore=left_out)
    for library in (LIBRARY, CPU_LIBRARY):
        (source / library).write_text("an old library")
    return source


def build(source: Path, target: Path, environment: dict[str, str], kind: str = "wheel") -> subprocess.CompletedProcess[str]:
    """Into target/kind."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target / kind)!r})"
    (target / kind).mkdir()
    return subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)


def installed(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment in `folder`, which has this wheel and, by their path, torch's packages."""
    import torch

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, wheel], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    return python


def machine(
    folder: Path, tools: tuple[str, ...] = ("nvcc", "cmake", "ninja"), nvcc: str = "release 13.0, V13.0.88", cmake: str = CMAKE
) -> dict[str, str]:
    """The environment of a machine that has these tools and nothing on PATH besides."""
    scripts = {"nvcc": f"print({nvcc!r})", "cmake": cmake}
    (folder / "bin").mkdir(parents=True)
    for tool in tools:
        script = folder / "bin" / tool
        script.with_suffix(".py").write_text(scripts.get(tool, ""))
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$0.py" "$@"\n')  # the first line takes no path with a blank
        script.chmod(0o755)
    others = {name: value for name, value in os.environ.items() if not name.startswith(("VLATTN_", "CUDA", "CXX"))}
    return {**others, "PATH": str(folder / "bin"), "CUDA_HOME": str(folder / "nowhere")}


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


def test_it_has_the_package_and_its_license_and_no_library_of_an_older_build(wheel, names):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert [name for name in names if name.endswith(".so")] == []
    assert {name.split("/", 1)[0] for name in names if ".dist-info/" not in name} == {"vlattn_fast"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_module_and_kernel_is_in_it(names):
    for folder, inside in (("vlattn_fast", "vlattn_fast"), *((name, f"vlattn_fast/{name}") for name in MAPPED)):
        wanted = {f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
        assert wanted <= names, sorted(wanted - names)


def test_every_data_file_is_in_it(names):
    files = [path for path in (ROOT / "vlattn_fast").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    wanted = {path.relative_to(ROOT).as_posix() for path in files} - {LIBRARY, RECORD, CPU_LIBRARY, CPU_RECORD}
    assert "vlattn_fast/py.typed" in wanted
    assert {Path(name).suffix for name in wanted} >= {".html"}
    assert "vlattn_fast/kernels/configurations.json" in names
    assert wanted <= names, sorted(wanted - names)


@pytest.mark.slow
def test_it_works_from_where_it_was_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import importlib.util, pathlib, vlattn_fast, vlattn_fast.benchmarks, vlattn_fast.kernels\n"
        f"assert pathlib.Path(vlattn_fast.__file__).is_relative_to({str(tmp_path)!r}), vlattn_fast.__file__\n"
        f"assert pathlib.Path(vlattn_fast.kernels.__file__).is_relative_to({str(tmp_path)!r})\n"
        "assert not any(map(importlib.util.find_spec, ('kernels', 'benchmarks')))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})


def contents(folder: Path, kind: str = "cuda") -> tuple[str, set[str], dict[str, object], str | None]:
    """The only wheel's tags and names, and build.json and the library of this kind."""
    (built,) = folder.iterdir()
    place = f"vlattn_fast/backends/{kind}"
    with zipfile.ZipFile(built) as archive:
        names, file = set(archive.namelist()), f"{place}/libvlattn_{kind}.so"
        library = archive.read(file).decode() if file in names else None
        return built.stem.split("-", 2)[2], names, json.loads(archive.read(f"{place}/build.json")), library


CPU_TOOLS = ("c++", "cmake", "ninja")
ASKED = {"VLATTN_BUILD_CUDA": "1"}


@pytest.mark.parametrize("asked", ["", "1"])
@pytest.mark.slow
def test_the_library_for_the_cpu_is_built_without_torch(asked, tmp_path):
    environment = machine(tmp_path / "machine", CPU_TOOLS) | {"VLATTN_BUILD_CPU": asked}
    done = build(copied(tmp_path / "source"), tmp_path, environment)
    assert done.returncode == 0, done.stderr
    tags, _, record, library = contents(tmp_path / "wheel", "cpu")
    assert tags.startswith("py3-none-linux_") and library == "the library"
    assert record.pop("seconds") < 60
    assert record == {"sets": ["baseline", "v3"], "compiler": "GNU 12"}
    log = tmp_path / "machine" / "bin" / "cmake.log"
    assert "-DVLATTN_ISA=all" in log.read_text()  # a wheel has every instruction set
    assert build(copied(tmp_path / "tree"), tmp_path, environment, "editable").returncode == 0
    assert "-DVLATTN_ISA=native" in log.read_text()
    _, _, record, library = contents(tmp_path / "wheel")
    assert library is None and record == {"reason": "VLATTN_BUILD_CUDA=1 builds it"}


INSTALLED = """
import sys, torch, vlattn_fast as va
from vlattn_fast.backends import native
x = torch.randn(1, 2, 9, 5)
torch.testing.assert_close(va.score_attention(x, x, x, backend="cpu"), va.reference.score_attention(x, x, x))
assert native.library.path.is_relative_to(sys.prefix), native.library.path
"""


@pytest.mark.slow
def test_an_installed_wheel_has_a_library_that_runs(tmp_path):
    """In an environment that has nothing but it, and torch by its path. The library is that of this tree, already compiled: it
    needs no library of the system beyond those of manylinux, and of Python no function beyond the stable ABI."""
    if not native.library.exists:
        pytest.skip(native.state())
    real = CMAKE.replace('write_text("the library")', f"write_bytes(pathlib.Path({str(native.library.path)!r}).read_bytes())")
    done = build(copied(tmp_path / "source"), tmp_path, machine(tmp_path / "machine", CPU_TOOLS, cmake=real))
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    shown = subprocess.run([sys.executable, "-m", "auditwheel", "show", wheel], capture_output=True, text=True, check=True).stdout
    assert '"manylinux_2_' in shown, shown
    audit = [sys.executable, "-m", "abi3audit", "--strict", "--summary", "--assume-minimum-abi3", "3.2", native.library.path]
    said = subprocess.run(audit, capture_output=True, text=True, check=True)
    assert "0 ABI version mismatches and 0 ABI violations" in " ".join((said.stdout + said.stderr).split())
    python = installed(wheel, tmp_path / "empty")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLATTN_", "PYTHONPATH"))}
    subprocess.run([python, "-c", INSTALLED], check=True, cwd=tmp_path, env=environment)


@pytest.mark.slow
def test_an_editable_install_keeps_the_build_for_the_cpu(tmp_path):
    """Only what changed is compiled the next time; another compiler starts anew."""
    source, environment = copied(tmp_path / "source"), machine(tmp_path / "machine", ("g++", *CPU_TOOLS))
    kept, compilers = source / "build" / "install", [str(tmp_path / "machine" / "bin" / name) for name in ("c++", "g++")]
    for compiler, still_there in ((compilers[0], False), (compilers[0], True), (compilers[1], False)):
        assert build(source, tmp_path, {**environment, "CXX": compiler}, "editable").returncode == 0
        assert (source / CPU_LIBRARY).read_text() == "the library" and json.loads((source / CPU_RECORD).read_text())[
            "seconds"
        ] < 60
        assert (kept / "an object").exists() == still_there
        (kept / "an object").touch()
        shutil.rmtree(tmp_path / "editable")


def test_one_command_builds_the_library_for_the_cpu_in_place(tmp_path):
    """`make` runs it where a kernel changed."""
    source, environment = copied(tmp_path / "source"), machine(tmp_path / "machine", ("nvcc", *CPU_TOOLS))
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_cpu", "--inplace"], cwd=source, env=environment, check=True)
    assert (source / CPU_LIBRARY).read_text() == "the library" and (source / LIBRARY).read_text() == "an old library"


@pytest.mark.parametrize("asked", ["", "0"])
def test_kernels_for_a_gpu_are_built_on_request_alone(asked, tmp_path):
    done = build(copied(tmp_path / "source"), tmp_path, machine(tmp_path / "machine") | {"VLATTN_BUILD_CUDA": asked})
    assert done.returncode == 0, done.stderr
    _, _, record, library = contents(tmp_path / "wheel")
    reason = "VLATTN_BUILD_CUDA=0 left it out" if asked else "VLATTN_BUILD_CUDA=1 builds it"
    assert library is None and record == {"reason": reason}
    assert not (tmp_path / "machine" / "bin" / "cmake.log").exists()


@pytest.mark.slow
def test_both_libraries_are_built_into_one_wheel(tmp_path):
    environment = machine(tmp_path / "machine", ("nvcc", *CPU_TOOLS)) | ASKED
    done = build(copied(tmp_path / "source"), tmp_path, environment)
    assert done.returncode == 0, done.stderr
    tags, names, record, library = contents(tmp_path / "wheel")
    assert tags.startswith("py3-none-linux_")  # neither Python's version nor torch's
    assert library == contents(tmp_path / "wheel", "cpu")[3] == "the library"
    assert record.pop("seconds") < 60
    assert record == {"targets": ["80-real", "100-virtual"], "nvcc": "13.0"}
    assert not any(name.startswith(("csrc", "CMake")) for name in names)
    *_, built = (tmp_path / "machine" / "bin" / "cmake.log").read_text().splitlines()
    assert built.endswith(f"--parallel {os.cpu_count()}")


@pytest.mark.slow
def test_targets_and_jobs_are_those_that_are_asked_for(tmp_path):
    environment = machine(tmp_path / "machine", nvcc="release 12.4, V12.4.1") | ASKED | {"MAX_JOBS": "3"}
    done = build(copied(tmp_path / "source"), tmp_path, environment | {"VLATTN_CUDA_TARGETS": "80-real;90a-real"})
    assert done.returncode == 0, done.stderr
    configured, built = (tmp_path / "machine" / "bin" / "cmake.log").read_text().splitlines()
    assert configured.endswith(" -DVLATTN_TARGETS=80-real;90a-real") and built.endswith("--parallel 3")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer or unset; got '0'"),
        ("MAX_JOBS", "all", "MAX_JOBS must be a positive integer or unset; got 'all'"),
        ("VLATTN_CUDA_TARGETS", "sm_90", "VLATTN_CUDA_TARGETS must be like 80-real;90a-real;100-virtual or unset; got 'sm_90'"),
        ("VLATTN_CUDA_TARGETS", "80-real;", "VLATTN_CUDA_TARGETS must be like 80-real;90a-real;100-virtual or unset; got '80"),
    ],
)
def test_targets_and_jobs_that_are_none(variable, value, words, tmp_path):
    done = build(copied(tmp_path / "source"), tmp_path, machine(tmp_path / "machine") | ASKED | {variable: value})
    assert done.returncode != 0 and words in done.stderr


@pytest.mark.slow
def test_a_library_does_not_outlive_its_install(tmp_path):
    """One tree, three installs: with the library, without it, and one whose build fails."""
    source, environment = copied(tmp_path / "source"), machine(tmp_path / "machine", CPU_TOOLS)
    failing = machine(tmp_path / "failing", CPU_TOOLS, cmake=FAILING)
    for name, given, found in (
        ("with", environment, "the library"),
        ("without", {**environment, "VLATTN_BUILD_CPU": "0"}, None),
        ("failing", failing, None),
    ):
        (tmp_path / f"{name}-wheel").mkdir()
        done = build(source, tmp_path / f"{name}-wheel", given)
        assert done.returncode == 0, done.stderr
        _, _, record, library = contents(tmp_path / f"{name}-wheel" / "wheel", "cpu")
        assert library == found
        assert found or f"the CPU C++ library is not built: {record['reason']}\n" in done.stdout
    assert record == {"reason": "the build failed (an install with VLATTN_BUILD_CPU=1 shows how)"}
    assert (source / CPU_LIBRARY).read_text() == "an old library"  # that of an editable install is left alone


@pytest.mark.slow
def test_an_editable_install_has_it_in_the_tree(tmp_path):
    source, environment = copied(tmp_path / "source"), machine(tmp_path / "machine") | ASKED
    assert build(source, tmp_path, environment, "editable").returncode == 0
    assert (source / LIBRARY).read_text() == "the library"
    assert json.loads((source / RECORD).read_text())["nvcc"] == "13.0"
    shutil.rmtree(tmp_path / "editable")
    assert build(source, tmp_path, {**environment, "VLATTN_BUILD_CUDA": "0"}, "editable").returncode == 0
    assert not (source / LIBRARY).exists()
    assert json.loads((source / RECORD).read_text()) == {"reason": "VLATTN_BUILD_CUDA=0 left it out"}


@pytest.mark.parametrize(
    ("asked", "machinery", "words"),
    [
        (
            "1",
            {"tools": ("cmake", "ninja")},
            "VLATTN_BUILD_CUDA=1: the CUDA C++ library cannot be built: nvcc was not found (of the CUDA "
            "toolkit, on PATH or in $CUDA_HOME/bin). VLATTN_BUILD_CUDA=0 installs without it.",
        ),
        (
            "1",
            {"cmake": FAILING},
            "no such compiler\nVLATTN_BUILD_CUDA=1: the CUDA C++ library cannot be built: the build failed (an "
            "install with VLATTN_BUILD_CUDA=1 shows how). VLATTN_BUILD_CUDA=0 installs without it.",
        ),
        ("yes", {}, "VLATTN_BUILD_CUDA must be 0, 1 or unset; got 'yes'"),
        (
            "cpu",
            {},
            "VLATTN_BUILD_CPU=1: the CPU C++ library cannot be built: no C++ compiler was found (g++ or clang++). "
            "VLATTN_BUILD_CPU=0 installs without it.",
        ),
        (
            "cpu",
            {"tools": CPU_TOOLS, "cmake": FAILING},
            "no such compiler\nVLATTN_BUILD_CPU=1: the CPU C++ library cannot be built: the build failed",
        ),
    ],
)
def test_an_install_that_cannot_obey_fails(asked, machinery, words, tmp_path):
    wanted = {"VLATTN_BUILD_CPU": "1"} if asked == "cpu" else {"VLATTN_BUILD_CUDA": asked}
    environment = machine(tmp_path / "machine", **machinery) | wanted
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
    assert {"CMakeLists.txt", "csrc/cuda/device.h", *wanted} <= found
    assert not {LIBRARY, RECORD, CPU_LIBRARY, CPU_RECORD} & found


def setup_module_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, imported where this is the environment."""
    for name in ("PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, environment[name])
    spec = importlib.util.spec_from_file_location("vlattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.ENVIRONMENT, "PATH", environment["PATH"])  # without the scripts beside this Python
    return module


@pytest.mark.parametrize(
    ("asked", "machinery", "reason"),
    [
        ("", {}, "VLATTN_BUILD_CUDA=1 builds it"),
        ("1", {}, None),
        ("1", {"tools": ()}, "nvcc was not found (of the CUDA toolkit, on PATH or in $CUDA_HOME/bin)"),
        ("1", {"tools": ("nvcc", "ninja")}, "cmake was not found (pip install cmake)"),
        ("1", {"tools": ("nvcc", "cmake")}, "ninja was not found (pip install ninja)"),
        ("1", {"nvcc": "release 12.6, V12.6.20"}, "nvcc 12.6 was found, and sm_100 needs 12.8 or newer"),
        ("1", {"nvcc": "release 12.8, V12.8.61"}, None),
        ("1", {"nvcc": "Segmentation fault"}, "nvcc of unknown version was found, and sm_100 needs 12.8 or newer"),
    ],
)
def test_what_stands_in_the_way(asked, machinery, reason, tmp_path, monkeypatch):
    assert setup_module_of(machine(tmp_path / "machine", **machinery), monkeypatch).cuda_obstacle(asked) == reason


@pytest.mark.parametrize(
    ("asked", "tools", "compiler", "reason"),
    [
        ("", CPU_TOOLS, "", None),
        ("1", ("clang++", "cmake", "ninja"), "", None),
        ("", ("some-g++", "cmake", "ninja"), "some-g++ -m64", None),
        ("", ("c++", "ninja"), "", "cmake was not found (pip install cmake)"),
        ("1", ("c++", "cmake"), "", "ninja was not found (pip install ninja)"),
        ("", ("cmake", "ninja"), "", "no C++ compiler was found (g++ or clang++)"),
        ("", CPU_TOOLS, "some-g++", "the C++ compiler of $CXX, some-g++, was not found"),
    ],
)
def test_what_stands_in_the_way_of_the_cpu(asked, tools, compiler, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    setup = setup_module_of(machine(tmp_path / "machine", tools), monkeypatch)
    assert setup.cpu_obstacle(asked) == reason
    monkeypatch.setattr(sys, "platform", "darwin")
    assert setup.cpu_obstacle(asked) == reason
    monkeypatch.setattr(sys, "platform", "freebsd14")
    elsewhere = "it is built on Linux and macOS; VLATTN_BUILD_CPU=1 builds anyway"
    assert setup.cpu_obstacle(asked) == (reason if asked else elsewhere)


def test_mypy_finds_the_packages_that_lie_elsewhere():
    """By links, in a folder that pyproject.toml names. Without them mypy would take what they have for Any, in silence."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert {"vlattn_fast", "typings"} <= {*settings["files"]} and "typings" in settings["mypy_path"]
    linked = {path.name: path.resolve() for path in (ROOT / "typings" / "vlattn_fast").iterdir()}
    assert linked == {name: ROOT / name for name in MAPPED}


def test_the_recipe_has_the_facts_of_pyproject() -> None:
    """conda/recipe.yaml, which tools/conda.py builds. conda-forge has torch under the name pytorch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    recipe = [line.strip() for line in (ROOT / "conda" / "recipe.yaml").read_text().splitlines()]
    facts = project["project"]
    assert f'version: "{facts["version"]}"' in recipe and f"summary: {facts['description']}" in recipe
    assert recipe.count(f"- python {facts['requires-python']}") == 2
    needs = [re.sub(r"^(\w+)(>=.*)$", r"\1 \2", need) for need in (*facts["dependencies"], *project["build-system"]["requires"])]
    needs = [need.replace("torch ", "pytorch ") for need in needs]
    assert not {f"- {need}" for need in needs} - {*recipe}
    (command,) = facts["scripts"].items()
    assert f"- {' = '.join(command)}" in recipe
