"""The machine code of the set `amx` as the compiler made it; tests/cpu/tiles.cpp carries out the instructions of tiles. For
processors with AVX512-BF16 and without AMX: those with AMX run the set in every test."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlattn_fast.backends import native

ROOT = Path(__file__).parents[2]
FILES = ("tests/cpu/test_pairs.py", "tests/cpu/test_panels.py")
# of the edges one size: `python -m tools.sanitize` computes all of them
CHOSEN = "padding or one_key or zero or lanes or relu or again or (beside_panels and 31) or (edges and size33-)"


def test_trapped_products_by_tiles(tmp_path: Path) -> None:
    sets = native._available()
    if "v4_bf16" not in sets or "amx" in sets or not hasattr(native.library.load(), "vlattn_amx_is_right"):
        pytest.skip("the processor has no AVX512-BF16, or has AMX; or the library was built without `amx`")
    if shutil.which("c++") is None:
        pytest.skip("c++ is not installed")
    library = tmp_path / "libtiles.so"
    flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC"]
    subprocess.run(["c++", *flags, "-o", library, ROOT / "tests" / "cpu" / "tiles.cpp"], check=True)
    plugins = ["-p", "no:faulthandler", "-p", "no:cacheprovider", "-p", "tests.helpers.cpu.trapped_tiles"]
    command = [sys.executable, "-m", "tests.helpers.process", "-q", *plugins, *FILES, "-k", CHOSEN]
    environment = {**os.environ, "VLATTN_TRAPPED_TILES": str(library), "VLATTN_CPU_ISA": "amx", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    products = re.search(r"products of tiles: (\d+)", done.stdout)
    assert products and int(products[1]) > 10000, done.stdout
