"""Scores by which tokens are kept or pruned: the attention that each key receives from chosen queries, with the whole map.

The rules are those of the papers and their code (`RULES`):
SnapKV, Li et al., NeurIPS 2024; H2O, Zhang et al., NeurIPS 2023; TOVA, Oren et al., EMNLP 2024; FastV, Chen et al., ECCV 2024;
SparseVLM, Zhang et al., ICML 2025; VisionZip, Yang et al., CVPR 2025.
Shapes: B batch, H heads, N queries, M keys; query (B, H, N, D), key (B, Hkv, M, D).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.checks import (
    check_bool,
    check_choice,
    check_floating,
    check_integer,
    check_tensor,
    check_token_mask,
    describe,
)
from vlattn_fast._ground.tensors import compute_dtype, expand_heads, mask_padding, product, resolve_scale, scaled_dot_default
from vlattn_fast.backends.reference._softmax import attend

Queries = str | int | Tensor
PLACES = ("all", "last", "first")


class Rule(NamedTuple):
    """How a rule makes a score of A = softmax(scale * q k^T + mask)."""

    queries: Queries | None
    """The queries i whose A_ij count: "all", "last", "first", the last W, or bool (B, N). None = the caller has to say."""
    is_sum: bool
    """Whether A_ij is summed over these queries; else their mean is taken."""
    kernel_size: int
    """The keys that are pooled into one, 1 = none."""
    per_head: bool
    """Whether each key head has a score; else the mean over all heads is taken."""
    is_causal: bool
    keeps_window: bool = False
    """Whether the last W tokens, which are the queries, are always kept."""
    keeps_first: bool = False
    """Whether the first token, which is the query, is always kept."""
    recent: int = 0
    """The last tokens that are always kept."""
    pooling: str = "avg"


RULES = {
    "snapkv": Rule(32, is_sum=True, kernel_size=5, per_head=True, is_causal=True, keeps_window=True),
    "h2o": Rule("all", is_sum=True, kernel_size=1, per_head=True, is_causal=True),
    "tova": Rule("last", is_sum=False, kernel_size=1, per_head=False, is_causal=True),
    "fastv": Rule("last", is_sum=False, kernel_size=1, per_head=False, is_causal=True),
    "sparsevlm": Rule(None, is_sum=False, kernel_size=1, per_head=False, is_causal=True),
    "visionzip": Rule("first", is_sum=False, kernel_size=1, per_head=False, is_causal=False, keeps_first=True),
}


def token_scores(
    query: Tensor,
    key: Tensor,
    rule: str = "snapkv",
    *,
    queries: Queries | None = None,
    kernel_size: int | None = None,
    pooling: str = "avg",
    recent: int | None = None,
    per_head: bool | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Computes the formulas of vlattn_fast.token_scores; the same arguments and shapes, without `backend`."""
    how = resolve_rule(query, rule, queries, kernel_size, pooling, recent, per_head, is_causal)
    num_queries = query.shape[2]
    rows = chosen_queries(how, query, key, key_mask)  # (B, N)
    query = query.masked_fill(~rows[:, None, :, None], 0.0)
    (visible_key,) = mask_padding(key_mask, key)
    scores = resolve_scale(scale, scaled_dot_default(query.shape[-1])) * product(
        query, expand_heads(visible_key, query.shape[1]).mT
    )
    if how.is_causal:
        attn_mask = hide_later(attn_mask, slice(0, num_queries), num_queries, key)
    prob, _ = attend(scores, attn_mask, key_mask, False, softcap, sink)  # A (B, H, N, M)
    received = (rows[:, None, :, None] * prob.to(compute_dtype(prob))).sum(2)  # sum_i A_ij over the chosen queries
    if not how.is_sum:
        received = received / rows.sum(1).clamp(min=1)[:, None, None]
    return finish(received, how, rows.shape[1], key, key_mask)


def text_raters(hidden: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """Computes the formula of vlattn_fast.text_raters; the same arguments."""
    check_raters(hidden, image, text)
    image_states, text_states = hidden.masked_fill(~image[..., None], 0.0), hidden.masked_fill(~text[..., None], 0.0)
    prob, _ = attend(product(image_states, text_states.mT)[:, None], key_mask=text)  # softmax over the text (B, 1, N, N)
    relevance = (image[:, None, :, None] * prob.to(compute_dtype(prob))).sum(2)[:, 0] / image.sum(1, keepdim=True).clamp(min=1)
    return above_mean(relevance, text)


# --- what the formulas share with vlattn_fast/ops/token_scores.py ---


def resolve_rule(
    query: Tensor, rule: Any, queries: Any, kernel_size: Any, pooling: Any, recent: Any, per_head: Any, is_causal: Any
) -> Rule:
    """Checks the caller's options and returns the rule with them."""
    check_choice("rule", rule, tuple(RULES))
    how = RULES[rule]._replace(pooling=pooling)
    check_choice("pooling", pooling, ("avg", "max"))
    if queries is not None:
        _check_queries(queries, query)
        how = how._replace(queries=queries)
    if how.queries is None:
        raise ValueError(
            f"queries must be given for rule {rule!r}: its text raters, bool (B, N), as vlattn_fast.text_raters gives; got None"
        )
    if kernel_size is not None:
        check_integer("kernel_size", kernel_size, low=1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that a key has as many neighbours on each side; got {kernel_size}")
        how = how._replace(kernel_size=kernel_size)
    if recent is not None:
        check_integer("recent", recent, low=0)
        how = how._replace(recent=recent)
    elif how.keeps_window and isinstance(how.queries, int):
        how = how._replace(recent=how.queries)
    if per_head is not None:
        check_bool(per_head=per_head)
        how = how._replace(per_head=per_head)
    if is_causal is not None:
        check_bool(is_causal=is_causal)
        how = how._replace(is_causal=is_causal)
    return how._replace(keeps_first=how.keeps_first and isinstance(how.queries, str) and how.queries == "first")


def _check_queries(queries: Any, query: Tensor) -> None:
    if isinstance(queries, Tensor):
        check_token_mask("queries", queries, "query", query, query.shape[2], "(B, N)")
    elif isinstance(queries, str):
        check_choice("queries", queries, PLACES)
    elif isinstance(queries, bool) or not isinstance(queries, int) or queries < 1:
        raise ValueError(
            "queries must be 'all', 'last', 'first', a number of last tokens from 1 on, or bool (B, N); got "
            f"{queries if isinstance(queries, int) else describe(queries)}"
        )
    else:
        check_integer("queries", queries)


def real_queries(query: Tensor, key: Tensor, key_mask: Tensor | None) -> Tensor | None:
    """Returns bool (B, N), the queries of real tokens; None = all, also if there are more than tokens."""
    before = key.shape[2] - query.shape[2]
    return None if key_mask is None or before < 0 else key_mask[:, before:]


def last_of(real: Tensor, count: int) -> Tensor:
    """The last `count` real tokens of bool (B, L)."""
    return real & (real.flip(1).cumsum(1).flip(1) <= count)


def first_of(real: Tensor) -> Tensor:
    return real & (real.cumsum(1) <= 1)


def chosen_queries(how: Rule, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Tensor:
    """bool (B, N): the queries whose attention counts."""
    real = real_queries(query, key, key_mask)
    if real is None:
        real = query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool)
    if isinstance(how.queries, Tensor):
        return how.queries & real
    if how.queries == "all":
        return real
    return first_of(real) if how.queries == "first" else last_of(real, 1 if how.queries == "last" else int(how.queries or 0))


def hide_later(attn_mask: Tensor | None, rows: slice | Tensor, num_queries: int, key: Tensor) -> Tensor:
    """Returns the mask of some of the queries, consecutive ones or (B, R), which hides all keys after each one's position.

    The queries are those of the last N of the M tokens.
    """
    num_keys = key.shape[2]
    before = num_keys - num_queries  # the place of the first query
    if isinstance(rows, slice):
        visible = torch.ones(rows.stop - rows.start, num_keys, dtype=torch.bool, device=key.device).tril(rows.start + before)
    else:
        visible = torch.arange(num_keys, device=key.device) <= (rows + before)[:, None, :, None]
    if attn_mask is None:
        return visible
    return attn_mask & visible if attn_mask.dtype == torch.bool else torch.where(visible, attn_mask, -torch.inf)


def finish(received: Tensor, how: Rule, num_rows: int, key: Tensor, key_mask: Tensor | None) -> Tensor:
    """Returns scores from the attention that each query head gives (B, H, M): pooled over keys, and heads reduced.

    A token that is always kept gets more than any other token can have.
    """
    highest = float(num_rows + 1 if how.is_sum else 2)  # a query gives at most 1
    if key_mask is None:
        first = min(int(how.keeps_first), key.shape[2])
        last = min(how.recent, key.shape[2] - first)
        if first or last:  # pools add zeros next to the others
            received = received[..., first : key.shape[2] - last]
        scores = _head_means(_pooled(received, how), how, key)
        return F.pad(scores, (first, last), value=highest) if first or last else scores
    always = last_of(key_mask, how.recent)
    if how.keeps_first:
        always = always | first_of(key_mask)
    scores = _head_means(_pooled(received.masked_fill(always[:, None], 0.0), how), how, key)
    always, padding = (always[:, None], ~key_mask[:, None]) if how.per_head else (always, ~key_mask)
    return scores.masked_fill(always, highest).masked_fill(padding, 0.0)


def _pooled(received: Tensor, how: Rule) -> Tensor:
    if how.kernel_size == 1 or received.numel() == 0:
        return received
    size, padding_size = how.kernel_size, how.kernel_size // 2
    if how.pooling == "max":
        return F.max_pool1d(received, size, 1, padding_size)
    return F.pad(received, (padding_size, padding_size)).unfold(-1, size, 1).mean(-1)  # a fifth of F.avg_pool1d's time on a CPU


def _head_means(received: Tensor, how: Rule, key: Tensor) -> Tensor:
    """Returns the mean over the query heads of a key head, or over all; 0 if there are none."""
    num_heads, num_key_heads = received.shape[1], key.shape[1]
    if how.per_head and num_heads == num_key_heads:
        return received
    if num_heads == 0:
        scores = received.sum(1)
        return scores[:, None].expand(-1, num_key_heads, -1) if how.per_head else scores
    return received.unflatten(1, (num_key_heads, -1)).mean(2) if how.per_head else received.mean(1)


def check_raters(hidden: Any, image: Any, text: Any) -> None:
    check_tensor("hidden", hidden, rank=3, shape="(B, N, C)")
    check_floating(hidden=hidden)
    for name, mask in (("image", image), ("text", text)):
        if mask is None:
            raise TypeError(f"{name} must be bool (B, N); got None")
        check_token_mask(name, mask, "hidden", hidden, hidden.shape[1], "(B, N)")


def above_mean(relevance: Tensor, text: Tensor) -> Tensor:
    """The text tokens whose relevance is at least the mean over the text, up to rounding: equal ones are all at their mean."""
    mean = relevance.masked_fill(~text, 0.0).sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
    return text & (relevance >= mean * (1 - 64 * torch.finfo(mean.dtype).eps))
