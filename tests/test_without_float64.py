"""Calls in float32 make no tensor of float64, which Apple's MPS lacks: what plain PyTorch computes can run there."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import programs
from tests.test_threads import SIZES
from vlattn_fast.checking import verify
from vlattn_fast.ops import OPERATORS

# it takes float64 for its sums on every device but MPS (vlattn_fast/backends/streaming/stacked_cross_attention.py)
BY_DEVICE = ("stacked_cross_attention",)


class WithoutFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dtype == torch.float64 and x.numel() > 1:
                raise TypeError(f"{func} made a tensor of float64")
        return out


def test_operators() -> None:
    """All but distances, whose squares keep their digits in float64."""
    failed = set()
    for case in verify.cases(sizes=SIZES, operators=[name for name in OPERATORS if name not in BY_DEVICE]):
        tensors = case.in_dtype(torch.float32)
        if not OPERATORS[case.operator].refusals("streaming", case.arguments(tensors)):
            try:
                with WithoutFloat64():
                    verify._run(case, tensors, "streaming")
            except TypeError:
                failed.add(case.title)
    assert failed == {"score_attention, distance"}


def test_explain() -> None:
    """In a process whose calls run in plain PyTorch."""
    done = programs.run(
        """
import torch, vlattn_fast as va
from tests.test_threads import uniter
from tests.test_without_float64 import WithoutFloat64
model, inputs = uniter()
for method in ("gradient", "weighted", "rollout", "attention", "input_gradient"):
    with WithoutFloat64():
        assert va.explain(model, inputs, method=method).relevancy["joint"].dtype == torch.float32
""",
        VLATTN_BACKEND="streaming",
    )
    assert done.returncode == 0, done.stderr


def test_the_mode_finds_float64() -> None:
    with WithoutFloat64(), pytest.raises(TypeError, match="made a tensor of float64"):
        torch.randn(2).double()
