"""The memory of C++ kernels beside torch's tensors: no map of a head, forward or backward.

tests/ops/test_memory.py counts torch's allocations and sees none of theirs, so here it is the process that is measured.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import vlattn_fast as va
from vlattn_fast import scores as S
from vlattn_fast.measuring.memory import peak_of_call

N, D = 4096, 16
MAP = 4 * N * N  # bytes of one head's
SIZES = {"additive": 1, "hadamard": 1}  # of a head, where it is not D: hidden units take their time
SCORES: dict[str, Any] = {
    "dot": "dot",
    "cosine": S.Cosine(),
    "general": S.General(torch.eye(D), activation="tanh"),
    "additive": S.Additive(torch.ones(1)),
    "hadamard": S.Hadamard(torch.ones(1), activation="tanh"),
}
OTHERS = "relevancy_attention", "relevancy_step", "its gradients", "attention_statistics", "attention_divergence"
INDEXERS = "indexer_divergence", "indexer_divergence of chosen keys"


def attend(kind: str) -> None:
    query, key, value = (torch.randn(1, 2, N, SIZES.get(kind, D), requires_grad=True) for _ in range(3))
    if kind in SCORES:
        outputs: Any = [va.score_attention(query, key, value, score=SCORES[kind], backend="cpu")]
    elif kind == "attention_statistics":
        outputs = va.attention_statistics(query, key, key_groups=torch.arange(N) % 2, num_groups=2, backend="cpu")
        outputs = [x for x in outputs if x.requires_grad]
    elif kind == "attention_divergence":
        outputs = [va.attention_divergence(query, key, value, key, backend="cpu")]
    elif kind in INDEXERS:
        chosen = torch.arange(N)[None, :, None] - torch.arange(64) if "chosen" in kind else None
        indexer = query, key[:, 0], value[..., 0]
        outputs = [va.indexer_divergence(query, key, *indexer, topk_indices=chosen, backend="cpu")]
    elif kind == "relevancy_attention":
        outputs = va.relevancy_attention(query, key, value, torch.zeros(1, 1, N, requires_grad=True), backend="cpu")
    else:
        tensors = [x if "gradients" in kind else x.detach() for x in (query, key, value, value)]
        outputs = [va.relevancy_step(torch.ones(1, 1, N), *tensors, backend="cpu")]
        if "gradients" not in kind:
            return
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


@pytest.mark.skipif("VLATTN_TEST_SANITIZED" in os.environ, reason="a sanitizer has memory of its own")
@pytest.mark.parametrize("kind", (*SCORES, *OTHERS, *INDEXERS))
def test_no_map_of_a_head_is_held(kind: str) -> None:
    attend(kind)  # what is loaded at the first call
    peaks = [peak for peak, _ in (peak_of_call(lambda: attend(kind)) for _ in range(3)) if peak is not None]
    if not peaks:
        pytest.skip("needs Linux's /proc")
    peak = min(peaks)  # what else runs in the process adds to it
    assert peak < MAP / 4, f"{peak / 2**20:.0f} MiB; a map has {MAP / 2**20:.0f}"


KEPT = """
import os, torch, vlattn_fast as va
torch.set_num_threads(1)
x, results = torch.randn(1, 2, 17, 8), []

def calls(count):
    for _ in range(count):
        results.append(va.score_attention(x, x, x, backend="cpu"))
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before = calls(500)
print((calls(4000) - before) / 4000)
"""


@pytest.mark.skipif("VLATTN_TEST_SANITIZED" in os.environ, reason="a sanitizer has memory of its own")
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.slow
def test_kept_results_hold_no_workspace() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4096, f"{done.stdout.strip()} bytes for a result of 1088"
