"""One map for all heads of an attention layer: A, or relu(A * dA) of Chefer et al., ICCV 2021, eq. 5, reduced over heads.

Shapes: B batch, H heads, N queries, M keys; query (B, H, N, D), key (B, Hkv, M, D), value (B, Hkv, M, Dv), grad_output
(B, H, N, Dv).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_choice
from vlattn_fast._ground.tensors import compute_dtype, expand_heads, mask_padding, product, resolve_scale, scaled_dot_default
from vlattn_fast.backends.reference._softmax import attend, pair_bias_of

RULES = ("attention", "gradient")
HEAD_REDUCTIONS = ("mean", "max", "min")


def attention_map(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    rule: str = "attention",
    head_reduction: str = "mean",
    row_normalize: bool = False,
    lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    group_bias: Tensor | None = None,
) -> Tensor:
    """Computes the formula of vlattn_fast.attention_map; the same arguments and shapes, without `backend`.

    The log-sum-exp is recomputed; `lse` has no effect.
    """
    check_choice("rule", rule, RULES)
    check_choice("head_reduction", head_reduction, HEAD_REDUCTIONS)
    (key,) = mask_padding(key_mask, key)
    key = expand_heads(key, query.shape[1])
    scale = resolve_scale(scale, scaled_dot_default(query.shape[-1]))
    pair_bias = pair_bias_of(group_bias, query_groups, key_groups)
    per_head, _ = attend(scale * product(query, key.mT), attn_mask, key_mask, is_causal, softcap, sink, pair_bias)  # A
    if rule == "gradient":
        if value is None or grad_output is None:
            raise ValueError("value and grad_output must be given for rule='gradient'; got None")
        (value,) = mask_padding(key_mask, value)
        value = expand_heads(value, query.shape[1])
        per_head = torch.relu(per_head * product(grad_output, value.mT))  # dA = dO V^T
    reductions: dict[str, Callable[..., Tensor]] = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}
    abar = reductions[head_reduction](per_head, 1)
    if row_normalize:
        total = abar.sum(-1, keepdim=True)
        abar = abar / torch.where(total == 0, 1.0, total)  # a zero row stays zero
    return abar.to(compute_dtype(abar))
