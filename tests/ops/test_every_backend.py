"""A key that a float mask hides may be infinite, in every operator and backend."""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import Tensor

from tests.helpers.ops.backends import each, finest
from tests.helpers.ops.every_call import gradients, outputs_of, small
from vlattn_fast.checking.cases import Example, cases_of
from vlattn_fast.ops import OPERATORS


def results(example: Example, tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    inputs = {name: x.detach().requires_grad_(example.differentiable and x.is_floating_point()) for name, x in tensors.items()}
    outputs = [x for x in outputs_of(example.run(inputs, backend=backend)) if x is not None]
    grads = dict(zip(inputs, gradients(outputs, inputs), strict=False))
    return {str(n): x.detach() for n, x in enumerate(outputs)} | {f"gradient of {name}": x for name, x in grads.items()}


WITH_MASKS = [name for name, each in OPERATORS.items() if "attn_mask" in inspect.signature(each.call).parameters]


@each("operator", streaming=WITH_MASKS, cpu=WITH_MASKS)
def test_a_key_that_a_float_mask_hides_may_be_infinite(backend: str, operator: str) -> None:
    """Its score plus -inf is NaN; in every operator the pair is masked."""
    example = next(iter(cases_of(operator).verify(torch.Generator().manual_seed(0), small(5))))
    mask = torch.randn(5, 5).index_fill(1, torch.tensor(3), -torch.inf)
    example, found = replace(example, options={**example.options, "attn_mask": mask}, differentiable=False), []
    for number in (0.0, torch.inf):
        tensors = example.in_dtype(finest(backend))
        tensors["key"][..., 3, :] = number
        found.append(results(example, tensors, backend))
    for name, x in found[0].items():
        assert torch.allclose(x, found[1][name], rtol=1e-4, atol=1e-5, equal_nan=False), name
