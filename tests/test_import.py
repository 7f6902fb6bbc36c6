"""What `import vlattn_fast` costs and touches, measured in processes of their own."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vlattn_fast

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import gc, json, os, sys, time
gc.disable()  # a collection goes through all that torch has made, and may come at any time
start = time.process_time()  # not the clock: other processes share the cores
import torch
torch_takes = time.process_time() - start
for code in json.loads(sys.argv[1]):  # each in a process of its own, where torch alone is imported
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        before, middle = set(sys.modules), time.process_time()
        try:
            exec(code, {})
            said = ""
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        part = (time.process_time() - middle) / torch_takes
        cuda = torch.cuda.is_initialized()
        with os.fdopen(writer, "w") as out:
            json.dump([part, sorted(set(sys.modules) - before), cuda, said], out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as result:
        print(result.read())
    assert os.waitpid(child, 0)[1] == 0
"""


def run(*codes: str) -> list[tuple[float, list[str], bool, str]]:
    """By code: its time as a part of that of importing torch, its modules, whether it initialises CUDA, its error."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(codes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_import_is_cheap_and_brings_no_heavy_package() -> None:
    runs = run(*["import vlattn_fast"] * 3)
    modules = {name.split(".")[0] for name in runs[0][1]}
    heavy = modules & {
        "triton",
        "transformers",
        "matplotlib",
        "sklearn",
        "PIL",
        "jinja2",
        "safetensors",
        "typer",
        "tqdm",
        "pandas",
        "scipy",
    }
    assert not heavy, f"import vlattn_fast also imports {sorted(heavy)}"
    parts = {".".join(name.split(".")[:2]) for name in runs[0][1] if name.startswith("vlattn_fast.")}
    late = parts & {f"vlattn_fast.{name}" for name in ("interpret", "nn", "models", "verify", "benchmarks")}
    assert "vlattn_fast.ops" in parts and not late, f"import vlattn_fast also imports {sorted(late)}"
    assert not any(initialised for _, _, initialised, _ in runs), "import vlattn_fast initialises CUDA"
    part = min(part for part, *_ in runs)
    assert part < 0.3, f"import vlattn_fast takes {part:.2f} of what import torch takes, beyond it"


FIRST_USE = """
import inspect, sys
import vlattn_fast as va
packages = {"interpret", "models", "nn"}
assert dir(va.scores) == sorted(va.scores.__all__)
assert packages <= set(dir(va)) == {*va._PACKAGES, *va.__all__, "__version__"}, set(dir(va)) - set(va.__all__)
for name in ("explain", "evaluate", "probe", "explain_dataset", "load_explanations"):
    function = getattr(va, name)
    assert function is getattr(sys.modules["vlattn_fast.interpret"], name) and function.__doc__ and name in vars(va)
    assert inspect.signature(function).parameters
for name in sorted(packages | set(va.__all__)):
    assert getattr(va, name) is not None
assert va.nn.capture_attention.__module__ == "vlattn_fast.nn.capture_attention"
try:
    va.explian
except AttributeError as error:
    assert "explian" in str(error)
else:
    raise AssertionError("a name that is not there")
"""


@pytest.mark.slow
def test_what_is_imported_late_is_there_at_its_first_use() -> None:
    froms = [f"from vlattn_fast import {name}; assert {name}.__doc__; from vlattn_fast import *"
             for name in ("explain", "Explanation", "interpret", "nn")]  # fmt: skip
    assert [said for *_, said in run(FIRST_USE, *froms)] == [""] * 5


def test_the_version_is_that_of_the_project() -> None:
    (stated,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert vlattn_fast.__version__ == stated and "__version__" in dir(vlattn_fast)


def test_a_tree_that_is_not_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vlattn` asks for it."""

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert vlattn_fast.__version__ == "0+unknown"


@pytest.mark.slow
def test_a_clone_beside_an_editable_install_warns_of_two_trees(tmp_path: Path) -> None:
    """Python finds the package in one folder, and the kernels in the other one."""
    leave_out = shutil.ignore_patterns("*.so", "*.safetensors", "__pycache__", "results")
    for name in ("vlattn_fast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave_out)
    code = "import warnings; warnings.simplefilter('error'); import vlattn_fast"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f"vlattn_fast comes from {tmp_path.resolve()}, and its Triton kernels" in done.stderr, done.stderr
    assert f"from {ROOT}, which" in done.stderr
    alone = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert alone.returncode == 0 and not alone.stderr
