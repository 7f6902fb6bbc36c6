"""The readers of recurrences: output = A value, with A of the formula and from unit impulses through the model's own function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlattn_fast.attach.recurrences.reading import FunctionCall, Reading, Recurrence
from vlattn_fast.attach.recurrences.table import CLASSES, FUNCTIONS
from vlattn_fast.backends.reference.recurrent_step import recurrent_map
from tests.helpers.recurrent_calls import CALLS
from tools.models.stored import Double


def call_of(make: Callable[[], FunctionCall]) -> tuple[FunctionCall, Reading]:
    call = make()
    name = call.function.__name__ if hasattr(call.function, "__name__") else type(call.function).__name__
    reader = {**FUNCTIONS, **CLASSES}[name]
    return call, reader(call)


def map_of(reading: Reading) -> Tensor:
    recurrence = reading.map
    assert isinstance(recurrence, Recurrence)
    gates = {name: getattr(recurrence, name) for name in ("log_decay", "beta", "diagonal")}
    query, key = (x.expand(-1, max(x.shape[1], recurrence.value.shape[1]), -1, -1) if x.shape[1] == 1 else x
                  for x in (recurrence.query, recurrence.key))
    return recurrent_map(query, key, **gates)


def by_impulses(reading: Reading) -> Tensor:
    """A (B, H, N, N), each column from a unit impulse in the values of one token."""
    value = torch.zeros_like(reading.map.value)
    columns = []
    for token in range(value.shape[2]):
        impulse = value.clone()
        impulse[:, :, token] = 1
        columns.append(reading.output_of(reading.run(impulse))[..., 0])
    return torch.stack(columns, -1)


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    with Double():
        yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_the_map_times_the_values_is_the_output(name: str) -> None:
    call, reading = call_of(CALLS[name])
    assert not reading.refusal
    result = call.function(*call.args, **call.kwargs)
    output, each = reading.output_of(result), map_of(reading)
    torch.testing.assert_close(each @ reading.map.value, output, rtol=0, atol=1e-11)
    torch.testing.assert_close(reading.output_of(reading.with_output(result, 2 * output)), 2 * output, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_unit_impulses_give_the_map(name: str) -> None:
    _, reading = call_of(CALLS[name])
    each = map_of(reading)
    assert each.std() > 1e-3
    torch.testing.assert_close(each, by_impulses(reading), rtol=0, atol=1e-11)
