"""The Triton kernels of congruence_loss in the interpreter against the formula: the loss of each sample and every gradient."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from compare import as_dtype, outputs_and_grads

import vlattn_fast as va
from tests.ops import congruence_loss_cases
from tests.ops.congruence_loss_cases import CROSS, call, make, masks, prefix
from tests.ops.score_cases import LAYOUTS, lay_out
from vlattn_fast.ops.congruence_loss import DIRECTIONS, KINDS

check = partial(congruence_loss_cases.check, "triton")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_and_directions(kind: str, direction: str) -> None:
    check(make(15, 33, b=2, cross=True), kind=kind, direction=direction)


@pytest.mark.parametrize("kind", KINDS)
def test_real_sizes(kind: str) -> None:
    check(make(40, 70, h=2, d=16), 2.0, kind=kind, text_mask=prefix(40, 31), image_mask=prefix(70, 57))


@pytest.mark.parametrize(
    "kind, words, regions",
    [
        ("cacr", 1, 1),
        ("cacr", 17, 63),
        ("cacr", 65, 1),
        ("iais_singular", 1, 15),
        ("iais_singular", 100, 17),
        ("iais_distributed", 63, 65),
        ("iais_distributed", 1, 16),
    ],
)
def test_sizes_either_side_of_a_tile(kind: str, words: int, regions: int) -> None:
    check(make(words, regions, h=1, d=5), kind=kind)


@pytest.mark.parametrize(
    "kind, words, regions, direction",
    [
        ("cacr", 5, 130, "both"),
        ("cacr", 160, 9, "image"),
        ("iais_singular", 9, 257, "text"),
        ("iais_singular", 129, 7, "both"),
        ("iais_distributed", 130, 15, "both"),
        ("iais_distributed", 3, 193, "text"),
    ],
)
def test_rows_longer_than_a_tile(kind: str, words: int, regions: int, direction: str) -> None:
    x = make(words, regions, h=1 if words + regions > 200 else 2, d=4, cross=kind == "iais_distributed")
    check(x, kind=kind, direction=direction, text_mask=prefix(words, words - 2), image_mask=prefix(regions, regions - 2))


@pytest.mark.parametrize("kind, d", [("cacr", 1), ("iais_singular", 17), ("iais_distributed", 65), ("cacr", 160)])
def test_head_sizes(kind: str, d: int) -> None:
    check(make(9, 20, d=d), kind=kind, scale=0.1)


@pytest.mark.parametrize("scale", (0.0, -0.7))
@pytest.mark.parametrize("kind", KINDS)
def test_scale(kind: str, scale: float) -> None:
    check(make(15, 12, cross=True), kind=kind, scale=scale)


@pytest.mark.parametrize(
    "kind, dtype, words, regions",
    [
        ("cacr", torch.bfloat16, 40, 70),
        ("iais_singular", torch.bfloat16, 40, 70),
        ("iais_distributed", torch.bfloat16, 40, 70),
        ("cacr", torch.float16, 70, 20),
        ("iais_singular", torch.float16, 20, 70),
        ("iais_distributed", torch.float16, 70, 33),
        ("cacr", torch.float16, 140, 36),
        ("iais_singular", torch.bfloat16, 140, 36),
        ("iais_distributed", torch.float16, 140, 36),
    ],
)
def test_half_precision(kind: str, dtype: torch.dtype, words: int, regions: int) -> None:
    x = as_dtype(make(words, regions, d=16, cross=True), dtype)
    check(x, kind=kind, text_mask=prefix(words, words - 9), image_mask=prefix(regions, regions - 3))


@pytest.mark.parametrize("direction", ("text", "image"))
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_in_one_direction(kind: str, direction: str) -> None:
    check(as_dtype(make(20, 33, d=16, cross=True), torch.bfloat16), kind=kind, direction=direction)


@pytest.mark.parametrize("kind", KINDS)
def test_small_gradients_in_float16(kind: str) -> None:
    """Of the order that a loss of many tokens, heads and samples sends: gradients of scores that float16 cannot hold."""
    x = as_dtype(make(64, 64, d=16), torch.float16)
    sent = [torch.full((1,), 2.0**10)]
    small = outputs_and_grads(call(va.congruence_loss, kind=kind, backend="triton"), x, sent)
    exact = outputs_and_grads(call(va.reference.congruence_loss, kind=kind), as_dtype(x, torch.float64), sent)
    for name in x:
        grad, wanted = small[f"grad {name}"].double(), exact[f"grad {name}"]
        assert float((grad - wanted).abs().max()) < 4e-3 * float(wanted.abs().max()), name


@pytest.mark.parametrize(
    "kind, name",
    [
        ("cacr", "text only"),
        ("cacr", "empty samples"),
        ("iais_singular", "ragged"),
        ("iais_distributed", "scattered"),
        ("iais_distributed", "empty samples"),
    ],
)
def test_padding_reaches_nothing(kind: str, name: str) -> None:
    x, given = make(15, 20, b=3, d=4, cross=name == "scattered"), masks(name)
    check(x, kind=kind, **given)
    clean = outputs_and_grads(call(va.congruence_loss, kind=kind, backend="triton", **given), x)
    dirty = dict(x)
    for key in x:
        mask = given.get("text_mask" if "text" in key else "image_mask")
        if mask is not None:
            dirty[key] = x[key].masked_fill(~mask[:, None, :, None], torch.nan)
            assert (clean[f"grad {key}"].transpose(1, 2)[~mask] == 0).all()
    for key, got in outputs_and_grads(call(va.congruence_loss, kind=kind, backend="triton", **given), dirty).items():
        assert torch.equal(got, clean[key]), key
    if name == "empty samples":
        assert (clean["out0"][:2] == 0).all() and clean["out0"][2] > 0
        assert all((clean[f"grad {key}"][:2] == 0).all() for key in x)


@pytest.mark.parametrize("kind, words", [("cacr", 5), ("iais_singular", 5), ("iais_singular", 133), ("iais_distributed", 5)])
def test_a_weight_that_underflows(kind: str, words: int) -> None:
    # not so the cross block: of saturated heads the mean has ties, and which one is picked is a matter of rounding
    x = {name: value if name in CROSS else value * 30 for name, value in make(words, 6, d=4, cross=True).items()}
    assert (torch.softmax(x["text_query"] @ x["text_key"].mT / 2, -1) == 0).any()
    got = outputs_and_grads(call(va.congruence_loss, kind=kind, backend="triton"), x)
    want = outputs_and_grads(call(va.reference.congruence_loss, kind=kind), as_dtype(x, torch.float64))
    for key, value in got.items():
        torch.testing.assert_close(value.double(), want[key], rtol=1e-4, atol=1e-4 * float(want[key].abs().max()) + 1e-12)


def test_the_first_of_equals_is_picked() -> None:
    """Every word attends to two regions alike, whose own attention differs."""
    x = make(6, 8)
    x["image_key"][:, :, 1::2] = x["image_key"][:, :, ::2]
    x["image_key"] *= 0.3
    check({**x, "image_query": x["image_query"] * 3}, kind="iais_singular", direction="text")


@pytest.mark.parametrize("kind", KINDS)
def test_direction_of_small_differences(kind: str) -> None:
    """Congruent maps: losses near zero keep their digits."""
    x = make(30, 30)
    x |= {"image_query": x["text_query"] + 1e-3 * torch.randn(1, 2, 30, 8), "image_key": x["text_key"].clone()}
    check(x, kind=kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x = {name: lay_out(value, layout) for name, value in make(9, 12, b=2, cross=True).items()}
    check(x, kind="iais_distributed")


@pytest.mark.parametrize("empty", ("b", "h", "words", "regions", "d"))
@pytest.mark.parametrize("kind", ("cacr", "iais_distributed"))
def test_empty_sizes(kind: str, empty: str) -> None:
    sizes = {"words": 3, "regions": 4, "b": 2, "h": 2, "d": 4, empty: 0}
    x = make(**sizes)
    got = outputs_and_grads(call(va.congruence_loss, kind=kind, scale=0.5, backend="triton"), x)
    assert got["out0"].shape == (sizes["b"],) and float(got["out0"].abs().sum()) < 1e-4  # IAIS takes 2e-6 a key off
    assert all(got[f"grad {name}"].shape == x[name].shape and (got[f"grad {name}"] == 0).all() for name in x)


def test_samples_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, given = make(15, 20, b=3, d=4, cross=True), masks("ragged")
    run = call(va.congruence_loss, kind="iais_distributed", backend="triton", **given)
    whole = outputs_and_grads(run, x)
    monkeypatch.setattr(importlib.import_module("vlattn_fast.kernels.congruence_loss"), "_CHUNK_BYTES", 2 * 6 * 4 * 35**2)
    chunked = outputs_and_grads(run, x)
    assert all(torch.equal(whole[name], chunked[name]) for name in whole)


def test_runs_are_bit_equal_and_write_no_input() -> None:
    x = make(20, 33, cross=True)
    before = {name: value.clone() for name, value in x.items()}
    run = call(va.congruence_loss, kind="iais_distributed", backend="triton")
    first, second = outputs_and_grads(run, x), outputs_and_grads(run, x)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x[name], before[name]) for name in x)


@pytest.mark.parametrize(
    "dtype, d, words, expected",
    [
        (torch.float64, 4, 3, "float16, bfloat16 and float32"),
        (torch.float32, 300, 3, "head_dim of at most 256"),
        (torch.float32, 1, 16385, "at most 16384 tokens"),
    ],
)
def test_what_it_cannot_run_is_refused(dtype: torch.dtype, d: int, words: int, expected: str) -> None:
    text, image = torch.zeros(1, 1, words, d, dtype=dtype), torch.zeros(1, 1, 2, d, dtype=dtype)
    with pytest.raises(ValueError, match=expected):
        va.congruence_loss((text, text), (image, image), backend="triton")
