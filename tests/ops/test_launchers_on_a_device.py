"""Launchers with tensors of a device other than the CPU: they read no value, which would wait, and mix no devices.

Tensors of the device "meta" have no values: to read one raises, and so does most of what mixes them with others. No GPU is there.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tools.host import without_launches
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example
from vlattn_fast.dispatch.choice import load
from vlattn_fast.dispatch.table import refusals
from vlattn_fast.ops import OPERATORS

Made = tuple[Callable[..., Any], tuple[Any, ...]]  # a launcher and its arguments


READS_LENGTHS = ("streaming", "paged_attention_statistics")  # as its docstring says: each request is a tile of its own


def runs(backend: str, case: Example) -> bool:
    operator = OPERATORS[case.operator]
    if (backend, case.operator) == READS_LENGTHS:
        return False
    call = operator.describe(**case.arguments(case.in_dtype(torch.bfloat16)))
    return not refusals(operator.backends, backend, call._replace(device_type="cuda"))


CASES = [
    pytest.param(name, case, id=f"{name}-{case.operator}-{case.name}")
    for case in verify.cases()
    for name in ("streaming", "triton")
    if runs(name, case)
]


def launchers(case: Example, backend: str) -> list[Made]:
    """Those of the forward and the backward pass, as they are called on a CPU, where kernels do nothing."""
    module, made = load(OPERATORS[case.operator].backends, backend), []

    def noted(launcher: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            made.append((launcher, args))
            return launcher(*args)

        return call

    with pytest.MonkeyPatch.context() as patch, without_launches():
        for name in ("forward", "backward", "step", "step_backward"):
            if hasattr(module, name):
                patch.setattr(module, name, noted(getattr(module, name)))
        verify._run(case, case.in_dtype(torch.bfloat16), backend)
    return made


@pytest.mark.parametrize(("name", "case"), CASES)
def test_they_read_no_value_and_mix_no_devices(name: str, case: Example) -> None:
    made = launchers(case, name)
    assert len(made) > (case.differentiable and case.operator != "relevancy_residual")  # whose forward pass has no launcher
    with without_launches(), torch.no_grad():  # as autograd calls them
        for launcher, args in made:
            results = launcher(*tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, args))
            assert all(x.is_meta for x in tree_leaves(results) if isinstance(x, Tensor))


@pytest.mark.parametrize("flaw", (lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x + torch.ones(3)))
def test_a_flaw_would_be_seen(flaw: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match="meta"):
        flaw(torch.empty(3, device="meta"))
