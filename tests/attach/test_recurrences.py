"""The readers of recurrences: output = A value, with A of the formula and from unit impulses through the model's own function."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.helpers.recurrent_calls import CALLS
from tools.tiny_models.stored import in_double
from vlattn_fast.attach.recurrences import lightning, rg_lru, rwkv
from vlattn_fast.attach.recurrences.reading import FunctionCall, Reading, Recurrence
from vlattn_fast.attach.recurrences.table import CLASSES, FUNCTIONS
from vlattn_fast.backends.reference.recurrent_step import recurrent_map

READERS = {
    **FUNCTIONS,
    **CLASSES,
    "lightning_attention": lightning.read,
    "rwkv_linear_attention": partial(rwkv.read, None),
    "RecurrentGemmaRglru": partial(rg_lru.read, None),
}


def call_of(make: Callable[[], FunctionCall]) -> tuple[FunctionCall, Reading]:
    call = make()
    name = getattr(call.function, "__name__", type(call.function).__name__)
    return call, READERS[type(call.module).__name__ if name == "forward" else name](call)


def map_of(reading: Reading) -> Tensor:
    """A (B, H, N, N) by the formula; a token that reads the state before its own is one that reads, then one that writes."""
    recurrence = reading.mixer
    assert isinstance(recurrence, Recurrence)
    if not recurrence.reads_before:
        return recurrent_map(
            recurrence.query, recurrence.key, log_decay=recurrence.log_decay, beta=recurrence.beta, diagonal=recurrence.diagonal
        )
    assert recurrence.log_decay is not None and recurrence.diagonal is not None
    query, key, log_decay = recurrence.query[:, :, 1:], recurrence.key[:, :, :-1], recurrence.log_decay[:, :, :-1]
    earlier = recurrent_map(query, key, log_decay=log_decay)  # rows from the second token on, columns to the last but one
    return functional.pad(earlier, (0, 1, 1, 0)) + torch.diag_embed(recurrence.diagonal)


def by_impulses(reading: Reading) -> Tensor:
    """A (B, H, N, N), each column from a unit impulse in the values of one token."""
    value = torch.zeros_like(reading.mixer.value)
    columns = []
    for token in range(value.shape[2]):
        impulse = value.clone()
        impulse[:, :, token] = 1
        columns.append(reading.output_of(reading.run(impulse))[..., 0])
    return torch.stack(columns, -1)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.manual_seed(0)
    with in_double():
        yield


@pytest.mark.parametrize("name", CALLS)
def test_the_map_times_the_values_is_the_output(name: str) -> None:
    call, reading = call_of(CALLS[name])
    assert not reading.unsupported
    result = call.function(*call.args, **call.kwargs)
    output, each = reading.output_of(result), map_of(reading)
    torch.testing.assert_close(each @ reading.mixer.value, output, rtol=0, atol=1e-11)
    torch.testing.assert_close(reading.output_of(reading.with_output(result, 2 * output)), 2 * output, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_unit_impulses_give_the_map(name: str) -> None:
    _, reading = call_of(CALLS[name])
    each = map_of(reading)
    assert each.std() > 1e-3
    torch.testing.assert_close(each, by_impulses(reading), rtol=0, atol=1e-11)
