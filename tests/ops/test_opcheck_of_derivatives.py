"""torch.library.opcheck of every operator `X_jvp` and `X_second`, with arguments that derivatives of calls give it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.ops.every_call import CALLS, every_call, leaves, outputs_of
from vlattn_fast.ops._ops import NAMESPACE
from vlattn_fast.ops._registration import _DERIVATIVES, _SYMBOLIC

NAMES = [name for name in _DERIVATIVES if name.endswith(("_jvp", "_second"))]
CHECKS = "test_schema", "test_faketensor", "test_autograd_registration"


class Calls(TorchDispatchMode):
    """Notes the arguments of the operators of NAMES."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix(f"{NAMESPACE}::")
        if name in NAMES:
            self.arguments.setdefault(name, tuple([x.detach() if isinstance(x, Tensor) else x for x in args]))
        return func(*args, **(kwargs or {}))


def arguments_of(title: str) -> dict[str, tuple[Any, ...]]:
    """Those of the tangents of a call, and of its second derivatives."""
    torch.manual_seed(0)
    every = every_call(title, 4)
    inputs = leaves(every)
    with Calls() as calls:
        with forward_ad.dual_level():
            every.run({name: forward_ad.make_dual(x, torch.rand_like(x)) for name, x in inputs.items()}, backend="streaming")
        made = [y for y in outputs_of(every.run(inputs, backend="streaming")) if y is not None and y.requires_grad]
        grads = torch.autograd.grad(
            [y.sin().sum() for y in made], list(inputs.values()), create_graph=True, materialize_grads=True
        )
        torch.autograd.grad([y.square().sum() for y in grads if y.requires_grad], list(inputs.values()), allow_unused=True)
    return calls.arguments


DIFFERENTIABLE = [title for title in CALLS if every_call(title, 4).differentiable and not title.startswith("token_scores")]


@pytest.mark.parametrize("title", DIFFERENTIABLE)
@pytest.mark.slow("relevancy_attention", "attention_statistics", "stacked_cross_attention", "damsm_similarity", "maxsim")
def test_opcheck(title: str) -> None:
    for name, arguments in arguments_of(title).items():
        torch.library.opcheck(getattr(getattr(torch.ops, NAMESPACE), name), arguments, test_utils=CHECKS)


def test_every_operator_is_checked() -> None:
    found = {name for title in DIFFERENTIABLE for name in arguments_of(title)}
    assert found == {name for name in NAMES if not name.endswith(_SYMBOLIC)}
