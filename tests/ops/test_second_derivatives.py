"""Second derivatives by create_graph=True: of dot products, and those that relevancy_residual has not."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradgradcheck

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to, assert_close_to, outputs_and_grads
from tests.helpers.ops.backends import each, on
from vlattn_fast.dispatch.choice import load
from vlattn_fast.ops.score_attention import BACKENDS


def residual_inputs() -> list[Tensor]:
    shapes = ((2, 4, 3), (2, 4, 3), (2, 5, 4), (2, 5, 4))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_weights_are_constants() -> None:
    """No derivative goes through a and b of "contribution", though they are functions of the data and the cotangent."""
    residual, branch, *carriers = residual_inputs()
    total, carrier = va.relevancy_residual(residual, branch, *carriers)
    g = torch.randn_like(total).requires_grad_()
    r = torch.randn_like(carrier).requires_grad_()
    grads = torch.autograd.grad([total, carrier], [residual, *carriers], [g, r], create_graph=True)
    by_data = torch.autograd.grad(grads[1].sum(), [residual, branch, g], retain_graph=True, allow_unused=True)
    assert by_data == (None, None, None)
    a = ((g * residual).sum(-1).abs() / ((g * residual).sum(-1).abs() + (g * branch).sum(-1).abs())).detach()
    (by_r,) = torch.autograd.grad(grads[1].sum(), r)
    torch.testing.assert_close(by_r, a[:, None].expand_as(r))


def inputs(
    n: int, m: int, *, b: int = 1, h: int = 2, kv: int = 2, d: int = 17, dv: int = 9, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d), "value": (b, kv, m, dv), "grad_out": (b, h, n, dv)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} | {"grad_lse": torch.randn(b, h, n).to(dtype)}


def gradients(operator: Callable[..., Any], **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Gradients of query, key and value as a function of the inputs; of `grad_lse` where the options ask for the log-sum-exp."""

    def call(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in (query, key, value)]
        made = operator(*leaves, enable_gqa=key.shape[1] != query.shape[1], **options)
        outputs = made if isinstance(made, tuple) else (made,)
        cotangents = [x.to(y.dtype) for x, y in zip((grad_out, grad_lse), outputs, strict=False)]
        return torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)

    return call


def check(tensors: Mapping[str, Tensor], *, backend: str = "cpu", **options: Any) -> dict[str, Tensor]:
    """All first and second derivatives against the formula by the tolerance rule. Those of a row with one key are zero: errors
    are held to what is subtracted."""
    made = gradients(va.score_attention, backend=backend, **options)
    formula = gradients(va.reference.score_attention, **options)
    cotangents = [torch.randn(tensors[name].shape) for name in ("query", "key", "value")]
    scales = {name: 1.0 for name in ("out0", "out1", *(f"grad {name}" for name in tensors))}
    return assert_all_close_to(made, formula, tensors, cotangents, scales=scales)


def attention_inputs(kv_heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 3, 5), (2, kv_heads, 6, 5), (2, kv_heads, 6, 2))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def visible(name: str) -> dict[str, object]:
    mask = torch.rand(2, 1, 3, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, :, 1] = False  # a row without a key
    keys = torch.ones(2, 6, dtype=torch.bool)
    keys[:, 4:] = False
    return {"none": {}, "bool": {"attn_mask": mask}, "keys": {"key_mask": keys}, "causal": {"is_causal": True}}[name]


@pytest.mark.parametrize("fast_mode", (True, False))  # by random directions, and entry by entry
def test_gradgradcheck_with_dropout_and_a_learned_matrix(fast_mode: bool) -> None:
    tensors = attention_inputs()
    matrix = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)

    def dropped(query: Tensor, key: Tensor, value: Tensor, matrix: Tensor) -> Tensor:
        torch.manual_seed(3)
        score = va.scores.General(matrix)
        return va.score_attention(query, key, value, score=score, dropout_p=0.4, backend="streaming")

    assert gradgradcheck(dropped, (*tensors, matrix), fast_mode=fast_mode)


def test_the_whole_gradient_of_relevancy() -> None:
    """dA is a function of the inputs, too: through relevancy_step's grad_output and the second derivative of the attention."""
    weight = torch.randn(2, 1, 6, dtype=torch.float64)
    results = []
    for backend in ("reference", "streaming"):
        query, key, value = attention_inputs()
        out = va.score_attention(query, key, value, backend=backend)
        (grad_output,) = torch.autograd.grad(out.sin().sum(), out, create_graph=True)
        start = torch.ones(2, 1, 3, dtype=torch.float64)
        relevancy = va.relevancy_step(start, query, key, value, grad_output, backend=backend)
        results.append(torch.autograd.grad((relevancy * weight).sum(), [query, key, value]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("score", ["dot", "cosine", "general"])
def test_scores_by_the_cpu_kernel(score: str) -> None:
    """Features have a head for each query head where the matrix has one, and values are shared."""
    tensors = inputs(20, 30, h=4, kv=2, d=8)
    matrix = torch.randn(4, 8, 8, dtype=torch.float64)

    def call(operator: Any, **options: Any) -> Any:
        def scored(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Any:
            made = va.scores.General(matrix.to(query.dtype)) if score == "general" else score
            return operator(query, key, value, score=made, **more)

        return gradients(scored, return_lse=True, **options)

    cotangents = [torch.randn_like(tensors[name]) for name in ("query", "key", "value")]
    assert_all_close_to(call(va.score_attention, backend="cpu"), call(va.reference.score_attention), tensors, cotangents)


@pytest.mark.parametrize("m", [70, 800])
def test_dropout_by_the_cpu_kernel(m: int) -> None:
    """The weights that `streaming` drops."""

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(5)
        dropped = gradients(va.score_attention, backend=backend, dropout_p=0.4, return_lse=True, is_causal=True)
        cotangents = [tensors[name] * 0.7 for name in ("query", "key", "value")]
        return outputs_and_grads(dropped, {name: x.to(dtype) for name, x in tensors.items()}, cotangents)

    tensors = inputs(60, m, b=2)
    ours, exact, formula = run("cpu", torch.float32), run("streaming", torch.float64), run("streaming", torch.float32)
    for name, x in ours.items():
        assert_close_to(x, exact[name], formula[name], what=name)


@on("streaming", "cpu")
@pytest.mark.parametrize("empty", ["b", "h", "n", "m", "d", "dv", "nm"])
def test_sizes_of_zero(backend: str, empty: str) -> None:
    sizes = {"n": 3, "m": 4, "b": 2, "h": 2, "kv": 2, "d": 5, "dv": 6} | dict.fromkeys([empty] if empty == "dv" else empty, 0)
    sizes["kv"] = sizes["h"]
    tensors, options = inputs(**sizes), {"return_lse": sizes["m"] > 0}  # without a key the formula's has no gradient
    found = outputs_and_grads(gradients(va.score_attention, backend=backend, **options), tensors)
    expected = outputs_and_grads(gradients(va.reference.score_attention, **options), tensors)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x)


@each("mask", streaming=("bool", "finite"), cpu=("bool", "finite"))
def test_rows_without_a_key_and_rows_of_the_least_number(backend: str, mask: str) -> None:
    visible = torch.rand(20, 30) > 0.4
    visible[3] = False
    options = {"attn_mask": visible if mask == "bool" else torch.where(visible, 0.0, torch.finfo(torch.float32).min)}
    found = check(inputs(20, 30), backend=backend, **options)
    assert bool(found["grad query"][:, :, 3].any()) == (mask == "finite")


@on("streaming", "cpu")
def test_a_second_backward_pass_computes_nothing_twice(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on to the first forward pass, though nothing in it depends on what that one gave."""
    module, calls = load(BACKENDS, backend), []
    for name in ("forward", "backward", "second"):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, name=name, run=run: [calls.append(name), run(x)][1])
    outputs_and_grads(gradients(va.score_attention, backend=backend), inputs(5, 6))
    assert calls == ["forward", "backward", "second"]
