"""Statistics of attention over keys in a paged cache, such as that of a server.

Formula: reference/paged_attention_statistics.py. Without a copy of the cache: streaming/paged_attention_statistics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast import kernels
from vlattn_fast._ground.checks import (
    FLOAT_DTYPES,
    autocasts,
    check_constant,
    check_device,
    check_floating,
    check_integer,
    check_softcap,
    check_tensor,
    describe,
    readable,
)
from vlattn_fast._ground.tensors import compute_dtype, without_autocast
from vlattn_fast.backends import reference
from vlattn_fast.backends.cpu import paged_attention_statistics as cpu
from vlattn_fast.backends.inputs import PagedAttentionStatisticsInputs
from vlattn_fast.backends.reference.paged_attention_statistics import (
    DEFAULT,
    STATISTICS,
    PagedAttentionStatistics,
    chosen_statistics,
)
from vlattn_fast.backends.streaming import paged_attention_statistics as streaming
from vlattn_fast.dispatch.call import CallShape, call_shape
from vlattn_fast.dispatch.choice import load, planned, select
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import table
from vlattn_fast.ops._groups import resolve_groups
from vlattn_fast.ops._registration import define, not_differentiable
from vlattn_fast.ops._stages import DotPlan, make_plan
from vlattn_fast.ops.attention_statistics import check_num_groups, check_statistics

OUTPUTS = STATISTICS[:-1]  # of the operator
BACKENDS = table(streaming, cpu=cpu, triton=lambda: kernels.paged_attention_statistics)


def paged_attention_statistics(
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    *,
    statistics: Sequence[str] | None = None,
    key_groups: Tensor | None = None,
    num_groups: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> PagedAttentionStatistics:
    """Computes the statistics of `attention_statistics` for packed queries over keys in a paged cache.

    The cache is not copied, and statistics that you do not name cost nothing. Attention is causal: the last query of request r is
    at position lengths[r] - 1, the one before it at lengths[r] - 2, and a query attends to the keys up to its position. Not
    differentiable.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> key_cache = torch.randn(9, 2, 4, 8)  # 9 blocks of 4 keys
        >>> block_table = torch.tensor([[7, 2, 0], [3, 8, 0]])
        >>> query = torch.randn(6, 2, 8)  # the 5 tokens of a prompt, and the newest token of another request
        >>> starts, lengths = torch.tensor([0, 5, 6]), torch.tensor([5, 8])
        >>> statistics = va.paged_attention_statistics(query, key_cache, block_table, lengths, starts)
        >>> statistics.entropy.shape, statistics.received.shape
        (torch.Size([6, 2]), torch.Size([2, 2, 12]))

    Args:
        query: (T, H, D) float16, bfloat16, float32 or float64, the tokens of R requests, one request after another.
        key_cache: (blocks, Hkv, block size, D) of the same dtype and of any strides, such as a view of a cache of keys and
            values; Hkv = H or a divisor of H. Keys after a request's length have no influence.
        block_table: (R, W) int32 or int64: key j of request r is key_cache[block_table[r, j // block size], :, j % block size].
            Block numbers after the length may be anything. M = W * block size keys have room.
        lengths: (R) int32 or int64, the number of keys of each request, including those of its queries.
        query_starts: (R + 1) int32 or int64: request r has the tokens query_starts[r] to query_starts[r + 1] - 1. Tokens of no
            request attend to no key.
        statistics: some of "mass", "entropy", "maximum", "received", "max_logit", "lse" and "diagonal". Default: the first
            four. The others are None in the result. Naming "mass" requires key_groups.
        key_groups: (R, K) int32 or int64, the group of each key, -1 = no group. Keys from K on have no group either.
        num_groups: G; see `attention_statistics`. Pass it on a GPU. Default: the largest value of key_groups + 1.
        scale: multiplies the products. Default: 1/sqrt(D).
        softcap: replaces a logit by softcap * tanh(logit / softcap).
        window: each query attends only to the last `window` keys up to its position (sliding-window attention). Default: all.
        backend: "auto", "reference", "streaming", "cpu" or "triton".

    Returns:
        PagedAttentionStatistics(mass (T, H, G), entropy (T, H) in nats, maximum (T, H), received (R, H, M), max_logit (T, H), lse
        (T, H), diagonal (T, H)), float32, float64 for float64 input. `diagonal` is the attention of a query on the key of its own
        position. A query without a visible key has mass, entropy, maximum and diagonal 0, max_logit and lse -inf.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.
            Values of block_table, lengths and query_starts are checked on the CPU. On a GPU the call does not wait for them, and
            a key in a block that the cache or the table does not have is visible to no query.

    Reference: Kwon et al., "PagedAttention", SOSP 2023, eq. 4.
    """
    if statistics is not None:
        statistics = check_statistics(statistics, key_groups, num_groups, STATISTICS)
    requests = _Requests(query, key_cache, block_table, lengths, query_starts, key_groups)
    plan = planned(_plan, backend, scale, softcap, *requests, num_groups, window)
    _check_values(requests)
    groups = resolve_groups(key_groups, num_groups)
    if autocasts(query):
        requests = requests._replace(query=query.to(key_cache.dtype))  # the cache stays as it is
    if plan.backend == "reference":
        options: dict[str, Any] = {"num_groups": groups, "scale": plan.scale, "softcap": softcap, "window": window}
        with without_autocast(query):
            return reference.paged_attention_statistics(**requests._asdict(), statistics=statistics, **options)
    asked = DEFAULT if statistics is None else statistics
    groups, window = groups if "mass" in asked else 0, 0 if window is None else window
    needed: Sequence[str] = asked
    if "diagonal" in asked:
        needed = [name for name in OUTPUTS if name in (*asked, "maximum", "max_logit")]
    inputs = PagedAttentionStatisticsInputs(*requests, groups, " ".join(needed), window, *plan.core, plan.backend)
    outputs = _op(inputs)
    diagonal = None
    if "diagonal" in asked:
        maximum, max_logit = (outputs[OUTPUTS.index(name)] for name in ("maximum", "max_logit"))
        diagonal = maximum * _relative_weight(requests, plan.scale, softcap, max_logit)
    return chosen_statistics([*outputs, diagonal], list(asked))


def _relative_weight(x: _Requests, scale: float, softcap: float | None, max_logit: Tensor) -> Tensor:
    """Returns the weight of the key at each query's own position in parts of the query's largest weight, (T, H)."""
    (blocks, key_heads, block_size, _), dtype = x.key_cache.shape, compute_dtype(x.query)
    if 0 in (blocks, key_heads, x.lengths.shape[0], x.block_table.shape[1]):
        return torch.zeros_like(max_logit)
    token = torch.arange(x.query.shape[0], device=x.query.device)
    request = torch.searchsorted(x.query_starts[1:].contiguous(), token.to(x.query_starts.dtype), right=True)
    request = request.clamp(max=x.lengths.shape[0] - 1)
    position = (x.lengths[request] - x.query_starts[request + 1] + token).clamp(0, x.block_table.shape[1] * block_size - 1)
    block = x.block_table[request, position // block_size]
    visible = ((block >= 0) & (block < blocks))[:, None] & ~torch.isneginf(max_logit)  # no largest logit: a token of no request
    key = x.key_cache[block.clamp(0, blocks - 1), :, position % block_size]  # (T, Hkv, D)
    key = key.repeat_interleave(x.query.shape[1] // key_heads, 1)
    score = scale * (x.query.to(dtype) * key.to(dtype)).sum(-1)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    return torch.where(visible, (score - torch.where(visible, max_logit, 0.0)).clamp(max=0.0).exp(), 0.0)


class _Requests(NamedTuple):
    query: Tensor
    key_cache: Tensor
    block_table: Tensor
    lengths: Tensor
    query_starts: Tensor
    key_groups: Tensor | None


def _describe(
    softcap: float | None,
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    key_groups: Tensor | None,
    num_groups: int | None,
    window: int | None,
    statistics: Any = None,
) -> CallShape:
    """Checks a call except for the values of its integers, and returns its metadata."""
    if statistics is not None:
        check_statistics(statistics, key_groups, num_groups, STATISTICS)
    _check_cache(query, key_cache)
    _check_requests(_Requests(query, key_cache, block_table, lengths, query_starts, key_groups))
    check_num_groups(num_groups, key_groups)
    check_softcap(softcap)
    if window is not None:
        check_integer("window", window, low=1)
    (requests, columns), block_size = block_table.shape, key_cache.shape[2]
    sizes = {"queries": query.shape[0], "requests": requests, "keys": columns * block_size, "head_dim": query.shape[2]}
    flags = {"key_groups": key_groups is not None, "softcap": softcap is not None, "window": window is not None}
    return call_shape("paged_attention_statistics", query, {**sizes, "block_size": block_size}, flags)


def _check_cache(query: Any, key_cache: Any) -> None:
    check_tensor("query", query, rank=3, shape="(T, H, D)")
    check_tensor("key_cache", key_cache, rank=4, shape="(blocks, Hkv, block size, D)")
    if key_cache.dtype not in FLOAT_DTYPES:
        raise TypeError(
            "key_cache must be float16, bfloat16, float32 or float64: a quantised cache has scales, which are not supported "
            '(serve with a cache of the model\'s dtype, in vLLM kv_cache_dtype="auto", or pass a dequantised copy of the blocks '
            f"that block_table names); got {describe(key_cache)}"
        )
    check_floating(query=query, key_cache=key_cache)
    for name, x in (("query", query), ("key_cache", key_cache)):
        check_constant(name, x)
    (_, heads, size), (_, key_heads, block_size, key_size) = query.shape, key_cache.shape
    if key_size != size:
        raise ValueError(f"key_cache must have query's head_dim {size}; got {describe(key_cache)}")
    if key_heads != heads and (key_heads == 0 or heads % key_heads != 0):
        raise ValueError(f"key_cache's number of heads must divide query's {heads}; got {describe(key_cache)}")
    if block_size == 0:
        raise ValueError(f"key_cache must have a block size of at least 1; got {describe(key_cache)}")


def _check_requests(x: _Requests) -> None:
    """Shapes and dtypes of the integers."""
    for name, shape in {"lengths": "(R)", "query_starts": "(R + 1)", "block_table": "(R, W)", "key_groups": "(R, K)"}.items():
        integers = getattr(x, name)
        if integers is None and name == "key_groups":
            continue
        check_tensor(name, integers, rank=1 + ("," in shape), shape=shape)
        check_device(name, integers, "query", x.query)
        if integers.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64; got {describe(integers)}")
        requests = x.lengths.shape[0]
        entries = requests + 1 if name == "query_starts" else requests  # torch 2.11 adds no bool to a size that may change
        if integers.shape[0] != entries:
            raise ValueError(
                f"{name} must have the shape {shape} with R = {requests}, the number of lengths; got {describe(integers)}"
            )
    if x.key_cache.shape[0] == 0 and x.block_table.shape[1] > 0:
        raise ValueError(f"key_cache must have at least one block if block_table has columns; got {describe(x.key_cache)}")


def _plan(backend: str, scale: float | None, softcap: float | None, query: Tensor, *more: Any) -> DotPlan:
    return make_plan(BACKENDS, select(BACKENDS, _describe(softcap, query, *more), backend), query, scale, softcap)


def _check_values(x: _Requests) -> None:
    """Raises unless the values of the integers fit, if they are on the CPU and available."""
    if x.query.device.type != "cpu" or not all([readable(each) for each in (x.query, x.block_table, x.lengths, x.query_starts)]):
        return
    tokens, starts, lengths, table = x.query.shape[0], x.query_starts.tolist(), x.lengths.tolist(), x.block_table
    blocks, columns, block_size = x.key_cache.shape[0], table.shape[1], x.key_cache.shape[2]
    if starts[0] < 0 or starts[-1] > tokens or starts != sorted(starts):
        raise ValueError(f"query_starts must ascend from 0 or more to at most the {tokens} tokens of query; got {starts!r:.80}")
    if lengths and not 0 <= min(lengths) <= max(lengths) <= columns * block_size:
        raise ValueError(
            f"lengths must lie from 0 to {columns * block_size}, the keys that {columns} blocks of {block_size} hold; got values "
            f"from {min(lengths)} to {max(lengths)}"
        )
    if table.numel() == 0 or (int(table.min()) >= 0 and int(table.max()) < blocks):
        return
    used = torch.arange(columns) * block_size < x.lengths[:, None]
    wrong = used & ((table < 0) | (table >= blocks))
    if wrong.any():
        r, column = (int(each) for each in wrong.nonzero()[0])
        raise ValueError(
            f"block_table must hold numbers from 0 to below {blocks}, the blocks of key_cache, for the keys of each request; got "
            f"{int(table[r, column])} for block {column} of request {r}"
        )


def _forward(inputs: PagedAttentionStatisticsInputs) -> tuple[Tensor, ...]:
    """Empty tensors stand for outputs that are not asked for."""
    query, asked = inputs.query, inputs.statistics.split()
    outputs = load(BACKENDS, inputs.backend).forward(inputs)
    empty = query.new_empty(0, dtype=compute_dtype(query))
    return tuple([x if name in asked else empty.clone() for name, x in zip(OUTPUTS, outputs, strict=True)])


def _forward_fake(inputs: PagedAttentionStatisticsInputs) -> tuple[Tensor, ...]:
    query, asked = inputs.query, inputs.statistics.split()
    rows, dtype = query.shape[:2], compute_dtype(query)
    room = inputs.block_table.shape[1] * inputs.key_cache.shape[2]
    shapes = {"mass": (*rows, inputs.num_groups), "received": (inputs.lengths.shape[0], rows[1], room)}
    return tuple(query.new_empty(shapes.get(name, rows) if name in asked else (0,), dtype=dtype) for name in OUTPUTS)


_op = define(
    "paged_attention_statistics",
    PagedAttentionStatisticsInputs,
    "(Tensor mass, Tensor entropy, Tensor maximum, Tensor received, Tensor max_logit, Tensor lse)",
    _forward,
    _forward_fake,
)
not_differentiable("paged_attention_statistics", "it has no gradients; detach query and key_cache")

OPERATOR = Operator(paged_attention_statistics, _describe, BACKENDS)
