"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, which guard every tensor and shared memory on both sides,
and with threads in another order than in the other tests."""

from __future__ import annotations

import subprocess
import sys

from tests.cuda.building import ROOT, SANITIZED, build, sanitizing

CHOSEN = {
    "score_attention": "feature_sizes or empty or grouped",
    "relevancy_attention": "head_dims or empty or number_of_carried_rows or layouts",
    "congruence_loss": "either_side or head_dims or empty or ragged or layouts",
}


def test_nothing_outside_is_touched() -> None:
    """All operators in one process: to load torch with a sanitizer takes longer than the tests of an operator."""
    library = build("asan", *SANITIZED) / "libvlattn_host.so"
    environment = {**sanitizing(), "VLATTN_CUDA_LIBRARY": str(library), "VLATTN_EMULATION_SEED": "3"}
    files = [f"tests/{folder}/test_{operator}.py" for operator in CHOSEN for folder in ("cuda", "ops")]
    chosen = " or ".join(f"test_{operator}.py and ({words})" for operator, words in CHOSEN.items())
    tests = ["-q", "-x", "-p", "no:cacheprovider", *files, "-k", f"cuda and ({chosen})"]
    done = subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
