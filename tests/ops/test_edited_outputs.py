"""What callers do to tensors of the graph: outputs are edited in place, saved tensors come back laid out otherwise."""

import torch
from torch import Tensor

from tests.helpers.ops.backends import each
from tests.helpers.ops.every_call import CALLS, WITH_CPU, every_call, gradients, leaves, outputs_of, titles
from vlattn_fast import scores

BACKENDS = ("auto", "streaming", "reference")
# all calls of one operator, whose outputs another kernel makes alike
SCORES = tuple(f"score_attention, {name}" for name, kind in scores.SCORES.items() if not kind.is_plain)
SAVED = "modified by an inplace operation"  # torch's own error: the backward pass needs this output as it was
NEEDED = {"score_attention", "score_attention, lse", *SCORES, "relevancy_attention", "relevancy_attention, rollout"}


@each("name", **dict.fromkeys(BACKENDS, tuple(CALLS)), triton=[name for name in titles("triton") if name not in SCORES])
def test_outputs_are_edited_in_place(name: str, backend: str) -> None:
    every = every_call(name, 5)
    x = leaves(every)
    options = {"backend": backend, **({"dropout_p": 0.1} if name == "score_attention" and backend != "auto" else {})}

    def outputs() -> list[Tensor]:
        torch.manual_seed(0)
        return outputs_of(every.run(x, **options))

    for i, plain in enumerate(outputs()):
        if not plain.is_floating_point():
            continue
        edited = outputs()[i]
        edited.mul_(3)
        torch.testing.assert_close(edited, 3 * plain)
        if not plain.requires_grad:
            continue
        want = torch.autograd.grad(3 * plain.sum(), list(x.values()), allow_unused=True, retain_graph=True)
        try:
            got = torch.autograd.grad(edited.sum(), list(x.values()), allow_unused=True)
        except RuntimeError as error:
            needed = NEEDED | {"attention_statistics", "attention_divergence"} if backend == "triton" else NEEDED
            assert SAVED in str(error) and name in needed, error
            continue
        torch.testing.assert_close(got, want)


def columns_first(x: Tensor) -> Tensor:
    """The same values with the last dimension as the slowest."""
    return x.detach().permute(tuple(reversed(range(x.dim())))).clone(memory_format=torch.contiguous_format)


def back(x: Tensor) -> Tensor:
    return x.permute(tuple(reversed(range(x.dim()))))


@each("name", streaming=CALLS, cpu=WITH_CPU)
def test_saved_tensors_come_back_in_another_layout(name: str, backend: str) -> None:
    """Hooks of torch.autograd.graph promise no strides."""
    every = every_call(name, 1100 if name == "score_attention" else 7)  # more than a block of the CPU's
    x = leaves(every)
    want = gradients(outputs_of(every.run(x, backend=backend)), x)
    with torch.autograd.graph.saved_tensors_hooks(columns_first, back):
        outputs = outputs_of(every.run(x, backend=backend))
    torch.testing.assert_close(gradients(outputs, x), want, rtol=1e-4, atol=1e-5)
