"""attention_statistics: the reference by hand and against loops, streaming against the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from compare import LargestAllocation, assert_all_close_to, outputs_and_grads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vlattn_fast.ops.attention_statistics import AttentionStatistics, attention_statistics
from vlattn_fast.reference.attention_statistics import attention_statistics as formulas
from vlattn_fast.streaming import _tiles

B, H, N, M, D, G = 2, 4, 6, 9, 5, 3
DIFFERENTIABLE = ("mass", "entropy", "maximum", "received")
RUNNING = ("reference", "streaming")
LOG2, LOG3 = math.log(2.0), math.log(3.0)


def double(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def inputs(dtype: torch.dtype = torch.float64, *, heads: int = H, scale: float = 1.5) -> dict[str, Tensor]:
    """query and key as a model lays them out, (B,N,H,D), and a row_weight of both signs."""
    query, key = double(B, N, H, D, scale=scale), double(B, M, heads, D, scale=scale)
    return {"query": query.to(dtype).transpose(1, 2), "key": key.to(dtype).transpose(1, 2), "row_weight": double(B, N).to(dtype)}


def bool_mask() -> Tensor:
    return (torch.rand(B, 1, N, M) > 0.4) & (torch.arange(B * N).view(B, 1, N, 1) != 2)  # query 2 of sample 0 sees no key


def float_mask() -> Tensor:
    return torch.randn(H, 1, M).masked_fill(torch.rand(H, 1, M) > 0.7, -torch.inf)


def key_mask() -> Tensor:
    return (torch.rand(B, M) > 0.3) & torch.tensor([[True], [False]])


CASES: dict[str, Any] = {
    "plain": lambda: {},
    "no groups": lambda: {"key_groups": None, "num_groups": None},
    "groups of each sample": lambda: {"key_groups": torch.randint(-1, G, (B, M)), "num_groups": G},
    "more groups than keys": lambda: {"num_groups": 2 * M},
    "no group at all": lambda: {"key_groups": torch.full((M,), -1), "num_groups": 0},
    "bool mask": lambda: {"attn_mask": bool_mask()},
    "float mask": lambda: {"attn_mask": float_mask()},
    "key mask": lambda: {"key_mask": key_mask()},
    "causal": lambda: {"is_causal": True},
    "scale 0": lambda: {"scale": 0.0},
    "negative scale": lambda: {"scale": -0.7},
    "all masks": lambda: {"attn_mask": float_mask(), "key_mask": key_mask(), "is_causal": True, "scale": 0.3},
}


def options(case: str) -> dict[str, Any]:
    return {"key_groups": torch.randint(-1, G, (M,)), "num_groups": G, **CASES[case]()}


def but_argmax(function: Any, **fixed: Any) -> Any:
    """The operator as compare.py wants it: floating outputs only."""

    def call(**tensors: Tensor) -> tuple[Tensor, ...]:
        found = function(**tensors, **fixed)
        return tuple(getattr(found, name) for name in DIFFERENTIABLE)

    return call


def check(tensors: dict[str, Tensor], fixed: dict[str, Any], what: str = "", *, only: str | None = None) -> None:
    """Outputs and gradients of streaming against the reference; `only` names the statistic that sends a gradient."""
    found = formulas(**tensors, **fixed)
    sent = [double(*getattr(found, name).shape) if only in (None, name) else None for name in DIFFERENTIABLE]
    call, want = but_argmax(attention_statistics, **fixed, backend="streaming"), but_argmax(formulas, **fixed)
    assert_all_close_to(call, want, tensors, sent, what=f"{what}, {only}")


def small_tiles(monkeypatch: pytest.MonkeyPatch, elements: int = 4 * M) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)


def by_loops(
    query: Any, key: Any, visible: Any, bias: Any, groups: Any, num_groups: int, weight: Any, scale: float
) -> dict[str, Any]:
    """The definitions, entry by entry: query (B,H,N,D), key (B,H,M,D), visible and bias (B,H,N,M), groups (B,M)."""
    (b, h, n, _), m = query.shape, key.shape[2]
    found = {
        "mass": np.zeros((b, h, n, num_groups)),
        "entropy": np.zeros((b, h, n)),
        "maximum": np.zeros((b, h, n)),
        "argmax": np.full((b, h, n), -1),
        "received": np.zeros((b, h, m)),
    }
    for row in np.ndindex(b, h, n):
        keys = [j for j in range(m) if visible[row][j]]
        score = {j: scale * float(query[row] @ key[row[0], row[1], j]) + bias[row][j] for j in keys}
        total = sum(math.exp(s - max(score.values())) for s in score.values())
        for j in keys:
            a = math.exp(score[j] - max(score.values())) / total
            if groups[row[0]][j] >= 0:
                found["mass"][row][groups[row[0]][j]] += a
            found["entropy"][row] -= a * math.log(a) if a > 0 else 0.0
            if a > found["maximum"][row]:
                found["maximum"][row], found["argmax"][row] = a, j
            found["received"][row[:2]][j] += weight[row[0]][row[2]] * a
    return found


# ------------------------------------------------------------------ the reference


@pytest.mark.parametrize("backend", RUNNING)
def test_by_hand(backend: str) -> None:
    """One head, A = [[1/2, 1/4, 1/4], [1/3, 1/3, 1/3], [0, 1, 0], [0, 0, 0]]."""
    hidden = -torch.inf
    logits = torch.tensor([[LOG2, 0.0, 0.0], [0.0, 0.0, 0.0], [hidden, 9.0, hidden], [hidden] * 3], dtype=torch.float64)
    query, key = torch.zeros(1, 1, 4, 1, dtype=torch.float64), torch.zeros(1, 1, 3, 1, dtype=torch.float64)
    found = attention_statistics(
        query,
        key,
        attn_mask=logits,
        key_groups=torch.tensor([1, -1, 1]),
        num_groups=2,
        row_weight=torch.tensor([1.0, 3.0, 2.0, 5.0]),
        backend=backend,
    )
    want = AttentionStatistics(
        mass=torch.tensor([[0, 3 / 4], [0, 2 / 3], [0, 0], [0, 0]]),
        entropy=torch.tensor([1.5 * LOG2, LOG3, 0, 0]),
        maximum=torch.tensor([1 / 2, 1 / 3, 1, 0]),
        argmax=torch.tensor([0, 0, 1, -1]),
        received=torch.tensor([1 / 2 + 1, 1 / 4 + 1 + 2, 1 / 4 + 1]),
    )
    for name, got, wanted in zip(want._fields, found, want, strict=True):
        torch.testing.assert_close(got[0, 0].double(), wanted.double(), rtol=0, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert found.argmax.dtype == torch.int64


@pytest.mark.parametrize("backend", RUNNING)
def test_gradients_by_hand(backend: str) -> None:
    """A = (a, 1 - a) with a = sigmoid(q): da/dq = a (1 - a), dH/dq = -a (1 - a) q."""
    query = torch.tensor([[[[LOG3]]]], dtype=torch.float64, requires_grad=True)
    key = torch.tensor([[[[1.0], [0.0]]]], dtype=torch.float64)
    weight = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    found = attention_statistics(
        query, key, key_groups=torch.tensor([-1, 0]), num_groups=1, row_weight=weight, scale=1.0, backend=backend
    )
    slope = 3 / 4 * 1 / 4
    for value, wanted in (
        (found.mass, -slope),
        (found.entropy, -slope * LOG3),
        (found.maximum, slope),
        (found.received[..., 0], 2 * slope),
    ):
        (grad,) = torch.autograd.grad(value.sum(), query, retain_graph=True)
        assert float(grad) == pytest.approx(wanted, abs=1e-14)
    (grad,) = torch.autograd.grad(found.received[..., 0].sum(), weight)
    assert float(grad) == pytest.approx(3 / 4, abs=1e-14)


@pytest.mark.parametrize("backend", RUNNING)
def test_first_of_equal_keys_is_the_maximum_and_takes_its_gradient(backend: str) -> None:
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64).view(1, 1, 3, 1).requires_grad_()
    found = attention_statistics(query, key, scale=1.0, backend=backend)
    found.maximum.sum().backward()
    a = math.exp(2) / (1 + 2 * math.exp(2))
    assert found.argmax.item() == 1
    assert key.grad is not None and key.grad.flatten().tolist() == pytest.approx([-a * (1 - 2 * a), a * (1 - a), -a * a])


@given(
    shape=st.tuples(st.integers(0, 2), *[st.integers(0, n) for n in (2, 4, 4)], st.integers(0, 3), st.integers(0, 4)),
    seed=st.integers(0, 2**31),
    masked=st.sampled_from(["none", "bool", "float", "key", "causal", "all"]),
    backend=st.sampled_from(RUNNING),
)
def test_against_loops_whatever_the_shape(shape: tuple[int, ...], seed: int, masked: str, backend: str) -> None:
    b, h, n, m, d, num_groups = shape
    random = torch.Generator().manual_seed(seed)
    query, key, weight = (
        torch.randn(*s, generator=random, dtype=torch.float64).requires_grad_() for s in ((b, h, n, d), (b, h, m, d), (b, n))
    )
    groups = torch.randint(-1, num_groups, (b, m), generator=random)
    visible, bias = torch.ones(b, h, n, m, dtype=torch.bool), torch.zeros(b, h, n, m, dtype=torch.float64)
    given_masks: dict[str, Any] = {"is_causal": masked in ("causal", "all")}
    if masked == "bool":
        given_masks["attn_mask"] = visible = torch.rand(b, h, n, m, generator=random) > 0.5
    if masked in ("float", "all"):
        visible = torch.rand(b, h, n, m, generator=random) > 0.4
        bias = torch.randn(b, h, n, m, generator=random, dtype=torch.float64)
        given_masks["attn_mask"] = bias.masked_fill(~visible, -torch.inf)
    if masked in ("key", "all"):
        given_masks["key_mask"] = torch.rand(b, m, generator=random) > 0.5
        visible = visible & given_masks["key_mask"][:, None, None]
    if given_masks["is_causal"]:
        visible = visible & torch.ones(n, m, dtype=torch.bool).tril()
    found = attention_statistics(
        query, key, key_groups=groups, num_groups=num_groups, row_weight=weight, scale=0.8, backend=backend, **given_masks
    )
    want = by_loops(
        *(x.detach().numpy() for x in (query, key)),
        visible.numpy(),
        bias.numpy(),
        groups.numpy(),
        num_groups,
        weight.detach().numpy(),
        0.8,
    )
    for name, got in found._asdict().items():
        np.testing.assert_allclose(got.detach().numpy(), want[name], rtol=0, atol=1e-12, err_msg=name)
    sum(getattr(found, name).sum() for name in DIFFERENTIABLE).backward()
    for x in (query, key, weight):
        assert x.grad is not None and x.grad.isfinite().all()


# ------------------------------------------------------------------ streaming against the reference


@pytest.mark.parametrize("tile", [1, 4 * M, 1 << 19])
@pytest.mark.parametrize("case", CASES)
def test_streaming_matches_reference(case: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, tile)
    fixed, tensors = options(case), inputs()
    for only in (None, *DIFFERENTIABLE):
        check(tensors, fixed, case, only=only)
    got, want = attention_statistics(**tensors, **fixed, backend="streaming"), formulas(**tensors, **fixed)
    assert torch.equal(got.argmax, want.argmax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["plain", "all masks"])
def test_other_dtypes(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    fixed, tensors = options(case), inputs(dtype)
    check(tensors, fixed, f"{case}, {dtype}")
    found = attention_statistics(**tensors, **fixed)
    assert all(getattr(found, name).dtype == torch.float32 for name in DIFFERENTIABLE)


def test_sharp_attention_in_float32() -> None:
    """Logits in the hundreds: weights underflow, the entropy is of the order of its rounding."""
    fixed, tensors = options("plain"), inputs(torch.float32, scale=12.0)
    assert float(attention_statistics(**tensors, **fixed).maximum.max()) == 1.0
    check(tensors, fixed)


def test_received_weight_of_every_query_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """row_weight (N), and none at all."""
    small_tiles(monkeypatch)
    fixed, tensors = options("bool mask"), inputs()
    tensors["row_weight"] = tensors["row_weight"][0]
    check(tensors, fixed)
    del tensors["row_weight"]
    check(tensors, fixed)


@pytest.mark.parametrize("heads", [1, 2])
def test_grouped_heads(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    fixed, tensors = options("all masks") | {"enable_gqa": True}, inputs(heads=heads)
    check(tensors, fixed)
    repeated = tensors | {"key": tensors["key"].repeat_interleave(H // heads, 1)}
    assert torch.equal(formulas(**tensors, **fixed).mass, formulas(**repeated, **fixed | {"enable_gqa": False}).mass)


@pytest.mark.parametrize("backend", RUNNING)
def test_what_stands_in_padding_reaches_nothing(backend: str) -> None:
    fixed, clean = options("key mask") | {"backend": backend}, inputs()
    hidden = ~fixed["key_mask"][:, None, :, None].expand_as(clean["key"])
    dirty = clean | {"key": clean["key"].masked_fill(hidden, torch.nan)}
    dirty["key"][0, 0] = torch.where(hidden[0, 0], torch.inf, dirty["key"][0, 0])
    assert torch.equal(attention_statistics(**clean, **fixed).argmax, attention_statistics(**dirty, **fixed).argmax)
    want, got = (outputs_and_grads(but_argmax(attention_statistics, **fixed), x) for x in (clean, dirty))
    assert all(torch.equal(got[name], x) and x.isfinite().all() for name, x in want.items())
    assert (got["grad key"][hidden] == 0).all() and (got["grad key"] != 0).any()


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("case", ["key mask", "bool mask"])
def test_query_without_visible_keys(case: str, backend: str) -> None:
    fixed, tensors = options(case) | {"backend": backend}, inputs()
    dead = (slice(1, 2), slice(None), slice(None)) if case == "key mask" else (slice(0, 1), slice(None), slice(2, 3))
    found = attention_statistics(**tensors, **fixed)
    assert all((getattr(found, name)[dead] == 0).all() for name in ("mass", "entropy", "maximum"))
    assert (found.argmax[dead] == -1).all() and (found.argmax >= 0).any()
    query = tensors["query"].clone().requires_grad_()
    found = attention_statistics(**tensors | {"query": query}, **fixed)
    sum(getattr(found, name).pow(2).sum() for name in DIFFERENTIABLE).backward()
    assert query.grad is not None and (query.grad[dead] == 0).all() and (query.grad != 0).any()


@pytest.mark.parametrize("layout", ["transposed", "every second", "expanded"])
def test_strides_and_no_writing(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    tensors = inputs()
    if layout == "every second":
        tensors = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in tensors.items()}
    if layout == "expanded":
        tensors = {name: x[:1].expand(B, *x.shape[1:]) for name, x in tensors.items()}
    fixed = options("all masks")
    before = {name: x.clone() for name, x in (tensors | fixed).items() if isinstance(x, Tensor)}
    call, want = but_argmax(attention_statistics, **fixed), but_argmax(formulas, **fixed)
    assert_all_close_to(call, want, tensors)  # sums: cotangents of stride 0
    assert_all_close_to(call, want, {name: x.contiguous() for name, x in tensors.items()})
    assert all(torch.equal((tensors | fixed)[name], x) for name, x in before.items())


def test_autocast_computes_in_its_dtype() -> None:
    fixed, tensors = options("key mask"), inputs(torch.float32)
    mixed = tensors | {"query": tensors["query"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        found = [attention_statistics(**x, **fixed) for x in (tensors, mixed)]
    want = attention_statistics(**tensors | {name: tensors[name].bfloat16() for name in ("query", "key")}, **fixed)
    for got in found:
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------ registration


@pytest.mark.parametrize(
    ("dtype", "without"), [(torch.float64, ()), (torch.bfloat16, ("key_groups", "row_weight", "attn_mask", "key_mask"))]
)
def test_opcheck(dtype: torch.dtype, without: tuple[str, ...]) -> None:
    query, key, row_weight = (x.requires_grad_() for x in inputs(dtype).values())
    given_tensors = {
        "query": query,
        "key": key,
        "key_groups": torch.randint(-1, G, (B, M)),
        "row_weight": row_weight,
        "attn_mask": bool_mask(),
        "key_mask": key_mask(),
    }
    arguments = (*(given_tensors | dict.fromkeys(without)).values(), 0 if without else G, 0.5, True, "streaming")
    torch.library.opcheck(torch.ops.vlattn.attention_statistics, arguments)
    mass, entropy, maximum, argmax, received = (x.detach() for x in torch.ops.vlattn.attention_statistics(*arguments))
    grads = (None, entropy, None, None) if without else (mass, entropy, maximum, received)
    query, key, *constants = (x.detach() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(torch.ops.vlattn.attention_statistics_backward, (*grads, query, key, argmax, *constants))


@pytest.mark.parametrize("heads", [1, 2])
def test_gradcheck(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 8)
    groups, mask = torch.tensor([0, 1, -1, 1]), torch.rand(1, 1, 3, 4) > 0.3
    mask[..., 1, :] = False

    def call(query: Tensor, key: Tensor, row_weight: Tensor) -> tuple[Tensor, ...]:
        return but_argmax(attention_statistics, key_groups=groups, num_groups=2, attn_mask=mask, enable_gqa=True)(
            query=query, key=key, row_weight=row_weight
        )

    tensors = [x.requires_grad_() for x in (double(1, 2, 3, 2), double(1, heads, 4, 2), double(3))]
    assert torch.autograd.gradcheck(call, tensors)


def test_no_second_derivative() -> None:
    tensors = inputs()
    query = tensors["query"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(attention_statistics(query, tensors["key"]).entropy.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_statistics has no second derivative"):
        grad.sum().backward()
    assert not attention_statistics(query, tensors["key"]).argmax.requires_grad


def test_compiles_to_two_graphs_over_ten_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(query: Tensor, key: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, ...]:
        return attention_statistics(query, key, key_groups=groups, num_groups=num_groups, is_causal=True)

    for length in range(7, 17):
        query, key = (double(1, 2, length + extra, 4).requires_grad_() for extra in (0, 3))
        groups, num_groups = torch.randint(-1, G, (length + 3,)), length - 4
        found = compiled(query, key, groups, num_groups)
        want = attention_statistics(query, key, key_groups=groups, num_groups=num_groups, is_causal=True)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        got, wanted = (torch.autograd.grad(x[0].sum() + x[1].sum(), [query, key]) for x in (found, want))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert counter.frame_count <= 2


def test_compiled_groups_are_not_read() -> None:
    torch._dynamo.reset()
    query, key, groups = double(1, 1, 3, 2).requires_grad_(), double(1, 1, 4, 2), torch.tensor([0, 1, 7, -3])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(num_groups: int | None) -> Tensor:
        return attention_statistics(query, key, key_groups=groups, num_groups=num_groups).mass

    with pytest.raises(Exception, match="num_groups must be given under torch.compile"):
        compiled(None)
    mass = compiled(2)
    want = attention_statistics(query, key, key_groups=torch.tensor([0, 1, -1, -1]), num_groups=2).mass
    assert torch.equal(mass, want)  # a value out of range is no group, in the backward pass too
    wanted = torch.autograd.grad(want.sum(), query)[0]
    assert torch.equal(torch.autograd.grad(mass.sum(), query)[0], wanted)


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 1 << 16)

    def largest(length: int) -> tuple[int, int]:
        query, key = (torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(2))
        groups = torch.randint(-1, G, (length,))
        with LargestAllocation() as memory:
            found = attention_statistics(query, key, key_groups=groups, num_groups=G)
            sum(getattr(found, name).sum() for name in DIFFERENTIABLE).backward()
        return memory.bytes, memory.peak

    small, large = largest(1024), largest(2048)
    assert large[0] <= 2 * small[0] and large[1] <= 2 * small[1], (small, large)
    assert large[0] < 2048 * 2048
    # as many groups as keys, few queries: membership as one (M,G) matrix would be the map again
    query, key = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2048, 4)
    with LargestAllocation() as memory:
        attention_statistics(query, key, key_groups=torch.arange(2048))
    assert memory.bytes <= 8 * (1 << 16), memory.by


# ------------------------------------------------------------------ arguments


def test_number_of_groups_from_the_data() -> None:
    tensors = inputs()
    for groups, wanted in ((torch.tensor([0, 4, -1] * 3), 5), (torch.full((M,), -1), 0), (None, 0)):
        for backend in RUNNING:
            assert attention_statistics(**tensors, key_groups=groups, backend=backend).mass.shape == (B, H, N, wanted)
        assert formulas(**tensors, key_groups=groups).mass.shape == (B, H, N, wanted)
    empty = attention_statistics(double(B, H, N, D), double(B, H, 0, D), key_groups=torch.zeros(0, dtype=torch.int64))
    assert empty.mass.shape == (B, H, N, 0) and empty.received.shape == (B, H, 0)


GROUPS = torch.zeros(M, dtype=torch.int64)
BAD_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query must be a torch.Tensor"),
    ({"key": double(B, H, M, D + 1)}, ValueError, "key must have query's (head )?size"),
    ({"key_groups": GROUPS.int()}, TypeError, "key_groups must be int64"),
    ({"key_groups": GROUPS[1:]}, ValueError, r"key_groups must have shape \(M\) or \(B, M\)"),
    ({"key_groups": GROUPS + 7, "num_groups": 2}, ValueError, "key_groups must hold values .* num_groups = 2; got values from 7"),
    ({"key_groups": GROUPS - 2}, ValueError, "key_groups must hold values from -1"),
    ({"key_groups": GROUPS + 2, "num_groups": 2}, ValueError, "below num_groups = 2; got values from 2 to 2"),
    ({"key_groups": GROUPS, "num_groups": -1}, ValueError, "num_groups must not be negative"),
    ({"key_groups": GROUPS, "num_groups": 2.0}, TypeError, "num_groups must be an integer"),
    ({"num_groups": 3}, ValueError, "num_groups must be 0 or None where key_groups is not given"),
    ({"row_weight": 2.0}, TypeError, "row_weight must be a torch.Tensor"),
    ({"row_weight": torch.ones(N, dtype=torch.int64)}, TypeError, "row_weight must be float16"),
    ({"row_weight": torch.ones(1, N)}, ValueError, r"row_weight must have shape \(N\) or \(B, N\) with \(B, N\) = \(2, 6\)"),
    ({"backend": "nonsense"}, ValueError, "backend must be one of"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' cannot run attention_statistics"),
]


@pytest.mark.parametrize(("changed", "error", "words"), BAD_INPUT, ids=[words[:40] for *_, words in BAD_INPUT])
def test_bad_input(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    given_inputs = {"query": double(B, H, N, D), "key": double(B, H, M, D)}
    with pytest.raises(error, match=words):
        attention_statistics(**given_inputs | changed)
