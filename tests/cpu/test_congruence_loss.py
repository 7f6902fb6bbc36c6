"""congruence_loss by the CPU kernels: gradients that the forward pass makes, and what they take."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, as_dtype, outputs_and_grads
from tests.helpers.ops.congruence_loss_cases import FORMS, call, check, make, prefix
from vlattn_fast.backends.reference.congruence_loss import num_gradients
from vlattn_fast.ops.congruence_loss import KINDS

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("kind, dtype", [("cacr", BF16), ("iais_singular", torch.float16), ("iais_distributed", BF16)])
def test_scattered_tokens_of_several_tiles(kind: str, dtype: torch.dtype) -> None:
    check(
        "cpu", as_dtype(make(150, 90, h=1, d=4), dtype), kind=kind, text_mask=torch.rand(1, 150) > 0.4, image_mask=prefix(90, 66)
    )


def op_arguments(x: dict[str, Tensor], form: str, saves: bool, *masks: Tensor | None, direction: str = "both") -> tuple[Any, ...]:
    queries, keys = [x["text_query"], x["image_query"]] * 2, [x["text_key"], x["image_key"], x["image_key"], x["text_key"]]
    return *queries, *keys, *(masks or (None, None)), *FORMS[form].values(), direction, 0.5, saves, "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_made_where_they_are_needed(kind: str) -> None:
    x = as_dtype(make(40, 30), F32)
    for saves in (False, True):
        loss, gradients = torch.ops.vlattn.congruence_loss(*op_arguments(x, f"{kind} softmax", saves))
        numbers = num_gradients(kind) * (x["text_query"].numel() + x["image_query"].numel())
        assert gradients.shape == (saves * numbers,) and not gradients.requires_grad and loss.shape == (1,)
    run, x = call(va.congruence_loss, kind=kind, backend="cpu"), {name: value.requires_grad_() for name, value in x.items()}
    with torch.no_grad(), LargestAllocation() as without:
        assert run(**x).grad_fn is None
    assert without.peak < 100, without.by


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_is_as_large_as_the_gradients(kind: str) -> None:
    """The backward pass multiplies them in place, but for whoever watches torch's dispatcher."""
    x, run = as_dtype(make(80, 60, d=16), F32), call(va.congruence_loss, kind=kind, backend="cpu")
    with LargestAllocation() as both:
        outputs_and_grads(run, x)
    assert both.peak < 2.1 * 4 * num_gradients(kind) * (x["text_query"].numel() + x["image_query"].numel()), both.by
    leaves = [value.requires_grad_() for value in x.values()]
    grads = torch.autograd.grad(run(**x).sum(), leaves)
    if kind != "iais_distributed":  # whose gradients autograd adds, of two blocks each
        assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_is_kept_gives_its_gradients_again(kind: str) -> None:
    """Also where those of the first pass have been edited."""
    x = {name: value.requires_grad_() for name, value in as_dtype(make(9, 7, b=2), F32).items()}
    loss, cotangent = call(va.congruence_loss, kind=kind, backend="cpu")(**x), torch.tensor([0.5, -3.0])
    first = torch.autograd.grad(loss, list(x.values()), cotangent, retain_graph=True)
    want = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    again = torch.autograd.grad(loss, list(x.values()), cotangent)
    assert all(torch.equal(grad, other) and (grad != 0).any() for grad, other in zip(again, want, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", ("text", "both"))
def test_every_number_of_the_gradients_is_written(form: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of padding, of a sample without text, and of blocks that do not count."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *sizes, **of: new_empty(x, *sizes, **of).fill_(torch.nan))
    masks = prefix(70, 70, 3, 0), prefix(30, 9, 30, 30)
    arguments = op_arguments(as_dtype(make(70, 30, b=3), F32), form, True, *masks, direction=direction)
    _, gradients = torch.ops.vlattn.congruence_loss(*arguments)
    assert torch.isfinite(gradients).all() and (gradients != 0).any()


@pytest.mark.parametrize("form", FORMS)
def test_heads_whose_weights_are_computed_again(form: str) -> None:
    """Those of three heads are more than are kept."""
    check("cpu", as_dtype(make(3, 700, h=3, d=4), F32), **FORMS[form])
