"""attention_map: the reference by hand and against loops, streaming against the reference."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from compare import LargestAllocation, assert_all_close_to, bytes_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vlattn_fast.ops.attention_map import BACKENDS, HEAD_REDUCTIONS, RULES, attention_map
from vlattn_fast.reference.attention_map import attention_map as formula
from vlattn_fast.streaming import _tiles

B, H, N, M, D, DV = 2, 4, 6, 9, 5, 3
RUNNING = ("reference", "streaming")
LOG2, LOG3 = math.log(2.0), math.log(3.0)


def double(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def inputs(rule: str, dtype: torch.dtype = torch.float64, *, heads: int = H) -> dict[str, Tensor]:
    """Tensors as a model lays them out, (B,N,H,D)."""
    shapes = {"query": (N, H, D), "key": (M, heads, D), "value": (M, heads, DV), "grad_output": (N, H, DV)}
    made = {name: double(B, *shape, scale=1.5).to(dtype).transpose(1, 2) for name, shape in shapes.items()}
    return made if rule == "gradient" else {name: made[name] for name in ("query", "key")}


def bool_mask() -> Tensor:
    mask = torch.rand(B, 1, N, M) > 0.4
    mask[0, :, 2] = False  # a query without a visible key
    return mask


def float_mask() -> Tensor:
    return torch.randn(H, 1, M).masked_fill(torch.rand(H, 1, M) > 0.7, -torch.inf)


def key_mask() -> Tensor:
    mask = torch.rand(B, M) > 0.3
    mask[1] = False
    return mask


CASES: dict[str, Any] = {
    "plain": lambda: {},
    "bool mask": lambda: {"attn_mask": bool_mask()},
    "float mask": lambda: {"attn_mask": float_mask()},
    "key mask": lambda: {"key_mask": key_mask()},
    "causal": lambda: {"is_causal": True},
    "scale 0": lambda: {"scale": 0.0},
    "all masks": lambda: {"attn_mask": float_mask(), "key_mask": key_mask(), "is_causal": True, "scale": -0.6},
}


def small_tiles(monkeypatch: pytest.MonkeyPatch, elements: int = 4 * M) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)


def compare(tensors: dict[str, Tensor], what: str, backend: str | None = None, **fixed: Any) -> Tensor:
    """The operator against its formula."""
    ours = partial(attention_map, **fixed, **({} if backend is None else {"backend": backend}))
    return assert_all_close_to(ours, partial(formula, **fixed), tensors, what=what, grads=False)["out0"]


def by_loops(
    query: Any,
    key: Any,
    value: Any,
    grad_output: Any,
    visible: Any,
    scale: float,
    rule: str,
    head_reduction: str,
    row_normalize: bool,
) -> Any:
    """The definition, entry by entry: query (B,H,N,D), key (B,H,M,D), visible (B,H,N,M)."""
    (b, h, n, _), m = query.shape, key.shape[2]
    abar = np.zeros((b, n, m))
    for sample, i in np.ndindex(b, n):
        for j in range(m):
            heads = []
            for head in range(h):
                row = visible[sample, head, i]
                score = [scale * float(query[sample, head, i] @ key[sample, head, x]) for x in range(m)]
                largest = max((s for s, seen in zip(score, row, strict=True) if seen), default=0.0)
                total = sum(math.exp(s - largest) for s, seen in zip(score, row, strict=True) if seen)
                a = math.exp(score[j] - largest) / total if row[j] else 0.0
                if rule == "gradient":
                    a = max(a * float(grad_output[sample, head, i] @ value[sample, head, j]), 0.0)
                heads.append(a)
            abar[sample, i, j] = {"mean": sum(heads) / h, "max": max(heads), "min": min(heads)}[head_reduction]
        total = abar[sample, i].sum()
        if row_normalize and total > 0:
            abar[sample, i] /= total
    return abar


# ------------------------------------------------------------------ the reference

# Two heads over two keys: A = [[1/2, 1/2], [1/4, 3/4]] and [[2/3, 1/3], [0, 1]]; third query without keys
LOGITS = torch.tensor([[[0.0, 0.0], [0.0, LOG3], [1.0, 1.0]], [[LOG2, 0.0], [0.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
VISIBLE = torch.tensor([[[1, 1], [1, 1], [0, 0]], [[1, 1], [0, 1], [0, 0]]], dtype=torch.bool)
BY_HAND: dict[tuple[str, str], list[list[float]]] = {
    ("attention", "mean"): [[7 / 12, 5 / 12], [1 / 8, 7 / 8], [0, 0]],
    ("attention", "max"): [[2 / 3, 1 / 2], [1 / 4, 1], [0, 0]],
    ("attention", "min"): [[1 / 2, 1 / 3], [0, 3 / 4], [0, 0]],
    # dA = [[2, -6], [4, -12], ..] in head 1 and [[3, 1], [-3, -1], ..] in head 2
    ("gradient", "mean"): [[(1 + 2) / 2, 1 / 6], [1 / 2, 0], [0, 0]],
    ("gradient", "max"): [[2, 1 / 3], [1, 0], [0, 0]],
    ("gradient", "min"): [[1, 0], [0, 0], [0, 0]],
}


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize(("rule", "head_reduction"), BY_HAND)
def test_by_hand(rule: str, head_reduction: str, backend: str) -> None:
    tensors = {"query": torch.zeros(1, 2, 3, 1), "key": torch.zeros(1, 2, 2, 1)}
    if rule == "gradient":
        tensors["value"] = torch.tensor([[[[1.0], [-3.0]], [[3.0], [1.0]]]])
        tensors["grad_output"] = torch.tensor([[[[2.0], [4.0], [5.0]], [[1.0], [-1.0], [5.0]]]])
    tensors = {name: x.double() for name, x in tensors.items()}
    fixed: dict[str, Any] = {
        "rule": rule,
        "head_reduction": head_reduction,
        "attn_mask": LOGITS.masked_fill(~VISIBLE, -torch.inf),
        "backend": backend,
    }
    want = torch.tensor(BY_HAND[rule, head_reduction], dtype=torch.float64)
    torch.testing.assert_close(attention_map(**tensors, **fixed)[0], want, rtol=0, atol=1e-15)
    total = want.sum(-1, keepdim=True)
    want = torch.where(total > 0, want / total, 0.0)
    torch.testing.assert_close(attention_map(**tensors, **fixed, row_normalize=True)[0], want, rtol=0, atol=1e-15)


def test_gradient_rule_is_the_published_procedure() -> None:
    """relu(A * A.grad) averaged over heads, with the gradient that autograd leaves on a stored map."""
    query, key, value, weight = double(B, H, N, D), double(B, H, M, D), double(B, H, M, DV), double(B, H, N, DV)
    stored = torch.softmax(query @ key.mT / D**0.5, -1).requires_grad_()
    out = (stored @ value).requires_grad_()
    out.retain_grad()
    (torch.tanh(out) * weight).sum().backward()
    assert stored.grad is not None and out.grad is not None
    want = (stored * stored.grad).clamp(min=0).mean(1).detach()
    for backend in RUNNING:
        got = attention_map(query, key, value, out.grad, rule="gradient", backend=backend)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


sizes = st.integers(0, 4)


@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 3), sizes, sizes, st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 2**31),
    rule=st.sampled_from(RULES),
    head_reduction=st.sampled_from(HEAD_REDUCTIONS),
    row_normalize=st.booleans(),
    is_causal=st.booleans(),
    masks=st.sets(st.sampled_from(["attn_mask", "key_mask"])),
    backend=st.sampled_from(RUNNING),
)
def test_against_loops_whatever_the_shape(
    shape: tuple[int, ...],
    seed: int,
    rule: str,
    head_reduction: str,
    row_normalize: bool,
    is_causal: bool,
    masks: set[str],
    backend: str,
) -> None:
    b, h, n, m, d, dv = shape
    random = torch.Generator().manual_seed(seed)
    query, key, value, grad_output = (
        torch.randn(*s, generator=random, dtype=torch.float64) for s in ((b, h, n, d), (b, h, m, d), (b, h, m, dv), (b, h, n, dv))
    )
    visible = torch.ones(b, h, n, m, dtype=torch.bool)
    fixed: dict[str, Any] = {"rule": rule, "head_reduction": head_reduction, "row_normalize": row_normalize, "scale": 0.8}
    if "attn_mask" in masks:
        fixed["attn_mask"] = torch.rand(b, h, n, m, generator=random) > 0.5
        visible &= fixed["attn_mask"]
    if "key_mask" in masks:
        fixed["key_mask"] = torch.rand(b, m, generator=random) > 0.5
        visible &= fixed["key_mask"][:, None, None]
    if is_causal:
        visible &= torch.ones(n, m, dtype=torch.bool).tril()
    also = (value, grad_output) if rule == "gradient" else ()
    got = attention_map(query, key, *also, **fixed, is_causal=is_causal, backend=backend)
    arrays = [x.numpy() for x in (query, key, value, grad_output, visible)]
    np.testing.assert_allclose(got.numpy(), by_loops(*arrays, 0.8, rule, head_reduction, row_normalize), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ streaming against the reference


@pytest.mark.parametrize("tile", [1, 2 * N * M, 1 << 19])  # one row of one head, two heads of all rows, everything
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_streaming_matches_reference(case: str, rule: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, tile)
    fixed, tensors = CASES[case]() | {"rule": rule}, inputs(rule)
    for head_reduction in HEAD_REDUCTIONS:
        for row_normalize in (False, True):
            options = fixed | {"head_reduction": head_reduction, "row_normalize": row_normalize}
            compare(tensors, f"{case}, {rule}, {head_reduction}, {row_normalize}", **options, backend="streaming")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["plain", "all masks"])
def test_other_dtypes(case: str, rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    fixed, tensors = CASES[case]() | {"rule": rule}, inputs(rule, dtype)
    for head_reduction in HEAD_REDUCTIONS:
        what = f"{case}, {rule}, {head_reduction}"
        got = compare(tensors, what, **fixed, head_reduction=head_reduction, backend="streaming")
        assert got.dtype == torch.float32


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heads", [1, 2])
def test_grouped_heads(heads: int, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    fixed, tensors = CASES["all masks"]() | {"rule": rule, "head_reduction": "max"}, inputs(rule, heads=heads)
    compare(tensors, "gqa", **fixed, enable_gqa=True)
    repeated = {name: x.repeat_interleave(H // x.shape[1], 1) for name, x in tensors.items()}
    assert torch.equal(formula(**tensors, **fixed, enable_gqa=True), formula(**repeated, **fixed))


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("rule", RULES)
def test_what_stands_in_padding_reaches_nothing(rule: str, backend: str) -> None:
    fixed, clean = CASES["key mask"]() | {"rule": rule, "backend": backend}, inputs(rule)
    hidden = ~fixed["key_mask"][:, None, :, None]
    dirty = {
        name: x.masked_fill(hidden, bad) if (bad := {"key": torch.nan, "value": torch.inf}.get(name)) else x
        for name, x in clean.items()
    }
    assert all(not dirty[name].isfinite().all() for name in ("key", "value") if name in dirty)
    found = attention_map(**dirty, **fixed)
    assert torch.equal(found, attention_map(**clean, **fixed)) and found.isfinite().all()
    assert (found.masked_select(~fixed["key_mask"][:, None, :].expand_as(found)) == 0).all()


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("rule", RULES)
def test_sums_of_rows(rule: str, backend: str) -> None:
    fixed, tensors = {"attn_mask": bool_mask(), "rule": rule, "backend": backend}, inputs(rule)
    sums = torch.ones(B, N, dtype=torch.float64)
    sums[0, 2] = 0  # the query without a visible key
    found = attention_map(**tensors, **fixed)
    if rule == "attention":
        torch.testing.assert_close(found.sum(-1), sums, rtol=0, atol=1e-14)
    assert (found[0, 2] == 0).all() and (found >= 0).all()
    for head_reduction in ("mean", "max"):
        normalized = attention_map(**tensors, **fixed, head_reduction=head_reduction, row_normalize=True)
        torch.testing.assert_close(normalized.sum(-1), sums, rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout", ["every second", "expanded"])
def test_strides_and_no_writing(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    tensors = inputs("gradient")
    if layout == "every second":
        tensors = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in tensors.items()}
    else:
        tensors = {name: x[:1, :, :1].expand(B, H, x.shape[2], x.shape[3]) for name, x in tensors.items()}
    fixed = CASES["all masks"]()
    before = {name: x.clone() for name, x in (tensors | fixed).items() if isinstance(x, Tensor)}
    compare(tensors, layout, **fixed, rule="gradient")
    assert all(torch.equal((tensors | fixed)[name], x) for name, x in before.items())


def test_autocast_computes_in_its_dtype() -> None:
    tensors, fixed = inputs("gradient", torch.float32), CASES["key mask"]() | {"rule": "gradient"}
    mixed = tensors | {"query": tensors["query"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        found = [attention_map(**x, **fixed) for x in (tensors, mixed)]
    want = attention_map(**{name: x.bfloat16() for name, x in tensors.items()}, **fixed)
    assert all(torch.equal(got, want) and got.dtype == torch.float32 for got in found)


# ------------------------------------------------------------------ registration


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule: str) -> None:
    tensors = inputs(rule)
    also = (tensors["value"], tensors["grad_output"], bool_mask(), key_mask()) if rule == "gradient" else (None,) * 4
    torch.library.opcheck(
        torch.ops.vlattn.attention_map,
        (tensors["query"], tensors["key"], *also, rule, "max", rule == "gradient", 0.5, rule == "gradient", "streaming"),
    )


@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output"])
def test_backward_is_refused_with_words(name: str) -> None:
    tensors = {other: x.requires_grad_(other == name) for other, x in inputs("gradient").items()}
    found = attention_map(**tensors, rule="gradient")
    assert found.requires_grad  # silence would look like a gradient of zero
    with pytest.raises(
        RuntimeError, match="attention_map has no gradient; detach .* use attention_statistics or score_attention"
    ):
        found.sum().backward()
    tensors = {other: x.detach() for other, x in tensors.items()}
    assert not attention_map(**tensors, rule="gradient").requires_grad


def test_only_the_reference_is_differentiable() -> None:
    tensors = {name: x.requires_grad_() for name, x in inputs("attention").items()}
    attention_map(**tensors, head_reduction="max", backend="reference")[..., 0].sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in tensors.values())


def test_compiles_to_two_graphs_over_ten_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention_map, fullgraph=True, backend=counter)
    for length in range(7, 17):
        tensors = [double(1, 2, length + extra, 4) for extra in (0, 3, 3, 0)]
        for rule in RULES:
            given_tensors = tensors if rule == "gradient" else tensors[:2]
            got = compiled(*given_tensors, rule=rule, is_causal=True)
            assert torch.equal(got, attention_map(*given_tensors, rule=rule, is_causal=True))
    assert counter.frame_count <= 4  # two for each rule


def test_errors_keep_their_words_when_compiled() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention_map, fullgraph=True, backend="aot_eager")
    query, key = double(1, 2, 3, 4), double(1, 2, 5, 4)
    with pytest.raises(Exception, match="head_reduction must be one of"):
        compiled(query, key, head_reduction="median")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="attention_map has no gradient; detach"):
        compiled(query.requires_grad_(), key)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
def test_nothing_larger_than_the_output(rule: str, head_reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 1 << 12)
    for length in (128, 256):
        query, key, value, grad_output = (torch.randn(1, 4, length, 8) for _ in range(4))
        also = (value, grad_output) if rule == "gradient" else ()
        with LargestAllocation() as memory:
            found = attention_map(query, key, *also, rule=rule, head_reduction=head_reduction, row_normalize=True)
        assert memory.bytes == bytes_of(found) == 4 * length**2, memory.by
        assert memory.peak <= bytes_of(found) + 16 * 4 * (1 << 12)  # and a few tiles


# ------------------------------------------------------------------ arguments


def test_backends_run_what_they_accept() -> None:
    assert set(BACKENDS) == {"cuda", "triton", "streaming", "reference"}
    tensors = inputs("attention")
    assert torch.equal(attention_map(**tensors), attention_map(**tensors, backend="streaming"))


GRADIENT = {"rule": "gradient", "value": double(B, H, M, DV), "grad_output": double(B, H, N, DV)}
BAD_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query must be a torch.Tensor"),
    ({"query": torch.zeros(H, N, D)}, ValueError, "query must have 4 dimensions"),
    ({"query": double(B, 0, N, D), "key": double(B, 0, M, D)}, ValueError, "query must have at least one head"),
    ({"key": torch.zeros(B, H, M, D)}, TypeError, "key must have the dtype of query"),
    ({"key": double(B, H, M, D + 1)}, ValueError, "key must have query's (head )?size"),
    ({"key": double(B + 1, H, M, D)}, ValueError, "key must have query's batch size"),
    ({"key": double(B, 2, M, D)}, ValueError, "key must have query's 4 heads"),
    ({"key": double(B, 3, M, D), "enable_gqa": True}, ValueError, "key's number of heads must divide"),
    ({"rule": "nonsense"}, ValueError, "rule must be one of"),
    ({"rule": 1}, TypeError, "rule must be one of"),
    ({"head_reduction": "median"}, ValueError, "head_reduction must be one of"),
    ({"head_reduction": None}, ValueError, "head_reduction must be one of"),
    ({"row_normalize": 1}, TypeError, "row_normalize must be True or False"),
    (GRADIENT | {"value": None}, ValueError, "value must be given for rule='gradient'"),
    (GRADIENT | {"grad_output": None}, ValueError, "grad_output must be given for rule='gradient'"),
    (GRADIENT | {"rule": "attention"}, ValueError, "value must not be given for rule='attention'"),
    ({"grad_output": GRADIENT["grad_output"]}, ValueError, "grad_output must not be given for rule='attention'"),
    (GRADIENT | {"value": double(B, H, M + 1, DV)}, ValueError, "value must have key's batch, heads and length"),
    (GRADIENT | {"value": torch.zeros(B, H, M, DV)}, TypeError, "value must have the dtype of query"),
    (GRADIENT | {"grad_output": double(B, H, N, DV + 1)}, ValueError, "grad_output must have the shape"),
    ({"attn_mask": torch.ones(N, M, dtype=torch.int64)}, TypeError, "attn_mask must be bool"),
    ({"attn_mask": torch.ones(M, N, dtype=torch.bool)}, ValueError, "attn_mask must broadcast"),
    ({"key_mask": torch.ones(B, N, dtype=torch.bool)}, ValueError, "key_mask must have shape"),
    ({"is_causal": None}, TypeError, "is_causal must be True or False"),
    ({"scale": math.inf}, ValueError, "scale must be a finite number"),
    ({"backend": "nonsense"}, ValueError, "backend must be one of"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' cannot run attention_map"),
]


@pytest.mark.parametrize(("changed", "error", "words"), BAD_INPUT, ids=[words[:44] for *_, words in BAD_INPUT])
def test_bad_input(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        attention_map(**{"query": double(B, H, N, D), "key": double(B, H, M, D)} | changed)
