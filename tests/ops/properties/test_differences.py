"""First and second derivatives of every call by each of its inputs alone, against differences in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.helpers.ops.properties import SMALL, calls, every, floating
from vlattn_fast.ops import OPERATORS

TINY = SMALL._replace(queries=2, keys=3, head_dim=2, value_dim=2, regions=3, words=4, features=3, heads=2, rows=1, images=2)


QUICK = ("attention_map", "maxsim", "relevancy_residual")


@every("streaming", without={"paged_attention_statistics": "it has no gradients"})
@pytest.mark.slow(*(name for name in OPERATORS if name not in QUICK))
def test_each_input_alone(backend: str, operator: str) -> None:
    for call in calls(operator, backend, TINY):
        x = {name: y.detach() for name, y in call.in_dtype(torch.float64).items()}
        for name in [name for name in x if "carrier" not in name]:  # the backward pass of a carrier is a rule

            def run(y: Tensor, call: Any = call, x: dict[str, Tensor] = x, name: str = name) -> tuple[Tensor, ...]:
                outputs = floating(call.run({**x, name: y}, backend=backend))
                outputs = outputs[:1] if any("carrier" in name for name in x) else outputs
                return tuple([torch.where(y.isneginf(), 0.0, y) for y in outputs if y.requires_grad])

            leaf = torch.where(x[name].isneginf(), -1.0, x[name]).requires_grad_()
            if run(leaf):
                assert gradcheck(run, leaf, fast_mode=True), (call.title, name)
                assert gradgradcheck(run, leaf, fast_mode=True), (call.title, name)
