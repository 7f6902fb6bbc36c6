"""Tensors saved for the backward pass may come back laid out otherwise: hooks of torch.autograd.graph promise no strides."""

import torch
from torch import Tensor

from tests.helpers.ops.backends import each
from tests.helpers.ops.every_call import CALLS, WITH_CPU, every_call, gradients, leaves, outputs_of

LENGTH = 1100  # more than one block of keys of the CPU kernels


def columns_first(x: Tensor) -> Tensor:
    """The same values with the last dimension as the slowest."""
    return x.detach().permute(tuple(reversed(range(x.dim())))).clone(memory_format=torch.contiguous_format)


def back(x: Tensor) -> Tensor:
    return x.permute(tuple(reversed(range(x.dim()))))


@each("name", streaming=CALLS, cpu=WITH_CPU)
def test_in_another_layout(name: str, backend: str) -> None:
    every = every_call(name, LENGTH if name == "score_attention" else 7)
    x = leaves(every)
    want = gradients(outputs_of(every.run(x, backend=backend)), x)
    with torch.autograd.graph.saved_tensors_hooks(columns_first, back):
        outputs = outputs_of(every.run(x, backend=backend))
    torch.testing.assert_close(gradients(outputs, x), want, rtol=1e-4, atol=1e-5)
