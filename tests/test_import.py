"""What `import vlattn_fast` costs and touches, measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import gc, json, sys, time
gc.disable()  # a collection goes through all that torch has made, and may come at any time
start = time.process_time()  # not the clock: other processes share the cores
import torch
middle, before = time.process_time(), set(sys.modules)
import vlattn_fast
part = (time.process_time() - middle) / (middle - start)
print(json.dumps([part, sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""


def imported() -> tuple[float, list[str], bool]:
    """How long it takes beyond torch, as a part of what torch takes; the modules it brings; whether CUDA is initialised."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    part, modules, initialised = json.loads(done.stdout)
    return part, modules, initialised


def test_import_is_cheap_and_brings_no_heavy_package() -> None:
    runs = [imported() for _ in range(3)]
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
    late = parts & {f"vlattn_fast.{name}" for name in ("interpret", "nn", "models", "lab", "verify", "kernels", "benchmarks")}
    assert "vlattn_fast.ops" in parts and not late, f"import vlattn_fast also imports {sorted(late)}"
    assert not any(initialised for _, _, initialised in runs), "import vlattn_fast initialises CUDA"
    part = min(part for part, _, _ in runs)
    assert part < 0.3, f"import vlattn_fast takes {part:.2f} of what import torch takes, beyond it"


FIRST_USE = """
import inspect, sys
import vlattn_fast as va
packages = {"interpret", "lab", "models", "nn"}
assert packages | set(va.__all__) <= set(dir(va))
for name in ("explain", "evaluate", "probe", "prompt_maps", "load_explanations"):
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


def test_what_is_imported_late_is_there_at_its_first_use() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_USE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout


@pytest.mark.parametrize("name", ["explain", "Explanation", "interpret", "nn"])
def test_from_imports_bring_what_is_imported_late(name: str) -> None:
    program = f"from vlattn_fast import {name}; assert {name}.__doc__; from vlattn_fast import *"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
