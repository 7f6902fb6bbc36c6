"""Gradients lie in memory as what they are of: in another layout torch copies them into `.grad`."""

from collections.abc import Callable

import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.backends import arguments_of, each, on
from vlattn_fast.backends.inputs import ScoreAttentionBackwardInputs, ScoreAttentionInputs

BACKENDS = ("cpu", "streaming", "triton")
Attend = Callable[..., Tensor]


def relevancy(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    carrier = torch.ones(query.shape[0], 1, query.shape[2])
    return va.relevancy_attention(query, key, value, carrier, backend=backend)[0]


CALLS: dict[str, Attend] = {
    "dot": va.score_attention,
    "additive": lambda *inputs, backend: va.score_attention(
        *inputs, score=va.scores.Additive(torch.ones(inputs[0].shape[1], 16)), backend=backend
    ),
    "relevancy": relevancy,
}


@each("name", **dict.fromkeys(BACKENDS, tuple(CALLS)), cuda=("additive",))
def test_a_gradient_lies_as_its_tensor(name: str, backend: str) -> None:
    contiguous = [torch.randn(2, 2, 7, 16).requires_grad_() for _ in range(3)]
    rows_first = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in contiguous]
    found = []
    for inputs in (contiguous, rows_first):
        out = CALLS[name](*inputs, backend=backend)
        assert out.stride() == (out.shape[2] * 32, 16, 32, 1)  # heads merge without a copy
        grads = torch.autograd.grad(out.square().sum(), inputs)
        assert [x.stride() for x in grads] == [x.stride() for x in inputs]
        found.append(grads)
    torch.testing.assert_close(*found)


@on(*BACKENDS)
def test_of_an_expanded_or_sliced_tensor_heads_come_after_rows(backend: str) -> None:
    packed = torch.randn(2, 7, 3, 4, 16)
    query, key = (packed[:, :, i].transpose(1, 2).requires_grad_() for i in range(2))
    value = torch.randn(2, 1, 7, 16).expand(2, 4, 7, 16).detach().requires_grad_()
    grads = torch.autograd.grad(va.score_attention(query, key, value, backend=backend).sum(), (query, key, value))
    assert {x.stride() for x in grads} == {(7 * 64, 16, 64, 1)}


@on(*BACKENDS)
def test_heads_that_share_keys(backend: str) -> None:
    query, key, value = (torch.randn(2, heads, 7, 16).requires_grad_() for heads in (4, 2, 2))
    out = va.score_attention(query, key, value, enable_gqa=True, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))
    assert [x.stride() for x in grads] == [x.stride() for x in (query, key, value)]


@on(*BACKENDS)
def test_a_registered_operator_keeps_the_layout_of_its_fake(backend: str) -> None:
    """torch.compile counts on it, and may lay out what it saves for the backward pass otherwise than it was traced."""
    query, key, value = (torch.randn(2, 4, n, 16) for n in (5, 7, 7))
    given = {"query": query, "key": key, "value": value, "scale": 0.25, "dropout_p": 0.0, "backend": backend}
    out, lse = torch.ops.vlattn.score_attention(*arguments_of(ScoreAttentionInputs, **given))
    given |= {"grad_out": out, "out": out, "lse": lse}
    *grads, _, _ = torch.ops.vlattn.score_attention_backward(*arguments_of(ScoreAttentionBackwardInputs, **given))
    assert [x.stride() for x in grads] == [(x.shape[2] * 64, 16, 64, 1) for x in (query, key, value)]
