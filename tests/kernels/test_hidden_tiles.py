"""Tiles of keys and queries whose groups are hidden from one another are not read by the Triton kernels: numbers planted there
reach no result."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to
from tests.helpers.ops.interpreter import reads_outside
from tests.helpers.ops.tile_edges import in_turn
from tests.kernels.test_group_bias import check, runs
from tests.kernels.test_relevancy_attention import OneRow
from tests.kernels.test_score_attention import KINDS, Ahead
from vlattn_fast.kernels import _configurations, _tiles

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

HIDDEN = {"in front": (0,), "behind": (2,), "between": (1,), "either side": (0, 2), "all": (0, 1, 2)}  # of three runs
OPERATORS: tuple[tuple[Callable[..., Any], float, dict[str, Any]], ...] = (  # each with what is planted, and its options
    (va.score_attention, torch.nan, {"backend": "triton"}),
    (va.reference.score_attention, 0.0, {}),
)
VECTOR = torch.linspace(-1, 1, 8)
TOLERANCES = {F32: {"rtol": 1e-3, "atol": 1e-4}, BF16: {"rtol": 0.1, "atol": 0.25}}  # NaN is neither
PLANTED = (10, 130, 390)  # a key of each, in a tile of up to 128 keys, whose other keys are of the same run


def hidden(heads: int, hides: tuple[int, ...], rows: int = 1) -> Tensor:
    return torch.randn(heads, rows, 3).index_fill(2, torch.tensor(hides), -torch.inf)


def planted(x: Tensor, keys: tuple[int, ...], value: float) -> Tensor:
    return x.index_fill(2, torch.tensor([PLANTED[one] for one in keys]), value)


PLAIN = ("dot", 40, {})
OTHERS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("dot", 300, {"is_causal": True}),
    ("dot", 40, {"scale": -0.7}),
    ("dot", 3, {"parts": True}),
    ("dot", 40, {"ahead": True}),
    ("dot", 150, {"dtype": BF16}),
    ("dot", 150, {"dtype": BF16, "ahead": True}),
    ("cosine", 40, {}),
    ("additive", 3, {}),
)


@pytest.mark.parametrize("call, hides", [*((PLAIN, hides) for hides in HIDDEN), *in_turn(OTHERS, [*HIDDEN])], ids=str)
def test_hidden_tiles_of_keys_are_not_read(
    call: tuple[str, int, dict[str, Any]], hides: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in their values would be NaN in sums, since 0 times NaN is NaN."""
    kind, n, options = call[0], call[1], dict(call[2])
    if options.pop("parts", False):
        monkeypatch.setattr(_tiles, "FEWEST_KEYS", 16)
    if options.pop("ahead", False):
        monkeypatch.setattr(_configurations, "OVERRIDES", Ahead(unused={}))
    dtype = options.pop("dtype", F32)
    query, key, value = (torch.randn(1, heads, rows, 8).to(dtype) for heads, rows in ((4, n), (2, 450), (2, 450)))
    groups = {"query_groups": torch.zeros(n, dtype=torch.int64), "key_groups": runs(450, 0, 128, 384), "enable_gqa": True}
    table, grad, results = hidden(4, HIDDEN[hides]), torch.randn(1, 4, n, 8), []
    for operator, number, more in OPERATORS:
        made_of = dtype if more else F32
        given = (x.to(dtype).to(made_of) for x in (query, key, planted(value, HIDDEN[hides], number), table))
        leaves = [x.clone().requires_grad_() for x in given]
        of_call = {**groups, **options, **more, "score": KINDS[kind]({"vector": VECTOR}), "group_bias": leaves[3]}
        out, lse = operator(*leaves[:3], return_lse=True, **of_call)
        results.append([x.float() for x in (out, lse, *torch.autograd.grad(out, leaves, grad.to(dtype).to(made_of)))])
    torch.testing.assert_close(*results, **TOLERANCES[dtype])


SCORES = (("dot", 1, F32), ("dot", 2, F32), ("dot", 2, BF16), ("additive", 1, F32))
ROWS = ((5, False), (190, False), (190, True))


@pytest.mark.parametrize("scores, rows", in_turn(SCORES, ROWS), ids=str)
def test_hidden_tiles_of_queries_are_not_read(scores: tuple[str, int, torch.dtype], rows: tuple[int, bool]) -> None:
    """Those in front of all that see a tile of keys, and those behind: NaN in their gradients stays away."""
    (kind, heads, dtype), (row, causal) = scores, rows
    query, key, value = (torch.randn(1, h, rows, 8).to(dtype) for h, rows in ((heads, 200), (1, 450), (1, 450)))
    query_groups = runs(200, 0, 100)
    table = torch.zeros(heads, 2, 3)
    table[:, query_groups[row], 1] = -torch.inf
    groups = {"query_groups": query_groups, "key_groups": runs(450, 0, 128, 384), "group_bias": table, "is_causal": causal}
    groups |= {"score": KINDS[kind]({"vector": VECTOR})}
    grad, results = torch.randn(1, heads, 200, 8), []
    for operator, number, more in OPERATORS:
        made_of = dtype if more else F32
        leaves = [x.to(made_of).clone().requires_grad_() for x in (key, value)]
        out = operator(query.to(made_of), *leaves, enable_gqa=True, **groups, **more)
        of_out = grad.index_fill(2, torch.tensor([row]), number).to(dtype).to(made_of)
        results.append([x[:, :, 128:384].float() for x in torch.autograd.grad(out, leaves, of_out)])
    torch.testing.assert_close(*results, **TOLERANCES[dtype])


MAPS: dict[str, Callable[..., Any]] = {  # of an operator, by name
    "attention": lambda call, q, k, v, g, **o: call("attention_map")(q, k, **o),
    "gradient": lambda call, q, k, v, g, **o: call("attention_map")(q, k, v, g, rule="gradient", head_reduction="min", **o),
    "step": lambda call, q, k, v, g, **o: call("relevancy_step")(torch.ones(1, 2, 40), q, k, v, g, **o),
    "statistics": lambda call, q, k, v, g, **o: torch.cat(
        [x.flatten() for x in call("attention_statistics")(q, k, statistics=("mass", "entropy", "maximum"), **o) if x is not None]
    ),
}


@pytest.mark.parametrize("name, heads", in_turn([*MAPS], ((0, 1), (0,), (1,))), ids=str)
def test_hidden_tiles_of_maps_and_statistics_are_not_read(name: str, heads: tuple[int, ...]) -> None:
    """Nor is NaN there, which would be NaN in gradients of what sees other keys; heads: those that hide keys. Programs over keys
    read theirs, as those of relevancy_step."""
    query, key, value, grad = (torch.randn(1, 2, rows, 8) for rows in (40, 420, 420, 40))
    table = torch.randn(2, 1, 3)
    table[list(heads), :, 1] = -torch.inf
    groups = {"query_groups": torch.zeros(40, dtype=torch.int64), "key_groups": runs(420, 0, 128, 384), "group_bias": table}
    seen = [part for h in (0, 1) for part in ((key[0, h, :128], key[0, h, 384:]) if h in heads else (key[0, h],))]
    with reads_outside(key, *seen) as found:
        MAPS[name](partial(getattr, va), query, key, value, grad, **groups, backend="triton")
    assert found == [] or name == "step"
    results = []
    for module, number, more in ((va, torch.nan, {"backend": "triton"}), (va.reference, 0.0, {})):
        for x in (key, value):
            x[0, heads, 128:384] = number
        leaves = [x.clone().requires_grad_() for x in (query, key, value, grad)]
        made = MAPS[name](partial(getattr, module), *leaves, **groups, **more)
        grads = torch.autograd.grad(made.square().sum(), leaves, allow_unused=True)
        results.append([made, *(x for x in grads if x is not None)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("row", (5, 190))
def test_hidden_queries_of_received_attention_are_not_read(row: int) -> None:
    query, key, weight = torch.randn(1, 1, 200, 8), torch.randn(1, 1, 420, 8), torch.rand(1, 200)
    table = torch.zeros(1, 2, 3)
    table[:, row // 100, 1] = -torch.inf
    groups = {"query_groups": runs(200, 0, 100), "key_groups": runs(420, 0, 128, 384), "group_bias": table}
    results = []
    for module, number, more in ((va, torch.nan, {"backend": "triton"}), (va.reference, 0.0, {})):
        weight[..., row] = number
        leaf = key.clone().requires_grad_()
        made = module.attention_statistics(query, leaf, row_weight=weight, statistics=("received",), **groups, **more)
        received = made.received[..., 128:384]
        results.append((received, torch.autograd.grad(received.sum(), leaf)[0][:, :, 128:384]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("head", (0, 1))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.slow
def test_queries_of_one_head_of_two_do_not_see_keys_that_both_share(dtype: torch.dtype, head: int) -> None:
    """One loop takes the queries of both for a tile of keys: blocks of them, in front and behind, which the other head needs."""
    inputs = {"query": torch.randn(1, 2, 330, 8), "key": torch.randn(1, 1, 300, 8), "value": torch.randn(1, 1, 300, 8)}
    table = torch.zeros(2, 3, 3)
    table[head, 0, 1] = table[head, 2, 1] = -torch.inf
    inputs = as_dtype(inputs | {"group_bias": table}, dtype)
    groups = {"query_groups": runs(330, 0, 128, 200), "key_groups": runs(300, 0, 64, 256), "enable_gqa": True}
    assert_all_close_to(
        partial(va.score_attention, backend="triton", **groups),
        partial(va.reference.score_attention, **groups),
        inputs,
        [torch.randn(1, 2, 330, 8)],
    )


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_seen_keys_that_begin_and_end_within_tiles(dtype: torch.dtype) -> None:
    """Hidden in front of them, in a gap between them, and behind them."""
    inputs = {"query": torch.randn(1, 1, 70, 8), "key": torch.randn(1, 1, 470, 8), "value": torch.randn(1, 1, 470, 8)}
    table = torch.zeros(1, 1, 5)
    table[..., ::2] = -torch.inf
    groups = {"query_groups": torch.zeros(70, dtype=torch.int64), "key_groups": runs(470, 0, 39, 107, 309, 421)}
    assert_all_close_to(
        partial(va.score_attention, return_lse=True, backend="triton", **groups),
        partial(va.reference.score_attention, return_lse=True, **groups),
        as_dtype(inputs | {"group_bias": table}, dtype),
        [torch.randn(1, 1, 70, 8), torch.randn(1, 1, 70)],
    )


def test_heads_that_see_other_tiles_share_keys() -> None:
    inputs = {"query": torch.randn(1, 2, 100, 3), "key": torch.randn(1, 1, 160, 3), "value": torch.randn(1, 1, 160, 5)}
    table = torch.randn(2, 3, 3)
    table[0, :2], table[1, 2], table[1, 0, 1] = -torch.inf, -torch.inf, -torch.inf
    check(inputs | {"group_bias": table}, "dot", runs(160, 0, 64, 100), enable_gqa=True)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("row", (5, 190))
@pytest.mark.slow
def test_hidden_tiles_of_one_row_of_relevancy(row: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_configurations, "OVERRIDES", OneRow(unused={}))
    query, key, value = (torch.randn(1, 2, rows, 8) for rows in (200, 300, 300))
    rows = runs(200, 0, 100)
    table = torch.randn(2, 2, 3)
    table[:, :, 0] = table[:, rows[row], 1] = -torch.inf
    options = {"query_groups": rows, "key_groups": runs(300, 0, 64, 200), "group_bias": table, "is_causal": causal}
    relevancy, grad = torch.randn(1, 1, 200), torch.randn(1, 2, 200, 8)
    step = va.reference.relevancy_step(relevancy, query, key, planted(value, (0,), 0.0), grad, **options)
    got = va.relevancy_step(relevancy, query, key, planted(value, (0,), torch.nan), grad, backend="triton", **options)
    torch.testing.assert_close(got, step, rtol=1e-3, atol=1e-5)  # the sums of rows read no hidden keys
    relevancy[..., row] = torch.nan
    got = va.relevancy_step(relevancy, query, key, value, grad, backend="triton", **options)
    torch.testing.assert_close(got[..., 64:192], _without(row, relevancy, query, key, value, grad, options)[..., 64:192])


def _without(row: int, relevancy: Tensor, *arguments: Any) -> Tensor:
    *tensors, options = arguments
    return va.reference.relevancy_step(relevancy.index_fill(2, torch.tensor([row]), 0.0), *tensors, **options)


def test_more_runs_than_are_listed() -> None:
    """All keys behind the last of them are taken for seen."""
    columns, table = (torch.arange(300) >= 64) * (1 + torch.arange(300) // 2 % 2), hidden(1, (0, 2))
    query, key, value = (torch.randn(1, 1, rows, 8) for rows in (40, 300, 300))
    results = []
    for operator, number, more in OPERATORS:
        of_call = {"query_groups": torch.zeros(40, dtype=torch.int64), "key_groups": columns, "group_bias": table}
        results.append(operator(query, key, planted(value, (0,), number), **of_call, **more))
    torch.testing.assert_close(*results)
