"""Two ways to compute one thing, equal to the bit under FpSan; calls under ConSan.

A pair is a call of `vlattn verify`, forward and backward, and the same call another way:

    tiles         each kernel in tiles half as large, with one stage
    rounded tiles the same but for the forward pass of attention, which rounds p = 2^(x - max so far): that is another number for
                  other tiles. All others round at places that tiles do not move, and FpSan keeps roundings apart
    causal        under a dense mask instead
    heads         with keys and values repeated for each query head, instead of grouped heads
    split         with keys in one range, instead of as many as there are blocks
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example, Sizes, Tensors
from vlattn_fast.ops import OPERATORS

ARCHITECTURES = {90: torch.bfloat16, 80: torch.float16}
SIZES = Sizes(queries=72, keys=104, regions=40, heads=2)
# log2(e) times it is 1: the largest x = scale s is the largest s, as in numbers. In the ring a factor changes the order
UNIT = 1.0 / math.log2(math.e)


class Item(NamedTuple):
    kind: str
    operator: str
    case: str
    narrow: bool  # in 16 bits, else in float32

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.operator} {self.case}{'' if self.narrow else ' in float32'}"


def items() -> Iterator[Item]:
    """All pairs, and all calls under ConSan; in float32, whose products are sums of parts, the first of each operator."""
    for operator in OPERATORS:
        cases = verify.cases(sizes=SIZES, operators=[operator])
        for narrow in (True, False):
            for case in cases if narrow else cases[:1]:
                for kind in ("tiles", "rounded tiles", "consan"):
                    yield Item(kind, operator, case.name, narrow)
        parameters = inspect.signature(cases[0].call).parameters
        if "is_causal" in parameters:
            yield Item("causal", operator, cases[0].name, True)
        if "enable_gqa" in parameters:
            yield Item("heads", operator, cases[0].name, True)
    yield Item("split", "score_attention", "additive", True)


def differing(item: Item, architecture: int) -> dict[str, float]:
    """By the names of the results whose numbers differ: the share of these numbers."""
    import ptx.sanitizers

    torch.set_num_threads(1)
    case = next(one for one in verify.cases(sizes=SIZES, operators=[item.operator]) if one.name == item.case)
    dtype = ARCHITECTURES[architecture] if item.narrow else torch.float32
    if item.kind == "consan":
        with ptx.sanitizers.consan(architecture):
            verify._run(case, case.in_dtype(dtype), "triton")
        return {}
    with ptx.sanitizers.fpsan(architecture, rounding=item.kind == "rounded tiles"):
        one, other = (results(item.kind, way, with_unit_scale(case), dtype) for way in (False, True))
    assert one.keys() == other.keys()
    shares = {name: unequal(x, other[name], low=item.kind != "rounded tiles") for name, x in one.items()}
    return {name: share for name, share in shares.items() if share}


def with_unit_scale(case: Example) -> Example:
    takes_scale = "scale" in inspect.signature(case.call).parameters
    return replace(case, options={**case.options, "scale": UNIT}) if takes_scale else case


def results(kind: str, other_way: bool, case: Example, dtype: torch.dtype) -> Tensors:
    with ExitStack() as stack:
        if kind in ("tiles", "rounded tiles") and other_way:
            stack.enter_context(smaller_tiles("score_attention forward" if kind == "rounded tiles" else None))
        if kind == "split":
            stack.enter_context(ranges_of_keys(other_way))
        if kind == "causal":
            options = {name: x for name, x in case.options.items() if name not in ("is_causal", "key_mask")}
            queries, keys = (case.tensors[name].shape[-2] for name in ("query", "key"))
            mask = torch.ones(queries, keys, dtype=torch.bool).tril()
            case = replace(case, options={**options, **({"attn_mask": mask} if other_way else {"is_causal": True})})
        if kind == "heads":
            case = grouped(case, other_way)
        return verify._run(case, case.in_dtype(dtype), "triton")


def grouped(case: Example, repeated: bool) -> Example:
    """One head of keys and values for all query heads, or as many that are equal, made so that gradients sum over them."""
    shared = {name: x[:, :1] if name in ("key", "value") else x for name, x in case.tensors.items()}

    def arrange(tensors: Tensors) -> dict[str, Any]:
        heads = tensors["query"].shape[1]
        each = {name: x.expand(-1, heads, -1, -1) for name, x in tensors.items() if name in ("key", "value") and repeated}
        return {**case.arrange({**tensors, **each}), "enable_gqa": not repeated}

    return replace(case, tensors=shared, arrange=arrange)


# ---- other ways


class _Smaller(dict[str, dict[str, int]]):
    """Replaces `OVERRIDES`: tiles half as large, or twice where half would be too small, and one stage."""

    def __init__(self, but: str | None) -> None:
        self.but = but

    def __bool__(self) -> bool:
        return True

    def get(self, key: str, default: Any = None) -> Any:
        if self.but and key.startswith(self.but):
            return default
        tiles = {name: size // 2 if size > 16 else 2 * size for name, size in default.items() if name.startswith("BLOCK")}
        return {**{name: x for name, x in default.items() if name != "AHEAD"}, **tiles, "num_stages": 1, "num_warps": 4}


@contextmanager
def smaller_tiles(but: str | None = None) -> Iterator[None]:
    """Within it kernels have tiles half as large, but for those whose configuration has this name."""
    from vlattn_fast.kernels import _configurations, _stacked_gradients, _stacked_weights

    def fewer_rows(configure: Callable[..., dict[str, int]]) -> Callable[..., dict[str, int]]:
        return lambda size, elements: configure(size, elements // 2)

    with ExitStack() as stack:
        stack.enter_context(_changed(_configurations, "OVERRIDES", _Smaller(but)))
        for module in (_stacked_gradients, _stacked_weights):
            stack.enter_context(_changed(module, "map_configuration", fewer_rows(module.map_configuration)))
        yield


@contextmanager
def ranges_of_keys(one: bool) -> Iterator[None]:
    """Within it the backward pass of hidden units takes keys in one range, or each block by itself."""
    from vlattn_fast.kernels import _units_backward

    with _changed(_units_backward, "_key_ranges", lambda heads, blocks, *sizes: (1, blocks) if one else (blocks, 1)):
        yield


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    try:
        setattr(owner, name, value)
        yield
    finally:
        setattr(owner, name, before)


# ---- comparison


def unequal(x: Tensor, y: Tensor, low: bool) -> float:
    """The share of numbers that differ, with `low` in the lower 16 bits."""
    from ptx.sanitizers import payload

    difference = payload(x) - payload(y)
    return float(((difference & 0xFFFF if low else difference) != 0).float().mean())
