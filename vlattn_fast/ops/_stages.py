"""The stages that calls of attention share.

A public call bundles its arguments in a NamedTuple, `Arguments`, and then goes through stages:

    plan      checks, backend, scale: only from the metadata of the arguments, and cached for the next such call
    features  what the kernel multiplies: no padding, autocast's dtype
    run       the operator, or the formula of backend "reference"
    finish    sink, heads, dtype

The functions below read the fields that the operators' `Arguments` have in common.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

from vlattn_fast._ground.checks import autocasts, check_masks, check_sink, check_softcap
from vlattn_fast._ground.named import by_name
from vlattn_fast._ground.tensors import cast_by_autocast, mask_padding, resolve_scale, scaled_dot_default
from vlattn_fast.dispatch.call import CallShape
from vlattn_fast.dispatch.table import Table
from vlattn_fast.ops._groups import check_groups, check_ranges
from vlattn_fast.scores import softcapped


def arguments_of(call: Callable[..., Any]) -> Any:
    """Returns the class of a public call's arguments, a NamedTuple with the call's names and defaults. A call begins with
    `Arguments(**locals())`, before it has other variables."""
    parameters = inspect.signature(call).parameters.values()
    defaults = [each.default for each in parameters if each.default is not each.empty]
    return by_name(namedtuple("Arguments", [each.name for each in parameters], defaults=defaults))


def described(arguments: Any, describe: Callable[[Any], CallShape]) -> Callable[..., CallShape]:
    """Returns a function of a public call's arguments, by name, that checks them and returns the call's metadata."""
    return lambda **named: describe(arguments(**named))


class DotPlan(NamedTuple):
    """How a call runs whose scores are scale * q . k. `core`: kind, parameter and scale of the core score."""

    backend: str
    masks_padding: bool
    scale: float
    core: tuple[str, float, float]


def make_plan(backends: Table, backend: str, arguments: Any) -> DotPlan:
    """The plan of a call that is checked but for its scale."""
    scale = resolve_scale(arguments.scale, scaled_dot_default(arguments.query.shape[-1]))
    return DotPlan(backend, backends[backend].masks_padding, scale, softcapped(scale, arguments.softcap))


def check_logits(arguments: Any) -> None:
    """Raises unless masks, softcap, sink and groups fit query and key."""
    query, key = arguments.query, arguments.key
    check_masks(query, key, arguments.attn_mask, arguments.key_mask, arguments.is_causal)
    check_softcap(arguments.softcap)
    check_sink(arguments.sink, query)
    check_groups(arguments)


def logit_flags(arguments: Any) -> dict[str, bool]:
    """Returns the flags about logits that backends' limits use."""
    return {name: getattr(arguments, name) is not None for name in ("softcap", "sink", "group_bias")}


def cast(arguments: Any) -> Any:
    """Returns the arguments, in autocast's dtype if autocast is on."""
    if not autocasts(arguments.query):
        return arguments
    names = [name for name in ("query", "key", "value", "grad_output") if name in arguments._fields]
    return arguments._replace(**dict(zip(names, cast_by_autocast(*[getattr(arguments, name) for name in names]), strict=True)))


def without_padding(arguments: Any, plan: DotPlan) -> Any:
    """Returns the arguments, with zeros in the keys and values of padding unless the backend's kernels mask it."""
    if plan.masks_padding or arguments.key_mask is None:
        return arguments
    names = [name for name in ("key", "value") if name in arguments._fields]
    masked = mask_padding(arguments.key_mask, *[getattr(arguments, name) for name in names])
    return arguments._replace(**dict(zip(names, masked, strict=True)))


def by_formula(formula: Callable[..., Any], arguments: Any, scale: float) -> Any:
    """Runs the call with the formula of the operator, which has the same arguments."""
    check_ranges(arguments)
    options = dict(zip(arguments._fields, arguments, strict=True))
    del options["backend"]
    return formula(**{**options, "scale": scale})
