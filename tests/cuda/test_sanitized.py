"""The kernels under AddressSanitizer with UndefinedBehaviorSanitizer, which guard every tensor and shared memory on both sides,
and under ThreadSanitizer, which reports what no barrier orders; with threads in another order than in the other tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cuda.building import ROOT, SANITIZED, THREADS, build, changed, run_tests, sanitizing

CHOSEN = {
    "address": {
        "score_attention": "feature_sizes or empty or grouped or blocks_of_keys",
        "relevancy_attention": "head_dims or empty or number_of_carried_rows or layouts or warps or taken_as_it_is",
        "congruence_loss": "either_side or head_dims or empty or ragged or layouts",
    },
    "thread": {  # barriers.py says what reports which barrier
        "score_attention": "feature_sizes or blocks_of_keys",
        "relevancy_attention": "number_of_carried_rows or warps",
        "congruence_loss": "either_side or ragged",
    },
}
BUILDS = {"address": ("asan", *SANITIZED), "thread": ("tsan", *THREADS)}
BARRIER = "__syncthreads();"
# Many carried rows, as in test_number_of_carried_rows, without pytest: to collect tests takes longer than this call.
CALL = """
import torch
import vlattn_fast as va

query, key, value = (torch.randn(1, 2, 20, size, requires_grad=True) for size in (6, 6, 5))
for rows in (4, 64):
    out, carrier = va.relevancy_attention(query, key, value, torch.rand(1, rows, 20, requires_grad=True), backend="cuda")
    (out.sum() + carrier.sum()).backward()
print("to the end")
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
    """One of relevancy_attention's; barriers.py removes each."""
    after = "wait_for_copies<3>();\n            "
    name = "relevancy_attention"
    library = changed(f"{name}.cu", f"{name}.cu", f"{after}{BARRIER}", after, tmp_path, *BUILDS["thread"])
    right, broken = (
        subprocess.run(
            [sys.executable, "-c", CALL],
            cwd=ROOT,
            env=environment("thread", one),
            capture_output=True,
            text=True,
            errors="replace",
        )
        for one in (build(*BUILDS["thread"]) / "libvlattn_host.so", library)
    )
    assert right.returncode == 0 and right.stdout == "to the end\n", right.stderr[-10000:]
    assert broken.returncode != 0 and "WARNING: ThreadSanitizer: data race" in broken.stderr, broken.stderr[-10000:]
