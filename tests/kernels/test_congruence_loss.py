"""congruence_loss in Triton: rows longer than a tile, padding, chunks, and what it refuses."""

import importlib
from functools import partial

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops.backends import assert_refused
from tests.helpers.ops.congruence_loss_cases import FORMS, check, make, masks, prefix

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "form, L, V, direction",
    [
        ("cacr softmax", 5, 130, "both"),
        ("cacr none", 130, 9, "image"),
        ("iais_singular none", 9, 129, "text"),
        ("iais_singular softmax", 129, 7, "both"),
        ("iais_distributed softmax", 130, 15, "both"),
        ("iais_distributed none", 9, 193, "text"),
    ],
)
def test_rows_longer_than_a_tile(form: str, L: int, V: int, direction: str) -> None:
    x = as_dtype(make(L, V, h=1, d=4, cross="distributed" in form), F32)
    check("triton", x, **FORMS[form], direction=direction, text_mask=prefix(L, L - 2), image_mask=prefix(V, V - 2))


@pytest.mark.parametrize("kind", ("cacr", "iais_distributed"))
def test_the_only_real_tokens_stand_behind_a_tile_of_padding(kind: str) -> None:
    """A modality without a real token makes the other one's loss 0: so all its tokens count."""
    image_mask = ~prefix(40, 34)
    check("triton", as_dtype(make(5, 40, h=1, d=4), F32), kind=kind, text_mask=prefix(5, 4), image_mask=image_mask)


@pytest.mark.parametrize(
    "form, dtype, L, V",
    [
        ("cacr none", F16, 70, 20),
        ("iais_singular none", BF16, 40, 70),
        ("iais_distributed none", BF16, 33, 65),
        ("cacr softmax", BF16, 140, 36),  # rows longer than a tile
        ("iais_singular softmax", BF16, 140, 36),
        ("iais_distributed softmax", F16, 140, 36),
    ],
)
def test_half_precision(form: str, dtype: torch.dtype, L: int, V: int) -> None:
    x = as_dtype(make(L, V, h=1, d=16, cross=True), dtype)
    check("triton", x, **FORMS[form], text_mask=prefix(L, L - 9), image_mask=prefix(V, V - 3))


def test_samples_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two samples and of one. torch multiplies their maps, and may round otherwise in batches of other sizes."""
    kernels = importlib.import_module("vlattn_fast.kernels.congruence_loss")
    sizes, whole = [], kernels._Chunk
    monkeypatch.setattr(kernels, "_Chunk", lambda queries, *rest: sizes.append(len(queries[0])) or whole(queries, *rest))
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", 2 * 6 * 4 * 15**2)
    check("triton", as_dtype(make(6, 9, b=3, h=1, d=4, cross=True), F32), kind="iais_distributed", **masks("ragged"))
    assert sizes[:4] == [2, 1, 2, 1]


def test_rows_of_many_tokens_are_refused() -> None:
    text, image = torch.zeros(1, 1, 16385, 1), torch.zeros(1, 1, 2, 1)
    run = partial(va.congruence_loss, (text, text), (image, image), backend="triton")
    assert_refused("triton", "at most 16384 tokens", run)
