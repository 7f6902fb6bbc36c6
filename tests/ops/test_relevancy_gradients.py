"""Gradients of relevancy_step and attention_map in float64: log-sum-exps, and nothing that nobody asked for."""

import pytest
import torch
from torch.autograd import forward_ad

import vlattn_fast as va

B, H, N, M, D, DV, T = 2, 4, 5, 7, 3, 6, 2
RULES = ("gradient", "attention")


def inputs(kv_heads=H, dtype=torch.float64, seed=0, keys=M):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T, N), (B, H, N, D), (B, kv_heads, keys, D), (B, kv_heads, keys, DV), (B, H, N, DV)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def gradients(call, tensors, weights, **options):
    """The gradients of sum(result * weights); None where the result does not depend on a tensor."""
    result = call(*tensors, **options)
    return torch.autograd.grad((result.double() * weights).sum(), tensors, allow_unused=True)


def step_weights():
    return torch.randn(B, T, M, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def check_equal(actual, expected, **tolerance):
    for one, two in zip(actual, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one.double(), two.double(), **(tolerance or {"rtol": 1e-9, "atol": 1e-11}))


@pytest.mark.parametrize("attached", [True, False])
def test_the_lse_of_the_forward_pass_attached_to_its_graph_or_not(attached):
    relevancy, query, key, value, grad_output = inputs()
    options = {"is_causal": True, "backend": "streaming"}
    expected = gradients(va.relevancy_step, [relevancy, query, key, value, grad_output], step_weights(), **options)

    def with_lse(relevancy, query, key, value, grad_output):
        _, lse = va.score_attention(query, key, value, is_causal=True, return_lse=True)
        lse = lse if attached else lse.detach()
        return va.relevancy_step(relevancy, query, key, value, grad_output, lse=lse, **options)

    check_equal(gradients(with_lse, [relevancy, query, key, value, grad_output], step_weights()), expected)


def test_only_what_is_asked_for_is_computed(monkeypatch):
    from vlattn_fast.backends.streaming import _abar

    tensors = [x.detach() for x in inputs()]
    tensors[0].requires_grad_()
    monkeypatch.setattr(_abar, "Sums", None)
    result = va.relevancy_step(*tensors, backend="streaming")
    (grad,) = torch.autograd.grad(result, tensors[:1], torch.ones_like(result))
    abar = va.attention_map(*tensors[1:], rule="gradient")
    torch.testing.assert_close(grad, torch.ones_like(result) @ abar.mT)


@pytest.mark.parametrize("rule", RULES)
def test_the_tangent_of_the_carriers_gradient(rule):
    """The saved log-sum-exp requires a gradient in the caller's graph, and counts as computed from query and key."""
    found = []
    for backend in ("streaming", "reference"):
        _, query, key, value, grad_output = inputs(keys=N)
        carrier = torch.linspace(-1, 1, B * N, dtype=torch.float64).view(B, 1, N).requires_grad_()
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, x.detach().cos()) for x in (query, key, value)]
            outputs = va.relevancy_attention(*duals, carrier=carrier, rule=rule, backend=backend)
            (grad,) = torch.autograd.grad(outputs[:2], carrier, [grad_output.detach(), carrier.detach().cos()])
            found.append(forward_ad.unpack_dual(grad).tangent)
    torch.testing.assert_close(*found)
