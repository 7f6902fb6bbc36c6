"""score_attention: any problem that hypothesis thinks of, by streaming or SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to
from tests.helpers.ops.backends import F64
from tests.helpers.ops.score_cases import LAYOUTS, Params, call, lay_out
from vlattn_fast import scores as S
from vlattn_fast.backends.streaming import _tiles


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
