"""Random sizes, masks, memory layouts and numbers for the fuzzer's calls, and what several operators draw alike."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.checking.cases._example import Tensors

# 0, 1, odd sizes and both sides of tile edges; small sizes come more often, so that a call takes milliseconds
LENGTHS = (0, 1, 1, 2, 3, 5, 7, 11, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 127, 129)
DIMS = (1, 2, 3, 5, 8, 8, 16, 16, 24, 31, 32, 40, 64, 65)
LAYOUTS = (
    "contiguous",
    "heads last",  # (B, N, H, D) in memory, like the output of projections
    "features first",  # the last stride is not 1
    *("rows padded", "every second row", "every second number", "offset by one", "part of a longer batch"),
    "fused",  # one of three tensors inside one, such as after a joint projection
    *("one batch for all", "one head for all", "one row for all"),  # stride 0
)
VECTOR_LAYOUTS = ("every second number", "offset by one")
VALUES = ("normal", "normal", "normal", "small", "large", "constant", "signs", "one-hot", "with zero rows", "cancelling")
EXTREME_VALUES = ("overflowing norms", "vanishing norms")  # for scores that do not depend on lengths
MASKS = (
    *("none", "bool", "bool, rows masked", "float", "float32", "float, -inf", "float, NaN", "float, finite rows"),
    *("float32, finite rows", "key", "key, samples masked", "causal", "key and causal", "bool and key"),
    "float and key and causal",
)
PAIRS = 1 << 15  # of query and key over batch and heads, at most
FEW_PAIRS = 1 << 12  # if kernels are interpreted or emulated


class Dice:
    """The random choices of one seed: Python's generator draws options, torch's draws numbers."""

    def __init__(self, seed: str, pairs: int = PAIRS, nan: bool = True, score: str | None = None) -> None:
        self.pairs, self.gap = pairs, torch.nan if nan else 0.0  # fills the gaps between rows, and masks of kind "float, NaN"
        self.choice = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.choice.getrandbits(60))
        self.drawn: dict[str, Any] = {}
        self.score = score  # of every call, if it is named

    def pick(self, name: str, options: Any) -> Any:
        """One of the options, noted under `name`."""
        drawn = self.choice.choice(tuple(options))
        self.drawn[name] = self.score if name == "score" and self.score else drawn
        return self.drawn[name]

    def chance(self, p: float) -> bool:
        return self.choice.random() < p

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def bools(self, *shape: int, p: float = 0.7) -> Tensor:
        return torch.rand(shape, generator=self.generator) < p

    def numbers(self, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
        """float64 numbers of a kind of VALUES, or of one of the norms that leave the range of `dtype`."""
        x, half = self.randn(*shape), dtype == torch.float16
        factors = {"small": 1e-3, "large": 8.0}
        factors |= {"overflowing norms": 9000.0 if half else 1e20}  # the sum of their squares overflows
        factors |= {"vanishing norms": 1e-4 if half else 1e-25}
        match kind:
            case "constant":
                return torch.full(shape, 0.75, dtype=torch.float64)
            case "signs":
                return x.sign()
            case "one-hot":
                return torch.where(x == x.amax(-1, keepdim=True), 4.0, 0.0) if x.numel() else x
            case "with zero rows":
                return torch.where(self.bools(*shape[:-1])[..., None], x, 0.0)
            case "near 1" | "near -1":
                return 1e-3 * x + float(kind.removeprefix("near "))
        return x * factors[kind] if kind in factors else x

    def sizes(self, square: bool = False) -> tuple[int, int, int, int, int]:
        """B, H, Hkv, N, M; M = N if tokens attend to themselves."""
        while True:
            batch, heads = self.choice.choice((1, 1, 2, 3, 0 if self.chance(0.05) else 2)), self.choice.choice((1, 2, 3, 4, 6, 8))
            queries, keys = self.choice.choice(LENGTHS), self.choice.choice(LENGTHS)
            keys = queries if square else keys
            if batch * heads * queries * keys <= self.pairs:
                break
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        key_heads = self.choice.choice(divisors) if self.chance(0.3) else heads
        self.drawn |= {"B": batch, "H": heads, "Hkv": key_heads, "N": queries, "M": keys}
        return batch, heads, key_heads, queries, keys

    def laid_out(self, name: str, x: Tensor, dtype: torch.dtype, repeated: bool = True) -> Tensor:
        """`x` in `dtype` in a layout of LAYOUTS, of stride 0 only where `repeated` allows it."""
        layout = self.choice.choice(LAYOUTS if repeated else LAYOUTS[:-3]) if self.chance(0.5) else "contiguous"
        self.drawn.pop(f"layout of {name}", None)  # of another tensor that this one takes the place of
        if layout != "contiguous":
            self.drawn[f"layout of {name}"] = layout
        return lay_out(x.to(dtype), layout, self.gap)


def lay_out(x: Tensor, layout: str, gap: float = torch.nan) -> Tensor:
    """`x` in another memory layout, with `gap`, or 0 if its dtype has no NaN, in the gaps; layouts of stride 0 repeat the first
    part. Vectors have those of VECTOR_LAYOUTS."""
    rank, shape = x.dim(), list(x.shape)
    match layout:
        case "heads last" if rank == 4:
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "features first":
            return x.mT.contiguous().mT
        case "one batch for all":
            return x[:1].contiguous().expand(shape)
        case "one head for all" if rank == 4:
            return x[:, :1].contiguous().expand(shape)
        case "one row for all":
            return x[..., :1, :].contiguous().expand(shape)
    around = {
        "rows padded": ([*shape[:-1], shape[-1] + 3], (..., slice(0, shape[-1]))),
        "every second row": ([*shape[:-2], 2 * math.prod(shape[-2:-1]), shape[-1]], (..., slice(None, None, 2), slice(None))),
        "every second number": ([*shape[:-1], 2 * shape[-1]], (..., slice(None, None, 2))),
        "part of a longer batch": ([shape[0] + 2, *shape[1:]], (slice(1, shape[0] + 1),)),
        "fused": ([*shape[:-1], 3 * shape[-1]], (..., slice(shape[-1], 2 * shape[-1]))),
        "offset by one": ([math.prod(shape) + 1], (slice(1, None),)),
    }
    if layout not in around:
        return x
    size, index = around[layout]
    part = torch.full(size, gap if x.is_floating_point() else 0, dtype=x.dtype)[index]
    if layout == "offset by one":
        part = part.view(shape)
    return part.copy_(x)


def draw_masks(dice: Dice, batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype) -> dict[str, Any]:
    """attn_mask, key_mask, is_causal."""
    kind = dice.pick("mask", MASKS)
    masks: dict[str, Any] = {"is_causal": "causal" in kind}
    shape = dice.choice.choice(((batch, heads), (batch, 1), (1, heads), (1, 1))) + (queries, keys)
    if kind.startswith("bool"):
        visible = dice.bools(*shape)
        if "rows masked" in kind:
            visible &= dice.bools(*shape[:-1])[..., None]
        masks["attn_mask"] = visible
    elif kind.startswith("float"):
        bias = dice.randn(*shape).to(torch.float32 if "float32" in kind else dtype)
        if "-inf" in kind:
            bias.masked_fill_(~dice.bools(*shape), -torch.inf)
        if "NaN" in kind:
            bias.masked_fill_(dice.bools(*shape, p=0.02), dice.gap)
        if "finite rows" in kind:
            low = dice.pick("finite", ("finfo.min", "-1e9", "-1e4"))
            value = torch.finfo(bias.dtype).min if low == "finfo.min" else max(float(low), torch.finfo(bias.dtype).min)
            bias.masked_fill_(~dice.bools(*shape[:-1])[..., None], value)
            bias.masked_fill_(~dice.bools(*shape, p=0.9), value)
        masks["attn_mask"] = bias[0, 0] if batch and dice.chance(0.3) else bias
    if "key" in kind:
        masks["key_mask"] = dice.bools(batch, keys)
        if "samples masked" in kind:
            masks["key_mask"] &= dice.bools(batch)[:, None]
    return masks


def poison(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """(B, Hkv, M, D) with NaN and Inf in the rows of padding."""
    if key_mask is None:
        return x
    bad = torch.where(torch.arange(x.shape[2])[:, None] % 2 == 0, torch.nan, torch.inf).to(x.dtype)
    return torch.where(key_mask[:, None, :, None], x, bad)


def attention_inputs(
    dice: Dice, dtype: torch.dtype, *, square: bool = False, value: bool = True, values: tuple[str, ...] = VALUES
) -> tuple[Tensors, dict[str, Any]]:
    """query, key and value of one call, and its masks, scale and enable_gqa."""
    batch, heads, key_heads, queries, keys = dice.sizes()
    if square:
        keys = dice.drawn["M"] = queries
    dim = dice.pick("D", DIMS)
    value_dim = dice.choice.choice(DIMS) if dice.chance(0.3) else dim
    dice.drawn["Dv"] = value_dim
    options = draw_masks(dice, batch, heads, queries, keys, dtype)
    options |= {"scale": dice.pick("scale", (None, None, 0.125, 1.0, 0.0, -0.5)), "enable_gqa": key_heads != heads}
    kind = dice.pick("values", values)
    kinds = ("near 1", "near -1") if kind == "cancelling" else (kind, kind)
    padding = options.get("key_mask")
    tensors = {
        "query": dice.laid_out("query", dice.numbers((batch, heads, queries, dim), kinds[0], dtype), dtype),
        "key": poison(dice.numbers((batch, key_heads, keys, dim), kinds[1], dtype), padding),
    }
    if value:
        tensors["value"] = poison(dice.randn(batch, key_heads, keys, value_dim), padding)
    for name in ("key", "value") if value else ("key",):  # a repeated row would carry the NaN of padding into real rows
        tensors[name] = dice.laid_out(name, tensors[name], dtype, repeated=padding is None)
    return tensors, options


def softcap_and_sink(dice: Dice, tensors: Tensors, dtype: torch.dtype, takes_softcap: bool = True) -> dict[str, Any]:
    """The softcap of a call, if it has one; its sink goes to `tensors`."""
    if dice.pick("sink", (None, None, None, "normal", "large", "small")) is not None:
        factor = {"normal": 1.0, "large": 20.0, "small": -20.0}[dice.drawn["sink"]]
        spread = dice.randn(tensors["query"].shape[1])
        tensors["sink"] = (spread if factor == 1.0 else factor + spread).to(dtype)
    softcap = dice.pick("softcap", (None, None, None, 0.5, 5.0, 50.0) if takes_softcap else (None,))
    return {} if softcap is None else {"softcap": softcap}


def group_bias(dice: Dice, tensors: Tensors, options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The groups of a call that has a bias of them; the bias goes to `tensors`. `options` may have groups of keys."""
    mask = dice.drawn["mask"]
    kinds = ["normal", "large"] + ["-inf"] * (mask != "float, NaN")  # a row of NaN has NaN in the gradients of masked pairs, too
    if mask in ("none", "float", "float32", "float, NaN") and dice.drawn["values"] != "with zero rows":  # whose relu has none
        kinds.append("NaN")
    kind = dice.pick("group_bias", [None] * 4 + kinds)
    if kind is None:
        return {}
    (batch, heads, queries, _), keys = tensors["query"].shape, tensors["key"].shape[2]
    query_count, key_count = dice.pick("groups", ((1, 1), (2, 3), (8, 8), (3, 17)))
    key_count = options.get("num_groups", key_count)
    size = (batch, heads, query_count, key_count) if dice.chance(0.5) else (heads, query_count, key_count)
    bias = dice.randn(*size) * (8.0 if kind == "large" else 1.0)
    if kind in ("-inf", "NaN"):
        bias.masked_fill_(~dice.bools(*size), -torch.inf if kind == "-inf" else dice.gap)
    tensors["group_bias"] = bias.to(dtype)
    groups = {}
    for name, count, length in (("query_groups", query_count, queries), ("key_groups", key_count, keys)):
        shape = (batch, length) if dice.chance(0.5) else (length,)
        groups[name] = options[name] if name in options else torch.randint(-1, count, shape, generator=dice.generator)
    return groups


def head_gate(dice: Dice, tensors: Tensors, dtype: torch.dtype) -> None:
    """Adds gates of heads, (H,) or (B, H), to the tensors of some calls."""
    batch, heads, *_ = tensors["query"].shape
    shape = dice.pick("head_gate", (None, None, None, (heads,), (batch, heads)))
    if shape is not None:
        tensors["head_gate"] = dice.randn(*shape).to(dtype)


def map_inputs(dice: Dice, dtype: torch.dtype) -> tuple[Tensors, dict[str, Any], bool]:
    """Arguments that relevancy_step and attention_map share, and whether the call has gradients that rounding does not choose.

    Value and grad_output are drawn only if the rule takes them. The gradient jumps if dA = dO . V changes its sign. So half
    of these calls are drawn with entries of one magnitude in an odd number of columns, which never add up to nothing.
    """
    tensors, options = attention_inputs(dice, dtype)
    options |= {"rule": dice.pick("rule", ("gradient", "attention")), "row_normalize": dice.pick("row_normalize", (False, True))}
    value, differentiable = tensors.pop("value"), True
    if options["rule"] == "gradient":
        grad_output = dice.randn(*tensors["query"].shape[:3], value.shape[3])
        if differentiable := dice.pick("signs", (False, True)):
            odd = value.shape[3] - 1 + value.shape[3] % 2
            value = torch.where(value.isfinite(), value.sign(), value)[..., :odd]
            value = dice.laid_out("value", value, dtype, repeated="key_mask" not in options)
            grad_output = grad_output.sign()[..., :odd]
        tensors |= {"value": value, "grad_output": dice.laid_out("grad_output", grad_output, dtype)}
    if options["row_normalize"] and dtype == torch.float16:  # the formula's own overflows if a row's sum is subnormal
        differentiable = False
    return tensors, options, differentiable
