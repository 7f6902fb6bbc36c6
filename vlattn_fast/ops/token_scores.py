"""Scores by which tokens are kept or pruned: SnapKV, H2O, TOVA, FastV, SparseVLM, VisionZip, without the map.

Formula: reference/token_scores.py. The attention that keys receive comes from `attention_statistics`, in any of its backends. A
rule that uses a few queries computes only their rows of the map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_attention, check_masks
from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.reference.token_scores import (
    Queries,
    Rule,
    above_mean,
    check_raters,
    chosen_queries,
    finish,
    hide_later,
    real_queries,
    resolve_rule,
)
from vlattn_fast.dispatch.call import AttentionArguments
from vlattn_fast.dispatch.choice import planned
from vlattn_fast.ops._documents import Ids, over_documents
from vlattn_fast.ops.attention_statistics import StatisticsPlan, attention_statistics, make_statistics_plan, statistics_of


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
    document_ids: Ids = None,
    cu_seqlens: Ids = None,
    backend: str = "auto",
) -> Tensor:
    """Computes a score for each key from the attention that it receives, to keep some tokens and prune the others.

    Memory in addition to inputs and result is O(N + M) per head: the map is never stored. A rule that uses a few queries computes
    only their rows of the map; "h2o" and queries="all" compute all pairs.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key = torch.randn(1, 4, 64, 8), torch.randn(1, 2, 64, 8)
        >>> scores = va.token_scores(query, key, "snapkv", queries=8, enable_gqa=True)
        >>> scores.shape, scores.topk(16, dim=-1).indices.shape
        (torch.Size([1, 2, 64]), torch.Size([1, 2, 16]))

    With A = softmax(scale * q k^T + mask), (B, H, N, M), and the tokens in their order:

    - "snapkv" (Li et al., NeurIPS 2024): S_hj = pool_j(sum_i A_hij) over the last W = 32 queries i, the window, for the keys j
      before it, padded with zeros; the mean over 5 neighbours, as in the authors' code. Their LongBench runs use
      kernel_size=7, pooling="max". Tokens of the window are always kept.
    - "h2o" (Zhang et al., NeurIPS 2023): S_hj = sum_i A_hij over all queries. The authors also keep the same number of recent
      tokens: `recent`.
    - "tova" (Oren et al., EMNLP 2024): S_j = mean_h A_hij of the last query i.
    - "fastv" (Chen et al., ECCV 2024): the same of the last query, as in the authors' code; take the scores of the image tokens j
      of layer K - 1. The paper's text says "received from all other tokens": queries="all", the mean over the queries.
    - "sparsevlm" (Zhang et al., ICML 2025): S_j = mean_i mean_h A_hij over the text raters i, which `text_raters` finds:
      queries=raters. Take the scores of the image tokens j.
    - "visionzip" (Yang et al., CVPR 2025): S_j = mean_h A_hij of the first query, CLS, in the last layer but one of a vision
      tower, without a causal mask. CLS is always kept. For a tower without CLS, such as SigLIP: queries="all", the mean attention
      that a token receives. Merging the other tokens into contextual ones is not implemented.

    A token that is always kept scores above all that others can have: 1 more than the number of queries if they are summed, else
    2. A sum over heads, which VisionZip's code has, or a mean over a window, orders tokens in the same way. PyramidKV scores like
    SnapKV, and chooses a number of tokens for each layer.

    Args:
        query: (B, H, N, D), those of the last N of the M tokens. Queries that are not tokens, such as a pooling head's: leave out
            key_mask, and mask padding by attn_mask.
        key: (B, Hkv, M, D), Hkv = H, or a divisor of H with enable_gqa.
        rule: "snapkv", "h2o", "tova", "fastv", "sparsevlm" or "visionzip".
        queries: whose attention counts: "all", "last", "first", the number of last queries, or bool (B, N). Default: the rule's.
        kernel_size: odd, the keys that are pooled into one; 1 = none. Default: 5 for "snapkv", else 1.
        pooling: "avg", which counts the zeros outside of the sequence, or "max".
        recent: number of last tokens that are always kept. Default: the window of "snapkv", else 0.
        per_head: True = a score for each key head, the mean over its query heads; False = the mean over all heads. Default: True
            for "snapkv" and "h2o".
        attn_mask, scale, enable_gqa, softcap, sink, backend: see attention_statistics.
        key_mask: bool (B, M), True = a real token. Others have score 0 and give no attention; "last", "first" and a number of
            last queries count real tokens, so samples of a batch may have any length, with padding on either side.
        document_ids, cu_seqlens: see score_attention.
        is_causal: whether no query attends to a key after its own position, i + M - N. Default: False for "visionzip", else True.

    Returns:
        (B, Hkv, M), or (B, M) if per_head is False; float32, float64 for float64. A query without a visible key gives
        nothing. If a sample has no query that counts, its scores are 0 except for the tokens that are always kept. Differentiable
        once, in query, key and sink.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.
    """
    if document_ids is not None or cu_seqlens is not None or getattr(query, "is_nested", False):
        return over_documents(token_scores, locals(), ["bhk"])
    x = AttentionArguments(query, key, attn_mask, key_mask, False, scale, enable_gqa, softcap, sink, backend=backend)
    plan = planned(_plan, x, rule, queries, kernel_size, pooling, recent, per_head, is_causal)
    how = plan.how if plan.how.queries is not None else plan.how._replace(queries=queries)
    chosen, weight = _with_rows(how, plan.rows, x)
    received, rows = statistics_of(chosen, None, weight, plan.statistics).received, chosen.query.shape[2]
    assert received is not None
    if weight is None and not how.is_sum and rows > 1:
        received = received / rows  # as many in each sample
    return finish(received, how, query.shape[2], key, key_mask)


class Plan(NamedTuple):
    """How a call runs. `how.queries` is None if a tensor names them, since plans are cached. `rows`: the first query that counts,
    and the one after the last; None if a mask of tokens chooses them. A slice would be a constant to torch.compile."""

    how: Rule
    rows: tuple[int, int] | None
    statistics: StatisticsPlan


def _plan(x: AttentionArguments, *choices: Any) -> Plan:
    check_attention(x.query, x.key, x.enable_gqa)
    how = resolve_rule(x.query, *choices)
    check_masks(x.query, x.key, x.attn_mask, x.key_mask, how.is_causal)
    names_mask, rows = isinstance(how.queries, Tensor), None
    if not names_mask and real_queries(x.query, x.key, x.key_mask) is None:
        num_queries, few = x.query.shape[2], _fewest(how, x.query)
        rows = (0, few) if how.queries == "first" else (num_queries - few, num_queries)
    chosen, weight = _with_rows(how, rows, x)
    statistics = make_statistics_plan(chosen, "received", None, weight)
    return Plan(how._replace(queries=None) if names_mask else how, rows, statistics)


def text_raters(hidden: Tensor, image: Tensor, text: Tensor, *, backend: str = "auto") -> Tensor:
    """Finds the text tokens that rate image tokens in SparseVLM: those close to the image.

    Returns a mask for token_scores(rule="sparsevlm", queries=...). Cost and memory are those of one attention_statistics
    call with a single head over all tokens.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> is_image = torch.tensor([[True] * 6 + [False] * 4])
        >>> raters = va.text_raters(torch.randn(1, 10, 16), is_image, ~is_image)
        >>> bool((raters & is_image).any()), bool(raters.any())
        (False, True)

    R_j = mean over the image tokens v of softmax_j(h_v . h_j), j over the text tokens, without a scale; the raters are those with
    R_j at least the mean of R. The authors' code takes those above the mean, and so none if all are equal. It uses the states
    before the first layer, and takes the text after the image.

    Args:
        hidden: (B, N, C) the states of all tokens.
        image, text: bool (B, N), the image tokens, and the text tokens from which raters are chosen.
        backend: see attention_statistics.

    Returns:
        bool (B, N).

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.

    Reference: Zhang et al., "SparseVLM", ICML 2025, section 3.2.
    """
    check_raters(hidden, image, text)
    states = hidden.detach().masked_fill(~(image | text)[..., None], 0.0)[:, None]
    weight = image / image.sum(1, keepdim=True).clamp(min=1)
    statistics = attention_statistics(
        states, states, statistics=["received"], row_weight=weight, key_mask=text, scale=1.0, backend=backend
    )
    return above_mean(statistics.received[:, 0], text)


def _with_rows(how: Rule, rows: tuple[int, int] | None, x: AttentionArguments) -> tuple[AttentionArguments, Tensor | None]:
    """Returns the arguments of attention_statistics for the queries that count, and their weights. `rows`: see `Plan`."""
    query, weight = x.query, None
    positions: slice | Tensor
    if rows is None:
        query, weight, positions = _chosen_rows(how, x)
    else:
        (first, end), positions = rows, slice(*rows)
        if end - first < query.shape[2]:
            query = query[:, :, positions]
    mask, is_causal = _mask(how, x.attn_mask, x.query, x.key, positions)
    return x._replace(query=query, attn_mask=mask, is_causal=is_causal), weight


def _fewest(how: Rule, query: Tensor) -> int:
    """Returns how many queries of a sample count at most."""
    count = {"last": 1, "first": 1}.get(how.queries) if isinstance(how.queries, str) else how.queries
    return min(count, query.shape[2]) if isinstance(count, int) else query.shape[2]


def _chosen_rows(how: Rule, x: AttentionArguments) -> tuple[Tensor, Tensor, slice | Tensor]:
    """Returns the queries (B, H, R, D) that are computed, their weights (B, R), and their positions: all, or those of (B, R)."""
    query, num_queries, few = x.query, x.query.shape[2], _fewest(how, x.query)
    chosen = chosen_queries(how, query, x.key, x.key_mask)
    rows: slice | Tensor = slice(0, num_queries)
    if few < num_queries:  # the positions of the chosen queries, in their order; -1 if a sample has fewer
        index = torch.where(chosen, torch.arange(num_queries, device=query.device), -1).topk(few, 1).values.flip(1)
        chosen, rows = index >= 0, (picked := index.clamp(min=0))
        query = torch.take_along_dim(query, picked[:, None, :, None], 2)
    weight = chosen.to(compute_dtype(query))
    if not how.is_sum:
        weight = weight / chosen.sum(1, keepdim=True).clamp(min=1)
    return query.masked_fill(~chosen[:, None, :, None], 0.0), weight, rows


def _mask(how: Rule, attn_mask: Tensor | None, query: Tensor, key: Tensor, rows: slice | Tensor) -> tuple[Tensor | None, bool]:
    """Returns the mask of these queries, and whether SDPA's flag is_causal replaces a mask of later keys."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    has_all_rows = isinstance(rows, slice) and rows.stop - rows.start == num_queries
    if attn_mask is not None and attn_mask.dim() > 1 and attn_mask.shape[-2] > 1 and not has_all_rows:
        if isinstance(rows, slice):
            attn_mask = attn_mask[..., rows, :]
        else:
            attn_mask = torch.take_along_dim(attn_mask[(None,) * (4 - attn_mask.dim())], rows[:, None, :, None], 2)
    if not how.is_causal or how.queries == "last":  # the last query attends to all
        return attn_mask, False
    if has_all_rows and num_queries == num_keys:
        return attn_mask, True
    return hide_later(attn_mask, rows, num_queries, key), False
