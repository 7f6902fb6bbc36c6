"""The tolerance rule holds with the roundings of a GPU: products and sums are one instruction, and exp2 and the reciprocal are an
ulp off, up or down (csrc/cuda/host/emulation.h)."""

from __future__ import annotations

import os

from tests.helpers.cuda.building import CONTRACTED, build, run_tests

CHOSEN = {
    "score_attention": "any_range or grouped or heads or either_gradient",
    "relevancy_attention": "head_dims or number_of_carried_rows or grouped or masks",
    "congruence_loss": "kinds or head_dims",
}


def test_errors_are_within_the_tolerance() -> None:
    library = build(*CONTRACTED) / "libvlattn_host.so"
    environment = {**os.environ, "VLATTN_CUDA_LIBRARY": str(library)}
    status, written = run_tests(CHOSEN, environment, "tests.helpers.cuda.noise")
    assert status == 0, written[-10000:]
