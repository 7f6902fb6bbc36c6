"""A bias of pairs of token groups in the Triton kernels: tiles of one group and of several, their edges, and what is masked.

What the operators compute otherwise: tests/ops/. Tiles are 32 x 32 in float32, 32 x 16 for sums over hidden units, 64 x 64 in
16 bit.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to
from tests.helpers.ops import abar_cases, map_cases, relevancy_cases
from tests.helpers.ops.backends import ROOT
from tests.helpers.releases import needs_interpreted_loops
from tests.kernels.test_score_attention import KINDS, Ahead, tensors
from vlattn_fast.kernels import _configurations, _group_bias, _tiles, relevancy_attention, score_attention

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def runs(size: int, *starts: int) -> Tensor:
    """Groups 0, 1, 2, ... that begin at these tokens; tokens before the first have none."""
    return torch.searchsorted(torch.tensor(starts), torch.arange(size), right=True) - 1


GROUPS: dict[str, Callable[[int], Tensor]] = {
    "one": lambda size: torch.zeros(size, dtype=torch.int64),
    "runs": lambda size: runs(size, 3, 35, 36, 70),  # tiles of one group, of none and one, of three
    "at tiles": lambda size: runs(size, 0, 16, 32, 64),
    "either side of tiles": lambda size: runs(size, 0, 15, 33, 63),
    "mixed": lambda size: torch.arange(size) % 5 - 1,
    "equal ends": lambda size: torch.where(torch.arange(size) % 16 == 7, 2, 1),  # first and last key of a tile have one group
    "none": lambda size: torch.full((size,), -1),
}


def bias(heads: int, rows: int, columns: int, *batch: int) -> Tensor:
    """With a pair that is masked, a large number and the most negative one."""
    made = torch.randn(*batch, heads, rows, columns)
    made[..., 0, columns - 1] = -torch.inf
    made[..., rows - 1, 0] = -1e5
    return made


def check(inputs: dict[str, Tensor], kind: str, columns: Tensor, *, cancels: bool = False, **options: Any) -> dict[str, Tensor]:
    """Outputs, lse and gradients against the formula; inputs has group_bias."""
    _, heads, n, _ = inputs["query"].shape
    rows = torch.arange(n) % (inputs["group_bias"].shape[-2] + 1) - 1
    groups = {"query_groups": rows, "key_groups": columns, "return_lse": True}

    def call(operator: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        def run(query: Tensor, key: Tensor, value: Tensor, group_bias: Tensor, **params: Tensor) -> Any:
            score = KINDS[kind](params)
            return operator(query, key, value, score=score, group_bias=group_bias, **groups, **options, **more)

        return run

    cotangents = [torch.randn(1, heads, n, inputs["value"].shape[3]), torch.randn(1, heads, n)]
    names = ("weight", "vector")
    used = {name: x for name, x in inputs.items() if name not in names or name in _parameters(kind)}
    scales = {f"grad {name}": 1.0 for name in used if cancels or name in names}
    return assert_all_close_to(
        call(va.score_attention, backend="triton"), call(va.reference.score_attention), used, cotangents, scales=scales
    )


def _parameters(kind: str) -> tuple[str, ...]:
    return {"tanh": ("weight",), "sigmoid": ("weight",), "additive": ("vector",)}.get(kind, ())


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("causal", (False, True))
def test_tiles_of_one_group_and_of_several(groups: str, causal: bool) -> None:
    inputs = tensors(37, 83) | {"group_bias": bias(1, 3, 4)}
    check(inputs, "dot", GROUPS[groups](83), is_causal=causal)


MASKS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "bool": lambda n, m: {"attn_mask": torch.rand(n, m) > 0.4},
    "float": lambda n, m: {"attn_mask": torch.randn(n, m).masked_fill(torch.rand(n, m) > 0.7, -torch.inf)},
    "key": lambda n, m: {"key_mask": torch.rand(1, m) > 0.4},
    "scale": lambda n, m: {"scale": -0.7},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", ("dot", "cosine", "tanh", "additive"))
def test_beside_other_masks(kind: str, masks: str) -> None:
    n, m = (5, 35) if kind == "additive" else (34, 67)
    inputs = tensors(n, m) | {"group_bias": bias(1, 2, 3, 1)}
    check(inputs, kind, runs(m, 0, 21, 33), **MASKS[masks](n, m))


@pytest.mark.parametrize("kind, m, dtype", [("dot", 130, BF16), ("dot", 97, FP16), ("cosine", 97, FP16), ("additive", 33, BF16)])
@pytest.mark.parametrize("groups", ("runs", "mixed"))
def test_in_16_bit(groups: str, kind: str, m: int, dtype: torch.dtype) -> None:
    inputs = tensors(20, m) | {"group_bias": bias(1, 3, 5)}
    check(as_dtype(inputs, dtype), kind, GROUPS[groups](m), cancels=True)


@pytest.mark.parametrize("columns", (1, 7, 33, 70))
def test_more_groups_than_a_program_sums(columns: int) -> None:
    inputs = tensors(18, 75) | {"group_bias": bias(1, 2, columns)}
    check(inputs, "dot", torch.arange(75) * 7 % (columns + 1) - 1)


@pytest.mark.skipif("VLATTN_PTX" in os.environ, reason="a compiled kernel keeps the constant that it was compiled with")
@pytest.mark.parametrize("groups", ("runs", "mixed"))
def test_float32_under_an_older_triton(groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which does not compile the branch of tiles with few groups."""
    monkeypatch.setattr(score_attention, "OLD_TRITON", True)
    monkeypatch.setattr(score_attention, "_softmax_under_bias", None)
    inputs = tensors(35, 83)
    check({**inputs, "group_bias": bias(inputs["query"].shape[1], 3, 5)}, "dot", GROUPS[groups](83))


def test_heads_that_share_keys() -> None:
    inputs = {"query": torch.randn(1, 4, 20, 3), "key": torch.randn(1, 2, 50, 3), "value": torch.randn(1, 2, 50, 5)}
    check(inputs | {"group_bias": bias(4, 3, 4)}, "dot", GROUPS["runs"](50), enable_gqa=True)


def test_groups_of_each_sample() -> None:
    """Beside dropout, whose pairs the two backends draw alike."""
    query, key, value = (torch.randn(2, 2, rows, 8) for rows in (20, 70, 70))
    rows, columns = torch.randint(-1, 3, (2, 20)), torch.stack([runs(70, 4, 40, 64), runs(70, 0, 32, 33)])
    table = torch.randn(2, 2, 3, 3, requires_grad=True)
    results = []
    for backend in ("triton", "streaming"):
        torch.manual_seed(1)
        groups = {"query_groups": rows, "key_groups": columns, "group_bias": table}
        out = va.score_attention(query, key, value, dropout_p=0.3, backend=backend, **groups)
        results.append((out, *torch.autograd.grad(out.square().sum(), table)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ("dot", "additive"))
def test_keys_that_are_split_into_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "FEWEST_KEYS", 16)
    numbers: list[int] = []
    split = score_attention.keys_of_a_part
    monkeypatch.setattr(score_attention, "keys_of_a_part", lambda *arguments: numbers.append(split(*arguments)) or numbers[-1])
    m = 65 if kind == "additive" else 161
    check(tensors(3, m) | {"group_bias": bias(1, 2, 3)}, kind, runs(m, 7, 32, 50))
    assert numbers and min(numbers) > 0


@pytest.mark.parametrize("options", [{}, {"key_mask": True}])
def test_scores_that_are_computed_a_tile_ahead(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_configurations, "OVERRIDES", Ahead(unused={}))
    options = {name: torch.rand(1, 50) > 0.4 for name in options}
    check(tensors(35, 50) | {"group_bias": bias(1, 2, 3)}, "dot", runs(50, 0, 16, 37), **options)


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("groups", ("runs", "mixed"))
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_what_is_no_number(value: float, groups: str, dtype: torch.dtype) -> None:
    """NaN of a bias stays in rows that see the group. A pair that a mask or -inf masks has none, whatever the score is."""
    query, key, value_rows = (torch.randn(1, 1, rows, 8).to(dtype) for rows in (40, 75, 75))
    columns, table = GROUPS[groups](75), torch.zeros(1, 2, 4)
    of_call = {"query_groups": torch.arange(40) // 20, "key_groups": columns, "backend": "triton"}
    table[0, 1, 1] = value
    out = va.score_attention(query, key, value_rows, group_bias=table, **of_call)
    assert out[:, :, 20:].isnan().all() and out[:, :, :20].isfinite().all()
    masked = va.score_attention(query, key, value_rows, group_bias=table, attn_mask=(columns != 1).expand(40, -1), **of_call)
    assert masked.isfinite().all()
    table[0, :, 1] = -torch.inf
    key[..., columns == 1, :] = value
    out = va.score_attention(query, key, value_rows, group_bias=table, **of_call)
    expected = va.reference.score_attention(query.float(), key.float(), value_rows.float(), attn_mask=columns != 1)
    torch.testing.assert_close(out.float(), expected, **({} if dtype == F32 else {"rtol": 0.02, "atol": 0.02}))


@pytest.mark.parametrize("kind, dtype", [("dot", BF16), ("dot", FP16), ("negative", BF16)])
@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"key_mask": True}), ids=str)
@pytest.mark.slow
def test_biases_that_a_product_does_not_add(options: dict[str, Any], kind: str, dtype: torch.dtype) -> None:
    """Rows of three blocks: with biases that a product adds, with those that it does not, and with both. Against a float mask."""
    n, columns = 150, torch.arange(100) % 6 - 1
    query, key, value = (torch.randn(1, 2, rows, 16).to(dtype) for rows in (n, 100, 100))
    lowest = torch.finfo(F32).min
    table = torch.randn(2, 6, 5)
    table[0, 1], table[0, 2] = torch.tensor([[-torch.inf, 0.5, 3.0, -60.0, 1.0], [lowest, 1e5, 65.0, 0.0, -1e4]])
    table[1, 3], table[1, 4], table[1, 5] = torch.tensor([[-torch.inf] * 5, [lowest] * 5, [torch.nan, torch.inf, 0.0, 0.0, 0.0]])
    rows = torch.arange(n) // 25
    dense = table[:, rows][..., columns.clamp(min=0)].masked_fill(columns < 0, 0.0)
    options = {**options, **({"key_mask": torch.arange(100)[None] % 7 != 0} if "key_mask" in options else {})}
    options["scale"] = -0.3 if kind == "negative" else 0.25
    grads = torch.randn(1, 2, n, 16).to(dtype), torch.randn(1, 2, n)
    results = []
    for bias in ({"group_bias": table, "query_groups": rows, "key_groups": columns}, {"attn_mask": dense}):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        outs = va.score_attention(*leaves, return_lse=True, backend="triton", **bias, **options)
        results.append([x.float() for x in (*outs, *torch.autograd.grad(outs, leaves, grads))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02, equal_nan=True)


@pytest.mark.parametrize("planted", (torch.inf, torch.nan))
def test_sums_of_gradients_that_are_not_finite(planted: float) -> None:
    """As in streaming: a product of the gradients with zeros is NaN in other groups, and in those without a key."""
    query, key, value = (torch.randn(1, 1, rows, 8).to(BF16) for rows in (70, 90, 90))
    grad = torch.randn(1, 1, 70, 8)
    grad[0, 0, 3, 2] = planted
    table, groups = torch.randn(1, 70, 4), {"query_groups": torch.arange(70), "key_groups": runs(90, 0, 40)}
    results = []
    for backend, dtype in (("triton", BF16), ("streaming", F32)):
        leaf = table.clone().requires_grad_()
        inputs = (x.to(dtype) for x in (query, key, value.abs()))
        out = va.score_attention(*inputs, group_bias=leaf, backend=backend, **groups)
        results.append(*torch.autograd.grad(out, leaf, grad.to(dtype)))
    got, want = results
    assert not got[0, 3, :2].isfinite().any() and (got[0, :, 2:] == 0).all()
    others = torch.arange(70) != 3
    torch.testing.assert_close(got[:, others], want[:, others], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("groups", (1, 3, 5, 6, 8))
@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.slow
def test_the_factors_of_a_product(dtype: torch.dtype, groups: int) -> None:
    """Their product is the bias over the scale, to 2^-14 of it, since the interpreter cuts where a GPU rounds. A special bias
    gives 0, and a word tells of each block."""
    n, scale = 200, 0.125
    table, columns = torch.randn(2, 3, n, groups), torch.randint(-2, groups + 1, (2, 150))
    table[0, 1, 70:], table[1, 2, 5, groups - 1], table[1, 0, 130, 0] = -torch.inf, torch.nan, 64.5
    (rest, _, _), product = _group_bias.prepared_product(table, columns, dtype, scale)
    plain = table.abs() <= 64
    known = (columns >= 0) & (columns < groups)
    got = product.parts[:, :, :n].float() @ product.members[:, None, :150].float().mT
    want = table.where(plain, 0.0)[:, torch.arange(3)].gather(3, columns.clamp(0, groups - 1)[:, None, None].expand(2, 3, n, 150))
    want = want * known[:, None, None] / scale
    assert ((got - want).abs() <= 2.0**-14 * want.abs() + 2.0**-24).all()
    assert not product.members[:, 150:].any() and not product.parts[:, :, n:].any()
    blocks = torch.nn.functional.pad(table, (0, 0, 0, 56), value=-torch.inf).unflatten(2, (4, 64))
    real = torch.arange(256).view(4, 64, 1) < n
    bits = 2 << torch.arange(groups)
    special = ((~(blocks.abs() <= 64) & real).any(3) * bits).sum(-1)
    hidden = ((blocks == -torch.inf).all(3) * bits).sum(-1)
    assert torch.equal(product.special.long(), special | hidden << 16)
    assert abs(rest[1, 0, 1, 130] - 64.5 * 1.4426950408889634) < 1e-4 and (rest[0, 1, 1:, 70:n] == -torch.inf).all()


def test_a_row_that_sees_no_group() -> None:
    inputs = tensors(20, 70)
    table = torch.randn(1, 2, 3, requires_grad=True)
    masked = table.detach().clone()
    masked[0, 1] = -torch.inf
    groups = {"query_groups": torch.arange(20) % 2, "key_groups": runs(70, 0, 32, 40), "group_bias": masked.requires_grad_()}
    out, lse = va.score_attention(*list(inputs.values())[:3], return_lse=True, backend="triton", **groups)
    assert (out[:, :, 1::2] == 0).all() and (lse[:, :, 1::2] == -torch.inf).all() and lse[:, :, ::2].isfinite().all()
    (grad,) = torch.autograd.grad(out.sum(), masked)
    assert (grad[0, 1] == 0).all() and (grad[0, 0] != 0).all()


@pytest.mark.parametrize("m", (1, 2047, 2049, 5000))
def test_the_words_of_keys(m: int) -> None:
    """Equal words say that all keys between have one group; a program reads 2,048 keys at a time."""
    groups = torch.randint(-3, 5, (2, m)).repeat_interleave(3, 1)[:, :m].contiguous()
    known = torch.where((groups >= 0) & (groups < 4), groups, -1)
    words = _group_bias.prepared(torch.zeros(2, 1, 3, 4), groups).words[:, :m]
    assert torch.equal((words & 0xFFFFFFFF) - 1, known)
    changes = (known[:, 1:] != known[:, :-1]).cumsum(1)
    assert torch.equal((words[:, 1:] >> 32) - (words[:, :1] >> 32), changes)


def of_tokens(n: int, columns: Tensor) -> dict[str, Any]:
    return {"query_groups": torch.arange(n) % 3 - 1, "key_groups": columns}


@pytest.mark.parametrize("groups", ("runs", "mixed"))
@pytest.mark.parametrize(
    "rule, rows, dtype", [("gradient", 2, F32), ("attention", 1, F32), ("gradient", 1, BF16), ("gradient", 70, F32)]
)
def test_relevancy_attention(rule: str, rows: int, dtype: torch.dtype, groups: str) -> None:
    inputs = relevancy_cases.tensors(70, h=2, kv=1, rows=rows, dtype=dtype)
    columns = of_tokens(70, GROUPS[groups](70))
    scales = {f"grad {name}": 1.0 for name in ("query", "key", "group_bias")}
    options = {"rule": rule, "row_normalize": rows == 2, "enable_gqa": True, **columns}
    assert_all_close_to(
        lambda **tensors: va.relevancy_attention(**tensors, **options, backend="triton"),
        lambda **tensors: va.reference.relevancy_attention(**tensors, **options),
        inputs | {"group_bias": bias(2, 2, 4).to(dtype)},
        relevancy_cases.cotangents(inputs),
        scales=scales,
    )


@pytest.mark.parametrize("groups", ("runs", "mixed"))
@pytest.mark.parametrize(
    "operator, rule", [("step", "gradient"), ("step", "attention"), ("map", "gradient"), ("map", "attention")]
)
@pytest.mark.parametrize("dtype, rows", [(F32, 2), (BF16, 70)])
def test_relevancy_step_and_attention_map(dtype: torch.dtype, rows: int, operator: str, rule: str, groups: str) -> None:
    def make(seed: int) -> dict[str, Tensor]:
        made = abar_cases.inputs(35, 75, b=1, h=2, kv=1, rows=rows, seed=seed)
        return made | {"group_bias": torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(seed)).double()}

    options = {"rule": rule, "row_normalize": rows == 2, **of_tokens(35, GROUPS[groups](75))}
    abar_cases.check("triton", operator, make, dtype, **options)


@pytest.mark.parametrize("columns", (3, 40))
def test_stored_maps_of_several_samples(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relevancy_attention, "_stored_maps", lambda *_: 1)

    def make(seed: int) -> dict[str, Tensor]:
        made = abar_cases.inputs(9, 40, b=2, h=2, kv=2, rows=65, seed=seed)
        return made | {"group_bias": torch.randn(2, 2, 2, columns, generator=torch.Generator().manual_seed(seed)).double()}

    groups = {"query_groups": torch.randint(-1, 2, (2, 9)), "key_groups": torch.randint(-1, columns, (2, 40))}
    abar_cases.check("triton", "step", make, rule="gradient", **groups)


@pytest.mark.parametrize("m", (40, 300))
@pytest.mark.parametrize("reduction", ("mean", "max", "min"))
def test_maps_of_one_tile_and_of_several(reduction: str, m: int) -> None:
    inputs = map_cases.map_inputs("attention", 20, m)
    groups = {**of_tokens(20, GROUPS["runs"](m)), "group_bias": bias(map_cases.H, 2, 4)}
    for dtype, row_normalize in ((F32, True), (BF16, False)):
        options = {"rule": "attention", "head_reduction": reduction, "row_normalize": row_normalize}
        map_cases.check_map("triton", as_dtype(inputs, dtype), **options, **groups)


@pytest.mark.parametrize("reduction", ("max", "min"))
def test_gradients_of_the_largest_and_the_least_head(reduction: str) -> None:
    inputs = as_dtype(map_cases.map_inputs("gradient", 20, 75), F32)
    results = []
    for backend in ("triton", "streaming"):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        table = torch.linspace(-1, 1, 12).view(2, 2, 3).requires_grad_()
        groups = {**of_tokens(20, runs(75, 0, 33, 64)), "group_bias": table}
        abar = va.attention_map(**leaves, rule="gradient", head_reduction=reduction, backend=backend, **groups)
        results.append(torch.autograd.grad(abar.square().sum(), [*leaves.values(), table]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("only", (None, *map_cases.STATISTICS))
@pytest.mark.parametrize("columns", (3, 7, 40))
def test_attention_statistics(columns: int, only: str | None) -> None:
    inputs = as_dtype(map_cases.statistics_inputs(35, 75, b=1, h=2, kv=1), F32)
    inputs["group_bias"] = torch.randn(2, 2, columns).where(torch.rand(2, 2, columns) > 0.1, -torch.inf)
    groups = of_tokens(35, torch.arange(75) // 20 % (columns + 1) - 1)
    map_cases.check_statistics("triton", inputs, only=only, enable_gqa=True, **groups)


def test_statistics_of_few_queries() -> None:
    """Whose keys are split into parts, without a mass."""
    inputs = as_dtype(map_cases.statistics_inputs(3, 1200, b=1, h=2, kv=2), BF16)
    inputs["group_bias"] = torch.randn(2, 2, 4).to(BF16)
    map_cases.check_statistics("triton", inputs, only="entropy", **of_tokens(3, runs(1200, 0, 300, 301, 700)))


@needs_interpreted_loops
@pytest.mark.slow
def test_the_interpreter_as_users_have_it() -> None:
    """TRITON_INTERPRET=1 alone, without what tests/helpers/ops/interpreter.py changes."""
    program = (
        "import torch, vlattn_fast as va; x = torch.randn(1, 2, 5, 16); groups = torch.arange(5) % 3 - 1; "
        "made = {'query_groups': groups, 'key_groups': groups, 'group_bias': torch.zeros(2, 2, 2, requires_grad=True)}; "
        "va.score_attention(x, x, x, **made, backend='triton').sum().backward()"
    )
    environment = {**{name: value for name, value in os.environ.items() if name != "VLATTN_PTX"}, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
