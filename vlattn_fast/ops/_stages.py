"""The stages that calls of attention share.

A public call bundles those of its arguments that all calls of attention have, `AttentionArguments`, and then goes through stages:

    plan      checks, backend, scale: only from the metadata of the arguments, and cached for the next such call
    features  what the kernel multiplies: no padding, autocast's dtype
    run       the operator, or the formula of backend "reference"
    finish    sink, heads, dtype
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from vlattn_fast._ground.checks import autocasts, check_masks, check_sink, check_softcap
from vlattn_fast._ground.tensors import cast_by_autocast, mask_padding, resolve_scale, scaled_dot_default
from vlattn_fast.backends.inputs import Attention
from vlattn_fast.dispatch.call import AttentionArguments, CallShape
from vlattn_fast.dispatch.choice import Arguments, select
from vlattn_fast.dispatch.table import Table
from vlattn_fast.ops._groups import check_groups, check_ranges, group_bias_inputs
from vlattn_fast.scores import softcapped


class DotPlan(NamedTuple):
    """How a call runs whose scores are scale * q . k. `core`: kind, parameter and scale of the core score."""

    backend: str
    masks_padding: bool
    scale: float
    core: tuple[str, float, float]


def make_plan(backends: Table, backend: str, query: Tensor, scale: float | None, softcap: float | None) -> DotPlan:
    """The plan of a call that is checked but for its scale."""
    scale = resolve_scale(scale, scaled_dot_default(query.shape[-1]))
    return DotPlan(backend, backends[backend].masks_padding, scale, softcapped(scale, softcap))


def planning(
    backends: Table, describe: Callable[[AttentionArguments, *Arguments], CallShape]
) -> Callable[[AttentionArguments, *Arguments], DotPlan]:
    """Returns the plan of a call that `describe` checks but for its scale."""

    def plan(x: AttentionArguments, *more: *Arguments) -> DotPlan:
        return make_plan(backends, select(backends, describe(x, *more), x.backend), x.query, x.scale, x.softcap)

    return plan


def check_logits(x: AttentionArguments) -> None:
    """Raises unless masks, softcap, sink and groups fit query and key."""
    check_masks(x.query, x.key, x.attn_mask, x.key_mask, x.is_causal)
    check_softcap(x.softcap)
    check_sink(x.sink, x.query)
    check_groups(x)


def logit_flags(x: AttentionArguments) -> dict[str, bool]:
    """Returns the flags about logits that backends' limits use."""
    return {"softcap": x.softcap is not None, "sink": x.sink is not None, "group_bias": x.group_bias is not None}


def cast(x: AttentionArguments, *more: Tensor | None) -> tuple[Any, ...]:
    """Returns the arguments and more tensors, in autocast's dtype if autocast is on."""
    if not autocasts(x.query):
        return x, *more
    query, key, *rest = cast_by_autocast(x.query, x.key, *more)
    return x._replace(query=query, key=key), *rest


def without_padding(x: AttentionArguments, plan: DotPlan, *values: Tensor | None) -> tuple[Any, ...]:
    """Returns the arguments and values, with zeros in the keys and values of padding unless the backend's kernels mask it."""
    if plan.masks_padding or x.key_mask is None:
        return x, *values
    key, *masked = mask_padding(x.key_mask, x.key, *values)
    return x._replace(key=key), *masked


def attention_of(x: AttentionArguments, plan: DotPlan, key_groups: Tensor | None = None) -> Attention:
    """Returns the attention as backends take it. `key_groups`: those of a call without a bias."""
    row_bias = None
    if x.group_bias is not None:
        row_bias, key_groups = group_bias_inputs(x.query, x.query_groups, x.key_groups, x.group_bias)
    return Attention(x.query, x.key, None, x.attn_mask, x.key_mask, row_bias, key_groups, *plan.core, x.is_causal)


def by_formula(formula: Callable[..., Any], x: AttentionArguments, scale: float, **more: Any) -> Any:
    """Runs the call with the formula of the operator, which has the same arguments; `more` are those that calls do not share."""
    check_ranges(x.query_groups, x.key_groups, x.group_bias)
    options = x._asdict() | more | {"scale": scale}
    del options["backend"]
    return formula(**options)
