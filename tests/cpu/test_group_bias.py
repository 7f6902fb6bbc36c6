"""Biases of pairs of token groups in the CPU kernels: sizes around tiles of queries and blocks of keys, numbers of groups, other
masks, blocks of keys that a tile does not see, threads."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to, outputs_and_grads
from tests.helpers.ops import tile_edges
from tests.helpers.ops.backends import LOW
from tests.helpers.ops.masks import COMMON, masks_of
from tests.helpers.ops.score_cases import SCORES as CASES
from tests.helpers.ops.score_cases import attention_inputs, call, tensors

SCORES = ("dot", "cosine-eps=5", "general-tanh-key", "additive")
MANY = (1, 3, 8, 16, 33, 64)  # groups of keys
BLOCK = 512  # keys, where there are more than 768


def grouped(b: int, n: int, m: int, groups: int, of_queries: int = 3) -> dict[str, Tensor]:
    """query_groups and key_groups, both with tokens that have none; runs of keys and single ones have one group."""
    runs = torch.randint(-1, groups, (b, m // 7 + 1)).repeat_interleave(7, 1)[:, :m]
    keys = torch.where(torch.arange(m) < m // 2, runs, torch.randint(-1, groups, (b, m)))
    return {"query_groups": torch.randint(-1, of_queries, (b, n)), "key_groups": keys}


def bias(*shape: int, hidden: float = 0.0) -> Tensor:
    return torch.randn(shape).masked_fill(torch.rand(shape) < hidden, -math.inf)


def check(
    operator: str, inputs: dict[str, Tensor], cotangents: list[Tensor | None] | None = None, **options: Any
) -> dict[str, Tensor]:
    """Outputs and gradients, that of group_bias among them; all may cancel to zero."""
    made, formula = (_named(getattr(module, operator), {**options, **more}) for module, more in _SIDES)
    scales = dict.fromkeys((f"grad {name}" for name in inputs), 1.0)
    return assert_all_close_to(made, formula, inputs, cotangents, scales=scales, what=operator)


_SIDES: tuple[tuple[Any, dict[str, str]], ...] = (va, {"backend": "cpu"}), (va.reference, {})


def _named(operator: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """The operator as a function of named tensors alone; of attention_statistics the outputs that were asked for."""

    def run(**inputs: Tensor) -> Any:
        made = operator(**inputs, **options)
        return made if "statistics" not in options else tuple(getattr(made, name) for name in options["statistics"])

    return run


def attention(
    n: int, m: int, groups: int, *, b: int = 1, h: int = 2, kv: int = 2, d: int = 6, dv: int = 3, hidden: float = 0.0
) -> dict[str, Tensor]:
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d), "value": (b, kv, m, dv)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {"group_bias": bias(h, 3, groups, hidden=hidden)}


@pytest.mark.parametrize("size, groups", tile_edges.covering(tile_edges.CPU, MANY))
def test_sizes_either_side_of_a_tile(size: tuple[int, int], groups: int) -> None:
    n, m = size
    check("score_attention", attention(n, m, groups), return_lse=True, **grouped(1, n, m, groups))


@pytest.mark.parametrize("mask, size, dtype", tile_edges.covering(("none", *COMMON), tile_edges.CPU_SEVERAL, LOW))
def test_beside_masks(mask: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    n, m = size
    inputs = as_dtype(attention(n, m, 5, b=2, hidden=0.2), dtype)
    found = check("score_attention", inputs, **grouped(2, n, m, 5), **masks_of(mask, n, m))
    assert not any(x.isnan().any() for x in found.values())


@pytest.mark.parametrize("n, m", tile_edges.CPU_SEVERAL)
@pytest.mark.parametrize("score", SCORES)
def test_scores(score: str, n: int, m: int) -> None:
    inputs, make = tensors("cpu", score, n=n, m=m)
    options = {"return_lse": True, **grouped(2, n, m, 5)}

    def scored(module: Any, more: dict[str, str]) -> Callable[..., Any]:
        return lambda group_bias, **x: call(module.score_attention, make, group_bias=group_bias, **options, **more)(**x)

    inputs = {**inputs, "group_bias": bias(2, 2, 3, 5, hidden=0.2)}
    scales = dict.fromkeys((f"grad {name}" for name in inputs), 1.0)
    assert_all_close_to(*(scored(*side) for side in _SIDES), inputs, scales=scales)


def test_parts_of_the_keys_of_few_queries() -> None:
    """From 4,096 keys on each 2,048 are a part (few_rows.h), of the groups and masks of its own keys."""
    inputs, masks = attention(1, 6144, 7), {"attn_mask": torch.randn(6144), "key_mask": torch.rand(1, 6144) < 0.9}
    check("score_attention", inputs, return_lse=True, **grouped(1, 1, 6144, 7), **masks)


@pytest.mark.parametrize("n, m", [(20, 40), (2, 900), (60, 900)])
def test_a_float64_mask_keeps_its_digits_beside_a_bias(n: int, m: int) -> None:
    """An offset of the row, which the bias takes back for a group, and a group that hides the mask's largest values."""
    inputs, groups = attention(n, m, 4), grouped(1, n, m, 4)
    mask = torch.randn(n, m, dtype=torch.float64) + 3e6
    mask[:, ::5] += 1e9
    groups["key_groups"][:, ::5] = 0
    inputs["group_bias"][:, :, 0] = -1e9
    inputs["group_bias"][0, 1, 0] = -math.inf
    check("score_attention", inputs, **groups, attn_mask=mask)


@pytest.mark.parametrize("n, m", [(5, 20), (20, 70), (20, 900)])
@pytest.mark.parametrize("large", (1e4, 1e30, math.inf, math.nan))
def test_large_biases(large: float, n: int, m: int) -> None:
    """Those beyond the range of exp, and rows of NaN, as the formula has them. Scores lose digits beside 1e4."""
    inputs, groups = attention(n, m, 4), grouped(1, n, m, 4)
    inputs["group_bias"][0, 0, 1], inputs["group_bias"][1, 2, 3] = large, -large
    out, formula = (module.score_attention(**inputs, **groups, **more) for module, more in _SIDES)
    torch.testing.assert_close(out, formula, equal_nan=True, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("n, m", [(1, 20), (5, 900), (20, 40), (130, 70), (70, 1300)])
@pytest.mark.parametrize("score", ("dot", "additive"))
def test_bits_of_a_bool_mask(score: str, n: int, m: int) -> None:
    """-inf hides a pair as a bool mask does, also where a block of keys is left out; rows without a key are among them."""
    inputs, make = attention_inputs(CASES[score], n=n, m=m)
    inputs = {name: x.float() for name, x in inputs.items()}
    key_groups = (torch.arange(m) // (BLOCK if m > BLOCK else 9)).expand(2, m)
    query_groups = torch.arange(n).expand(2, n) // 64
    table = torch.rand(int(query_groups.max()) + 1, int(key_groups.max()) + 1) < 0.5
    table[0] = torch.arange(table.shape[1]) > 0
    table[-1] = table.shape[0] == 1
    groups = {"query_groups": query_groups, "key_groups": key_groups}
    hidden = torch.zeros(2, *table.shape).masked_fill(~table, -math.inf)
    mask = table[query_groups[0]][:, key_groups[0]]
    cotangents = [torch.randn(2, 2, n, 3), torch.randn(2, 2, n)]
    runs = [
        outputs_and_grads(call(va.score_attention, make, return_lse=True, backend="cpu", **masks), inputs, cotangents)
        for masks in ({"group_bias": hidden, **groups}, {"attn_mask": mask})
    ]
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name


@pytest.mark.parametrize("n, causal", [(1, False), (8, False), (20, False), (130, False), (1100, True)])
def test_a_block_of_keys_that_no_row_sees_is_not_read(n: int, causal: bool) -> None:
    """NaN in its keys and values reaches nothing, as 0 times it would: in both passes."""
    m = 3 * BLOCK
    inputs = attention(n, m, 3)
    key_groups = (torch.arange(m) // BLOCK)[None]
    groups = {"query_groups": torch.zeros(1, n, dtype=torch.int64), "key_groups": key_groups}
    for block in range(2 if causal else 3):
        x = {name: y.clone() for name, y in inputs.items()}
        x["group_bias"][..., block] = -math.inf
        x["key"][:, :, key_groups[0] == block] = x["value"][:, :, key_groups[0] == block] = math.nan
        found = outputs_and_grads(_named(va.score_attention, {"backend": "cpu", "is_causal": causal, **groups}), x)
        seen = slice(None) if block or not causal else slice(BLOCK, None)
        assert all(found[name].isfinite().all() for name in found if name != "grad key" and name != "grad value"), found
        assert found["out0"][:, :, seen].abs().sum() > 0
        for name in ("grad key", "grad value"):
            assert not found[name][:, :, key_groups[0] == block].any()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("n, masked", [(1, False), (1, True), (3, False), (3, True), (20, False)])
def test_a_block_of_keys_that_some_of_the_heads_that_share_it_see(n: int, masked: bool, dtype: torch.dtype) -> None:
    """All but the first of them, the last, and none. Without a mask of each head few queries of heads are queries of one head."""
    inputs = as_dtype(attention(n, 3 * BLOCK, 3, h=6, kv=2), dtype)
    for head, block in ((0, 0), (0, 1), (5, 1), (3, 2), (4, 2), (5, 2)):
        inputs["group_bias"][head, :, block] = -math.inf
    groups = {"query_groups": torch.zeros(n, dtype=torch.int64), "key_groups": torch.arange(3 * BLOCK) // BLOCK}
    mask = torch.randn(6, n, 3 * BLOCK) if masked else None
    check("score_attention", inputs, attn_mask=mask, enable_gqa=True, return_lse=True, **groups)


def test_a_hidden_group_has_no_gradient_in_a_row_of_nan() -> None:
    inputs, groups = attention(20, 40, 2), grouped(1, 20, 40, 2)
    inputs["query"][:] = math.nan
    inputs["group_bias"][:, :, 0] = -math.inf
    grad = outputs_and_grads(_named(va.score_attention, {"backend": "cpu", **groups}), inputs)["grad group_bias"]
    assert not grad[:, :, 0].any() and grad[:, :, 1].isnan().all()


@pytest.mark.usefixtures("threads")
def test_the_gradient_has_the_same_bits_on_every_number_of_threads() -> None:
    """Each row is summed by itself. A group for each query leaves nothing to sum behind it."""
    for n, m in ((70, 300), (130, 1300)):
        inputs = attention(n, m, 5, h=4, kv=4) | {"group_bias": bias(4, n, 5)}
        groups = {"query_groups": torch.arange(n), "key_groups": grouped(1, n, m, 5)["key_groups"]}
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(outputs_and_grads(_named(va.score_attention, {"backend": "cpu", **groups}), inputs)["grad group_bias"])
        assert all(torch.equal(x, found[0]) for x in found)


def maps(n: int, m: int, rule: str) -> dict[str, Tensor]:
    inputs = attention(n, m, 4, b=2, hidden=0.1)
    value = inputs.pop("value")
    return inputs | ({"value": value, "grad_output": torch.randn(2, 2, n, 3)} if rule == "gradient" else {})


@pytest.mark.parametrize("operator", ("relevancy_step", "attention_map", "attention_statistics"))
def test_a_block_that_is_hidden_counts_as_masked(operator: str) -> None:
    """For all rows, in the first block of keys and in the second; and all blocks, for some rows."""
    n, m = 70, 1100
    inputs = maps(n, m, "attention")
    if operator == "relevancy_step":
        inputs["relevancy"] = torch.rand(2, 3, n)
    key_groups = (torch.arange(m) // BLOCK).expand(2, m)
    for block in range(3):
        inputs["group_bias"] = bias(2, 2, 3)
        inputs["group_bias"][..., block] = inputs["group_bias"][:, 1] = -math.inf
        groups = {"query_groups": (torch.arange(n) > 64).long(), "key_groups": key_groups}
        options = {"rule": "attention"} if operator != "attention_statistics" else {"statistics": ("mass", "entropy", "received")}
        found = check(operator, inputs, **options, **groups)
        assert not any(x.isnan().any() for x in found.values())
