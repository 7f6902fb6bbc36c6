"""The forward pass of plain dot products by cuDNN, as torch calls it for scaled_dot_product_attention, where it is faster.

The line `score_attention cudnn` of _configurations.py says from how many tokens on, by features and for causal calls or others:
`make gpu PARTS=cudnn` measures lengths, and stores what it finds in configurations.json. The backward pass only needs out and
lse, so it stays ours. cuDNN makes a plan for each new shape, and each thread keeps its plans.
`torch.backends.cuda.enable_cudnn_sdp(False)` turns this off, as it does for torch's own attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from vlattn_fast._ground.tensors import rows_first
from vlattn_fast.backends.inputs import ScoreAttentionInputs
from vlattn_fast.kernels._configurations import cached_launch, configuration
from vlattn_fast.kernels._tiles import aligned

MOST = 2**31 - 1  # elements of a tensor
OLDEST = 91501  # 9.15.1: torch prefers no older one on Hopper
attend = getattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", None)  # not a public name


def out_and_lse(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor] | None:
    """out (B, H, N, D), laid out (B, N, H, D), and lse (B, H, N) in float32; None if the Triton kernel runs."""
    # what most calls are not comes first: each call of the Triton backend asks
    if not (_is_plain(inputs) and _on_gpu(inputs.attention.query) and _is_long(inputs)) or attend is None or _version() < OLDEST:
        return None
    x, causal = inputs.attention, inputs.attention.is_causal
    query, key, value = aligned(x.query), aligned(x.key), aligned(inputs.value)
    if not can_use_cudnn_attention(
        SDPAParams(query, key, value, None, 0.0, causal, False)
    ):  # switched off, or not of these sizes
        return None
    out, lse = attend(query, key, value, None, True, is_causal=causal, scale=x.scale)[:2]
    return rows_first(out), lse.reshape(query.shape[:3]).contiguous()  # cuDNN has (B, H, N, 1)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _version() -> int:
    return torch.backends.cudnn.version() or 0


def _is_plain(inputs: ScoreAttentionInputs) -> bool:
    x = inputs.attention
    absent = (x.vector, x.attn_mask, x.key_mask, x.row_bias, inputs.seed)
    return x.score == "dot" and x.scale > 0.0 and all(each is None for each in absent)


def _is_long(inputs: ScoreAttentionInputs) -> bool:
    """Whether cuDNN is faster, by sizes and dtype."""
    query, key, is_causal = inputs.attention.query, inputs.attention.key, inputs.attention.is_causal
    if query.dtype not in (torch.float16, torch.bfloat16) or not query.shape == key.shape == inputs.value.shape:
        return False
    least = _least(is_causal, query.shape[3])
    return least is not None and query.shape[2] >= least and query.numel() <= MOST


@cached_launch
def _least(is_causal: bool, size: int) -> int | None:
    return configuration("score_attention", "cudnn", is_causal=is_causal, size=size).get("FROM")
