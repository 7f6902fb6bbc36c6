"""Two ways to compute one thing, equal to the bit under FpSan; calls under ConSan.

A pair is a call of `vlattn verify`, forward and backward, and the same call another way:

    tiles         tiles of 32 rows by 32 columns with one stage, and tiles of 16 by 64 with two
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


# by operator: the calls of `vlattn verify` that together launch all kernels
CALLS = {
    "score_attention": ("scaled_dot causal", "additive"),
    "relevancy_attention": ("gradient",),
    "attention_map": ("gradient of the largest head",),
    "attention_statistics": ("three groups",),
    "congruence_loss": ("iais_singular",),
    "stacked_cross_attention": ("SCAN t2i",),
}
OTHER_WAYS = (
    ("rounded tiles", "score_attention", "scaled_dot causal"),
    ("causal", "score_attention", "scaled_dot causal"),
    ("heads", "score_attention", "scaled_dot causal"),
    ("split", "score_attention", "additive"),
)


class Item(NamedTuple):
    kind: str
    operator: str
    case: str
    narrow: bool  # in 16 bits, else in float32

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.operator} {self.case}{'' if self.narrow else ' in float32'}"


def items() -> Iterator[Item]:
    """All pairs, and all calls under ConSan."""
    for operator, cases in CALLS.items():
        for case in cases:
            yield from (Item(kind, operator, case, True) for kind in ("tiles", "consan"))
    yield from (Item(*one, True) for one in OTHER_WAYS)


def differing(item: Item, architecture: int) -> tuple[dict[str, float], set[str]]:
    """By the names of the results whose numbers differ the share of these numbers; and the kernels that ran."""
    import ptx.sanitizers

    torch.set_num_threads(1)
    case = next(one for one in verify.cases(sizes=SIZES, operators=[item.operator]) if one.name == item.case)
    dtype = ARCHITECTURES[architecture] if item.narrow else torch.float32
    if item.kind == "consan":
        with ptx.sanitizers.consan(architecture) as launches:
            verify._run(case, case.in_dtype(dtype), "triton")
        return {}, {launch.name for launch in launches}
    with ptx.sanitizers.fpsan(architecture, rounding=item.kind == "rounded tiles") as launches:
        one, other = (results(item.kind, way, with_unit_scale(case), dtype) for way in (False, True))
    assert one.keys() == other.keys()
    shares = {name: unequal(x, other[name], low=item.kind != "rounded tiles") for name, x in one.items()}
    return {name: share for name, share in shares.items() if share}, {launch.name for launch in launches}


def with_unit_scale(case: Example) -> Example:
    takes_scale = "scale" in inspect.signature(case.call).parameters
    return replace(case, options={**case.options, "scale": UNIT}) if takes_scale else case


def results(kind: str, other_way: bool, case: Example, dtype: torch.dtype) -> Tensors:
    with ExitStack() as stack:
        oblong = kind in ("tiles", "rounded tiles") and other_way
        but = "score_attention forward" if kind == "rounded tiles" else None
        stack.enter_context(tiles(Tiles(16, 64, 2, but) if oblong else SQUARE, oblong))
        if kind == "split":
            stack.enter_context(ranges_of_keys(other_way))
        if kind == "causal":
            options = {name: x for name, x in case.options.items() if name not in ("is_causal", "key_mask")}
            queries, keys = (case.tensors[name].shape[-2] for name in ("query", "key"))
            mask = torch.ones(queries, keys, dtype=torch.bool).tril()
            case = replace(case, options={**options, **({"attn_mask": mask} if other_way else {"is_causal": True})})
        if kind == "heads":
            case = grouped(case, other_way)
        made = verify._run(case, case.in_dtype(dtype), "triton")
    return summed_over_heads(made) if kind == "heads" and other_way else made


def grouped(case: Example, repeated: bool) -> Example:
    """One head of keys and values for all query heads, or as many as these that are equal."""
    heads = case.tensors["query"].shape[1]
    shared = {
        name: x[:, :1].repeat(1, heads if repeated else 1, 1, 1) if name in ("key", "value") else x
        for name, x in case.tensors.items()
    }
    return replace(case, tensors=shared, options={**case.options, "enable_gqa": not repeated})


def summed_over_heads(results: Tensors) -> Tensors:
    """Gradients of keys and values that are repeated, as those of what they repeat."""
    from ptx.sanitizers import number, payload

    def summed(name: str, x: Tensor) -> Tensor:
        of_shared = name in ("gradient of key", "gradient of value")
        return number(payload(x).sum(1, keepdim=True), x.dtype) if of_shared else x

    return {name: summed(name, x) for name, x in results.items()}


# ---- other ways


class Tiles(dict[str, dict[str, int]]):
    """Replaces `OVERRIDES`: tiles of these sizes for all kernels, but for those whose configuration has the name `but`."""

    def __init__(self, rows: int, columns: int, stages: int, but: str | None = None) -> None:
        self.rows, self.columns, self.stages, self.but = rows, columns, stages, but

    def __bool__(self) -> bool:
        return True

    def get(self, key: str, default: Any = None) -> Any:
        sizes = {"BLOCK_Q": self.rows, "BLOCK_I": self.rows, "BLOCK_KV": self.columns, "BLOCK_J": self.columns}
        tile = {name: sizes.get(name, 32) for name in default if name.startswith("BLOCK")}
        few = self.but and key.startswith(self.but)
        return SQUARE.get(key, default) if few else {**tile, "num_warps": 4, "num_stages": self.stages}


SQUARE = Tiles(32, 32, 1)


@contextmanager
def tiles(sizes: Tiles, fewer_rows: bool) -> Iterator[None]:
    """Within it kernels have tiles of these sizes, and with `fewer_rows` those that hold whole contexts half as many rows."""
    from vlattn_fast.kernels import _configurations, _stacked_gradients, _stacked_weights

    def configured(configure: Callable[..., dict[str, int]]) -> Callable[..., dict[str, int]]:
        return lambda size, elements: configure(size, elements // 2 if fewer_rows else elements)

    with ExitStack() as stack:
        stack.enter_context(_changed(_configurations, "OVERRIDES", sizes))
        for module in (_stacked_gradients, _stacked_weights):
            stack.enter_context(_changed(module, "map_configuration", configured(module.map_configuration)))
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
