"""Tangents of score_attention by the CPU kernel, as the backend's functions give them: sizes around tiles of queries, blocks and
panels of keys, masks, dtypes, layouts, dropout, large offsets and logits, and the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.compare import assert_all_close_to
from tests.helpers.ops import tile_edges
from tests.helpers.ops.backends import LOW
from tests.helpers.ops.score_cases import MASKS, lay_out, padding
from vlattn_fast._ground.tensors import compute_dtype, expand_heads
from vlattn_fast.backends.cpu import score_attention as kernels
from vlattn_fast.backends.inputs import ScoreAttentionInputs, ScoreAttentionJvpInputs, schema_of
from vlattn_fast.backends.streaming._dropout import keep_factor

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch.func.jvp itself

BF16, SCALE = torch.bfloat16, 0.3
FIELDS = ("query", "key", "value", "row_bias")
LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")
ODD = ((4, 4), (5, 3), (16, 33), (31, 16), (64, 65), (1, 257))  # numbers of a query and of a value
# bfloat16: from 17 queries on these take panels of up to 512 keys, beyond 64 features of up to 256, in chunks of 64
PANELS = ((17, 31), (31, 33), (33, 64), (48, 65), (65, 130), (257, 40), (40, 513), (20, 1025))
FEATURES = ((16, 16), (17, 33), (33, 17), (64, 64), (80, 40), (128, 96))


def inputs(
    n: int, m: int, *, b: int = 1, h: int = 2, kv: int = 2, d: int = 17, dv: int = 9, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """query, key and value, with their tangents."""
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d), "value": (b, kv, m, dv)}
    shapes |= {f"{name}_tangent": shape for name, shape in shapes.items()}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def with_bias(tensors: dict[str, Tensor], groups: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """With row_bias, which masks some pairs, and its tangent; and groups of the keys, of which some have none."""
    (b, h, n, _), m = tensors["query"].shape, tensors["key"].shape[2]
    bias = torch.randn(b, h, n, groups).masked_fill(torch.rand(b, h, n, groups) < 0.2, -torch.inf)
    key_groups = torch.randint(-1, groups, (b, m))
    return tensors | {"row_bias": bias, "row_bias_tangent": torch.randn(b, h, n, groups)}, key_groups


def tangents(
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_groups: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float = SCALE,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel's tangents as a function of the tensors. That of the log-sum-exp is cast as the operator does it."""

    def call(**x: Tensor) -> tuple[Tensor, Tensor]:
        row_bias = x.get("row_bias")
        masks = {"attn_mask": attn_mask, "key_mask": key_mask, "row_bias": row_bias, "key_groups": key_groups, "seed": seed}
        numbers = {"score": "dot", "parameter": 0.0, "scale": scale, "dropout_p": dropout_p, "is_causal": is_causal}
        shared = {name: x[name] for name in FIELDS[:3]} | masks | numbers | {"vector": None, "backend": "cpu"}
        out, lse = kernels.forward(schema_of(ScoreAttentionInputs).from_named(shared | {"sink": None}))
        given = {f"{name}_tangent": x.get(f"{name}_tangent") for name in FIELDS} | {"vector_tangent": None}
        made, of_lse = kernels.jvp(schema_of(ScoreAttentionJvpInputs).from_named(given | shared | {"out": out, "lse": lse}))
        return made, of_lse.to(compute_dtype(out))

    return call


def formula(
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_groups: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float = SCALE,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same by torch.func.jvp of a softmax."""

    def attention(query: Tensor, key: Tensor, value: Tensor, row_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if key_mask is not None:
            key, value = (torch.where(key_mask[:, None, :, None], x, 0.0) for x in (key, value))
        key, value = (expand_heads(x, query.shape[1]) for x in (key, value))
        sums = compute_dtype(query)
        logits = (query @ key.mT).to(sums) * scale
        visible = torch.ones_like(logits, dtype=torch.bool)
        if key_mask is not None:
            visible = visible & key_mask[:, None, None]
        if is_causal:
            visible = visible.tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        added = [] if attn_mask is None or attn_mask.dtype == torch.bool else [attn_mask]
        if row_bias is not None:
            assert key_groups is not None
            row_bias = torch.cat([row_bias, torch.zeros_like(row_bias[..., :1])], -1)
            added.append(row_bias.gather(3, (key_groups % row_bias.shape[3])[:, None, None].expand(logits.shape)))
        for bias in added:
            visible, logits = visible & (bias > -torch.inf), logits + torch.where(bias > -torch.inf, bias, 0.0).to(sums)
        logits = torch.where(visible, logits, -torch.inf)
        top = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(sums).min)
        e = torch.where(visible, (logits - top).exp(), 0.0)
        total = e.sum(-1, keepdim=True)
        prob, lse = e / torch.where(total > 0, total, 1.0), (top + torch.where(total > 0, total, 1.0).log())[..., 0]
        if dropout_p > 0:
            whole = tuple(slice(0, size) for size in logits.shape[:3])
            prob = prob * keep_factor(seed, dropout_p, logits.shape[1:3], logits.shape[3], whole, sums)
        return prob.to(query.dtype) @ value, lse

    def call(**x: Tensor) -> tuple[Tensor, Tensor]:
        names = [name for name in FIELDS if name in x]
        given = tuple(x[name] for name in names)
        directions = tuple(x.get(f"{name}_tangent", torch.zeros_like(x[name])) for name in names)
        _, made = torch.func.jvp(attention, given, directions)
        return made

    return call


def check(tensors: dict[str, Tensor], scale: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """Both tangents against the formula by the tolerance rule, with errors held to numbers of this size."""
    scales = {"out0": scale, "out1": scale}
    return assert_all_close_to(tangents(**options), formula(**options), tensors, scales=scales, grads=False)


# ---- sizes, masks and layouts


@pytest.mark.parametrize("n, m", tile_edges.CPU)
def test_sizes_either_side_of_a_tile(n: int, m: int) -> None:
    check(inputs(n, m))


@pytest.mark.parametrize("mask, size, dtype", tile_edges.covering(tuple(MASKS), tile_edges.CPU_SEVERAL, LOW))
def test_masks_across_tiles_and_blocks(mask: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    n, m = size
    found = check(inputs(n, m, b=2, dtype=dtype), **MASKS[mask](n, m))
    assert not any(x.isnan().any() for x in found.values())


@pytest.mark.parametrize("size, features, mask", tile_edges.covering(PANELS, FEATURES, ("none", *MASKS)))
def test_edges_of_panels(size: tuple[int, int], features: tuple[int, int], mask: str) -> None:
    (d, dv), options = features, {} if mask == "none" else MASKS[mask](*size)
    check(inputs(*size, b=2, d=d, dv=dv, dtype=BF16), **options)


@pytest.mark.parametrize("sizes, layout, dtype, n", tile_edges.covering(ODD, LAYOUTS, LOW, (1, 2, 35)))
def test_head_sizes_and_layouts(sizes: tuple[int, int], layout: str, dtype: torch.dtype, n: int) -> None:
    d, dv = sizes
    check({name: lay_out(x, layout) for name, x in inputs(n, 33, b=2, d=d, dv=dv, dtype=dtype).items()})


@pytest.mark.parametrize("n, dtype", tile_edges.covering((20, *tile_edges.CPU_COPIED), LOW))
def test_key_heads_that_are_shared(n: int, dtype: torch.dtype) -> None:
    """With padding, under the causal mask: later tiles see more of a block that is copied."""
    check(inputs(n, n, b=2, h=4, dtype=dtype), key_mask=padding(n), is_causal=True)


@pytest.mark.parametrize("size, dtype, mask", tile_edges.covering(tile_edges.CPU_SEVERAL, LOW, ("none", "float", "float64")))
def test_biases_of_groups(size: tuple[int, int], dtype: torch.dtype, mask: str) -> None:
    tensors, key_groups = with_bias(inputs(*size, b=2, dtype=dtype))
    options = {} if mask == "none" else MASKS["float"](*size)
    if mask == "float64":
        options = {"attn_mask": options["attn_mask"].double()}
    check(tensors, key_groups=key_groups, **options)
    del tensors["row_bias_tangent"]
    check(tensors, key_groups=key_groups, **options)


@pytest.mark.parametrize("size, dtype", tile_edges.covering(tile_edges.CPU_SEVERAL, LOW))
def test_dropout(size: tuple[int, int], dtype: torch.dtype) -> None:
    check(inputs(*size, b=2, dtype=dtype), dropout_p=0.4, seed=torch.tensor(2**40 + 17))


def test_empty_tensors() -> None:
    for n, m, dv in ((0, 3, 4), (3, 0, 4), (3, 3, 0)):
        out, lse = tangents()(**inputs(n, m, dv=dv))
        assert out.shape == (1, 2, n, dv) and lse.shape == (1, 2, n) and not out.any() and (m > 0 or not lse.any())


# ---- what is not visible


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("n, m", ((3, 40), (40, 40), (40, 900)))
@pytest.mark.parametrize("fill", (torch.nan, torch.inf))
def test_padding_is_not_read(n: int, m: int, fill: float, dtype: torch.dtype) -> None:
    """Nor tangents of keys whose pairs an attn_mask masks, or of biases of -Inf; a value is multiplied by 0."""
    tensors, key_groups = with_bias(inputs(n, m, b=2, d=32, dv=16, dtype=dtype))
    key_mask, shown = torch.rand(2, m) > 0.3, torch.rand(m) > 0.3
    key_mask[1] = False
    options = {"key_mask": key_mask, "attn_mask": shown.expand(n, m)}
    plain = {name: x for name, x in tensors.items() if not name.startswith("row_bias")}
    for given, more in ((tensors, {"key_groups": key_groups}), (plain, {})):
        hidden = {name: x.clone() for name, x in given.items()}
        for name in ("key", "value"):
            for x in (hidden[name], hidden[f"{name}_tangent"]):
                x[~key_mask[:, None].expand(x.shape[:3])] = fill
        hidden["key_tangent"][:, :, ~shown] = fill
        if more:
            hidden["row_bias_tangent"][hidden["row_bias"] == -torch.inf] = fill
        for x, y in zip(tangents(**options, **more)(**hidden), tangents(**options, **more)(**given), strict=True):
            assert torch.equal(x, y) and not x[1].any()


@pytest.mark.parametrize("dtype", LOW)
def test_rows_without_a_key(dtype: torch.dtype) -> None:
    """Zeros, also where a query's tangent is NaN, or a value's that no row sees."""
    for n, m in ((5, 20), (40, 40), (40, 900)):
        tensors, mask = inputs(n, m, d=32, dv=16, dtype=dtype), torch.ones(n, m, dtype=torch.bool)
        mask[[0, n - 1]] = False
        tensors["query_tangent"][:, :, 0] = torch.nan
        for x in tangents(attn_mask=mask)(**tensors):
            assert not x[:, :, [0, n - 1]].any() and x[:, :, 1:-1].isfinite().all()
        tensors["value_tangent"][:] = torch.nan
        assert not any(x.any() for x in tangents(attn_mask=mask & False)(**tensors))


# ---- large numbers


@pytest.mark.parametrize("n, m", ((3, 40), (40, 577), (40, 1100)))
def test_an_offset_of_all_tangents_of_a_row(n: int, m: int) -> None:
    """Of 1,000 in the tangents of the logits, where float32 has steps of 6e-5: what is left is their mean in each row. The plain
    sweep, P x V less the mean times P V, is wrong by 2e-4 and more."""
    tensors = inputs(n, m, d=64, dv=64)
    tensors |= {"row_bias": torch.zeros(1, 2, n, 1), "row_bias_tangent": torch.full((1, 2, n, 1), 1000.0)}
    for first in (0, m // 2):  # also where the first keys have no weight
        mask = torch.zeros(n, m)
        mask[:, :first] = -200.0
        options = {"key_groups": torch.zeros(1, m, dtype=torch.int64), "attn_mask": mask}
        exact = formula(**options)(**{name: x.double() for name, x in tensors.items()})
        out, lse = tangents(**options)(**tensors)
        assert (out - exact[0]).abs().max() < 4e-5
        assert (lse - exact[1]).abs().max() < 1e-4  # two steps


@pytest.mark.parametrize("n", (3, 40))
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("offset", (torch.finfo(torch.float32).min, -1e9, -1e4, 1e9))
def test_finite_masks(n: int, dtype: torch.dtype, offset: float) -> None:
    """A row with one large number throughout attends to all its keys evenly, however few digits its log-sum-exp has."""
    for m in (40, 900):
        tensors, mask = inputs(n, m, d=32, dv=16, dtype=dtype), torch.randn(n, m)
        mask[[0, n - 1]] = offset
        for given in (mask, mask.double()):
            check(tensors, attn_mask=given)


@pytest.mark.parametrize("n", (1, 5, 16, 40))
@pytest.mark.parametrize("dtype", LOW[:2])
def test_large_logits(n: int, dtype: torch.dtype) -> None:
    """Of 1e8, whose sums other kernels round otherwise: each row still attends to the largest ones, with weights of sum 1."""
    for m in (40, 900):
        tensors = inputs(n, m, d=33, dv=16, dtype=dtype)
        tensors["query"] *= 1e8
        tensors["value_tangent"] = torch.ones_like(tensors["value"])
        tensors |= {f"{name}_tangent": torch.zeros_like(tensors[name]) for name in ("query", "key")}
        out, lse = tangents()(**tensors)
        torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=4 * torch.finfo(dtype).eps)
        assert not lse.any()


# ---- the same bits


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("n, m", ((70, 70), (5, 900), (40, 900)))
def test_same_bits(n: int, m: int, dtype: torch.dtype) -> None:
    """For any number of threads, and for a sample alone and in a batch."""
    tensors = inputs(n, m, b=3, h=4, d=32, dv=16, dtype=dtype)
    options = {"is_causal": n == m, "key_mask": torch.rand(3, m) > 0.2}
    torch.set_num_threads(1)
    whole = tangents(**options)(**tensors)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(whole, tangents(**options)(**tensors), strict=True))
    for b in range(3):
        alone = {name: x[b : b + 1] for name, x in tensors.items()}
        again = tangents(**options | {"key_mask": options["key_mask"][b : b + 1]})(**alone)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(whole, again, strict=True))
