"""Whoever asks for less gets the same: gradients of one input, of one output, and twice by a graph that is kept."""

import pytest
import torch
from torch import Tensor

from tests.helpers.ops.properties import SMALL, calls, every, floating
from vlattn_fast.checking.cases import Example

WITHOUT = {"paged_attention_statistics": "it has no gradients"}
Gradients = dict[str, Tensor]


def gradients(call: Example, backend: str, tensors: dict[str, Tensor], cotangents: dict[int, Tensor], *alone: str) -> Gradients:
    """Of these inputs, by default of all; the others require none."""
    leaves = {name: x.detach().clone().requires_grad_(not alone or name in alone) for name, x in tensors.items()}
    outputs = floating(call.run(leaves, backend=backend))
    wanted = [name for name, x in leaves.items() if x.requires_grad]
    asked = {n: x for n, x in cotangents.items() if outputs[n].requires_grad}
    if not asked:
        return {name: torch.zeros_like(leaves[name]) for name in wanted}
    arguments = [outputs[n] for n in asked], [leaves[name] for name in wanted], [*asked.values()]
    first = torch.autograd.grad(*arguments, retain_graph=True, materialize_grads=True)
    again = torch.autograd.grad(*arguments, materialize_grads=True)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True)), f"{call.title}: the second time"
    return dict(zip(wanted, first, strict=True))


@every("streaming", "cpu", "triton", "cuda", without=WITHOUT)
@pytest.mark.slow("triton", "cuda")
def test_one_input_or_output(backend: str, operator: str) -> None:
    """The gradients by each output alone add up to those by all."""
    made = [call for call in calls(operator, backend, SMALL, torch.float32) if call.differentiable]
    for call in made[: 2 if backend in ("triton", "cuda") else None]:
        tensors = call.in_dtype(torch.float32, torch.get_default_device())
        cotangents = {n: torch.randn_like(x) for n, x in enumerate(floating(call.run(tensors, backend=backend)))}
        whole = gradients(call, backend, tensors, cotangents)
        sums = {name: torch.zeros_like(x) for name, x in tensors.items()}
        for n, cotangent in cotangents.items():
            for name, x in gradients(call, backend, tensors, {n: cotangent}).items():
                sums[name] += x
        for name, x in whole.items():
            tolerance = {"rtol": 1e-4, "atol": 1e-5 * (1 + float(x.abs().max()))}
            found = {"alone": gradients(call, backend, tensors, cotangents, name)[name]}
            if "carrier" not in name:  # whose backward pass is a rule
                found["by each output"] = sums[name]
            for title, y in found.items():
                torch.testing.assert_close(y, x, **tolerance, msg=lambda m, t=f"{call.title}, {name}, {title}": f"{t}: {m}")
