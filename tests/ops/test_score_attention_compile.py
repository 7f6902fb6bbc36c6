"""score_attention: registration, torch.compile, and any problem that hypothesis thinks of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from compare import as_dtype, assert_all_close_to, outputs_and_grads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vlattn_fast as va
from tests.ops.score_cases import F64, LAYOUTS, SCORES, TORCH_JIT, Params, attention_inputs, call, lay_out, padding
from vlattn_fast import scores as S
from vlattn_fast.streaming import _tiles

# ------------------------------------------------------------------------------------------------- registration and compile

KINDS = {
    "dot": 0.0,
    "cosine": 1e-8,
    "dot_relu": 0.0,
    "dot_leaky_relu": 0.1,
    "dot_tanh": 0.0,
    "dot_sigmoid": 0.0,
    "additive": 0.0,
    "hadamard_tanh": 0.0,
    "hadamard_sigmoid": 0.0,
}


@pytest.mark.parametrize("layout", ("contiguous", "transposed", "strided"))
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, layout: str) -> None:
    torch.manual_seed(2)
    dv = 8 if layout == "contiguous" else 3
    query, key, value = (lay_out(torch.randn(s), layout) for s in ((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, dv)))
    vector = torch.randn(4, 6) if kind in ("additive", "hadamard_tanh", "hadamard_sigmoid") else None
    seed = torch.tensor(7) if kind == "dot_tanh" else None
    mask = {"contiguous": (None, None), "transposed": (torch.randn(5, 7), None), "strided": (None, padding())}[layout]
    options = (kind, KINDS[kind], 0.5, 0.25 if seed is not None else 0.0, layout == "transposed", "streaming")
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(torch.ops.vlattn.score_attention, (*leaves, vector, *mask, seed, *options))
    out, lse = torch.ops.vlattn.score_attention(query, key, value, vector, *mask, seed, *options)
    for grad_lse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            torch.ops.vlattn.score_attention_backward,
            (lay_out(torch.randn_like(out), layout), grad_lse, query, key, value, out, lse, vector, *mask, seed, *options),
        )


@pytest.mark.parametrize(
    "score",
    (
        "scaled_dot",
        "cosine",
        "general-key-bias",
        "general-tanh-per_head",
        "additive",
        "concat-unequal",
        "hadamard-leaky_relu-key",
        "hadamard-offset=tensor",
    ),
)
def test_fullgraph_equals_eager_in_two_graphs_over_ten_lengths(score: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    inputs, make = attention_inputs(SCORES[score])
    names = list(inputs)

    def fn(*xs: Tensor) -> Any:
        return call(va.score_attention, make, return_lse=True)(**dict(zip(names, xs, strict=True)))

    compiled = torch.compile(fn, backend=counter, fullgraph=True)
    for n in range(11, 21):
        for name in ("query", "key", "value"):
            inputs[name] = torch.randn(*inputs[name].shape[:2], n, inputs[name].shape[3], dtype=F64)
        found = outputs_and_grads(lambda **xs: compiled(*xs.values()), inputs)
        wanted = outputs_and_grads(lambda **xs: fn(*xs.values()), inputs)
        for name, x in found.items():
            torch.testing.assert_close(x, wanted[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@TORCH_JIT
def test_inductor_equals_eager() -> None:
    """A fake layout that differs from the real one shows here: Inductor writes code for the fake's."""
    torch._dynamo.reset()
    score = {"w": torch.randn(6, 6)}
    x = {name: torch.randn(2, 3, 9, 6) for name in ("query", "key")} | {"value": torch.randn(2, 3, 9, 4)} | score

    def fn(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
        mask = torch.ones(2, 9, dtype=torch.bool).index_fill(1, torch.tensor([8]), False)
        a, lse = va.score_attention(query, key, value, score="dot", return_lse=True, key_mask=mask)
        b = va.score_attention(query, key, value, score=S.General(w, activation="tanh"), key_mask=mask)
        return (a * lse[..., None].sigmoid() + b).transpose(1, 2).reshape(2, 9, 12)

    found = outputs_and_grads(torch.compile(fn, fullgraph=True), x)
    wanted = outputs_and_grads(fn, x)
    for name, got in found.items():
        torch.testing.assert_close(got, wanted[name], msg=lambda m, name=name: f"{name}: {m}")
    torch._dynamo.reset()


def test_dropout_under_compile() -> None:
    torch._dynamo.reset()
    eye = torch.eye(30).expand(1, 2, 30, 30)
    x = torch.randn(1, 2, 40, 4)
    compiled = torch.compile(lambda q, k: va.score_attention(q, k, eye, dropout_p=0.3), backend="aot_eager", fullgraph=True)
    first, second = compiled(x, x[:, :, :30]), compiled(x, x[:, :, :30])
    assert not torch.equal(first, second)
    assert abs((first != 0).double().mean() - 0.7) < 0.05
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------- properties


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    size = st.integers(0, 6)
    kv, group = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    return {
        "sizes": (draw(st.integers(0, 2)), kv, group, draw(size), draw(size), draw(st.integers(0, 4)), draw(st.integers(0, 3))),
        "layouts": tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        "score": draw(st.sampled_from(("dot", "cosine", "tanh", "relu", "additive", "hadamard", "hadamard_relu"))),
        "mask": draw(st.sampled_from(("none", "bool", "float", "rank1"))),
        "key_mask": draw(st.booleans()),
        "causal": draw(st.booleans()),
        "lse": draw(st.booleans()),
        "dtype": draw(st.sampled_from((F64, torch.float32))),
        "tile": draw(st.sampled_from((1, 7, 1 << 19))),
        "seed": draw(st.integers(0, 99)),
    }


@given(problems())
def test_any_problem_matches_the_formula(problem: dict[str, Any]) -> None:
    b, kv, group, n, m, d, dv = problem["sizes"]
    h = kv * group
    torch.manual_seed(problem["seed"])
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d), "value": (b, kv, m, dv)}
    inputs = {
        name: lay_out(torch.randn(shape), layout)
        for (name, shape), layout in zip(shapes.items(), problem["layouts"], strict=False)
    }
    inputs |= {"weight": torch.randn(d, d), "vector": torch.randn(h, d)}
    make: Callable[[Params], Any] = {
        "dot": lambda p: "dot",
        "cosine": lambda p: S.Cosine(eps=0.5),
        "tanh": lambda p: S.General(p["weight"], activation="tanh"),
        "relu": lambda p: S.General(p["weight"], activation="relu", projects="query"),
        "additive": lambda p: S.Additive(p["vector"], p["weight"]) if d else "dot",
        "hadamard": lambda p: S.Hadamard(p["vector"], p["weight"], activation="sigmoid"),
        "hadamard_relu": lambda p: S.Hadamard(p["vector"], activation="relu"),
    }[problem["score"]]
    mask = {"none": None, "bool": torch.rand(b, 1, n, m) > 0.4, "float": torch.randn(h, n, m), "rank1": torch.rand(m) > 0.4}[
        problem["mask"]
    ]
    options = {
        "attn_mask": mask,
        "key_mask": torch.rand(b, m) > 0.4 if problem["key_mask"] else None,
        "is_causal": problem["causal"],
        "enable_gqa": True,
        "return_lse": problem["lse"],
    }
    if kv == 0:
        options["enable_gqa"] = False
    inputs = as_dtype(inputs, problem["dtype"])
    cotangent = lay_out(torch.randn(b, h, n, dv), problem["layouts"][3])
    before = _tiles.TILE_ELEMENTS
    _tiles.TILE_ELEMENTS = problem["tile"]
    try:
        assert_all_close_to(
            call(va.score_attention, make, **options),
            call(va.reference.score_attention, make, **options),
            inputs,
            [cotangent, None][: 1 + problem["lse"]],
            scales={f"grad {name}": 4.0 for name in inputs},
        )
    finally:
        _tiles.TILE_ELEMENTS = before
