"""Two ways to compute one thing, equal to the bit under FpSan; calls under ConSan.

A pair is a call of `vlattn verify`, forward and backward, and the same call another way:

    tiles         tiles of 32 rows by 32 columns with one stage, and tiles of 16 by 64 with two
    rounded tiles the same but for the forward pass of attention, which rounds p = 2^(x - max so far): that is another number for
                  other tiles. All others round at places that tiles do not move, and FpSan keeps roundings apart
    causal        under a dense mask instead
    heads         with keys and values repeated for each query head, instead of grouped heads
    split         with keys in one range, instead of as many as there are blocks or parts
    parts         with keys in parts of 32, and of 64
    rows          with whole rows in a tile, and in several
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.helpers.ops.jvp_cases import with_tangents
from tools.emulated.triton import emulated
from tools.planted.calls import changed_source, tile_by_tile
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example, Sizes, Tensors

ARCHITECTURES = {90: torch.bfloat16, 80: torch.float16}
SIZES = Sizes(queries=72, keys=104, regions=40, heads=2)
# log2(e) times it is 1: the largest x = scale s is the largest s, as in numbers. In the ring a factor changes the order
UNIT = 1.0 / math.log2(math.e)


class Item(NamedTuple):
    kind: str
    operator: str
    case: str
    dtype: torch.dtype | None = None  # else that of the architecture

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.operator} {self.case}" + (f" {self.dtype}" if self.dtype else "")

    @property
    def kernels(self) -> set[str]:
        names = CALLS[self.operator, self.case].split()
        return {*names, *(ALSO_WITH_WHOLE_ROWS if self.kind == "rows" else ())}


# calls of `vlattn verify`, some of them varied (`VARIANTS`), with all that they launch
CALLS = {
    ("score_attention", "scaled_dot causal"): """score_attention._forward_kernel _products_backward._backward_q_kernel
        _products_backward._backward_kv_kernel""",
    ("score_attention", "scaled_dot causal, all keys"): """score_attention._whole_forward_kernel
        _products_backward._backward_kv_kernel""",
    ("score_attention", "scaled_dot causal, tangents"): "score_attention._forward_kernel _products_jvp._jvp_kernel",
    ("score_attention", "additive"): """score_attention._prepare_kernel score_attention._forward_kernel
        _units_backward._units_rows_kernel _units_backward._units_backward_kernel""",
    ("score_attention", "grouped heads, few queries"): "score_attention._forward_kernel score_attention._join_kernel",
    ("score_attention", "groups and gate"): """_group_bias._group_bias_kernel score_attention._forward_kernel
        score_attention._rows_kernel _products_backward._backward_q_kernel _products_backward._backward_kv_kernel""",
    ("score_attention", "groups and gate, runs"): """_group_bias._group_bias_kernel score_attention._forward_kernel
        score_attention._rows_kernel _products_backward._backward_q_kernel _products_backward._backward_kv_kernel""",
    ("relevancy_attention", "gradient"): """score_attention._forward_kernel _products_backward._backward_q_kernel
        _products_backward._backward_kv_kernel""",
    ("relevancy_attention", "gradient, all keys"): """score_attention._whole_forward_kernel
        _products_backward._backward_kv_kernel""",
    ("relevancy_step", "gradient"): """score_attention._rows_kernel _products_backward._backward_kv_kernel
        _map_backward._map_backward_rows_kernel _map_backward._map_backward_q_kernel _map_backward._map_backward_kv_kernel""",
    ("relevancy_step", "gradient, one row"): "score_attention._rows_kernel relevancy_attention._step_kernel",
    ("attention_map", "gradient of the largest head"): """attention_map._map_kernel attention_map._rows_kernel
        _map_backward._map_backward_rows_kernel _map_backward._map_backward_q_kernel _map_backward._map_backward_kv_kernel
        _map_backward._map_taken_kernel score_attention._rows_kernel""",
    ("attention_statistics", "three groups"): """_key_groups._members_kernel attention_statistics._rows_kernel
        attention_statistics._received_kernel _statistics_backward._backward_q_kernel _statistics_backward._backward_kv_kernel""",
    ("attention_statistics", "three groups, few queries"): """_key_groups._members_kernel attention_statistics._rows_kernel
        attention_statistics._join_kernel attention_statistics._received_kernel""",
    ("attention_divergence", "js"): """attention_statistics._rows_kernel attention_divergence._terms_kernel
        attention_divergence._backward_q_kernel attention_divergence._backward_kv_kernel""",
    ("attention_divergence", "means of other heads"): """attention_statistics._rows_kernel attention_divergence._terms_kernel
        attention_divergence._backward_q_kernel attention_divergence._backward_kv_kernel""",
    ("indexer_divergence", "padding"): """attention_statistics._rows_kernel attention_divergence._terms_kernel
        attention_divergence._backward_q_kernel attention_divergence._backward_kv_kernel
        indexer_divergence._rows_kernel indexer_divergence._backward_q_kernel indexer_divergence._backward_kv_kernel""",
    ("indexer_divergence", "causal"): """attention_statistics._rows_kernel attention_divergence._terms_kernel
        attention_divergence._backward_q_kernel attention_divergence._backward_kv_kernel
        indexer_divergence._rows_kernel indexer_divergence._backward_q_kernel indexer_divergence._backward_kv_kernel""",
    ("indexer_divergence", "chosen keys"): """_chosen_keys._chosen_rows_kernel _chosen_keys._chosen_terms_kernel
        _chosen_keys._chosen_backward_q_kernel _chosen_keys._chosen_backward_k_kernel""",
    ("congruence_loss", "iais_singular"): """congruence_maps.map_kernel congruence_maps.gradient_kernel
        congruence_loss._divergence_kernel congruence_loss._target_backward_kernel""",
    ("congruence_loss", "iais_singular, long rows"): """congruence_maps.statistics_kernel congruence_maps.map_kernel
        congruence_maps.gradient_q_kernel congruence_maps.gradient_kernel congruence_loss._divergence_kernel""",
    ("maxsim", "masks"): "maxsim._largest_kernel maxsim._query_gradient_kernel maxsim._document_gradient_kernel",
    ("relevancy_residual", "contribution"): "relevancy_residual._weights_kernel",
    ("paged_attention_statistics", "requests"): """paged_attention_statistics._rows_kernel
        paged_attention_statistics._join_kernel paged_attention_statistics._received_kernel""",
    ("paged_attention_statistics", "new tokens"): """paged_attention_statistics._rows_kernel
        paged_attention_statistics._join_kernel paged_attention_statistics._received_kernel""",
    ("stacked_cross_attention", "SCAN t2i"): """_stacked_products._matmul_kernel _stacked_weights._weights_kernel
        _stacked_cosines._attend_kernel _stacked_cosines._aggregate_kernel _stacked_gradients._maps_kernel""",
}
ALSO_WITH_WHOLE_ROWS = ("congruence_loss._target_backward_kernel",)
# under ConSan alone: the first divides by 1 / sum, which is the sum again where that is odd alone, and raises exponents to at
# least -160; the second has steps of one size
NO_PAIR = ("attention_statistics._join_kernel", "relevancy_residual._weights_kernel")
# tiles of additive scores are few: each takes others for its split. A part of the keys of few queries is a tile. Tangents are
# centred by the mean of a tile, and integers have no sum of P that is 1, by which it drops out
ONE_TILING = (
    "additive",
    "grouped heads, few queries",
    "three groups, few queries",
    "scaled_dot causal, tangents",
    "contribution",
)
PAIRS = (
    *(Item("tiles", *call) for call in CALLS if call[1] not in ONE_TILING),
    Item("tiles", "score_attention", "scaled_dot causal", torch.float32),
    Item("tiles", "relevancy_attention", "gradient", torch.float32),
    Item("tiles", "maxsim", "masks", torch.float32),
    Item("rounded tiles", "score_attention", "scaled_dot causal"),
    Item("causal", "score_attention", "scaled_dot causal"),
    Item("causal", "attention_divergence", "js"),
    Item("causal", "attention_divergence", "means of other heads"),
    Item("causal", "indexer_divergence", "causal"),
    Item("heads", "score_attention", "scaled_dot causal"),
    Item("heads", "score_attention", "scaled_dot causal, tangents"),
    Item("split", "score_attention", "additive"),
    Item("split", "score_attention", "grouped heads, few queries"),
    Item("split", "paged_attention_statistics", "new tokens"),
    Item("parts", "score_attention", "grouped heads, few queries"),
    Item("rows", "congruence_loss", "iais_singular, long rows"),
)
# on sm_80, in float16, these divide rows of a tile by their largest entry: other tiles, other quotients. No program has all keys
# of a head there
RELATIVE = ("congruence_loss", "attention_divergence", "indexer_divergence")
SM_80 = tuple(item for item in PAIRS if item.operator not in RELATIVE and not item.case.endswith("all keys"))
ITEMS = {90: (*(Item("consan", *call) for call in CALLS), *PAIRS), 80: SM_80}

# its terms are cut off where 2^x is 0 in numbers, that is by the distance from the largest logit so far
WITHOUT_ENTROPY = ("mass", "maximum", "received")


def differing(item: Item, architecture: int) -> tuple[dict[str, float], set[str]]:
    """By the names of the results whose numbers differ the share of these numbers; and the kernels that ran."""
    import ptx.sanitizers

    torch.set_num_threads(1)
    case, variant = case_of(item)
    dtype = item.dtype or ARCHITECTURES[architecture]
    if item.kind == "consan":
        with ptx.sanitizers.consan(architecture, emulated=emulated) as launches, variant():
            verify._run(case, case.in_dtype(dtype), "triton")
        return {}, {launch.name for launch in launches}
    with ptx.sanitizers.fpsan(architecture, rounding=item.kind == "rounded tiles", emulated=emulated) as launches:
        one, other = (results(item.kind, way, provable(case), dtype, variant) for way in (False, True))
    assert one.keys() == other.keys()
    shares = {name: unequal(x, other[name], low=item.kind != "rounded tiles") for name, x in one.items()}
    return {name: share for name, share in shares.items() if share}, {launch.name for launch in launches}


def case_of(item: Item) -> tuple[Example, Callable[[], AbstractContextManager[None]]]:
    """The call of `vlattn verify` that the item names, and a context within which its variant runs."""
    name, _, variant = item.case.rpartition(", ")
    name, variant = (name, variant) if variant in VARIANTS else (item.case, "")
    sizes = SIZES._replace(**OTHER_SIZES.get(variant, {}))
    case = next(one for one in verify.cases(sizes=sizes, operators=[item.operator]) if one.name == name)
    if variant == "float mask":
        queries, keys = (case.tensors[name].shape[-2] for name in ("query", "key"))
        mask = torch.randn(queries, keys, generator=torch.Generator().manual_seed(0))
        case = replace(case, options={**case.options, "attn_mask": mask})
    if variant == "runs":
        groups = torch.arange(sizes.keys) // 40  # some tiles have one group, others parts of two
        case = replace(case, options={**case.options, "key_groups": groups})
    if variant == "tangents":
        from vlattn_fast.kernels import score_attention

        case = with_tangents(case, score_attention)
    whole = variant == "all keys"
    case = replace(case, differentiable=case.differentiable and (whole or variant not in OTHER_SIZES))
    return case, nullcontext if whole else partial(by_tiles, VARIANTS.get(variant, nullcontext))


def provable(case: Example) -> Example:
    """The call with a scale that is 1 in base 2, and without entropy."""
    takes_scale = "scale" in inspect.signature(case.call).parameters
    options = {**case.options, **({"scale": UNIT} if takes_scale else {})}
    if "attention_statistics" not in case.operator:
        return replace(case, options=options)

    def call(**arguments: Any) -> tuple[Tensor, ...]:
        return tuple(x for x in case.call(**arguments) if x is not None)

    return replace(case, options={**options, "statistics": WITHOUT_ENTROPY}, call=call)


def results(
    kind: str, other_way: bool, case: Example, dtype: torch.dtype, variant: Callable[[], AbstractContextManager[None]]
) -> Tensors:
    with ExitStack() as stack:
        stack.enter_context(variant())
        oblong = kind in ("tiles", "rounded tiles") and other_way
        but = "score_attention forward" if kind == "rounded tiles" else None
        stack.enter_context(tiles(Tiles(16, 64, 2, but) if oblong else SQUARE, oblong))
        if kind == "split":
            stack.enter_context(ranges_of_keys(other_way))
        if other_way and kind in ("split", "parts"):
            stack.enter_context(parts_of_keys(0 if kind == "split" else 64))
        if kind == "rows":
            stack.enter_context(whole_rows(not other_way))
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
        name: x[:, :1].repeat(1, heads if repeated else 1, 1, 1) if name.startswith(("key", "value")) else x
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


class Tiles(dict[str, dict[str, int]]):
    """Replaces `OVERRIDES`: tiles of these sizes for all kernels, but for those whose configuration has the name `but`."""

    def __init__(self, rows: int, columns: int, stages: int, but: str | None = None) -> None:
        self.rows, self.columns, self.stages, self.but = rows, columns, stages, but

    def __bool__(self) -> bool:
        return True

    def get(self, key: str, default: Any = None) -> Any:
        sizes = {"BLOCK_Q": self.rows, "BLOCK_I": self.rows, "BLOCK_KV": self.columns, "BLOCK_J": self.columns}
        tile = {name: sizes.get(name, 32) for name in default if name.startswith("BLOCK")}
        if key.startswith("score_attention backward_whole"):
            tile["BLOCK_KV"] = default["BLOCK_KV"]  # which holds all keys
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
def parts_of_keys(keys: int) -> Iterator[None]:
    """Within it the keys of few queries are taken in parts of so many, at least; 0: all in one."""
    from vlattn_fast.kernels import attention_statistics, paged_attention_statistics, score_attention

    with ExitStack() as stack:
        stack.enter_context(_changed(paged_attention_statistics, "FEWEST_KEYS", keys or 1 << 20))
        for module in (score_attention, attention_statistics):
            stack.enter_context(_changed(module, "keys_of_a_part", lambda *_: keys))
        yield


@contextmanager
def whole_rows(whole: bool) -> Iterator[None]:
    """Within it tiles of congruence_loss hold whole rows, or parts of them. Whole rows are not rounded to tf32: that changes bits
    of floats, and integers have none of these."""
    from vlattn_fast.kernels import congruence_loss

    def unrounded(source: str) -> str:
        return source.replace("round_tf32(b_a), round_tf32(b_b)", "b_a, b_b")

    with _changed(congruence_loss, "_holds_rows", lambda *_: whole), changed_source("congruence_loss._dot_tf32", unrounded):
        yield


@contextmanager
def by_tiles(variant: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """The variant, within which no program has all keys of a head."""
    with tile_by_tile(), variant():
        yield


VARIANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "all keys": nullcontext,
    "few queries": lambda: parts_of_keys(32),
    "float mask": nullcontext,
    "long rows": lambda: whole_rows(False),
    "one row": nullcontext,
    "runs": nullcontext,
    "tangents": nullcontext,
}
# the others are of calls without gradients
OTHER_SIZES = {"all keys": {"rows": 1}, "few queries": {"queries": 6}, "one row": {"rows": 1}}


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    try:
        setattr(owner, name, value)
        yield
    finally:
        setattr(owner, name, before)


def unequal(x: Tensor, y: Tensor, low: bool) -> float:
    """The share of numbers that differ, with `low` in the lower 16 bits."""
    from ptx.sanitizers import payload

    difference = payload(x) - payload(y)
    return float(((difference & 0xFFFF if low else difference) != 0).float().mean())
