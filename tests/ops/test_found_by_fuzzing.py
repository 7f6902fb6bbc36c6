"""Defects that the fuzzer found (tests/fuzz/): each failed before it was mended."""

from functools import partial
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to
from tests.helpers.ops.backends import LOW, each, on
from vlattn_fast.scores import cosine


@on("reference", "streaming")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_gradient_of_the_log_sum_exp_of_a_row_masked_by_a_finite_number(backend: str, dtype: torch.dtype) -> None:
    """All weights of such a row are 1/M. The reference took each of them for 1, through torch.logsumexp."""
    query, key, value = (torch.randn(1, 1, n, 4, dtype=dtype, requires_grad=True) for n in (3, 8, 8))
    mask = torch.full((3, 8), torch.finfo(dtype).min, dtype=dtype)
    _, lse = va.score_attention(query, key, value, score="dot", attn_mask=mask, return_lse=True, backend=backend)
    (grad,) = torch.autograd.grad(lse.sum(), query)
    torch.testing.assert_close(grad, key.detach().mean(2, keepdim=True).expand_as(grad))


@on("reference", "streaming")
@pytest.mark.parametrize("slope", (0.01, 0.3, -0.5, 2.0, -1.0))
@pytest.mark.parametrize("side", ("query", "key"))
def test_leaky_hadamard_has_the_slope_of_leaky_relu_at_zero(backend: str, slope: float, side: str) -> None:
    """Features that come from a relu are exactly zero in places. The gradient there was zero instead of slope * k."""
    tensors = {name: torch.randn(1, 2, n, 6, dtype=torch.float64) for name, n in (("query", 5), ("key", 7), ("value", 7))}
    tensors[side] = tensors[side].relu()
    cotangent, vector = torch.randn(1, 2, 5, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def gradients(name: str, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
        score = va.scores.Hadamard(vector, activation="leaky_relu", negative_slope=slope)
        return torch.autograd.grad(va.score_attention(**leaves, score=score, backend=name), list(leaves.values()), cotangent)

    if slope == -1.0:  # |q k| has no derivative there: zero is as good as any, and it is finite
        assert all(grad.isfinite().all() for grad in gradients(backend, tensors))
        return
    for grad, exact in zip(gradients(backend, tensors), gradients("reference", tensors), strict=True):
        torch.testing.assert_close(grad, exact)


def test_cosine_of_one_feature_has_no_gradient() -> None:
    """It is 1 or -1. The gradient was the rounding of two sums of up to 1e3, one over pairs and one over features."""
    query, key = ((torch.randn(1, 2, n, 1) / 1e3).requires_grad_() for n in (9, 7))
    score = va.scores.Cosine(eps=1e-20)
    with torch.no_grad():
        key[:, :, 3] = 0.0  # tiles, as the clamp acts
    out = va.score_attention(query, key, torch.randn(1, 2, 7, 4), score=score, backend="streaming")
    (gradient,) = torch.autograd.grad(out.sum(), key)
    assert (gradient[key != 0] == 0).all()


@on("reference", "streaming", "cpu", "triton")
@pytest.mark.parametrize("side", ("query", "key"))
@pytest.mark.parametrize("length", (0.0, 2.0**-24, 2.0**-9, 2.0**-7, 2.0**12))
def test_cosine_beside_a_short_vector_in_float16(backend: str, side: str, length: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton multiplied its gradient by 1 / |k| or 1 / eps in float16: Inf in the query's, and times a zero vector NaN."""
    monkeypatch.setattr(cosine, "readable", lambda x: False)  # as on a GPU: the kernels see whether a clamp acts
    tensors = {name: torch.randn(1, 2, n, 8).half() for name, n in (("query", 37), ("key", 70), ("value", 70))}
    tensors[side][:, :, 1] = torch.eye(8)[3].half() * length
    cotangent = torch.randn(1, 2, 37, 8).half() * 8.0

    def gradients(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = {n: x.to(dtype).requires_grad_() for n, x in tensors.items()}
        out = va.score_attention(**leaves, score="cosine", backend=name)
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), cotangent.to(dtype)), strict=True))

    found, exact = gradients(backend, torch.float16), gradients("reference", torch.float64)
    for name, grad in found.items():
        others = torch.ones(grad.shape[2], dtype=torch.bool)
        others[1] = name != side  # the short vector's own gradient is a sum over its length
        torch.testing.assert_close(grad[:, :, others].double(), exact[name][:, :, others], rtol=2e-2, atol=5e-3)


@on("reference", "streaming", "cpu", "triton")
@pytest.mark.parametrize("gap, size", [(90.0, 1.0), (99.0, 1.0), (85.0, 1e-3)])
def test_rows_that_sum_to_a_subnormal_number(backend: str, gap: float, size: float) -> None:
    """Where dA is negative at all keys that have attention, a row of Abar is what is left: e^-gap times the size of dA. r over
    that is infinite, and it was multiplied by the row's zeros."""
    query, key, value = (torch.tensor(x)[None, None, :, None] for x in ((gap, 0.5, 0.5), (0.0, -1.0, 0.0), (-1.0, size, -1.0)))
    grad, ones = torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3)
    options = {"row_normalize": True, "scale": 1.0, "backend": backend}
    step = va.relevancy_step(ones, query, key, value, grad, **options)
    carrier = torch.zeros(1, 1, 3, requires_grad=True)
    outputs = va.relevancy_attention(query, key, value.requires_grad_(), carrier, **options)
    cotangent, _ = torch.autograd.grad(outputs, (carrier, value), (grad, ones))
    for found in (step, cotangent - ones):
        # two rows are all at the middle key; the other is, or is taken for zeros
        assert torch.allclose(found[..., (0, 2)], torch.zeros(2), atol=1e-6)
        assert 2.0 - 1e-5 < found[..., 1] < 3.0 + 1e-5


TANH = {
    "additive": lambda t: va.scores.Additive(t["vector"]),
    "hadamard": lambda t: va.scores.Hadamard(t["vector"], activation="tanh"),
    "general": lambda t: va.scores.General(torch.diag(t["vector"]), activation="tanh"),
}


@each("score", streaming=TANH, cpu=TANH, triton=TANH, cuda=["additive", "hadamard"])
@pytest.mark.parametrize(
    "dtype, size, keys, scale",
    [
        *((torch.float32, size, 17, None) for size in (1e-6, 1e-3, 1e-2, 1.0)),
        *((dtype, 1e-3, 1, None) for dtype in LOW),  # the log-sum-exp is the score itself
        (torch.float32, 1e-3, 17, 1e3),
        (torch.bfloat16, 1e-6, 17, None),
    ],
)
def test_where_tanh_is_small(backend: str, score: str, dtype: torch.dtype, size: float, keys: int, scale: float | None) -> None:
    """tanh from (1 - e) / (1 + e), or from 2 / (1 + e) - 1, has an error of 6e-8 also where tanh is 1e-6."""
    check_tanh(backend, score, dtype, *(torch.randn(1, 1, n, 8) * size for n in (33, keys)), scale)


@on("streaming", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("size, largest", [(1e-3, 1.0), (1e-6, 30.0), (0.1, 1.0)])
def test_where_query_and_key_cancel(backend: str, dtype: torch.dtype, size: float, largest: float) -> None:
    """tanh's argument is small although neither query nor key is."""
    centre = torch.randn(8) * largest
    query, key = torch.randn(1, 1, 33, 8) * size + centre, torch.randn(1, 1, 17, 8) * size - centre
    check_tanh(backend, "additive", dtype, query, key, None)


def check_tanh(backend: str, score: str, dtype: torch.dtype, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> None:
    tensors = {"query": query, "key": key, "value": torch.randn_like(key), "vector": torch.randn(8)}

    def call(function: Any, vector: torch.Tensor, **tensors: torch.Tensor) -> Any:
        return function(**tensors, score=TANH[score]({"vector": vector}), scale=scale, return_lse=True)

    ours, formula = partial(va.score_attention, backend=backend), va.reference.score_attention
    cotangents = [torch.randn(1, 1, 33, 8), torch.randn(1, 1, 33)]
    assert_all_close_to(partial(call, ours), partial(call, formula), as_dtype(tensors, dtype), cotangents)


@on("reference", "streaming", "cpu", "triton")
@pytest.mark.parametrize("call", ("score_attention", "relevancy_attention"))
def test_the_gradient_of_a_small_sink_keeps_its_digits(backend: str, call: str) -> None:
    """It is minus the sink's share, 2e-9 here, times sum(dO * O): the keys' share times 1 minus it has none of its digits."""
    g = torch.Generator().manual_seed(0)
    query, key, value, cotangent = (torch.randn(1, 2, 6, 8, generator=g) for _ in range(4))
    sink = torch.tensor([-18.0, -20.0])

    def gradient(name: str, dtype: torch.dtype) -> torch.Tensor:
        leaf = sink.to(dtype).requires_grad_()
        tensors = [x.to(dtype) for x in (query, key, value)]
        if call == "relevancy_attention":
            tensors.append(torch.ones(1, 1, 6, dtype=dtype))
        out = getattr(va, call)(*tensors, sink=leaf, backend=name)
        return torch.autograd.grad((out[0] if isinstance(out, tuple) else out).mul(cotangent.to(dtype)).sum(), leaf)[0]

    want = gradient("reference", torch.float64).float()
    torch.testing.assert_close(gradient(backend, torch.float32), want, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("activation", ("relu", "leaky_relu"))
def test_the_gradient_of_a_vector_over_many_rows_keeps_its_digits(activation: str) -> None:
    """A rehearsal of `make gpu` found it, on every backend: torch added the 8,192 terms of each number one after the other."""
    g = torch.Generator().manual_seed(0)
    query, cotangent = torch.randn(1, 2, 4096, 16, generator=g), torch.rand(1, 2, 4096, 32, generator=g)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        vector = torch.ones(2, 16, dtype=dtype, requires_grad=True)
        core = va.scores.Hadamard(vector, activation=activation).core(query.to(dtype), query.to(dtype))
        return torch.autograd.grad(core.query, vector, cotangent.to(dtype))[0]

    torch.testing.assert_close(gradient(torch.float32).double(), gradient(torch.float64), rtol=5e-7, atol=0.0)
