"""Gradients of relevancy_step and attention_map, against autograd through the formula in float64."""

import itertools

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


def masks(name):
    generator = torch.Generator().manual_seed(7)
    key_mask = torch.rand(B, M, generator=generator) > 0.3
    key_mask[1] = False  # rows without a key
    return {
        "none": {},
        "bool": {"attn_mask": torch.rand(B, 1, N, M, generator=generator) > 0.3},
        "float": {"attn_mask": torch.randn(H, N, M, generator=generator, dtype=torch.float64)},
        "keys": {"key_mask": key_mask},
        "causal": {"is_causal": True, "scale": 0.7},
        "softcap": {"softcap": 0.8},
    }[name]


def gradients(call, tensors, weights, **options):
    """The gradients of sum(result * weights); None where the result does not depend on a tensor."""
    result = call(*tensors, **options)
    return torch.autograd.grad((result.double() * weights).sum(), tensors, allow_unused=True)


def step_weights():
    return torch.randn(B, T, M, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def map_of(query, key, value=None, grad_output=None, **options):
    """attention_map, which takes value and grad_output for rule "gradient" alone."""
    pair = (value, grad_output) if options["rule"] == "gradient" else ()
    return va.attention_map(query, key, *pair, **options)


def check_equal(actual, expected, **tolerance):
    for one, two in zip(actual, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one.double(), two.double(), **(tolerance or {"rtol": 1e-9, "atol": 1e-11}))


@pytest.mark.parametrize("mask", ["none", "bool", "float", "keys", "causal", "softcap"])
@pytest.mark.parametrize(("rule", "row_normalize"), list(itertools.product(RULES, (False, True))))
def test_step_equals_autograd_through_the_formula(rule, row_normalize, mask):
    for kv_heads in (H, 2):
        tensors = inputs(kv_heads)
        tensors = tensors if rule == "gradient" else tensors[:3]
        options = {"rule": rule, "row_normalize": row_normalize, "enable_gqa": kv_heads != H, **masks(mask)}
        expected = gradients(va.relevancy_step, tensors, step_weights(), backend="reference", **options)
        assert all(grad.abs().max() > 1e-4 for grad in expected)
        for backend in ("streaming", "auto"):
            check_equal(gradients(va.relevancy_step, tensors, step_weights(), backend=backend, **options), expected)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "keys", "causal", "softcap"])
@pytest.mark.parametrize("reduction", ["mean", "max", "min"])
@pytest.mark.parametrize(("rule", "row_normalize"), list(itertools.product(RULES, (False, True))))
def test_map_equals_autograd_through_the_formula(rule, row_normalize, reduction, mask):
    weights = torch.randn(B, N, M, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for kv_heads in (H, 2):
        tensors = inputs(kv_heads)[1:]
        tensors = tensors if rule == "gradient" else tensors[:2]
        options = {"rule": rule, "head_reduction": reduction, "row_normalize": row_normalize, "enable_gqa": kv_heads != H}
        expected = gradients(map_of, tensors, weights, backend="reference", **options, **masks(mask))
        for backend in ("streaming", "auto"):
            check_equal(gradients(map_of, tensors, weights, backend=backend, **options, **masks(mask)), expected)


@pytest.mark.parametrize("reduction", ["max", "min"])
def test_equal_heads_share_the_gradient_as_in_amax(reduction):
    """With logits that are exact, and so equal in any order of sums."""
    rounded = ((4.0 * x[:, :1].detach()).round() / 4.0 for x in inputs()[1:3])
    query, key = (x.expand(-1, H, -1, -1).clone().requires_grad_() for x in rounded)
    weights = torch.ones(B, N, M).double().cumsum(-1)
    options = {"rule": "attention", "head_reduction": reduction, "scale": 0.25}
    expected = gradients(map_of, [query, key], weights, backend="reference", **options)
    check_equal(gradients(map_of, [query, key], weights, backend="streaming", **options), expected)
    torch.testing.assert_close(expected[0][:, 0], expected[0][:, 1])


def test_several_tiles_of_rows_and_heads(monkeypatch):
    from vlattn_fast.backends.streaming import _tiles

    tensors = inputs()
    options = {"rule": "gradient", "row_normalize": True, "backend": "streaming"}
    expected = gradients(va.relevancy_step, tensors, step_weights(), **options)
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 2 * M)
    check_equal(gradients(va.relevancy_step, tensors, step_weights(), **options), expected)


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule):
    tensors = inputs()
    tensors = tensors if rule == "gradient" else tensors[:3]
    call = lambda *x: va.relevancy_step(*x, rule=rule, row_normalize=True, backend="streaming")  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)
    call = lambda *x: map_of(*x, rule=rule, head_reduction="max", backend="streaming")  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors[1:])


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


def test_a_sink_has_a_gradient():
    sink = torch.tensor([0.3, -1.0, 2.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    tensors = [*inputs(), sink]

    def step(*tensors, backend):
        *rest, sink = tensors
        return va.relevancy_step(*rest, sink=sink, backend=backend)

    expected = gradients(step, tensors, step_weights(), backend="reference")
    assert expected[-1][:3].abs().min() > 1e-4 and expected[-1][3] == 0
    check_equal(gradients(step, tensors, step_weights(), backend="streaming"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    tensors = inputs(dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = gradients(va.relevancy_step, wide, step_weights(), backend="reference")
    actual = gradients(va.relevancy_step, tensors, step_weights(), backend="streaming")
    assert [x.dtype for x in actual] == [dtype] * 5
    eps = torch.finfo(dtype).eps
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=2 * eps, atol=4 * eps * float(two.abs().max()))


def test_only_what_is_asked_for_is_computed(monkeypatch):
    from vlattn_fast.backends.streaming import _abar

    tensors = [x.detach() for x in inputs()]
    tensors[0].requires_grad_()
    monkeypatch.setattr(_abar, "Sums", None)
    result = va.relevancy_step(*tensors, backend="streaming")
    (grad,) = torch.autograd.grad(result, tensors[:1], torch.ones_like(result))
    abar = va.attention_map(*tensors[1:], rule="gradient")
    torch.testing.assert_close(grad, torch.ones_like(result) @ abar.mT)


def test_compiled_and_checked_by_torch():
    tensors = inputs(dtype=torch.float32)
    expected = gradients(va.relevancy_step, tensors, step_weights())
    compiled = torch.compile(lambda *x: va.relevancy_step(*x), fullgraph=True, backend="aot_eager")
    check_equal(gradients(compiled, tensors, step_weights()), expected, rtol=1e-5, atol=1e-6)
    compiled = torch.compile(lambda *x: va.attention_map(*x, rule="gradient"), fullgraph=True, backend="aot_eager")
    weights = torch.ones(B, N, M)
    check_equal(
        gradients(compiled, tensors[1:], weights), gradients(map_of, tensors[1:], weights, rule="gradient"), rtol=1e-5, atol=1e-6
    )


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
