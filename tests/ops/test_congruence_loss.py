"""congruence_loss: every backend against the formula, which test_congruence_loss_formula.py tests."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.helpers.compare import LargestAllocation, as_dtype, outputs_and_grads
from tests.helpers.ops.backends import F64, LOW, each, finest, on
from tests.helpers.ops.congruence_loss_cases import CROSS, FORMS, NAMES, call, check, make, masks
from tests.helpers.ops.tile_edges import covering
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.ops.congruence_loss import DIRECTIONS, congruence_loss

FAST = ("streaming", "cpu", "triton", "cuda")
FORMS_OF = {name: tuple(FORMS) for name in FAST} | {"cuda": ("cacr softmax", "iais_distributed softmax")}
TILE_ELEMENTS = 24  # rows, heads and samples in several tiles of streaming


PAIRS = covering(LOW[:2], tuple(FORMS), DIRECTIONS)
CUDA_PAIRS = covering(LOW[:2], FORMS_OF["cuda"], DIRECTIONS)


@each("case", streaming=itertools.product((F64,), FORMS, DIRECTIONS), cpu=PAIRS, triton=PAIRS, cuda=CUDA_PAIRS)
def test_kinds_and_directions(backend: str, case: tuple[torch.dtype, str, str]) -> None:
    dtype, form, direction = case
    got = check(backend, as_dtype(make(6, 18, cross=direction == "both"), dtype), **FORMS[form], direction=direction)
    assert got["out0"].dtype == (F64 if dtype == F64 else torch.float32) and got["grad text_key"].dtype == dtype


ONE_TOKEN = {"cacr": (1, 1), "iais_singular": (1, 6), "iais_distributed": (6, 1)}


@each("form", **FORMS_OF)
def test_one_token(form: str, backend: str) -> None:
    check(backend, as_dtype(make(*ONE_TOKEN[FORMS[form]["kind"]], d=1), finest(backend)), **FORMS[form])


@each("form", **FORMS_OF)
def test_scale(form: str, backend: str) -> None:
    for scale in (-0.7, 0.0) if "cacr" in form else (0.0 if "singular" in form else -0.7,):
        check(backend, as_dtype(make(6, 9, cross=True), finest(backend)), **FORMS[form], scale=scale)


@each("form", **FORMS_OF)
def test_nan_shows_in_its_own_sample_alone(form: str, backend: str) -> None:
    x = as_dtype(make(5, 7, b=2, h=1 if backend == "triton" else 2), finest(backend))
    run = call(congruence_loss, **FORMS[form], backend=backend)
    clean = outputs_and_grads(run, x)
    x["image_key"][1, 0, 6, 3] = torch.nan
    for name, value in outputs_and_grads(run, x).items():
        assert torch.equal(value[0], clean[name][0]) and value[1].isnan().any(), name


@each("form", **FORMS_OF)
def test_a_weight_that_underflows(form: str, backend: str) -> None:
    # not so the cross block: of saturated heads the mean has ties, and which one is picked depends on rounding
    x = {name: value if name in CROSS else value * 30 for name, value in make(5, 6, d=4, cross=True).items()}
    x = as_dtype(x, torch.float32)
    assert (torch.softmax(x["text_query"] @ x["text_key"].mT / 2, -1) == 0).any()
    check(backend, x, **FORMS[form])


@on(*FAST[:3])
def test_the_first_of_equals_is_picked(backend: str) -> None:
    """Each text token attends to two image tokens alike, whose own attention differs."""
    x = make(6, 8)
    x["image_key"][:, :, 1::2] = x["image_key"][:, :, ::2]
    x["image_key"] *= 0.3
    x["image_query"] *= 3
    for dtype in (torch.float32, torch.bfloat16):
        check(backend, as_dtype(x, dtype), kind="iais_singular", direction="text")


@each("form", **FORMS_OF)
def test_maps_that_nearly_agree(form: str, backend: str) -> None:
    """Losses near zero keep their digits."""
    x = make(12, 12)
    x |= {"image_query": x["text_query"] + 1e-3 * torch.randn(1, 2, 12, 8), "image_key": x["text_key"].clone()}
    check(backend, as_dtype(x, torch.float32), **FORMS[form])


@each("form", **FORMS_OF)
def test_gradients_of_scores_beyond_float16(form: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are small where there are many tokens, and large with the cotangent of a loss that is scaled up."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1 << 10)
    check(backend, as_dtype(make(40, 36, d=16), torch.float16), torch.full((1,), 2.0**10), **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_no_map_with_a_head_axis(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1 << 12)
    batch, heads, tokens, head_dim = 2, 8, 128, 4
    x = as_dtype(make(tokens, tokens, b=batch, h=heads, d=head_dim), torch.float32)
    run = call(congruence_loss, **FORMS[form], backend="streaming")
    with LargestAllocation() as forward:
        run(**x)
    with LargestAllocation() as both:
        outputs_and_grads(run, x)
    tile, head_mean, gradient = 4 << 12, 4 * tokens * tokens, 4 * batch * heads * tokens * head_dim
    assert forward.bytes <= head_mean, forward.by
    assert forward.peak <= 2 * head_mean + 16 * tile
    assert both.bytes <= max(head_mean, gradient), both.by
    assert both.peak <= 3 * head_mean + 16 * tile + 9 * gradient < 4 * batch * heads * tokens * tokens


@on("reference", "streaming")
def test_mean_counts_empty_samples(backend: str) -> None:
    x, options = make(6, 9, b=3), {"backend": backend, **masks("empty samples")}
    each_sample = call(congruence_loss, **options)(**x)
    mean = call(congruence_loss, reduction="mean", **options)(**x)
    assert mean.shape == () and float(mean) == pytest.approx(float(each_sample.sum()) / 3) and mean > 0
    assert float(call(congruence_loss, backend=backend, reduction="mean")(**make(3, 4, b=0))) == 0.0


@each("kind", **{name: ("cacr", "iais_singular") for name in ("reference", *FAST)} | {"cuda": ("cacr",)})
def test_cross_block_is_a_constant(kind: str, backend: str) -> None:
    x = as_dtype(make(6, 4, cross=True), finest(backend))
    grads = outputs_and_grads(call(congruence_loss, kind=kind, backend=backend), x)
    assert all((grads[f"grad {name}"] == 0).all() for name in CROSS)
    assert all((grads[f"grad {name}"] != 0).any() for name in NAMES)


T, V = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 8)
BAD_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"text": T}, TypeError, r"text must be the pair \(query.*got a torch.float32 tensor"),
    ({"image": (V,)}, TypeError, "image must be the pair"),
    ({"cross": (T, V, V)}, TypeError, "cross must be the pair"),
    ({"cross": ((T, V), V)}, TypeError, r"cross\[1\] must be the pair \(image query, text key\)"),
    ({"cross": ((T, V), (T, V))}, ValueError, r"cross image query must have the shape \(2, 3, 5, 8\)"),
]


@pytest.mark.parametrize("change, error, words", BAD_INPUT, ids=[words for _, _, words in BAD_INPUT])
def test_bad_input(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        congruence_loss(**{"text": (T, T), "image": (V, V), **change})
