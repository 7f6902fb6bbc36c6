"""Tile edges and limits of the Triton kernels of score_attention; what they compute otherwise: tests/ops/test_score_attention.py.

Tiles are 32 x 32 in float32, 32 x 16 for sums over hidden units, 64 and 128 rows in 16 bit.
"""

from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops.backends import assert_refused
from tests.helpers.ops.interpreter import reads_outside
from tests.helpers.ops.score_cases import check
from vlattn_fast import scores as S
from vlattn_fast._ground import score_kinds
from vlattn_fast.backends.inputs import Attention, ScoreAttentionInputs
from vlattn_fast.backends.streaming._scores import score_tile
from vlattn_fast.kernels import _boxes, _configurations, _products_backward, score_attention
from vlattn_fast.scores import cosine

F32, BF16 = torch.float32, torch.bfloat16
KINDS = {
    "dot": lambda p: "dot",
    "cosine": lambda p: S.Cosine(eps=5.0),  # a clamp that acts on some pairs: otherwise the kernel would see plain products
    "tanh": lambda p: S.General(p["weight"], activation="tanh"),
    "sigmoid": lambda p: S.General(p["weight"], activation="sigmoid"),
    "additive": lambda p: S.Additive(p["vector"]),
}


def tensors(n: int, m: int, d: int = 3, dv: int = 5) -> dict[str, torch.Tensor]:
    """Of one head."""
    shapes = {"query": (1, 1, n, d), "key": (1, 1, m, d), "value": (1, 1, m, dv), "weight": (d, d), "vector": (1, d)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "kind, n, m",
    [("tanh", 1, 1), ("tanh", 31, 33), ("tanh", 65, 63), ("additive", 1, 1), ("additive", 15, 17), ("additive", 33, 31)],
)
@pytest.mark.parametrize("causal", (False, True))
def test_sizes_either_side_of_a_tile(causal: bool, kind: str, n: int, m: int) -> None:
    check("triton", tensors(n, m), KINDS[kind], cancels=True, is_causal=causal)  # of one key alone, gradients are zero


@pytest.mark.parametrize("kind, n, m, causal", [("dot", 65, 130, True), ("tanh", 63, 65, False), ("additive", 65, 33, True)])
def test_sizes_either_side_of_a_tile_in_16_bit(kind: str, n: int, m: int, causal: bool) -> None:
    check("triton", as_dtype(tensors(n, m), torch.bfloat16), KINDS[kind], cancels=True, is_causal=causal)


def test_tiles_of_128_rows() -> None:
    """Of long sequences: CLIP ViT-L/14@336's."""
    check("triton", as_dtype(tensors(577, 577, 16, 16), torch.bfloat16), KINDS["dot"])


class Ahead(dict[str, Any]):
    """Forward passes compute the scores of the next tile before this one's softmax."""

    def get(self, key: str, default: Any = None) -> Any:
        return {**default, "BLOCK_Q": 16, "BLOCK_KV": 16, "AHEAD": 1} if key.startswith("score_attention forward ") else default


@pytest.mark.parametrize("of", ["product", "units"])
def test_a_kind_without_a_formula_is_refused(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither backend takes it for the kind that its branches end with."""
    monkeypatch.setitem(score_kinds.KINDS, "new", score_kinds.Kind("", of))
    one = tensors(3, 3)
    attention = Attention(one["query"], one["key"], one["vector"], score="new")
    with pytest.raises(Exception, match="no formula for this kind"):
        score_attention.forward(ScoreAttentionInputs(attention, one["value"], None, None, 0.0, "triton"))
    with pytest.raises((KeyError, ValueError), match="new"):
        score_tile("new", one["query"], one["key"], one["vector"], 0.0)


@pytest.mark.parametrize(
    "kind, m, options",
    [
        ("dot", 15, {}),
        ("dot", 16, {"dropout_p": 0.3}),
        ("dot", 49, {"scale": -0.7}),
        ("dot", 64, {"is_causal": True}),
        ("dot", 50, {"key_mask": True}),
        ("dot", 50, {"attn_mask": True}),
        ("tanh", 33, {}),
        ("cosine", 40, {}),
    ],
)
def test_scores_that_are_computed_a_tile_ahead(
    kind: str, m: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_configurations, "OVERRIDES", Ahead(unused={}))
    masks = {"key_mask": torch.rand(1, m) > 0.4, "attn_mask": torch.randn(35, m)}
    options = {name: masks[name] if value is True and name in masks else value for name, value in options.items()}
    if "dropout_p" in options:
        inputs = tensors(35, m)
        q, k, v = inputs["query"], inputs["key"], inputs["value"]
        torch.manual_seed(1)
        out = va.score_attention(q, k, v, backend="triton", **options)
        torch.manual_seed(1)
        torch.testing.assert_close(out, va.score_attention(q, k, v, backend="streaming", **options))
    else:
        check("triton", tensors(35, m), KINDS[kind], **options)


@pytest.mark.parametrize("d, dv", [(24, 40), (16, 8)])
@pytest.mark.parametrize("m, options", [(7, {}), (16, {}), (41, {}), (35, {"is_causal": True}), (49, {"dropout_p": 0.3})])
def test_tiles_by_tensor_descriptors(m: int, options: dict[str, Any], d: int, dv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of rows (B, N, H, D), and grouped ones; the last tiles reach out of the tensors, in whose place there is NaN."""
    monkeypatch.setattr(_configurations, "OVERRIDES", Ahead(unused={}))
    monkeypatch.setattr(_products_backward, "whole_config", lambda *_: None)
    described = spied(monkeypatch)
    query, key, value = (room(2, rows, heads, size) for rows, heads, size in ((35, 4, d), (m, 2, d), (m, 2, dv)))
    outs = []
    for backend in ("triton", "streaming"):
        torch.manual_seed(1)
        outs.append(va.score_attention(query, key, value, backend=backend, enable_gqa=True, **options))
    torch.testing.assert_close(*outs, rtol=0.02, atol=0.02)
    assert described == [query.shape, key.shape, key.shape, value.shape, value.shape, outs[0].shape]


@pytest.mark.parametrize("why", ["float32", "12 features", "padding", "one key for all samples"])
def test_other_calls_have_no_descriptors(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_configurations, "OVERRIDES", Ahead(unused={}))
    monkeypatch.setattr(_products_backward, "whole_config", lambda *_: None)
    described = spied(monkeypatch)
    query, key, value = (room(2, 20, 2, 12 if why == "12 features" else 16) for _ in range(3))
    if why == "one key for all samples":
        key = key[:1].expand(2, -1, -1, -1)
    if why == "float32":
        query, key, value = query.float(), key.float(), value.float()
    options = {"key_mask": torch.arange(20).expand(2, 20) < 15} if why == "padding" else {}
    outs = [va.score_attention(query, key, value, backend=backend, **options) for backend in ("triton", "streaming")]
    torch.testing.assert_close(*outs, rtol=0.02, atol=0.02)
    assert described == []


def room(batch: int, rows: int, heads: int, size: int) -> torch.Tensor:
    """(B, H, N, D) in bfloat16, among NaN."""
    x = torch.full((batch, rows + 70, heads, size + 8), torch.nan, dtype=BF16)[:, :rows, :, :size]
    return x.copy_(torch.randn(x.shape)).transpose(1, 2)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the tensors that are described from now on."""
    shapes: list[torch.Size] = []

    def boxes_of(x: torch.Tensor, rows: int, columns: int) -> Any:
        shapes.append(x.shape)
        return _boxes.boxes_of(x, rows, columns)

    monkeypatch.setattr(score_attention, "boxes_of", boxes_of)
    return shapes


@pytest.mark.parametrize("m", (7, 16, 33, 64))
@pytest.mark.parametrize("options", ({}, {"is_causal": True}), ids=str)
def test_the_tile_ahead_lies_within_the_keys(options: dict[str, Any], m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none beyond the last one, and what stands behind the keys belongs to others."""
    monkeypatch.setattr(_configurations, "OVERRIDES", Ahead(unused={}))
    inputs = tensors(35, m)
    room = torch.full((1, 1, 2 * m + 64, 3), torch.nan)
    key = room[:, :, m : 2 * m].copy_(inputs["key"])
    with reads_outside(room, key) as found:
        out = va.score_attention(inputs["query"], key, inputs["value"], score="dot", backend="triton", **options)
    assert found == []
    torch.testing.assert_close(out, va.reference.score_attention(*list(inputs.values())[:3], score="dot", **options))


@pytest.mark.parametrize("left", (1, 16, 17, 33))
def test_the_last_tile_holds_what_is_left(left: int) -> None:
    """16 or 32 keys and queries, or as many as the others, where no mask is causal."""
    check("triton", as_dtype(tensors(64 + left, 128 + left), torch.bfloat16), KINDS["dot"])


@pytest.mark.parametrize("zero", (False, True))
@pytest.mark.parametrize(
    "n, m, dtype, causal", [(70, 83, F32, False), (70, 83, F32, True), (97, 145, BF16, False), (193, 193, BF16, False)]
)
def test_cosine_with_and_without_a_clamp(
    n: int, m: int, dtype: torch.dtype, causal: bool, zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the score itself sees that no clamp acts, and asks for plain products; on a GPU the kernel does."""
    monkeypatch.setattr(cosine, "readable", lambda x: False)
    inputs = tensors(n, m)
    if zero:  # within a whole tile; norms are read 128 at a time
        inputs["key"][0, 0, 40 if m < 192 else 130] = inputs["query"][0, 0, 3 if n < 192 else 131] = 0.0
    check("triton", as_dtype(inputs, dtype), lambda p: "cosine", is_causal=causal)


def test_a_clamp_in_one_of_the_heads_that_share_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosine, "readable", lambda x: False)
    inputs = {"query": torch.randn(1, 4, 40, 3), "key": torch.randn(1, 2, 70, 3), "value": torch.randn(1, 2, 70, 5)}
    inputs["query"][0, 1, 7] = 0.0
    check("triton", inputs, lambda p: "cosine", enable_gqa=True)


@pytest.mark.parametrize("kind", ("sigmoid", "cosine", "additive"))
@pytest.mark.parametrize("d, dv", [(1, 1), (17, 3), (64, 40), (80, 136)])
def test_feature_sizes(d: int, dv: int, kind: str) -> None:
    n, m = (5, 7) if kind == "additive" else (20, 37)
    check("triton", tensors(n, m, d, dv), KINDS[kind])


@pytest.mark.parametrize("wide", ("features", "values"))
def test_the_widest_that_it_takes(wide: str) -> None:
    check("triton", tensors(5, 7, *((256, 8) if wide == "features" else (8, 256))), KINDS["tanh"])


@pytest.mark.parametrize(
    "kind, d, dv, options",
    [
        ("dot", 192, 256, {"attn_mask": True}),
        ("cosine", 256, 130, {"is_causal": True}),
        ("cosine", 130, 192, {}),
        ("tanh", 200, 16, {"key_mask": True}),
    ],
)
def test_float32_rows_that_are_multiplied_in_parts(kind: str, d: int, dv: int, options: dict[str, Any]) -> None:
    """Of more than 128 features, 64 at a time; over several tiles of 64."""
    n, m = 70, 83
    masks = {"key_mask": torch.rand(1, m) > 0.4, "attn_mask": torch.where(torch.rand(n, m) > 0.3, torch.randn(n, m), -torch.inf)}
    inputs = {name: x for name, x in tensors(n, m, d, dv).items() if name != "vector"}
    inputs["weight"] = inputs["weight"] / d
    inputs["query"][0, 0, 3] = inputs["key"][0, 0, 40] = 0.0  # cosine's clamp
    check("triton", inputs, KINDS[kind], **{name: masks.get(name, value) for name, value in options.items()})


@pytest.mark.parametrize("offset, dtype", [*((x, torch.float32) for x in (8.0, 13.0, 21.0, 1000.0)), (13.0, torch.bfloat16)])
def test_additive_scores_of_any_range(offset: float, dtype: torch.dtype) -> None:
    """Exponentials are met as a product, as a clamped product where two share a reciprocal, and not at all beyond e^44."""
    for signs in ((1, -1), (1, 1), (-1, -1)):  # what cancels, and what saturates
        inputs = tensors(20, 36, 4)
        inputs["query"][..., :10, :] += signs[0] * offset  # some tiles of either kind
        inputs["key"][..., :20, ::2] += signs[1] * offset
        inputs["key"][..., 1::2] += offset
        check("triton", as_dtype(inputs, dtype), KINDS["additive"], cancels=True)


def test_the_largest_key_stands_behind_the_128th() -> None:
    """It decides for its whole head how tiles take tanh: without it, products of two exponentials would not be clamped."""
    inputs = tensors(4, 131, 4)
    inputs["key"] /= 4.0
    inputs["query"][..., 1, :], inputs["key"][..., 129, :] = -15.0, -21.0
    check("triton", inputs, KINDS["additive"], cancels=True)


def test_a_series_is_refused() -> None:
    x, score = torch.randn(1, 1, 3, 8), S.Additive(torch.randn(8), method="series", tolerance=0.1)
    assert_refused("triton", "sine series", lambda: va.score_attention(x, x, x, score=score, backend="triton"))
