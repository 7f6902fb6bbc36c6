"""torch.compile with lengths and numbers that vary: no graph breaks, and a graph is not made for each value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing

from tests.helpers.ops.every_call import CALLS, gradients, leaves, outputs_of

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch.compile
VARYING = [(name, option) for name, every in CALLS.items() for option in every.floats]


def compiled(name: str, **arguments: Any) -> tuple[Any, Any, Any]:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x: dict[str, torch.Tensor], options: dict[str, float]) -> Any:
        return CALLS[name].call(x, **options)

    return torch.compile(step, backend=counter, fullgraph=True, **arguments), step, counter


def assert_same(name: str, run: Any, step: Any, n: int, options: dict[str, float]) -> None:
    torch.manual_seed(n)
    x = leaves(CALLS[name].make(n), CALLS[name].differentiable)
    results = []
    for function in (run, step):
        torch.manual_seed(0)
        outputs = outputs_of(function(x, options))
        results.append([*outputs, *(gradients(outputs, x) if CALLS[name].differentiable else [])])
    if "dropout_p" in options:  # compiled code draws other numbers
        return
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_ten_lengths(name: str) -> None:
    run, step, counter = compiled(name, dynamic=True)
    for n in range(7, 17):
        assert_same(name, run, step, n, {})
    assert counter.frame_count <= 2  # one more where a length meets another size, or 1


@pytest.mark.parametrize(
    "name, option, dynamic",
    [(*each, None) for each in VARYING] + [(*each, True) for each in VARYING if "score_attention" == each[0]],
)
def test_five_values_of_a_number(name: str, option: str, dynamic: bool | None) -> None:
    """One graph for the first value and one for all others."""
    run, step, counter = compiled(name, dynamic=dynamic)
    for value in CALLS[name].floats[option]:
        assert_same(name, run, step, 7, {option: value})
    assert counter.frame_count <= 2
