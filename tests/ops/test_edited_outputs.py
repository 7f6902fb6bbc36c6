"""Outputs may be edited in place: they are no views to autograd."""

import torch

from tests.helpers.ops.backends import each
from tests.helpers.ops.every_call import CALLS, every_call, leaves, outputs_of, titles
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

    def outputs() -> list[torch.Tensor]:
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
