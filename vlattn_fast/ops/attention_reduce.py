"""Sums of a function of the attention over keys or queries, tile by tile in plain PyTorch: for what no operator has a kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlattn_fast._ground.checks import (
    check_attention,
    check_choice,
    check_device,
    check_head_dim,
    check_masks,
    check_tensor,
    describe,
)
from vlattn_fast._ground.tensors import (
    cast_by_autocast,
    compute_dtype,
    expand_heads,
    mask_padding,
    resolve_scale,
    scaled_dot_default,
    without_autocast,
)
from vlattn_fast.backends.inputs import Attention
from vlattn_fast.backends.streaming._scores import Logits, Tile
from vlattn_fast.backends.streaming._tiles import probabilities


def attention_reduce(
    query: Tensor,
    key: Tensor,
    f: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    over: str = "keys",
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes sum_j f(A_ij, i, j) v_j for queries i, or sum_i f(A_ij, i, j) v_i for keys j; A = softmax(scale q k^T + mask).

    No map is stored: memory in addition to inputs and result is that of a tile, forward and backward; second derivatives keep the
    tiles. For a statistic that `attention_statistics` has, that is faster.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
        >>> va.attention_reduce(query, key, lambda a, i, j: a * (i - j).abs()).shape  # how far each query looks, in tokens
        torch.Size([1, 2, 6])
        >>> va.attention_reduce(query, key, lambda a, i, j: a.square(), over="queries").shape
        torch.Size([1, 2, 6])

    Args:
        query, key: (B, H, N, D) and (B, Hkv, M, D), Hkv = H, or a divisor of H with enable_gqa.
        f: takes a tile A (b, h, n, M), full rows in the dtype of sums, and the numbers i (n, 1) and j (M) of its queries and
            keys, and returns f of each pair, such as `(a > 0.1) * a`. Masked pairs add nothing, whatever f gives. It is called
            again in the backward pass.
        over: "keys" or "queries", what is summed over.
        value: v, (B, Hkv, M, Dv) over keys or (B, H, N, Dv) over queries. Default: 1.
        attn_mask, key_mask, is_causal, scale, enable_gqa: as in score_attention.

    Returns:
        (B, H, N) over keys, (B, H, M) over queries; with a value (B, H, N or M, Dv). float32 (float64 for float64 input).
        Twice differentiable by autograd if f is.

    Raises:
        ValueError, TypeError: if an argument is wrong; the message names it.
    """
    check_choice("over", over, ("keys", "queries"))
    if not callable(f):
        raise TypeError(f"f must be a callable; got {describe(f)}")
    check_attention(query, key, enable_gqa, **({} if value is None or over == "queries" else {"value": value}))
    if value is not None and over == "queries":
        check_tensor("value", value, rank=4, shape="(B, H, N, Dv)")
        check_device("value", value, "query", query)
        if value.dtype != query.dtype or value.shape[:3] != query.shape[:3]:
            raise ValueError(f"value must be {query.dtype} {(*query.shape[:3], 'Dv')}, as query is; got {describe(value)}")
    check_head_dim(query, key)
    check_masks(query, key, attn_mask, key_mask, is_causal)
    query, key, value = cast_by_autocast(query, key, value)
    (key,) = mask_padding(key_mask, key)
    if value is not None and over == "keys":
        value = expand_heads(mask_padding(key_mask, value)[0], query.shape[1])
    scale = resolve_scale(scale, scaled_dot_default(query.shape[-1]))
    logits = Logits(Attention(query, key, None, attn_mask, key_mask, scale=scale, is_causal=is_causal))
    of_queries = over == "keys"
    sizes = query.shape[2] if of_queries else key.shape[2], 1 if value is None else value.shape[3]
    total = query.new_zeros(*query.shape[:2], *sizes, dtype=compute_dtype(query))
    with without_autocast(query):
        for tile in logits.tiles():
            place, part = tile if of_queries else tile[:2], partial(_of_tile, f, logits, tile, value, of_queries)
            total[place] = total[place] + checkpoint(part, use_reentrant=False, preserve_rng_state=False)
    return total if value is not None else total[..., 0]


def _of_tile(f: Callable[..., Tensor], logits: Logits, tile: Tile, value: Tensor | None, of_queries: bool) -> Tensor:
    x, (b, h, i) = logits.of(tile), tile
    places = [torch.arange(*ends, device=x.device) for ends in ((i.start, i.stop), (0, x.shape[3]))]
    masked = torch.isneginf(x)
    a = torch.where(masked, 0.0, probabilities(x, logits.dtype))  # else an infinite slope of f at 0 would be a NaN gradient
    found: Any = f(a, places[0][:, None], places[1])
    shape = found.shape[::-1] if isinstance(found, Tensor) else (0,)
    if len(shape) > 4 or any([size not in (1, of_tile) for size, of_tile in zip(shape, x.shape[::-1], strict=False)]):
        raise ValueError(f"f must return a tensor that broadcasts to A's shape {tuple(x.shape)}; got {describe(found)}")
    found = torch.where(masked, 0.0, found)
    found = found if of_queries else found.mT
    if value is None:
        return found.sum(-1, keepdim=True)
    return found @ (value[b, h] if of_queries else value[tile]).to(found.dtype)
