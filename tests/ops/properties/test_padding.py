"""What stands in padding, NaN and infinity, reaches nothing: no output, no gradient and no derivative of one."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.helpers.compare import outputs_and_grads
from tests.helpers.ops.backends import finest
from tests.helpers.ops.derivative_cases import PRODUCTS, Function
from tests.helpers.ops.properties import BACKENDS, PADDED, SMALL, Turn, calls, check, every, every_choice, floating, supported
from tests.helpers.ops.score_cases import TORCH_JIT
from vlattn_fast.checking.cases import Example
from vlattn_fast.ops import OPERATORS

WITHOUT = {
    "paged_attention_statistics": "it has lengths of requests: tests/ops/test_paged_attention_statistics.py",
    "recurrent_step": "padding comes after all tokens, and a recurrence is causal",
    "relevancy_residual": "it adds token by token",
}


def padded(call: Example) -> tuple[Example, dict[str, Tensor]]:
    """The call with padding before, between and after its tokens, and where each tensor has it; all of the last sample is."""
    masks, where = {}, {}
    for name in inspect.signature(call.call).parameters:
        for each in [each for each in PADDED.get(name, ()) if each in call.tensors]:
            x = call.tensors[each]
            count, length = len(x), x.shape[-2]
            real = (torch.arange(length) % 3 != 1).repeat(count, 1)
            real[0, 0] = real[0, -1] = real[-1] = False
            masks[name] = real
            if name.endswith("lengths"):
                masks[name] = torch.arange(count).flip(0)
                real = torch.arange(length) < masks[name][:, None]
            where[each] = ~real.view(count, *[1] * (x.dim() - 3), length, 1).expand(x.shape)
    assert where, f"{call.operator} has no padding: say so in WITHOUT, or name its argument in PADDED"
    return replace(call, options={**call.options, **masks}), where


def fill(call: Example, where: dict[str, Tensor], dtype: torch.dtype, number: float) -> dict[str, Tensor]:
    """The tensors with this number in padding; of two, in turn. Copies keep the layout, on which rounding may depend."""
    tensors = call.in_dtype(dtype, torch.get_default_device())
    return {
        name: x.clone().masked_fill_(where[name], number if n % 2 else -number) if name in where else x
        for n, (name, x) in enumerate(tensors.items())
    }


@every_choice((torch.nan, torch.inf, -torch.inf), "reference", *BACKENDS, without=WITHOUT)
@pytest.mark.usefixtures("small_tiles")
def test_outputs_and_gradients(backend: str, operator: str, turn: Turn) -> None:
    sizes = SMALL._replace(heads=2) if backend == "triton" else None
    made = supported([padded(call)[0] for call in calls(operator, backend, sizes)], backend)
    for call, number in turn.meet(made):
        where = padded(call)[1]
        cotangents = [torch.randn_like(x) for x in floating(call.run(fill(call, where, finest(backend), 0.0), backend=backend))]

        def run(call: Example = call, **x: Tensor) -> tuple[Tensor, ...]:
            return floating(call.run(x, backend=backend))

        tensors = [fill(call, where, finest(backend), x) for x in (0.0, number)]
        clean, filled = (outputs_and_grads(run, x, cotangents) if call.differentiable else {"": run(**x)[0]} for x in tensors)
        for name, x in clean.items():
            assert torch.equal(x, filled[name]), f"{call.title} {name}"
            masked = where.get(name.removeprefix("grad "))
            assert masked is None or not x.masked_select(masked).any(), f"{call.title} {name}"
        if turn.first is not None and backend not in ("triton", "cuda"):
            check(replace(call, tensors=fill(call, where, torch.float64, 0.0)), backend)


@every("streaming", "cpu", without=WITHOUT)
@pytest.mark.slow("cpu")
@TORCH_JIT
def test_derivatives_of_gradients(backend: str, operator: str) -> None:
    """Also of NaN in tangents of padding."""
    for call, where in map(padded, [call for call in calls(operator, backend) if call.differentiable][:2]):
        found = []
        for number in (0.0, torch.nan):
            x = fill(call, where, finest(backend), number)
            u = {name: torch.where(y.isneginf(), 0.0, y).cos() for name, y in x.items()}  # NaN stays
            products = [PRODUCTS[name] for name in ("forward", "forward_over_reverse", "reverse_over_reverse")]
            f = Function(call, backend)
            found.append([tree_leaves(run(f, tuple(x.values()), tuple(u.values()))) for run in products])
        for clean, filled in zip(*found, strict=True):
            for n, (expected, got) in enumerate(zip(clean, filled, strict=True)):
                assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6), (call.title, n)


def test_arguments_of_padding_are_known() -> None:
    """Each operator that has one is asked."""
    arguments = {name for each in OPERATORS.values() for name in inspect.signature(each.call).parameters}
    assert {name for name in arguments if name.endswith(("_mask", "_lengths"))} - {"attn_mask"} == {*PADDED}
