"""The forward pass of long causal dot products by cuDNN, as torch calls it for scaled_dot_product_attention.

On an H100, with 16,384 tokens and 32 heads of 128, cuDNN took 3.4 ms where the Triton kernel took 6.0. With LLaVA's 704 tokens
both took about the same (docs/kernels.md). The backward pass needs out and lse alone, so it stays ours.
`torch.backends.cuda.enable_cudnn_sdp(False)` turns this off, as it does for torch's own attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from vlattn_fast._ground.tensors import empty_rows_first
from vlattn_fast.backends.inputs import ScoreAttentionInputs
from vlattn_fast.kernels._configurations import architecture

LONG = 4096  # tokens; between 704 and 16,384 nothing was measured
SIZES = range(65, 129)  # of heads
MOST = 2**31 - 1  # elements of a tensor
attend = torch.ops.aten._scaled_dot_product_cudnn_attention


def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor] | None:
    """out (B, H, N, D), laid out (B, N, H, D), and lse (B, H, N) in float32; None where the Triton kernel runs."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if not (_on_hopper(query) and _is_plain(inputs) and _is_measured(query, key, value)):
        return None
    if not can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, True, False)):  # switched off, or not built for it
        return None
    out, lse = attend(query, key, value, None, True, is_causal=True, scale=inputs.scale)[:2]
    result = empty_rows_first(query, query.shape[1], query.shape[2], value.shape[3])
    result = out if out.stride() == result.stride() else result.copy_(out)
    return result, lse.reshape(query.shape[:3]).contiguous()  # cuDNN has (B, H, N, 1)


def _on_hopper(x: Tensor) -> bool:
    return x.is_cuda and architecture(x.device.index) == "sm_90"


def _is_plain(inputs: ScoreAttentionInputs) -> bool:
    absent = (inputs.vector, inputs.attn_mask, inputs.key_mask, inputs.row_bias, inputs.seed)
    return inputs.score == "dot" and inputs.is_causal and inputs.scale > 0.0 and all(x is None for x in absent)


def _is_measured(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether sizes and dtype are like those of the measurement."""
    same = query.shape == key.shape == value.shape
    in_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    return same and in_16_bits and query.shape[2] >= LONG and query.shape[3] in SIZES and query.numel() <= MOST
