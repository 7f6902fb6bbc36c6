"""The tolerance rule holds with the roundings of a GPU: exp2 and the reciprocal are an ulp off, up or down, and products and sums
are one instruction, as in the other tests (csrc/cuda/host/emulation.h)."""

from __future__ import annotations

import os

from tests.helpers.cuda.building import HOST, build, run_tests

CHOSEN = {
    "score_attention": "any_range or grouped or heads or either_gradient",
    "relevancy_attention": "head_dims or number_of_carried_rows or grouped or masks",
    "congruence_loss": "kinds or head_dims",
}


def test_errors_are_within_the_tolerance() -> None:
    library = build("host", *HOST) / "libvlattn_host.so"
    environment = {**os.environ, "VLATTN_CUDA_LIBRARY": str(library)}
    status, written = run_tests(CHOSEN, environment, "tests.helpers.cuda.noise")
    assert status == 0, written[-10000:]
