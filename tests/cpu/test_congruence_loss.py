"""congruence_loss by the CPU kernels: sizes around tiles and blocks, samples beyond a chunk, threads, and what it refuses.

The rest stands in tests/ops/test_congruence_loss.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, as_dtype, outputs_and_grads
from tests.helpers.ops.backends import assert_refused
from tests.helpers.ops.congruence_loss_cases import call, check, make, prefix
from vlattn_fast.backends.cpu import congruence_loss as backend
from vlattn_fast.ops.congruence_loss import KINDS

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("L, V", [(16, 17), (65, 64), (1, 130), (129, 3)])
def test_sizes_either_side_of_a_tile(kind: str, L: int, V: int) -> None:
    check("cpu", as_dtype(make(L, V, h=1, d=5, cross=L < V), F32), kind=kind)


@pytest.mark.parametrize("kind, d", [("cacr", 129), ("iais_singular", 257), ("iais_distributed", 31)])
def test_head_dims(kind: str, d: int) -> None:
    check("cpu", as_dtype(make(20, 18, h=1, d=d), F32), kind=kind)


@pytest.mark.parametrize("kind, dtype", [("cacr", BF16), ("iais_singular", torch.float16), ("iais_distributed", BF16)])
def test_scattered_tokens_of_several_tiles(kind: str, dtype: torch.dtype) -> None:
    check(
        "cpu", as_dtype(make(150, 90, h=1, d=4), dtype), kind=kind, text_mask=torch.rand(1, 150) > 0.4, image_mask=prefix(90, 66)
    )


def test_more_samples_than_a_chunk_of_the_backward_pass() -> None:
    """Each has its own loss and gradients: those of a call by itself, bit for bit."""
    x = as_dtype(make(90, 90, b=20, h=1, d=4), F32)
    for kind in KINDS:
        run = call(va.congruence_loss, kind=kind, backend="cpu")
        every = outputs_and_grads(run, x)
        alone = outputs_and_grads(run, {name: value[19:] for name, value in x.items()})
        assert all(torch.equal(every[name][19:], value) for name, value in alone.items())


def test_threads_change_no_bit(threads: None) -> None:
    x, options = as_dtype(make(40, 70, b=3, h=2, cross=True), F32), {"text_mask": prefix(40, 40, 3, 0)}
    for kind in KINDS:
        results: list[dict[str, Tensor]] = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(outputs_and_grads(call(va.congruence_loss, kind=kind, backend="cpu", **options), x))
        assert all(torch.equal(result[name], value) for result in results for name, value in results[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_maps_live_for_a_backward_pass_alone(kind: str) -> None:
    x = as_dtype(make(40, 30), F32)
    queries, keys = [x["text_query"], x["image_query"]] * 2, [x["text_key"], x["image_key"], x["image_key"], x["text_key"]]
    loss, maps = torch.ops.vlattn.congruence_loss(queries, keys, None, None, kind, "both", 0.5, "cpu")
    assert maps.shape == (1, 70, 96) and not maps.requires_grad and loss.shape == (1,)
    assert call(va.congruence_loss, kind=kind, backend="cpu")(**x).grad_fn is None


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_is_as_large_as_the_maps(kind: str) -> None:
    """Such as zeros for their gradient."""
    with LargestAllocation() as both:
        outputs_and_grads(call(va.congruence_loss, kind=kind, backend="cpu"), as_dtype(make(80, 60, d=4), F32))
    assert both.peak < 1.5 * 4 * math.prod(backend.maps_shape(1, 80, 60)), both.by


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ("text", "both"))
def test_every_number_of_the_maps_is_written(kind: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of padding, of a sample without text, and of blocks that do not count."""
    run = backend._run_forward
    monkeypatch.setattr(backend, "_run_forward", lambda **members: (members["maps"].fill_(torch.nan), run(**members)))
    x = as_dtype(make(70, 30, b=3), F32)
    queries, keys = [x["text_query"], x["image_query"]] * 2, [x["text_key"], x["image_key"], x["image_key"], x["text_key"]]
    masks = prefix(70, 70, 3, 0), prefix(30, 9, 30, 30)
    _, maps = torch.ops.vlattn.congruence_loss(queries, keys, *masks, kind, direction, 0.5, "cpu")
    assert torch.isfinite(maps).all() and (maps != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    x = {name: value.requires_grad_() for name, value in as_dtype(make(5, 4, b=2, h=3, d=6), F32).items()}
    queries, keys = [x["text_query"], x["image_query"]] * 2, [x["text_key"], x["image_key"], x["image_key"], x["text_key"]]
    options = (prefix(5, 5, 1), None, kind, "both", 0.5, "cpu")
    torch.library.opcheck(torch.ops.vlattn.congruence_loss, (queries, keys, *options))
    queries, keys = [value.detach() for value in queries], [value.detach() for value in keys]
    _, maps = torch.ops.vlattn.congruence_loss(queries, keys, *options)
    torch.library.opcheck(torch.ops.vlattn.congruence_loss_backward, (torch.tensor([0.5, 2.0]), maps, queries, keys, *options))


def test_refusals() -> None:
    assert_refused("cpu", "float16, bfloat16 and float32", lambda: call(va.congruence_loss, backend="cpu")(**make(3, 4)))
