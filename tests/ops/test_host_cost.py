"""The cost of a call before and after its kernel: Python functions, and whether it goes through torch's dispatcher."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vlattn_fast as va
from tests.helpers.ops.backends import each, on
from tests.helpers.ops.every_call import CALLS, WITH_CPU, every_call, gradients, leaves, outputs_of
from vlattn_fast.checking.cases import Example
from vlattn_fast.ops import _registration

IN_BACKWARD = "relevancy_residual"  # whose operator runs there alone, where autograd hides modes of functions
PACKAGE = str(Path(va.__file__).parent)
# with a sink they begin with the log-sum-exp, which is a call of score_attention
WITH_LSE = "attention_map, softcap and sink", "attention_statistics, softcap and sink"
CHECKING = str(Path(PACKAGE, "checking"))  # where the call is arranged
FORWARD, BACKWARD = 52, 45  # the most of the package's functions that a pass on the CPU's kernels calls
DIRECT = 26  # and a forward pass that gives the tensors of the call to the operator


def forward_and_backward(every: Example, x: dict[str, Tensor], backend: str) -> tuple[list[Tensor], list[Tensor]]:
    outputs = outputs_of(every.run(x, backend=backend))
    return outputs, gradients(outputs, x)


def functions(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of `run`, and the files of the Python functions that it calls."""
    files: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        return run(), files
    finally:
        sys.setprofile(None)


@each("name", cpu=WITH_CPU, streaming=CALLS)
def test_plain_tensors_do_without_the_dispatcher(name: str, backend: str) -> None:
    every = every_call(name, 5)
    x = leaves(every)
    forward_and_backward(every, x, backend)  # loads what is loaded at the first call
    outputs, files = functions(lambda: outputs_of(every.run(x, backend=backend)))
    _, files_backward = functions(lambda: gradients(outputs, x))
    assert not [file for file in files + files_backward if file.endswith("torch/_ops.py") or "torch/_library" in file]
    if backend == "cpu":
        ours, ours_backward = (
            sum(file.startswith(PACKAGE) and not file.startswith(CHECKING) for file in each) for each in (files, files_backward)
        )
        calls = 2 if name in WITH_LSE else 1
        kernels = 2 if name == "relevancy_attention, softcap and sink" else calls  # rollout through a sink is a step apart
        in_tiles = name == "recurrent_step"  # whose backward pass is that of streaming
        assert ours <= calls * FORWARD and (in_tiles or ours_backward <= kernels * BACKWARD)


@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"softcap": 2.0, "scale": 0.5}, {"key_mask": [True] * 4 + [False]}))
@on("cpu", "streaming")
def test_products_of_the_tensors_of_a_call_cost_least(options: dict[str, Any], backend: str) -> None:
    """The same bits as with a log-sum-exp, for which a call goes through all stages."""
    options = {name: torch.tensor([x]) if name == "key_mask" else x for name, x in options.items()}
    every = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]

    def run(**more: Any) -> Any:
        return va.score_attention(*every, **options, **more, backend=backend)

    out, _ = run(return_lse=True)
    run()  # makes the plan
    again, files = functions(run)
    assert torch.equal(again, out)
    for ours, others in zip(*(torch.autograd.grad(x.sin().sum(), every) for x in (again, out)), strict=True):
        assert torch.equal(ours, others)
    assert backend != "cpu" or sum(file.startswith(PACKAGE) for file in files) <= DIRECT


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def vlattn(names: set[str]) -> set[str]:
    """The operators among `names`, without their backward operators."""
    found = [re.fullmatch(r"vlattn(?:::|\.)(\w+?)(?:\.default)?", name) for name in names]
    return {match[1] for match in found if match and not match[1].endswith("_backward")}


def same(one: Tensor, other: Tensor) -> bool:
    """Bit by bit; but a score's numbers and vectors have sums over all rows, which torch orders otherwise in a mode."""
    return torch.equal(one, other) if one.dim() > 1 else torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CALLS if name != IN_BACKWARD])
def test_whoever_watches_sees_the_operator(name: str) -> None:
    """Modes and the profiler, and the results are the same bit by bit."""
    every = every_call(name, 5)
    x = leaves(every)
    outputs, grads = forward_and_backward(every, x, "streaming")
    modes = Seen(), SeenFunctions()
    for mode in modes:
        with mode:
            again, grads_again = forward_and_backward(every, x, "streaming")
        pairs = zip([*outputs, *grads], [*again, *grads_again], strict=True)
        assert all(same(one, other) for one, other in pairs)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:  # without, torch 2.11 warns
        forward_and_backward(every, x, "streaming")
    seen = [vlattn(mode.names) for mode in modes] + [vlattn({event.name for event in profile.events()})]
    assert all(len(names) == (2 if name in WITH_LSE else 1) for names in seen), seen
    assert seen[0] == seen[1] == seen[2]


class Plain(Tensor):
    """A tensor of a class that torch's functions keep."""


def test_a_subclass_stays_one() -> None:
    query, key = (torch.randn(1, 2, 4, 8).as_subclass(Plain) for _ in range(2))
    assert type(va.attention_map(query, key)) is Plain


@on("cpu", "streaming")
def test_a_negated_view_is_negated(backend: str) -> None:
    """The imaginary part of a conjugate is one: torch keeps -x in the memory of x."""
    negated = torch._neg_view(torch.randn(1, 2, 4, 8))
    assert negated.is_neg()
    key = torch.randn(1, 2, 6, 8)
    want = va.attention_map(negated.resolve_neg(), key, backend=backend)
    assert torch.equal(va.attention_map(negated, key, backend=backend), want)


def test_inference_mode() -> None:
    every = every_call("score_attention, additive", 5)
    x = leaves(every)
    want = every.run(x)
    with torch.inference_mode():
        got = every.run(x)
    assert got.is_inference() and not got.requires_grad and torch.equal(got, want)


def test_below_autograd_nothing_is_recorded() -> None:
    """As in the kernel of somebody else's operator, to which torch gives tensors that require gradients."""
    every = every_call("relevancy_attention", 5)
    x = leaves(every)
    with torch._C._AutoDispatchBelowAutograd():
        out, _ = every.run(x)
    assert out.grad_fn is None and not out.requires_grad


def test_without_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a torch whose own parts have other names every call goes through the dispatcher, and gives the same."""
    query, key, value = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))

    def run() -> list[torch.Tensor]:
        out = va.score_attention(query, key, value, score="cosine")
        return [out, *torch.autograd.grad(out.sum(), (query, key, value))]

    short = run()
    monkeypatch.setattr(_registration, "_HAS_FAST_PATH", False)
    for x, y in zip(short, run(), strict=True):
        assert same(x, y)
