"""What `import vlattn_fast` costs and touches, measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import gc, json, sys, time
import torch
gc.disable()  # a collection goes through all that torch has made, and may come at any time
before = set(sys.modules)
start = time.process_time()  # not the clock: other processes share the cores
import vlattn_fast
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""


def imported() -> tuple[float, list[str], bool]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, modules, initialised = json.loads(done.stdout)
    return seconds, modules, initialised


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
    assert not any(initialised for _, _, initialised in runs), "import vlattn_fast initialises CUDA"
    fastest = min(seconds for seconds, _, _ in runs)
    assert fastest < 0.2, f"import vlattn_fast takes {fastest:.2f} s beyond import torch"
