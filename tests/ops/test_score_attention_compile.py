"""score_attention: registration and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import outputs_and_grads
from tests.helpers.ops.backends import F64, arguments_of, each, on
from tests.helpers.ops.score_cases import PLAIN, SCORES, TORCH_JIT, attention_inputs, call, lay_out, padding, tensors
from vlattn_fast import scores as S
from vlattn_fast.backends.inputs import (
    ScoreAttentionBackwardInputs,
    ScoreAttentionInputs,
    ScoreAttentionJvpInputs,
    ScoreAttentionSecondInputs,
)

KINDS = {
    "dot": 0.0,
    "cosine": 1e-8,
    "dot_relu": 0.0,
    "dot_leaky_relu": 0.1,
    "dot_tanh": 0.0,
    "dot_sigmoid": 0.0,
    "dot_softcap": 0.7,
    "additive": 0.0,
    "hadamard_tanh": 0.0,
    "hadamard_sigmoid": 0.0,
}


TRACED = (("dot", "contiguous"), ("additive", "transposed"), ("dot", "strided"))  # each layout, and a vector
OPCHECKS = {
    "streaming": [(kind, "contiguous") for kind in KINDS] + [("additive", "transposed"), ("dot", "strided")],
    "cpu": [("dot", "strided"), ("dot_tanh", "transposed"), ("additive", "strided")],
    "triton": [("dot_tanh", "transposed")],
    "cuda": [("additive", "transposed"), ("additive", "strided")],
}


@each("case", **OPCHECKS)
def test_opcheck(backend: str, case: tuple[str, str]) -> None:
    """Schemas and fake layouts that the operators promise; autograd's registration, which all backends and kinds share."""
    kind, layout = case
    checks = ("test_schema", "test_faketensor")
    traced = checks + (("test_autograd_registration", "test_aot_dispatch_dynamic") if case in TRACED else ())
    torch.manual_seed(2)
    b, dv = 1 if backend == "triton" else 2, 8 if layout == "contiguous" else 3
    query, key, value = (lay_out(torch.randn(b, *s), layout) for s in ((4, 5, 6), (2, 7, 6), (2, 7, dv)))
    vector = torch.randn(4, 6) if kind in ("additive", "hadamard_tanh", "hadamard_sigmoid") else None
    seed = torch.tensor(7) if kind == "dot_tanh" else None
    sink = torch.zeros(4, 1) if kind == "dot_softcap" else None
    given: dict[str, Any] = {"value": value, "vector": vector, "seed": seed, "sink": sink, "score": kind, "scale": 0.5}
    given |= {"transposed": {"attn_mask": torch.randn(5, 7)}, "strided": {"key_mask": padding()}}.get(layout, {})
    if backend == "streaming" and layout != "strided":
        given |= {"row_bias": torch.randn(b, 4, 5, 3), "key_groups": torch.randint(-1, 3, (b, 7))}
    given |= {"parameter": KINDS[kind], "dropout_p": 0.25 if seed is not None else 0.0}
    given |= {"is_causal": layout == "transposed", "backend": backend}
    tensors = {"query": query, "key": key, "value": value}
    leaves = {name: x.detach().requires_grad_(backend == "streaming") for name, x in tensors.items()}
    forward, ops = ScoreAttentionInputs, torch.ops.vlattn
    torch.library.opcheck(ops.score_attention, arguments_of(forward, **given | leaves), test_utils=traced)
    given |= tensors
    out, lse = ops.score_attention(*arguments_of(forward, **given))
    given |= {"out": out, "lse": lse}
    for grad_lse in (None, torch.randn_like(lse)):
        given |= {"grad_out": lay_out(torch.randn_like(out), layout), "grad_lse": grad_lse}
        arguments = arguments_of(ScoreAttentionBackwardInputs, **given)
        torch.library.opcheck(ops.score_attention_backward, arguments, test_utils=checks if grad_lse is None else traced)
        if kind == "dot":
            given["grad_out"] = torch.randn_like(out)
            of = tensors | {"row_bias": given.get("row_bias")}
            tangents = {f"{name}_tangent": None if x is None else torch.randn_like(x) for name, x in of.items()}
            of_grads = {"grad_out_tangent": given["grad_out"], "grad_lse_tangent": grad_lse}
            for some, with_jvp in (({}, True), (of_grads, False)):
                arguments = arguments_of(ScoreAttentionSecondInputs, **given, **tangents, **some, with_jvp=with_jvp)
                torch.library.opcheck(ops.score_attention_second, arguments, test_utils=checks)
            arguments = arguments_of(ScoreAttentionJvpInputs, **given, **tangents)
            torch.library.opcheck(ops.score_attention_jvp, arguments, test_utils=checks)


@pytest.mark.parametrize(
    "score", ("general-key-bias", "general-tanh-per_head", "concat-unequal", "hadamard-leaky_relu-key", "hadamard-offset=tensor")
)
@pytest.mark.slow
def test_fullgraph_equals_eager_in_two_graphs_over_five_lengths(score: str) -> None:
    """test_compile_options.py has the plain scores, and aot_eager for all that AOT autograd treats in another way."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager" if score == "general-tanh-per_head" else "eager")
    inputs, make = attention_inputs(SCORES[score])
    names = list(inputs)

    def fn(*xs: Tensor) -> Any:
        return call(va.score_attention, make, return_lse=True)(**dict(zip(names, xs, strict=True)))

    compiled = torch.compile(fn, backend=counter, fullgraph=True)
    for n in (11, 12, 15, 16, 17):
        for name in ("query", "key", "value"):
            inputs[name] = torch.randn(*inputs[name].shape[:2], n, inputs[name].shape[3], dtype=F64)
        found = outputs_and_grads(lambda **xs: compiled(*xs.values()), inputs)
        expected = outputs_and_grads(lambda **xs: fn(*xs.values()), inputs)
        for name, x in found.items():
            torch.testing.assert_close(x, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@on("sdpa", "cpu", "triton", "cuda")
@pytest.mark.slow("cuda", "triton")
def test_fullgraph_equals_eager_on_every_backend(backend: str) -> None:
    torch._dynamo.reset()
    inputs, make = tensors(backend, PLAIN[backend])
    names = list(inputs)

    def fn(*xs: Tensor) -> Any:
        return call(va.score_attention, make, key_mask=padding(), backend=backend)(**dict(zip(names, xs, strict=True)))

    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    found = outputs_and_grads(lambda **xs: compiled(*xs.values()), inputs)
    eager = outputs_and_grads(lambda **xs: fn(*xs.values()), inputs)
    for name, x in found.items():
        torch.testing.assert_close(x, eager[name], msg=lambda m, name=name: f"{name}: {m}")
    torch._dynamo.reset()


@TORCH_JIT
@pytest.mark.slow
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
    expected = outputs_and_grads(fn, x)
    for name, got in found.items():
        torch.testing.assert_close(got, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch.compile
@pytest.mark.slow
def test_dropout_under_compile() -> None:
    """Drawn anew at each call, and one graph for all probabilities but the first."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    eye = torch.eye(30).expand(1, 2, 30, 30)
    x = torch.randn(1, 2, 40, 4)
    compiled = torch.compile(lambda q, k, p: va.score_attention(q, k, eye, dropout_p=p), backend=counter, fullgraph=True)
    first, second = compiled(x, x[:, :, :30], 0.3), compiled(x, x[:, :, :30], 0.3)
    assert not torch.equal(first, second)
    for p in (0.3, 0.45, 0.6, 0.85):
        assert abs((compiled(x, x[:, :, :30], p) != 0).double().mean() - (1 - p)) < 0.05
    assert counter.frame_count <= 2
    torch._dynamo.reset()
