"""Statistics of the rows of A = softmax(scale * q k^T + mask) for probes and losses, without the map (VALUE, ECCV 2020).

Formula: reference/attention_statistics.py. O(N + M) memory: streaming/attention_statistics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast import kernels
from vlattn_fast._ground.checks import (
    FLOAT_DTYPES,
    check_attention,
    check_head_dim,
    check_integer,
    check_names,
    check_tensor,
    describe,
    is_differentiated,
    is_dtensor,
)
from vlattn_fast._ground.tensors import as_dtype, compute_dtype, expand_heads, mask_padding, masked_logits, without_autocast
from vlattn_fast.backends import reference
from vlattn_fast.backends.cpu import attention_statistics as cpu
from vlattn_fast.backends.inputs import AttentionStatisticsBackwardInputs, AttentionStatisticsInputs, named
from vlattn_fast.backends.reference.attention_statistics import AttentionStatistics, LogitStatistics, chosen_statistics
from vlattn_fast.backends.streaming import attention_statistics as streaming
from vlattn_fast.dispatch import choice
from vlattn_fast.dispatch.call import AttentionArguments, CallShape, call_shape
from vlattn_fast.dispatch.choice import gradients, load, planned
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import table
from vlattn_fast.ops._derivatives import Derivatives
from vlattn_fast.ops._documents import Ids, over_documents
from vlattn_fast.ops._groups import check_rows, check_token_groups, group_bias_inputs, resolve_groups
from vlattn_fast.ops._shards import Local, Shards, over_shards
from vlattn_fast.ops._sinks import lse_with_sink, share_of_keys
from vlattn_fast.ops._stages import DotPlan, attention_of, by_formula, cast, check_logits, logit_flags, make_plan, without_padding
from vlattn_fast.ops.score_attention import attention_lse, attention_with_lse

BACKENDS = table(
    streaming,
    cpu=cpu,
    triton=lambda: kernels.attention_statistics,
    saves={"cpu": ("argmax",), "triton": ("mass", "maximum", "row_max", "mean_x")},
)
DEFAULT = AttentionStatistics._fields
BY_PLACE = "diagonal", "distance"
_LARGEST = "maximum", "argmax"
OUTPUTS = (*DEFAULT, "max_logit", "row_max", "mean_x")  # of the operator; the last two are numbers for a backend's backward pass


def _on_shards(call: Callable[..., AttentionStatistics], shards: Shards, x: Local) -> AttentionStatistics:
    groups = x["key_groups"]
    counts = x["num_groups"] is None and x["group_bias"] is None
    if counts and isinstance(groups, Tensor) and groups.ndim == 2 and "batch" in shards.kinds:
        raise ValueError("num_groups must be given if key_groups is sharded over the batch; got None")
    return call(**x)


_DIMENSIONS = ["bhqg", "bhq", "bhq", "bhq:k", "bhk", "bhq", "bhq", "bhq", "bhq"]  # of LogitStatistics


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    statistics: Sequence[str] | None = None,
    key_groups: Tensor | None = None,
    num_groups: int | None = None,
    row_weight: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
    query_groups: Tensor | None = None,
    group_bias: Tensor | None = None,
    document_ids: Ids = None,
    cu_seqlens: Ids = None,
    backend: str = "auto",
) -> AttentionStatistics:
    """Computes the mass per group of keys, entropy, largest weight and received attention of A = softmax(scale * q k^T + mask).

    Memory in addition to inputs and results is O(N + M) per head: A is never stored, and the backward pass recomputes it tile by
    tile. Name only the `statistics` that you use: on a GPU "received" takes a second pass over the keys. A sink takes one more.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
        >>> text_or_image = torch.tensor([0, 0, 0, 1, 1, 1, -1])
        >>> statistics = va.attention_statistics(query, key, key_groups=text_or_image, num_groups=2)
        >>> statistics.mass.shape, statistics.entropy.shape, statistics.received.shape
        (torch.Size([1, 2, 5, 2]), torch.Size([1, 2, 5]), torch.Size([1, 2, 7]))

    Args:
        query: (B, H, N, D) float16, bfloat16, float32 or float64.
        key: (B, Hkv, M, D), Hkv = H, or a divisor of H with enable_gqa.
        statistics: some of "mass", "entropy", "maximum", "argmax", "received", "max_logit", "lse", "diagonal" and "distance".
            Default: the first five. The others are None in the result. Naming "mass" requires key_groups.
        key_groups: int64 (M) or (B, M), the group of each key, -1 = no group. Used by `mass` and by group_bias.
        num_groups: G. Pass it on a GPU: then the call does not wait for the device to tell the values of key_groups, and
            out-of-range indices mean "no group", which also holds under torch.compile and CUDA graph capture. Otherwise they
            raise ValueError. Default: that of group_bias, or the largest value of key_groups + 1; 0 without key_groups.
        row_weight: (N) or (B, N) floating point, the weight of each query in `received`. Default: 1.
        attn_mask, key_mask, is_causal, scale, enable_gqa, softcap, sink, query_groups, group_bias: see score_attention. scale
            defaults to 1/sqrt(D).
        document_ids, cu_seqlens: see score_attention.
        backend: "auto", "reference", "streaming", "cpu" or "triton".

    Returns:
        AttentionStatistics(mass (B, H, N, G), entropy (B, H, N) in nats, maximum (B, H, N), argmax (B, H, N),
        received (B, H, M)); None for each that `statistics` does not name. If it names one of the others, LogitStatistics with
        max_logit, lse, diagonal (A_ii, 0 for i >= M) and distance (sum_j A_ij |i - j|, in tokens), all (B, H, N), in addition. A
        query without a visible key has mass, entropy, maximum, diagonal and distance 0, argmax -1, max_logit -inf, lse -inf (or
        the sink) and zero gradients. With a sink, the weights of a query sum to less than 1, and all statistics are of the
        weights on the keys: `mass` over all keys is their share, and `entropy` is -sum_j A_ij log A_ij. "distance" takes
        two calls of `score_attention` in float32 or wider, one if the call is causal.

    Twice differentiable, in query, key, row_weight, sink and group_bias, except argmax, max_logit and lse (`score_attention`
    returns an lse with a gradient). For a causal map, received_i / (N - i) - A_ii is an eigenvalue of the Laplacian of its graph.
    Do not edit mass and maximum in place: the backward pass of the Triton kernels uses them. Training that bounds its logits
    (QK-clip, vlattn_fast.nn.QKClip) uses `max_logit`.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.

    Reference: Cao et al., "Behind the Scene", ECCV 2020 (VALUE). With the tokens of each modality as a
    group, mass gives their modality importance and their cross-modal heads; maximum and argmax give their linked tokens.
    """
    if document_ids is not None or cu_seqlens is not None or getattr(query, "is_nested", False):
        if num_groups is None and key_groups is not None and group_bias is None:
            num_groups = resolve_groups(key_groups.values() if key_groups.is_nested else key_groups, None)
        return over_documents(attention_statistics, locals(), _DIMENSIONS)
    if is_dtensor(query):
        return over_shards(attention_statistics, locals(), _DIMENSIONS, _on_shards)
    if statistics is not None:
        statistics = check_statistics(statistics, key_groups, num_groups, LogitStatistics._fields)
    groups = query_groups, key_groups, group_bias
    x = AttentionArguments(query, key, attn_mask, key_mask, is_causal, scale, enable_gqa, softcap, sink, *groups, backend)
    plan = planned(make_statistics_plan, x, " ".join(DEFAULT if statistics is None else statistics), num_groups, row_weight)
    return statistics_of(x, num_groups, row_weight, plan)


class StatisticsPlan(NamedTuple):
    """How a call runs. `outputs`: the names of what the call or its backward pass needs; `asked`: those that it returns."""

    dot: DotPlan
    asked: list[str]
    outputs: str


class Features(NamedTuple):
    """The operator's inputs, the sink's logit (H, 1) and the share (B, H, N) that it leaves the keys."""

    inputs: AttentionStatisticsInputs
    logit: Tensor | None
    share: Tensor | None


def _describe(x: AttentionArguments, statistics: Any, num_groups: int | None, row_weight: Tensor | None) -> CallShape:
    """Checks a call, and returns its metadata."""
    if statistics is not None:
        check_statistics(statistics, x.key_groups, num_groups, LogitStatistics._fields)
    check_attention(x.query, x.key, x.enable_gqa)
    check_head_dim(x.query, x.key)
    has_bias = x.group_bias is not None or x.query_groups is not None
    check_logits(x if has_bias else x._replace(key_groups=None))  # which need no bias here
    if x.key_groups is not None:
        check_token_groups("key_groups", x.key_groups, x.query, x.key.shape[2], "M")
    check_num_groups(num_groups, x.key_groups)
    if num_groups is not None and x.group_bias is not None and num_groups != x.group_bias.shape[-1]:
        raise ValueError(
            f"num_groups must be None or group_bias's number of groups of keys, {x.group_bias.shape[-1]}; got {num_groups}"
        )
    if row_weight is not None:
        _check_row_weight(row_weight, x.query)
    sizes = {"queries": x.query.shape[2], "keys": x.key.shape[2], "head_dim": x.query.shape[3]}
    flags = {"key_groups": x.key_groups is not None, "row_weight": row_weight is not None}
    return call_shape("attention_statistics", x.query, sizes, {**flags, **logit_flags(x)})


def make_statistics_plan(
    x: AttentionArguments, statistics: str, num_groups: int | None, row_weight: Tensor | None
) -> StatisticsPlan:
    """Plans a call whose `statistics` are checked: names with spaces between them."""
    backend = choice.select(BACKENDS, _describe(x, None, num_groups, row_weight), x.backend)
    asked = statistics.split()
    needed, leaves = [*asked], (x.query, x.key, row_weight, x.group_bias, x.sink if "received" in asked else None)
    if "lse" in asked:
        needed += ["max_logit", "maximum"]
    if "diagonal" in asked:
        needed += ["maximum", "argmax"]
    if is_differentiated(*leaves) and {*needed} & {*OUTPUTS}:
        needed += BACKENDS[backend].saves
        if "maximum" in asked:
            needed.append("argmax")  # its gradient goes there
    dot = make_plan(BACKENDS, backend, x.query, x.scale, x.softcap)
    return StatisticsPlan(dot, asked, " ".join([name for name in OUTPUTS if name in needed]))


def statistics_of(
    x: AttentionArguments, num_groups: int | None, row_weight: Tensor | None, plan: StatisticsPlan
) -> AttentionStatistics:
    """The statistics of a call that is checked and planned."""
    num_groups = resolve_groups(x.key_groups, num_groups if x.group_bias is None else x.group_bias.shape[-1])
    if plan.dot.backend == "reference":
        options = {"statistics": plan.asked, "num_groups": num_groups, "row_weight": row_weight}
        return by_formula(reference.attention_statistics, x, plan.dot.scale, **options)
    features = _features(x, num_groups, row_weight, plan)
    outputs = dict(zip(OUTPUTS, _derivatives.forward(features.inputs) if plan.outputs else (None,) * len(OUTPUTS), strict=True))
    (x,) = cast(x)
    if "diagonal" in plan.asked:
        outputs["diagonal"] = _diagonal(x, plan.dot, outputs["maximum"], outputs["argmax"])
    if "distance" in plan.asked:
        outputs["distance"] = _distance(x, plan.dot)
    return _finish(outputs, features, plan.asked)


def _features(x: AttentionArguments, num_groups: int, weight: Tensor | None, plan: StatisticsPlan) -> Features:
    logit = None if x.sink is None else x.sink[:, None]
    share = (
        None if logit is None or not {*plan.asked} & {*DEFAULT, *BY_PLACE} else share_of_keys(attention_lse(x, plan.dot), logit)
    )
    (x,) = cast(*without_padding(x, plan.dot))
    groups = None if x.key_groups is None else x.key_groups.expand(x.key.shape[0], -1)
    attention = attention_of(x, plan.dot, groups)
    if weight is not None:
        weight = weight.to(compute_dtype(x.query)).expand(x.query.shape[0], -1)[:, None].expand(x.query.shape[:3])
    if share is not None:
        share = as_dtype(share, compute_dtype(x.query))
        if "received" in plan.asked:
            weight = share if weight is None else weight * share
    if "mass" not in plan.asked:
        num_groups = 0
    row_weight, statistics = weight, plan.outputs
    return Features(AttentionStatisticsInputs(attention, row_weight, num_groups, statistics, plan.dot.backend), logit, share)


def _diagonal(x: AttentionArguments, plan: DotPlan, maximum: Tensor, argmax: Tensor) -> Tensor:
    """Returns A_ii (B, H, N) without the sink's share: the largest weight times e to the difference of the two logits, which both
    have what is common to a row. A log-sum-exp, which is rounded with it, is taken for derivatives alone."""
    queries, tokens = x.query.shape[2], min(x.query.shape[2], x.key.shape[2])
    if tokens == 0:
        return torch.zeros_like(maximum)
    diagonal = _logits_at(x, plan, torch.arange(tokens, device=x.query.device).expand(*x.query.shape[:2], -1))
    top = _logits_at(x, plan, argmax[:, :, :tokens].clamp(0, x.key.shape[2] - 1)).detach()
    visible = ~torch.isneginf(diagonal)
    less = (diagonal.detach() - torch.where(visible, top, 0.0)).clamp(max=0.0).exp()
    weight = torch.where(visible, maximum.detach()[:, :, :tokens] * less.to(maximum.dtype), 0.0)
    if is_differentiated(x.query, x.key, x.group_bias):
        log = torch.where(visible, diagonal - attention_lse(x, plan)[:, :, :tokens], 0.0)
        weight = weight * (log - log.detach()).exp().to(weight.dtype)
    return F.pad(weight, (0, queries - tokens))


def _distance(x: AttentionArguments, plan: DotPlan) -> Tensor:
    """Returns sum_j A_ij |i - j| (B, H, N) without the sink's share."""
    dtype = compute_dtype(x.query)
    x = x._replace(query=x.query.to(dtype), key=x.key.to(dtype), sink=None)  # 16 bits do not hold the places of tokens
    with without_autocast(x.query):
        signed, lse = _mean_distance(x, plan)
        visible = ~torch.isneginf(lse)
        distance = torch.where(visible, signed, 0.0)
        if not x.is_causal:  # |i - j| = 2 max(i - j, 0) - (i - j): the keys up to the query count twice
            before, lse_before = _mean_distance(x._replace(is_causal=True), plan)
            distance = 2.0 * _share_before(x, plan, lse_before, lse) * before - distance
    return distance


def _share_before(x: AttentionArguments, plan: DotPlan, lse_before: Tensor, lse: Tensor) -> Tensor:
    """Returns what the keys up to a query get of its attention, (B, H, N). As in `_diagonal`, the two log-sum-exps are taken for
    derivatives alone: the value is made of the largest weights of both calls, and of the logits that these have."""
    largest, logits = [], []
    for each in (x._replace(is_causal=True), x):
        detached = AttentionArguments(each.query.detach(), each.key.detach(), *each[2:])
        found = attention_statistics(**detached._asdict() | {"scale": plan.scale, "backend": plan.backend}, statistics=_LARGEST)
        largest.append(found.maximum.detach())
        logits.append(_logits_at(each, plan, found.argmax.clamp(0, x.key.shape[2] - 1)).detach())
    visible = largest[0] > 0
    share = largest[1] / torch.where(visible, largest[0], 1.0) * torch.where(visible, logits[0] - logits[1], -torch.inf).exp()
    if is_differentiated(x.query, x.key, x.group_bias):
        log = torch.where(visible, lse_before - torch.where(visible, lse, 0.0), 0.0)
        share = share * (log - log.detach()).exp()
    return share.to(largest[0].dtype)


def _logits_at(x: AttentionArguments, plan: DotPlan, places: Tensor) -> Tensor:
    """Returns the logits (B, H, n) of the first n queries, each with the key of its place in int64 (B, H, n)."""
    (key,) = mask_padding(x.key_mask, x.key)
    count, dtype, (batch, heads) = places.shape[2], compute_dtype(x.query), places.shape[:2]
    every = places[..., None].expand(-1, -1, -1, key.shape[3])  # take_along_dim would fix the sizes of graphs
    key = expand_heads(key, heads).gather(2, every)
    score = plan.scale * (x.query[:, :, :count].to(dtype) * key.to(dtype)).sum(-1, keepdim=True)
    if x.softcap is not None:
        score = x.softcap * torch.tanh(score / x.softcap)
    mask, bias = x.attn_mask, None
    if mask is not None:
        mask = mask.expand(batch, heads, x.query.shape[2], x.key.shape[2])[:, :, :count].gather(3, places[..., None])
    rows, groups = group_bias_inputs(x.query, x.query_groups, x.key_groups, x.group_bias)
    if rows is not None and groups is not None:
        of_key = groups[:, None].expand(-1, heads, -1).gather(2, places)[..., None]
        bias = rows.expand(batch, -1, -1, -1)[:, :, :count].gather(3, of_key.clamp(0, rows.shape[3] - 1))
        bias = torch.where((of_key >= 0) & (of_key < rows.shape[3]), bias, 0.0)
    logits = masked_logits(score, mask, None, None, bias)[..., 0]
    if x.key_mask is None:
        return logits
    return torch.where(x.key_mask[:, None].expand(-1, heads, -1).gather(2, places), logits, -torch.inf)


def _mean_distance(x: AttentionArguments, plan: DotPlan) -> tuple[Tensor, Tensor]:
    """Returns i less the mean place of the keys that query i attends to, and the log-sum-exp of its logits, both (B, H, N)."""
    of_keys, of_queries = (torch.arange(y.shape[2], device=y.device, dtype=y.dtype) for y in (x.key, x.query))
    mean, lse = attention_with_lse(x, plan, of_keys[:, None].expand(*x.key.shape[:3], 1))
    return of_queries - mean[..., 0], lse


def _finish(outputs: dict[str, Any], features: Features, asked: list[str]) -> AttentionStatistics:
    """Returns the statistics with a sink, from those of the softmax over only the keys and the share that the sink leaves them.
    `received` has the share in the weights of its queries."""
    if "lse" in asked:
        outputs["lse"] = _lse(outputs, features.logit)
    values = chosen_statistics([outputs.get(name) for name in LogitStatistics._fields], asked)
    share = features.share
    if share is None:
        return values
    entropy, argmax = values.entropy, values.argmax
    if entropy is not None:  # -sum s P log(s P); the bound keeps 0 log 0 and its gradient finite
        entropy = share * (entropy - share.clamp(min=torch.finfo(share.dtype).tiny).log())
    scaled = {name: x * share for name in ("maximum", *BY_PLACE) if (x := getattr(values, name, None)) is not None}
    return values._replace(
        mass=values.mass if values.mass is None else values.mass * share[..., None],
        entropy=entropy,
        argmax=argmax if argmax is None else torch.where(share == 0, -1, argmax),
        **scaled,
    )


def _lse(outputs: dict[str, Any], logit: Tensor | None) -> Tensor:
    """Returns the log-sum-exp (B, H, N): a query's largest weight is exp(max_logit - lse) before a sink takes its share."""
    max_logit, maximum = outputs["max_logit"].detach(), outputs["maximum"].detach()
    lse = torch.where(torch.isneginf(max_logit), max_logit, max_logit - maximum.log())
    return lse if logit is None else lse_with_sink(lse, logit.detach())


def check_num_groups(num_groups: Any, key_groups: Tensor | None) -> None:
    if num_groups is not None:
        check_integer("num_groups", num_groups, low=0)
        if key_groups is None and num_groups > 0:
            raise ValueError(f"num_groups must be 0 or None if key_groups is not given; got {num_groups}")


def check_statistics(statistics: Any, key_groups: Any, num_groups: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Returns the statistics to compute, some of these `names`."""
    asked = check_names("statistics", statistics, names)
    if "mass" in asked and key_groups is None and num_groups is None:
        raise ValueError("key_groups must be given if statistics names 'mass', which would be empty without; got None")
    return asked


def _check_row_weight(weight: Any, query: Tensor) -> None:
    check_tensor("row_weight", weight, shape="(N) or (B, N)")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"row_weight must be float16, bfloat16, float32 or float64; got {describe(weight)}")
    check_rows("row_weight", weight, query, query.shape[2], "N")


def _forward(inputs: AttentionStatisticsInputs) -> tuple[Tensor | None, ...]:
    asked = inputs.statistics.split()
    outputs = load(BACKENDS, inputs.backend).forward(inputs)
    return tuple([x if name in asked else None for name, x in zip(OUTPUTS, outputs, strict=True)])


def _forward_fake(inputs: AttentionStatisticsInputs) -> tuple[Tensor | None, ...]:
    query, asked = inputs.attention.query, inputs.statistics.split()
    per_row, dtypes = query.shape[:3], {"argmax": torch.int64}
    shapes = {"mass": (*per_row, inputs.num_groups), "received": (*per_row[:2], inputs.attention.key.shape[2])}
    return tuple(
        query.new_empty(shapes.get(name, per_row), dtype=dtypes.get(name, compute_dtype(query))) if name in asked else None
        for name in OUTPUTS
    )


_FIELDS = "query", "key", "row_weight", "row_bias"


def _backward(inputs: AttentionStatisticsBackwardInputs) -> tuple[Tensor | None, ...]:
    if inputs.attention.query.shape[1] == 0:  # no kernel handles keys that no query head shares
        x = named(inputs)
        return tuple([None if x[field] is None else x[field].new_zeros(x[field].shape) for field in _FIELDS])
    gradients: tuple[Tensor | None, ...] = load(BACKENDS, inputs.backend).backward(inputs)
    return gradients


def _setup_context(ctx: Any, inputs: AttentionStatisticsInputs, output: tuple[Tensor, ...]) -> None:
    mass, _, maximum, argmax, _, *constants = output
    ctx.mark_non_differentiable(*[x for x in (argmax, *constants) if x is not None])
    if "mass" in BACKENDS[inputs.backend].saves:
        _derivatives.saved.save(ctx, inputs, mass, maximum, argmax, *constants[1:])
    else:
        _derivatives.saved.save(ctx, inputs, None, None, argmax, None, None)


_derivatives = Derivatives(
    "attention_statistics",
    (AttentionStatisticsInputs, AttentionStatisticsBackwardInputs),
    _FIELDS,
    outputs=OUTPUTS,
    grads={f"grad_{name}": name for name in ("mass", "entropy", "maximum", "received")},
    passes=(_forward, _backward, gradients(BACKENDS, streaming.jvp), gradients(BACKENDS, streaming.second)),
    fake=_forward_fake,
    setup_context=_setup_context,
)

OPERATOR = Operator(attention_statistics, _describe, BACKENDS)
