"""attention_reduce: sums on stored maps, their derivatives up to the second, and that no map is stored."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.backends.streaming import _tiles

F64 = torch.float64
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "entropy": lambda a, i, j: torch.special.entr(a),
    "infinite slope at 0": lambda a, i, j: a.sqrt(),
    "power": lambda a, i, j: a**3,
    "threshold": lambda a, i, j: (a > 0.15) * a,
    "distance": lambda a, i, j: a * (i - j).abs(),
    "diagonal": lambda a, i, j: a * (i == j),
    "same group": lambda a, i, j: a * (i % 3 == j % 3),
    "constant": lambda a, i, j: torch.ones_like(a),
}
MASKS: dict[str, dict[str, Any]] = {
    "": {},
    "masks": {
        "key_mask": torch.arange(9) < torch.tensor([[9], [6]]),
        "attn_mask": torch.randn(1, 1, 7, 9, dtype=F64),
        "scale": 0.7,
    },
    "causal": {"is_causal": True},
}


def tensors(heads: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 2, 7, 4, dtype=F64), torch.randn(2, heads, 9, 4, dtype=F64)


def stored(query: Tensor, key: Tensor, f: Any, over: str = "keys", value: Tensor | None = None, **options: Any) -> Tensor:
    """On the whole map."""
    key = key.repeat_interleave(2 // key.shape[1], 1)
    seen = torch.ones(2, 1, 7, 9, dtype=torch.bool)
    if "key_mask" in options:
        seen = seen & options["key_mask"][:, None, None]
    if options.get("is_causal"):
        seen = seen.tril()
    logits = query @ key.mT * options.get("scale", 0.5) + options.get("attn_mask", 0.0)
    a = torch.where(seen, logits.masked_fill(~seen, -torch.inf).softmax(-1), 1.0)
    found = f(a, torch.arange(7)[:, None], torch.arange(9)) * seen
    if value is None:
        return found.sum(-1 if over == "keys" else -2)
    return found @ value.repeat_interleave(2 // value.shape[1], 1) if over == "keys" else found.mT @ value


@pytest.mark.parametrize("over", ["keys", "queries"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_sums_and_gradients(name: str, mask: str, over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 20)  # two rows of nine
    f, options = FUNCTIONS[name], {**MASKS[mask], "over": over}
    query, key = (x.requires_grad_() for x in tensors())
    got, want = va.attention_reduce(query, key, f, **options), stored(query, key, f, **options)
    torch.testing.assert_close(got, want)
    if name != "constant" and not (name == "entropy" and mask):  # whose slope at a masked pair is infinite on the map
        sent = torch.randn_like(got)
        for x, y in zip(*(torch.autograd.grad(out, (query, key), sent) for out in (got, want)), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("over", ["keys", "queries"])
def test_values_of_grouped_heads_and_second_derivatives(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 20)
    query, key = tensors(heads=1)
    value = torch.randn(2, 1, 9, 3, dtype=F64) if over == "keys" else torch.randn(2, 2, 7, 3, dtype=F64)

    def run(*given: Tensor) -> Tensor:
        return va.attention_reduce(*given[:2], FUNCTIONS["power"], over=over, value=given[2], enable_gqa=True)

    given = [x.requires_grad_() for x in (query, key, value)]
    torch.testing.assert_close(run(*given), stored(query, key, FUNCTIONS["power"], over, value))
    assert torch.autograd.gradcheck(run, given, fast_mode=True) and torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_statistics_are_lines_of_it() -> None:
    query, key = tensors()
    names = "entropy", "received", "distance", "diagonal"
    known = va.attention_statistics(query, key, statistics=names)
    for name in names:
        f = FUNCTIONS.get(name, lambda a, i, j: a)
        got = va.attention_reduce(query, key, f, over="queries" if name == "received" else "keys")
        torch.testing.assert_close(got, getattr(known, name))


def test_no_map_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the passes: what is saved has at most as many numbers as a tile, or an input."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 640)
    query, key = (torch.randn(1, 1, 64, 8, requires_grad=True) for _ in range(2))
    saved = list[int]()

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = va.attention_reduce(query, key, lambda a, i, j: a.square())
    assert sum(saved) < 64 * 64, saved
    out.sum().backward()


def test_sums_under_autocast_are_those_of_inputs_in_its_dtype() -> None:
    query, key, value = torch.randn(1, 2, 7, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = va.attention_reduce(query, key, lambda a, i, j: a, value=value)
    want = va.attention_reduce(query.bfloat16(), key.bfloat16(), lambda a, i, j: a, value=value.bfloat16())
    assert got.dtype == torch.float32 and torch.equal(got, want)


QUERY, KEY = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)


@pytest.mark.parametrize(
    ("f", "options", "error", "message"),
    [
        (abs, {"over": "heads"}, ValueError, "over must be"),
        (3, {}, TypeError, "f must be a callable"),
        (None, {}, TypeError, "f must be a callable"),
        (abs, {"over": "queries", "value": torch.zeros(1, 2, 5, 3)}, ValueError, "value must be torch.float32 .1, 2, 3,"),
        (abs, {"over": "queries", "value": torch.zeros(1, 2, 3, 3).long()}, ValueError, "value must be torch.float32"),
        (lambda a, i, j: None, {}, ValueError, "f must return a tensor"),
        (lambda a, i, j: a.repeat(1, 1, 1, 2), {}, ValueError, "f must return a tensor"),
        (abs, {"value": torch.zeros(1, 2, 3, 3)}, ValueError, "value must have key's batch"),
    ],
)
def test_wrong_arguments(f: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        va.attention_reduce(QUERY, KEY, f, **options)
