"""recurrent_step and the map of a recurrence: unit impulses through the recurrence are the truth."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to
from tests.helpers.ops.backends import F64, each, finest, on
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.backends.streaming import recurrent_step as streaming

BACKENDS = ("streaming", "cpu")
RULES = [(rule, row_normalize) for rule in ("gradient", "attention") for row_normalize in (False, True)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming crosses several chunks, tiles, and slices of the heads."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 700)
    monkeypatch.setattr(streaming, "CHUNK", 8)


def recurrence(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor | None, diagonal: Tensor) -> Tensor:
    """o (N, Dv) of one head, token by token: query, key and log_decay (N, Dk), value (N, Dv), beta and diagonal (N)."""
    state, outputs = value.new_zeros(key.shape[1], value.shape[1]), []
    for t in range(len(query)):
        state = log_decay[t].exp()[:, None] * state
        written = value[t] if beta is None else beta[t] * (value[t] - state.T @ key[t])
        state = state + torch.outer(key[t], written)
        outputs.append(state.T @ query[t] + diagonal[t] * value[t])
    return torch.stack(outputs) if outputs else torch.zeros_like(value)


def unit_impulses(
    query: Tensor, key: Tensor, log_decay: Tensor | None = None, beta: Tensor | None = None, diagonal: Tensor | None = None
) -> Tensor:
    """A (B, H, N, N): what the recurrence makes of a value 1 at one token and 0 elsewhere, for each token."""
    others = [x for x in (query, key, log_decay, beta, diagonal) if x is not None]
    heads = max(x.shape[1] for x in others)
    batch, _, length, dim = query.shape
    whole = torch.empty(batch, heads, length, length, dtype=F64)
    gates = query.new_zeros(batch, heads, length)
    log_decay = gates if log_decay is None else log_decay
    log_decay = log_decay if log_decay.dim() == 4 else log_decay[..., None].expand(-1, -1, -1, dim)
    diagonal = gates if diagonal is None else diagonal
    for b in range(batch):
        for h in range(heads):
            q, k = (x[b, h * x.shape[1] // heads] for x in (query, key))
            rest = log_decay[b, h], None if beta is None else beta[b, h], diagonal[b, h]
            for s in range(length):
                impulse = F.one_hot(torch.tensor([s]), length).double().mT
                whole[b, h, :, s] = recurrence(q, k, impulse, *rest)[:, 0]
    return whole


def tensors(n: int, *, b: int = 2, h: int = 4, hq: int = 4, hk: int = 4, d: int = 5, dv: int = 3) -> dict[str, Tensor]:
    """A call of a gated delta rule with a diagonal."""
    sizes = {"query": (hq, n, d), "key": (hk, n, d), "value": (h, n, dv), "grad_output": (h, n, dv)}
    x = {name: torch.randn(b, *size, dtype=F64) for name, size in sizes.items()}
    x["key"] = F.normalize(x["key"], dim=-1)
    gates = {"log_decay": -torch.rand(b, h, n, dtype=F64), "beta": 2 * torch.rand(b, h, n, dtype=F64)}
    return {"relevancy": torch.rand(b, 2, n, dtype=F64), **x, **gates, "diagonal": torch.randn(b, h, n, dtype=F64)}


def per_feature(x: dict[str, Tensor]) -> dict[str, Tensor]:
    decay = -2 * torch.rand(*x["log_decay"].shape, x["query"].shape[3], dtype=F64)
    return {**x, "log_decay": decay}


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda x: {name: tensor for name, tensor in x.items() if name not in names}


def strong(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Decays of exp(-50) a token: a product over sixteen of them is no float64 number, and its inverse neither."""
    return {**x, "log_decay": torch.where(torch.rand_like(x["log_decay"]) < 0.7, -50.0, x["log_decay"])}


def forgetting(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some tokens forget all: a decay of 0."""
    return {**x, "log_decay": torch.where(torch.rand_like(x["log_decay"]) < 0.2, -torch.inf, x["log_decay"])}


KINDS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "gated delta rule": without("diagonal"),
    "delta rule": without("log_decay", "diagonal"),
    "delta rule, decay per feature": lambda x: without("diagonal")(per_feature(x)),
    "scalar decay": without("beta", "diagonal"),
    "decay per feature": lambda x: without("beta")(per_feature(x)),
    "linear attention": without("log_decay", "beta", "diagonal"),
    "all of them": per_feature,
    "strong decay": strong,
    "strong decay per feature": lambda x: strong(per_feature(x)),
    "forgetting": forgetting,
}


def gates_of(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[name] for name in ("log_decay", "beta", "diagonal") if name in x}


def call(backend: str, **options: Any) -> Callable[..., Tensor]:
    if backend == "reference":
        return functools.partial(va.reference.recurrent_step, **options)
    return functools.partial(va.recurrent_step, **options, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_that_of_unit_impulses(kind: str) -> None:
    for heads in ({}, {"hq": 2, "hk": 1}, {"hk": 2}):
        x = KINDS[kind](tensors(33, b=1, **heads))
        gates = gates_of(x)
        if not gates:
            x["query"] = va._ground.tensors.expand_heads(x["query"], 4)
        truth = unit_impulses(x["query"], x["key"], **gates)
        torch.testing.assert_close(va.reference.recurrent_map(x["query"], x["key"], **gates), truth, rtol=1e-9, atol=1e-9)
        assert truth.abs().max() > 0.1 and not truth.triu(1).any()


def test_outputs_are_the_map_times_values() -> None:
    """For values of several features, which one number A_ts multiplies."""
    x = per_feature(tensors(20, b=1, h=1, hq=1, hk=1))
    rest = x["log_decay"][0, 0], x["beta"][0, 0], x["diagonal"][0, 0]
    outputs = recurrence(x["query"][0, 0], x["key"][0, 0], x["value"][0, 0], *rest)
    whole = va.reference.recurrent_map(x["query"], x["key"], **gates_of(x))
    torch.testing.assert_close(whole[0, 0] @ x["value"][0, 0], outputs, rtol=1e-9, atol=1e-9)


def test_the_map_by_hand() -> None:
    """Two tokens of one feature, q = 3 and 5, k = 1 and 1, a = 1/2, beta = 1/4: A_10 = 5 * 1/4 * (1 - 1/4) * 1/2."""
    query, key = torch.tensor([3.0, 5.0]).view(1, 1, 2, 1), torch.ones(1, 1, 2, 1)
    gates = {"log_decay": torch.full((1, 1, 2), 0.5).log(), "beta": torch.full((1, 1, 2), 0.25)}
    torch.testing.assert_close(va.reference.recurrent_map(query, key, **gates)[0, 0], torch.tensor([[0.75, 0], [0.46875, 1.25]]))
    gates = {"log_decay": gates["log_decay"], "diagonal": torch.tensor([[[10.0, 20.0]]])}
    torch.testing.assert_close(va.reference.recurrent_map(query, key, **gates)[0, 0], torch.tensor([[13.0, 0], [2.5, 25.0]]))


@on("reference", *BACKENDS)
def test_by_hand(backend: str) -> None:
    """A = [1, 0], [-3, 1]. By attention its rows are divided by 1 and 4. dA = [2, .], [-1, 4]: relu(A dA) = [2, 0], [3, 4]."""
    r = torch.tensor([[[1.0, 10.0]]]).to(finest(backend))
    query, key = (torch.tensor(x, dtype=r.dtype).view(1, 1, 2, 1) for x in ([1.0, -3.0], [1.0, 1.0]))
    diagonal = torch.tensor([[[0.0, 4.0]]], dtype=r.dtype)
    value, grad = (torch.tensor(x, dtype=r.dtype).view(1, 1, 2, 1) for x in ([1.0, -4.0], [2.0, -1.0]))
    step = functools.partial(call(backend), r, query, key, diagonal=diagonal)
    assert step(value, grad).tolist() == [[[32.0, 40.0]]]
    assert step(rule="attention").tolist() == [[[8.5, 2.5]]]
    torch.testing.assert_close(step(value, grad, row_normalize=True)[0, 0], torch.tensor([1 + 30 / 7, 40 / 7], dtype=r.dtype))


@each("kind", **dict.fromkeys(BACKENDS, tuple(KINDS)))
def test_matches_the_formula(backend: str, kind: str) -> None:
    """Outputs and all gradients, over several chunks, of which the last is not full."""
    for (rule, row_normalize), heads in zip(RULES, ({}, {"hq": 2, "hk": 1}, {"hk": 2}, {"hq": 1}), strict=True):
        x = as_dtype(KINDS[kind](tensors(27, **heads)), finest(backend))
        options = {"rule": rule, "row_normalize": row_normalize}
        assert_all_close_to(call(backend, **options), call("reference", **options), x, [torch.randn(2, 2, 27)])


@on(*BACKENDS)
def test_a_long_sequence(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand tokens whose decays remember hundreds, in the tiles and chunks of other calls."""
    monkeypatch.undo()
    x = as_dtype(tensors(2000, b=1, h=1, hq=1, hk=1, d=4), finest(backend))
    x["log_decay"] = x["log_decay"] / 100
    x["log_decay"][..., ::700] = -50.0
    assert_all_close_to(call(backend), call("reference"), x, grads=False)


@on("reference", *BACKENDS)
@pytest.mark.parametrize("name", ("key", "query", "log_decay", "beta", "value", "grad_output"))
def test_nan_stays_where_the_recurrence_carries_it(backend: str, name: str) -> None:
    """From its token on to all that lies before it; never to earlier outputs, nor from later tokens. Columns of Abar that have
    one are NaN in the result."""
    x = as_dtype(without("diagonal")(tensors(24, b=1, h=1, hq=1, hk=1)), finest(backend))
    t, s = torch.arange(24)[:, None], torch.arange(24)
    where = {
        "key": (t >= 13) & (s <= 13),
        "query": (s <= t) & (t == 13),
        "log_decay": (t >= 13) & (s < 13),
        "beta": (t >= 13) & (s <= 13),
        "value": (s <= t) & (s == 13),
        "grad_output": (s <= t) & (t == 13),
    }[name]
    x[name][:, :, 13] = torch.nan
    if name not in ("value", "grad_output"):
        whole = va.reference.recurrent_map(x["query"], x["key"], **gates_of(x))
        assert torch.equal(whole[0, 0].isnan(), where) and not whole.triu(1).any()
        x["value"], x["grad_output"] = torch.ones_like(x["value"]), torch.ones_like(x["value"])
    for first in (0, 14):  # a run that begins behind the NaN has none
        rows = {each: tensor[:, :, first:] for each, tensor in x.items()}
        got = call(backend)(**rows)[0, 0]
        assert torch.equal(got.isnan(), where[first:, first:].any(0))


@on("reference", *BACKENDS)
def test_rows_of_shares(backend: str) -> None:
    """Each head's row has shares of one, a row of zeros none; a token that writes nothing receives nothing."""
    x = as_dtype(without("diagonal", "value", "grad_output")(tensors(30, b=1)), finest(backend))
    x["query"][:, :, 5] = 0.0
    x["beta"][..., 9] = 0.0
    x["relevancy"] = torch.eye(30, dtype=finest(backend))[None]
    abar = call(backend, rule="attention")(**x)[0]
    ones = torch.ones(30, dtype=abar.dtype).index_fill(0, torch.tensor([5]), 0.0)
    torch.testing.assert_close(abar.sum(-1), ones)
    assert not abar[:, 9].any() and not (abar < 0).any()


@on("reference", *BACKENDS)
def test_a_row_of_small_numbers_has_shares(backend: str) -> None:
    """The sum of a row may be so small that its inverse is no number."""
    small = torch.ones(1, 1, 9, 1)
    small[:, :, 5] = 1e-42
    ones, eye = torch.ones(1, 1, 9, 1), torch.eye(9)[None].requires_grad_()
    abar = call(backend, row_normalize=True)(eye, small, ones, ones, ones)
    want = torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(abar[0], want, rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(abar.sum(), eye)
    torch.testing.assert_close(grad[0], torch.ones(9, 9), rtol=1e-4, atol=0)
