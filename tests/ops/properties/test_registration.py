"""torch.library.opcheck of every registered operator, with the arguments that calls and their derivatives give it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.ops.backends import finest
from tests.helpers.ops.every_call import leaves
from tests.helpers.ops.properties import SMALL, calls, every, floating, pairs_of, supported
from vlattn_fast.checking.cases import Example
from vlattn_fast.checking.cases._dice import lay_out
from vlattn_fast.ops._ops import NAMESPACE
from vlattn_fast.ops._registration import _DERIVATIVES, _SYMBOLIC

NAMES = [name for name in _DERIVATIVES if not name.endswith(_SYMBOLIC)]
CHECKS = "test_schema", "test_faketensor"


class Calls(TorchDispatchMode):
    """Notes the arguments of our operators, of each choice of dtypes and of those that are None."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix(f"{NAMESPACE}::")
        if name in NAMES:
            made = tuple([x.detach() if isinstance(x, Tensor) else x for x in args])
            self.arguments.setdefault((name, *[getattr(x, "dtype", x is None) for x in made]), made)
        return func(*args, **(kwargs or {}))


def arguments_of(call: Example, backend: str, dtype: torch.dtype = torch.float32) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Those of a call, of its gradients, its tangents and its second derivatives."""
    x = leaves(call, {name: lay_out(x, "heads last") for name, x in call.in_dtype(dtype).items()})
    with Calls() as noted:
        made = [y for y in floating(call.run(x, backend=backend)) if y.requires_grad]
        if made:
            grads = torch.autograd.grad(
                [y.sin().sum() for y in made], list(x.values()), create_graph=backend == "streaming", materialize_grads=True
            )
            if rest := [y.square().sum() for y in grads if y.requires_grad]:
                torch.autograd.grad(rest, list(x.values()), allow_unused=True)
            with forward_ad.dual_level():
                call.run({name: forward_ad.make_dual(y, torch.rand_like(y)) for name, y in x.items()}, backend=backend)
    return noted.arguments


@every("streaming", "cpu", "triton", "cuda")
@pytest.mark.slow("triton", "cuda")
def test_opcheck(backend: str, operator: str) -> None:
    """Schemas, and fakes with the layouts and dtypes of the results: sums of 16 bits are wider, and of 64 bits, too."""
    made = calls(operator, backend, SMALL)[: 1 if backend in ("triton", "cuda") else None]
    found = arguments_of(made[0], backend, finest(backend))
    for call in supported(made, backend, torch.bfloat16):
        found = arguments_of(call, backend, torch.bfloat16) | found
    left = {operator} if backend == "streaming" else set()  # is traced once
    for (name, *_), arguments in found.items():
        traced = ("test_autograd_registration", "test_aot_dispatch_dynamic") if name in left else ()
        left -= {name}
        torch.library.opcheck(getattr(getattr(torch.ops, NAMESPACE), name), arguments, test_utils=(*CHECKS, *traced))


def test_every_operator_is_checked() -> None:
    found = set()
    for _, operator in pairs_of(("streaming",), {}):
        for call in calls(operator, "streaming", SMALL)[-1:] + calls(operator, "streaming", SMALL)[:1]:
            found |= {name for name, *_ in arguments_of(call, "streaming")}
    assert found >= {*NAMES} - {"group_rows", "group_sums"}
