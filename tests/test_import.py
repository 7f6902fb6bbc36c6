"""What `import vlattn_fast` costs and touches, measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    assert not any(initialised for _, _, initialised in runs), "import vlattn_fast initialises CUDA"
    part = min(part for part, _, _ in runs)
    assert part < 0.3, f"import vlattn_fast takes {part:.2f} of what import torch takes, beyond it"
