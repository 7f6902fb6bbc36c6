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


class _Smaller(dict[str, dict[str, int]]):
    """Replaces `OVERRIDES`: tiles half as large, or twice where half would be too small, one stage, and eight warps."""

    def __init__(self, but: str | None) -> None:
        self.but = but

    def __bool__(self) -> bool:
        return True

    def get(self, key: str, default: Any = None) -> Any:
        if self.but and key.startswith(self.but):
            return default
        tiles = {name: size // 2 if size > 16 else 2 * size for name, size in default.items() if name.startswith("BLOCK")}
        return {**{name: x for name, x in default.items() if name != "AHEAD"}, **tiles, "num_stages": 1, "num_warps": 8}


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
