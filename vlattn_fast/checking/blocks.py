"""The formulas in blocks of samples and queries, for sizes at which whole maps fit no memory.

Each block is a call of the formula (`va.reference`), whose map the backward pass makes again. Queries stand in blocks under a
mask of their own instead of `is_causal`. Gradients of keys and values are sums over the blocks, in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from vlattn_fast import scores
from vlattn_fast._ground.tensors import product
from vlattn_fast.backends import reference
from vlattn_fast.backends.reference._softmax import gated
from vlattn_fast.backends.streaming._dropout import keep_factor

NUMBERS = 2**25  # of a block's map: 256 MiB in float64
# arguments whose third axis is that of the queries
PER_QUERY = ("query", "other_query", "index_query", "index_weights", "teacher_lse", "grad_output", "relevancy")
SHARED = ("key", "other_key", "index_key", "value")  # arguments that every block of queries reads
QUERIES = {"attention_map": 1, "indexer_divergence": 1}  # the axis of the queries in a result; that of the other operators is 2
SUMS = {"relevancy_step": (0,), "attention_statistics": (4,)}  # results that are sums over the queries

Arguments = dict[str, Any]


def formula(operator: str, numbers: int = NUMBERS) -> Callable[..., Any]:
    """`va.reference.<operator>` with blocks whose maps have at most `numbers` numbers (at least a query's), for calls without
    attn_mask. Dropout drops what the kernels drop that draw their seed from the generator of the query's device as it is."""

    def blocked(**arguments: Any) -> Any:
        if operator == "relevancy_attention":
            return _relevancy_attention(arguments, numbers)
        assert arguments.get("attn_mask") is None
        call = getattr(reference, operator)
        query, seed = arguments["query"], None
        if arguments.get("dropout_p", 0.0) > 0.0:
            seed = torch.randint(0, 2**62, (), device=query.device)
        plan = list(_blocks(arguments, numbers))
        if seed is None and len(plan) == len(plan[0][1]) == 1:
            return call(**arguments)
        joined = []
        dtypes = {name: arguments[name].dtype for name in SHARED if isinstance(arguments.get(name), Tensor)}
        wide = {name: arguments[name].to(torch.promote_types(dtype, torch.float32)) for name, dtype in dtypes.items()}
        for samples, blocks in plan:

            def block(rows: slice, samples: slice = samples) -> Any:
                cut = _cut({**arguments, **wide}, samples, rows)
                cut |= {name: cut[name].to(dtype) for name, dtype in dtypes.items()}
                with _Dropped(seed, arguments, samples, rows):
                    return call(**cut)

            pieces = [checkpoint(block, rows, use_reentrant=False, preserve_rng_state=False) for rows in blocks]
            joined.append(_joined(operator, pieces))
        return _map(lambda x, _: torch.cat(x), joined)

    return blocked


def _blocks(arguments: Arguments, numbers: int) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of samples, and the slices of queries of each."""
    (batch, heads, queries, size), keys = arguments["query"].shape, arguments["key"].shape[2]
    score = arguments.get("score")
    pair_size = 1 if score is None or scores.resolve(score).is_dot_product else size  # such formulas hold features for a pair
    rows = max(1, min(queries, numbers // max(1, heads * keys * pair_size)))
    if {"diagonal", "distance"} & {*(arguments.get("statistics") or ())}:  # whose formulas count queries from the first one
        rows = queries
    samples = max(1, numbers // max(1, heads * keys * pair_size * queries))
    blocks = [slice(i, min(i + rows, queries)) for i in range(0, queries, rows)] or [slice(0, 0)]
    for first in range(0, batch, samples):
        yield slice(first, min(first + samples, batch)), blocks


def _cut(arguments: Arguments, samples: slice, rows: slice) -> Arguments:
    cut = dict(arguments)
    for name in (*PER_QUERY, *SHARED, "key_mask"):
        if isinstance(x := arguments.get(name), Tensor):
            cut[name] = x[samples, :, rows] if name in PER_QUERY else x[samples]
    if isinstance(x := arguments.get("topk_indices"), Tensor):
        cut["topk_indices"] = x[samples, rows]
    ranks = {"key_groups": 2, "query_groups": 2, "row_weight": 2, "head_gate": 2, "group_bias": 4}
    for name, rank in ranks.items():  # for each sample, or for all of them
        if isinstance(x := arguments.get(name), Tensor):
            x = x[samples] if x.dim() == rank else x
            cut[name] = x[..., rows] if name in ("query_groups", "row_weight") else x
    if cut.pop("is_causal", False):
        keys = torch.arange(arguments["key"].shape[2], device=arguments["query"].device)
        cut["attn_mask"] = keys <= torch.arange(rows.start, rows.stop, device=keys.device)[:, None]
    return cut


def _joined(operator: str, pieces: list[Any]) -> Any:
    """The blocks of queries of some samples as one result."""
    sums, axis = SUMS.get(operator, ()), QUERIES.get(operator, 2)
    return _map(lambda x, number: torch.stack(x).sum(0) if number in sums else torch.cat(x, axis), pieces)


def _map(join: Callable[[tuple[Tensor, ...], int], Tensor], results: list[Any]) -> Any:
    """A tensor or a tuple of tensors from several: each by `join(its blocks, its number)`."""
    first = results[0]
    if isinstance(first, Tensor):
        return join(tuple(results), 0)
    parts = enumerate(zip(*results, strict=True))
    joined = [None if each[0] is None else join(each, number) for number, each in parts]  # a statistic that was not asked for
    return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)


class _Dropped(TorchFunctionMode):
    """Inside, dropout of a block's map drops what the kernels drop."""

    def __init__(self, seed: Tensor | None, arguments: Arguments, samples: slice, rows: slice) -> None:
        super().__init__()
        self.seed = seed
        self.sizes = arguments["query"].shape[1:3], arguments["key"].shape[2]
        self.tile = samples, slice(0, arguments["query"].shape[1]), rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout and self.seed is not None:
            (prob,) = args
            return prob * keep_factor(self.seed, kwargs["p"], *self.sizes, self.tile, prob.dtype)
        return func(*args, **(kwargs or {}))


def _relevancy_attention(arguments: Arguments, numbers: int) -> tuple[Tensor, Tensor]:
    rule_names = ("rule", "row_normalize", "residual_weight", "attention_weight")
    shared = {name: x for name, x in arguments.items() if name not in ("carrier", "head_gate", *rule_names)}
    out = formula("score_attention", numbers)(**shared)
    carry = {name: arguments[name] for name in rule_names if name in arguments}
    calls = {name: _detached(x) for name, x in shared.items()}, carry, numbers
    out, carrier = _Carry.apply(out, arguments["carrier"], *calls)
    return gated(out, arguments.get("head_gate")), carrier


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


class _Carry(torch.autograd.Function):
    """Identity on (out, carrier); the backward pass multiplies the carrier's cotangent by blocks of queries of Abar."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, carrier: Tensor, *calls: Any) -> tuple[Tensor, Tensor]:
        ctx.calls = calls
        return out.clone(), carrier.clone()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, r: Tensor) -> tuple[Any, ...]:
        shared, carry, numbers = ctx.calls
        a, b = (
            1.0 if w is None else w[:, None].to(r.dtype) if isinstance(w, Tensor) else w
            for w in (carry.get("residual_weight"), carry.get("attention_weight"))
        )
        rules = {name: carry[name] for name in ("rule", "row_normalize") if name in carry}
        arguments, weighted, carried = {"rule": "gradient", **shared, **rules, "grad_output": grad_out}, r * b, []
        for samples, blocks in _blocks(shared, numbers):
            total = torch.zeros_like(r[samples])
            for rows in blocks:
                abar = reference.attention_map(**_cut(arguments, samples, rows))
                total += product(weighted[samples][..., rows], abar.to(r.dtype))
            carried.append(total)
        return grad_out, r * a + torch.cat(carried), None, None, None

    @staticmethod
    def jvp(ctx: Any, out: Tensor, carrier: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return out.clone(), carrier.clone()
