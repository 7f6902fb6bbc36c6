"""The kernels under AddressSanitizer with UndefinedBehaviorSanitizer, which guard every tensor and shared memory on both sides,
and under ThreadSanitizer, which reports what no barrier orders; with threads in another order than in the other tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cuda.building import ROOT, SANITIZED, THREADS, build, changed, run_tests, sanitizing

BUILDS = {"address": ("asan", *SANITIZED), "thread": ("tsan", *THREADS)}
# what these builds have: float32 in tiles of 128 columns, and a 16-bit type in tiles of 64
SIZES = "feature_sizes and (5-1-torch or 64-5-torch or 65-64-torch.float32 or 128-128-torch.float32)"
ROWS = "carried_rows and (0-cuda or 1-cuda or float32-4 or float32-5 or bfloat16-8 or bfloat16-9 or bfloat16-64)"
DIMS = "head_dims and (float32 or 17-3 or 64-40)"
WARPS = "warps and not (130-torch.float32 or 130-3-torch.float32)"  # for which there is no shared memory
STRIPS = "either_side and not 128-127"
CHOSEN = {
    "address": {
        "score_attention": f"{SIZES} or empty or grouped or blocks_of_keys",
        "relevancy_attention": f"{DIMS} or {ROWS} or {WARPS} or empty or layouts or taken_as_it_is",
        "congruence_loss": f"{STRIPS} or head_dims and not (65-dtype4 or 128-dtype5) or empty or ragged or layouts",
    },
    "thread": {  # barriers.py says what reports which barrier
        "score_attention": f"{SIZES} or blocks_of_keys",
        "relevancy_attention": f"{ROWS} or {WARPS}",
        "congruence_loss": f"{STRIPS} or ragged",
    },
}
BARRIER = "__syncthreads();"
# Many carried rows, as in test_number_of_carried_rows, without pytest: to collect tests takes longer than this call.
CALL = """
import torch
import vlattn_fast as va

query, key, value = (torch.randn(1, 2, 20, size, requires_grad=True) for size in (6, 6, 5))
for rows in (4, 64):
    out, carrier = va.relevancy_attention(query, key, value, torch.rand(1, rows, 20, requires_grad=True), backend="cuda")
    (out.sum() + carrier.sum()).backward()
"""


def environment(kind: str, library: Path) -> dict[str, str]:
    made = {**sanitizing(kind), "VLATTN_CUDA_LIBRARY": str(library), "VLATTN_EMULATION_SEED": "3"}
    made["VLATTN_TEST_SANITIZED"] = "1"  # one draw of the numbers (tests/helpers/compare.py)
    if kind == "thread":
        made["TSAN_OPTIONS"] += ":halt_on_error=1"
    return made


def run(kind: str, library: Path, chosen: dict[str, str]) -> tuple[int, str]:
    return run_tests(chosen, environment(kind, library))


@pytest.mark.parametrize("kind", BUILDS)
def test_nothing_is_found(kind: str) -> None:
    status, written = run(kind, build(*BUILDS[kind]) / "libvlattn_host.so", CHOSEN[kind])
    assert status == 0, written[-10000:]


def test_a_removed_barrier_is_reported(tmp_path: Path) -> None:
    """One of relevancy_attention's, without which test_nothing_is_found passes; barriers.py removes each."""
    after = "wait_for_copies<3>();\n            "
    name = "relevancy_attention"
    library = changed(f"{name}.cu", f"{name}.cu", f"{after}{BARRIER}", after, tmp_path, *BUILDS["thread"])
    command, environs = [sys.executable, "-c", CALL], environment("thread", library)
    done = subprocess.run(command, cwd=ROOT, env=environs, capture_output=True, text=True, errors="replace")
    assert done.returncode != 0 and "WARNING: ThreadSanitizer: data race" in done.stderr, done.stderr[-10000:]
