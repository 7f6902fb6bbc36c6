"""Where the tensors of a call stand for others: torch.jit.trace, make_fx, torch.func.vmap. Numbers that are read off their
values must not become a part of the result there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import vlattn_fast as va
from tests.helpers.ops.backends import on
from vlattn_fast import scores as S
from vlattn_fast.backends import native

Call = Callable[..., Any]
TRACES: dict[str, Callable[..., Call]] = {
    "torch.jit.trace": lambda call, *x: torch.jit.trace(call, x, check_trace=False),
    "make_fx": lambda call, *x: make_fx(call)(*x),
    "make_fx, fake": lambda call, *x: make_fx(call, tracing_mode="fake")(*x),
    "make_fx, symbolic": lambda call, *x: make_fx(call, tracing_mode="symbolic")(*x),
}
# torch.jit.trace warns of shapes that are compared
a_trace = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::torch.jit.TracerWarning")


@a_trace
@on("reference", "streaming", "cpu")
@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_of_cosine_serves_vectors_of_length_zero(trace: str, backend: str) -> None:
    """The clamp does not act on what it was traced with."""

    def call(query: Tensor, key: Tensor) -> Any:
        return va.score_attention(query, key, key, score="cosine", backend=backend)

    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 5, 8)
    traced = TRACES[trace](call, query, key)
    query[:, :, 1] = 0.0
    torch.testing.assert_close(traced(query, key), call(query, key))


@a_trace
@pytest.mark.parametrize("built", [True, False], ids=["our kernels", "no kernels of ours"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("score", ["scaled_dot", "cosine", "hadamard"])
def test_a_layer_that_learns_is_traced(score: str, dtype: torch.dtype, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.jit.trace traces it with gradients and then, to check, without: both must have the same graph."""
    monkeypatch.setattr(native, "library", native.library._replace(exists=built))
    layer, x = va.nn.ScoreAttention(16, 2, score).to(dtype), torch.randn(2, 5, 16, dtype=dtype)
    traced = torch.jit.trace(layer, (x,))
    torch.testing.assert_close(traced(x), layer(x))


@a_trace
@pytest.mark.parametrize("trace", [*TRACES, "torch.func.vmap"])
def test_a_series_is_refused(trace: str) -> None:
    """Its frequencies would be those of another range of data."""

    def call(query: Tensor, key: Tensor, vector: Tensor) -> Any:
        score = S.Additive(vector, method="series", tolerance=0.1)
        return va.score_attention(query, key, key, score=score)

    x = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 5, 8), torch.randn(8)
    call(*x)
    with pytest.raises(ValueError, match=r"Additive\(method='series'\) reads the range of its data, which code that is traced"):
        if trace in TRACES:
            TRACES[trace](call, *x)
        else:
            torch.func.vmap(call, (None, 0, None))(x[0], x[1][None], x[2])


@pytest.mark.parametrize("backend", ["auto", "streaming", "cpu", "reference"])
def test_vmap_over_a_congruence_loss(backend: str) -> None:
    def loss(text: Tensor, image: Tensor, text_mask: Tensor) -> Tensor:
        return va.congruence_loss((text, text), (image, image), text_mask=text_mask, backend=backend)

    text, image, mask = torch.randn(3, 2, 2, 5, 4), torch.randn(2, 2, 6, 4), torch.rand(3, 2, 5) > 0.3
    got = torch.func.vmap(loss, (0, None, 0))(text, image, mask)
    torch.testing.assert_close(got, torch.stack([loss(each, image, which) for each, which in zip(text, mask, strict=True)]))
