"""The forward pass of long causal dot products by cuDNN, as torch calls it for scaled_dot_product_attention.

On an H100, with 16,384 tokens and 32 heads of 128 in bfloat16, cuDNN took 3.4 ms and the Triton kernel of then 6.0
(docs/kernels.md). The backward pass only needs out and lse, so it stays ours. cuDNN makes a plan for each new shape,
and each thread keeps its plans. `torch.backends.cuda.enable_cudnn_sdp(False)` turns this off, as it does for
torch's own attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from vlattn_fast._ground.tensors import rows_first
from vlattn_fast.backends.inputs import ScoreAttentionInputs
from vlattn_fast.kernels._configurations import architecture
from vlattn_fast.kernels._tiles import aligned

LONG = 8192  # tokens. Between 704, where both take about the same time forward and backward, and 16,384 nothing was measured
SIZES = range(65, 129)  # of heads, which the Triton kernel pads to 128
MOST = 2**31 - 1  # elements of a tensor
OLDEST = 91501  # 9.15.1: torch prefers no older one on Hopper
attend = getattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", None)  # not a public name


def out_and_lse(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor] | None:
    """out (B, H, N, D), laid out (B, N, H, D), and lse (B, H, N) in float32; None if the Triton kernel runs."""
    # what most calls are not comes first: each call of the Triton backend asks
    if not (_is_plain(inputs) and _on_hopper(inputs.query) and _is_long(inputs)) or attend is None or _version() < OLDEST:
        return None
    query, key, value = aligned(inputs.query), aligned(inputs.key), aligned(inputs.value)
    if not can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, True, False)):  # switched off, or not of these sizes
        return None
    out, lse = attend(query, key, value, None, True, is_causal=True, scale=inputs.scale)[:2]
    return rows_first(out), lse.reshape(query.shape[:3]).contiguous()  # cuDNN has (B, H, N, 1)


def _on_hopper(x: Tensor) -> bool:
    return x.is_cuda and architecture(x.device.index) == "sm_90"


def _version() -> int:
    return torch.backends.cudnn.version() or 0


def _is_plain(inputs: ScoreAttentionInputs) -> bool:
    absent = (inputs.vector, inputs.attn_mask, inputs.key_mask, inputs.row_bias, inputs.seed)
    return inputs.score == "dot" and inputs.is_causal and inputs.scale > 0.0 and all(x is None for x in absent)


def _is_long(inputs: ScoreAttentionInputs) -> bool:
    """Whether sizes and dtype are near those of the measurement."""
    query = inputs.query
    same = query.shape == inputs.key.shape == inputs.value.shape
    in_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    return same and in_16_bits and query.shape[2] >= LONG and query.shape[3] in SIZES and query.numel() <= MOST
