"""cuDNN's attention beside ours by length: forward, which the line `score_attention cudnn` of kernels/_configurations.py decides
by, and forward with backward; tiles of our forward pass; and relevancy, on Triton and in CUDA C++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vlattn_fast as va
from tools.gpu import launches
from tools.gpu.full import WITHOUT_CUDNN
from tools.gpu.tiles import label, overridden
from vlattn_fast.ops import OPERATORS

Row = dict[str, Any]
LENGTHS, FEATURES = (1024, 2048, 4096, 8192, 16384), (64, 128)
TOKENS, WIDTH = 16384, 2048  # of all samples, and of all heads
NEVER = 2**31  # tokens: more than a call has
SAVES = 0.03
# by features the two tiles of a forward pass between which estimates decide
TILES = {64: ((128, 64, 8, 3), (64, 64, 4, 3)), 128: ((128, 64, 8, 3), (64, 32, 4, 3))}


class Length(NamedTuple):
    tokens: int
    features: int
    is_causal: bool

    @property
    def item(self) -> str:
        return f"{self.tokens} tokens of {self.features}{', causal' if self.is_causal else ''}"


EVERY = [Length(tokens, features, causal) for features in FEATURES[::-1] for causal in (True, False) for tokens in LENGTHS]


def measured(item: dict[str, Any], device: str) -> Row:
    """Microseconds of both."""
    length = Length(item["tokens"], item["features"], item["is_causal"])
    made = calls(length, device, few=device == "cpu")
    seconds = launches.in_turns([[call] for call in made.values()], device)
    times = {name: round(each * 1e6, 3) for name, each in zip(made, seconds, strict=True)}
    return {"passed": None, **length._asdict(), "timed_by": launches.TIMED_BY[device], "us": times}


def calls(length: Length, device: str, few: bool = False) -> dict[str, Callable[[], Any]]:
    """Both passes by ours and by cuDNN, and of relevancy. few: tokens of one head; torch has no cuDNN for them on a CPU."""
    tokens = length.tokens // 64 if few else length.tokens
    batch, heads = (1, 1) if few else (TOKENS // tokens, WIDTH // length.features)
    shape = (batch, heads, tokens, length.features)
    leaves = [torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    grad = torch.randn_like(leaves[0])

    def ours() -> Tensor:
        out: Tensor = va.score_attention(*leaves, is_causal=length.is_causal, return_lse=True, backend="triton")[0]
        return out

    def cudnn() -> Tensor:
        return F.scaled_dot_product_attention(*leaves, is_causal=length.is_causal)

    def backward(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), leaves, grad)

    by_cudnn = (lambda call: call) if few else sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    both = {"ours": WITHOUT_CUDNN(ours), "cuDNN": by_cudnn(cudnn)}
    made: dict[str, Callable[[], Any]] = {name: torch.no_grad()(call) for name, call in both.items()}
    made |= {f"{name}, forward+backward": backward(call) for name, call in both.items()}
    for sizes in TILES[length.features]:
        tile = dict(zip(("BLOCK_Q", "BLOCK_KV", "num_warps", "num_stages"), sizes, strict=True))
        made[f"ours, {label(tile)}"] = torch.no_grad()(overridden("score_attention forward dot", tile)(both["ours"]))
    carrier, r = (torch.rand(batch, 1, tokens, device=device).requires_grad_(leaf) for leaf in (True, False))

    def relevancy(backend: str) -> Callable[[], Any]:
        def run() -> Any:
            outputs = va.relevancy_attention(*leaves, carrier, is_causal=length.is_causal, backend=backend)
            return torch.autograd.grad(outputs, [*leaves, carrier], [grad, r])

        return run

    arguments = dict(zip(("query", "key", "value", "carrier"), (*leaves, carrier), strict=True), is_causal=length.is_causal)
    runs = [name for name in ("triton", "cuda") if not OPERATORS["relevancy_attention"].refusals(name, arguments)]
    return made | {f"relevancy, {name}, forward+backward": relevancy(name) for name in runs}


def chosen(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Configurations by these rows: from how many tokens on cuDNN's forward pass is faster at each length. Only where all lengths
    are measured."""
    table = {}
    for features in FEATURES:
        for causal in (True, False):
            mine = {row["tokens"]: row["us"] for row in rows if (row["features"], row["is_causal"]) == (features, causal)}
            if mine.keys() == set(LENGTHS):
                loses = [n for n in LENGTHS if mine[n]["cuDNN"] >= (1 - SAVES) * mine[n]["ours"]]
                least = next((n for n in LENGTHS if n > max(loses, default=0)), NEVER)
                table[f"score_attention cudnn {causal} {features}"] = {"FROM": least}
    return table
