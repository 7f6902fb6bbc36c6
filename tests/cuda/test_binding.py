"""What csrc/cuda/binding.cpp says when a launch fails, and the way to the library by VLATTN_CUDA_LIBRARY."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda.building import ROOT
from vlattn_fast.cuda import _shared_library


def test_a_failed_launch_names_kernel_sizes_and_device() -> None:
    """More shared memory than there is: what the public call refuses beforehand."""
    x, carrier = torch.zeros(2, 1, 500, 100), torch.zeros(2, 1, 500)
    operators = _shared_library.operators()
    with pytest.raises(RuntimeError, match=re.escape("relevancy_attention(B=2, H=1, N=500, M=500, D=100, DV=100, T=0) on ")):
        operators.relevancy_attention(x, x, x, carrier, None, None, None, None, "gradient", False, 0.1, False)
    x = x[:, :, :5]
    out, _, lse = operators.relevancy_attention(x, x, x, carrier, None, None, None, None, "gradient", False, 0.1, False)
    assert (out == 0).all() and torch.isfinite(lse).all()  # what comes after it runs


def test_it_refuses_what_it_has_no_kernel_for() -> None:
    x = torch.zeros(1, 1, 4, 8)
    operators = _shared_library.operators()
    for score, dropout_p in (("dot", 0.0), ("additive", 0.5)):
        with pytest.raises(RuntimeError, match="additive scores without dropout"):
            operators.score_attention(x, x, x, torch.zeros(1, 8), None, None, None, score, 0.0, 1.0, dropout_p, False)
    with pytest.raises(RuntimeError, match="float16, bfloat16 and float32"):
        operators.congruence_loss([x.double()] * 4, [x.double()] * 4, None, None, "cacr", "both", 1.0)


@pytest.mark.skipif(os.environ.get("VLATTN_TEST_DEVICE", "cpu") != "cpu", reason="of the library for the CPU")
def test_the_command_takes_the_library_that_is_named(cuda_library: Path) -> None:
    environment = {**os.environ, "VLATTN_CUDA_LIBRARY": str(cuda_library)}

    def vlattn(*words: str) -> str:
        code = "from vlattn_fast.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = vlattn("verify", "congruence_loss", "--backend", "cuda", "--dtype", "float32")
    assert re.search(r"^congruence_loss +cuda +float32 +[1-9]", said, re.M), said
    assert f"the worst again: VLATTN_CUDA_LIBRARY={cuda_library} vlattn verify congruence_loss --backend cuda" in said
    assert f"{cuda_library}, named by VLATTN_CUDA_LIBRARY" in vlattn("info")
