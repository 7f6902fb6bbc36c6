"""Biases of pairs of token groups and gates of heads: every backend against the formula, and the formula against dense masks made
by hand and the papers' gradient.

A backend enters by itself when it refuses group_bias no more. DTensors: test_shards.py.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to
from tests.helpers.ops.backends import HALVES, finest, on
from tests.helpers.ops.backends import each as on_each
from tests.helpers.ops.group_cases import DV, GK, GQ, ON_GROUPS, B, D, H, M, N, groups, tensors
from vlattn_fast import scores as S
from vlattn_fast.checking.cases import Sizes, cases_of
from vlattn_fast.dispatch.call import CallShape
from vlattn_fast.dispatch.table import refusals
from vlattn_fast.ops import OPERATORS


def takes(operator: str, backend: str) -> bool:
    call = CallShape(operator, torch.float32, "cpu", defaultdict(int), defaultdict(bool, group_bias=True, score="dot"))
    return not any("group_bias" in reason for reason in refusals(OPERATORS[operator].backends, backend, call))


def backends(operator: str = "score_attention") -> tuple[str, ...]:
    return tuple(name for name in ("reference", "streaming", "cpu", "triton") if takes(operator, name))


def dense(bias: Tensor, query_groups: Tensor, key_groups: Tensor) -> Tensor:
    """(B, H, N, M), pair by pair."""
    (batch, n), m = query_groups.shape, key_groups.shape[1]
    pairs = torch.zeros(batch, bias.shape[-3], n, m, dtype=bias.dtype)
    for b in range(batch):
        of_sample = bias if bias.dim() == 3 else bias[b]
        for i in range(n):
            for j in range(m):
                if query_groups[b, i] >= 0 and key_groups[b, j] >= 0:
                    pairs[b, :, i, j] = of_sample[:, query_groups[b, i], key_groups[b, j]]
    return pairs


def by_formula(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out and A of softmax(q k^T / sqrt(D) + bias of each pair) v; a row without a key is zero."""
    logits = (query @ key.mT) * query.shape[-1] ** -0.5 + bias
    logits = logits if visible is None else logits.masked_fill(~visible, -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    prob = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return prob @ value, prob


def grads(out: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    cotangent = torch.randn(out.shape, dtype=out.dtype)
    return dict(zip(inputs, torch.autograd.grad((out * cotangent).sum(), tuple(inputs.values())), strict=True))


def leaves(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.clone().requires_grad_() for name, each in x.items()}


@pytest.mark.parametrize("backend", ["reference", "streaming"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_dense_mask_made_by_hand(backend: str, per_sample: bool, causal: bool) -> None:
    """Outputs and gradients, that of the bias by autograd through the formula, to 1e-12."""
    x, of = tensors(), groups()
    if per_sample:
        x["group_bias"] = torch.stack([x["group_bias"], -x["group_bias"].nan_to_num(neginf=-3.0)])
    visible = torch.ones(N, M, dtype=torch.bool).tril() if causal else None
    ours, by_hand = leaves(x), leaves(x)
    got = va.score_attention(**ours, **of, is_causal=causal, backend=backend)
    bias = by_hand["group_bias"]
    index = torch.arange(GQ * GK).view(1, GQ, GK).expand(H, -1, -1)
    number = dense(index, **of).long()
    has_group = (of["query_groups"] >= 0)[:, None, :, None] & (of["key_groups"] >= 0)[:, None, None]
    flat = bias.flatten(-2).expand(B, H, -1)
    pairs = flat.gather(2, number.flatten(2)).view(number.shape)
    finite = torch.where(has_group & (pairs > -torch.inf), pairs, 0.0)
    hidden = has_group & (pairs == -torch.inf)
    want, _ = by_formula(
        by_hand["query"], by_hand["key"], by_hand["value"], finite, ~hidden if visible is None else ~hidden & visible
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    mine, hands = grads(got, ours), grads(want, by_hand)
    for name, x_ in mine.items():
        torch.testing.assert_close(x_, hands[name], rtol=0, atol=1e-12, msg=name)


# in the interpreter bfloat16 alone, which loses more than float16 and takes the same way
@on_each("dtype", **{name: HALVES[:1] if name == "triton" else HALVES for name in backends()})
@pytest.mark.slow("triton")
def test_a_bias_of_16_bits_has_sums_of_32(backend: str, dtype: torch.dtype) -> None:
    """Its gradient, over many pairs, is the formula's for the same bias in the query's dtype, rounded once."""
    n, m = (100, 150) if backend == "triton" else (200, 300)
    x, of = tensors(backend, n=n, m=m), groups(n=n, m=m)
    biases = [x["group_bias"].nan_to_num(neginf=0.0).to(dtype)]
    biases.append(biases[0].to(x["query"].dtype))
    cotangent = torch.randn(B, H, n, DV, dtype=x["query"].dtype)
    got, want = (
        torch.autograd.grad((va.score_attention(**{**x, "group_bias": bias}, **of, backend=name) * cotangent).sum(), bias)[0]
        for name, bias in zip((backend, "reference"), (each.requires_grad_() for each in biases), strict=True)
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=0.01, atol=1e-4)


def run(backend: str, operator: str = "score_attention", **options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The public call and its formula, as functions of named tensors."""
    public, formula = OPERATORS[operator].call, OPERATORS[operator].formula
    return lambda **x: public(**x, **options, backend=backend), lambda **x: formula(**x, **options)


@on(*backends())
@pytest.mark.slow("triton")
def test_sink_and_other_scores(backend: str) -> None:
    x = tensors(backend) | {"sink": torch.linspace(-1, 1, H, dtype=finest(backend))}
    assert_all_close_to(
        *run(backend, **groups(), return_lse=True), x, [torch.randn(B, H, N, DV), torch.randn(B, H, N)], what=backend
    )
    of = {name: each for name, each in tensors(backend).items() if name != "sink"}
    for score in ("cosine", S.Distance(1.5), S.Additive(torch.linspace(-1, 1, D, dtype=finest(backend)))):
        assert_all_close_to(*run(backend, **groups(), score=score), of, [torch.randn(B, H, N, DV)], what=f"{backend} {score}")


@on(*backends())
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_as_in_a_float_mask(backend: str, value: float) -> None:
    x, of = tensors(backend), groups()
    x["group_bias"][3, 2, 1] = value
    mask = dense(x["group_bias"], **of)
    got = va.score_attention(**x, **of, backend=backend)
    bias = x.pop("group_bias")
    want = va.score_attention(**x, attn_mask=mask, backend=backend)
    assert want.isnan().any() and want.isfinite().any()
    torch.testing.assert_close(got, want, equal_nan=True)
    leaf = bias.clone().requires_grad_()
    va.score_attention(**x, **of, group_bias=leaf, backend=backend).sum().backward()
    assert leaf.grad is not None
    clean = [g for g in range(GQ) if g != 2]
    assert leaf.grad[3, 2, 1].isnan() and leaf.grad[:3].isfinite().all() and leaf.grad[3, clean].isfinite().all()


@on(*backends())
def test_a_masked_pair_is_masked_whatever_is_added(backend: str) -> None:
    """-inf of one kind of mask beside +inf or NaN of another, and the other way round."""
    x, of = tensors(backend), groups()
    x["group_bias"] = torch.zeros_like(x["group_bias"])
    for masks, others in ((-torch.inf, torch.inf), (-torch.inf, torch.nan)):
        bias = x["group_bias"].clone()
        bias[:, :, 0] = masks
        hidden = (of["key_groups"] == 0)[:, None, None] & (of["query_groups"] >= 0)[:, None, :, None]
        mask = torch.zeros(B, 1, N, M, dtype=bias.dtype).masked_fill(hidden, others)
        want = va.score_attention(*(x[name] for name in ("query", "key", "value")), attn_mask=~hidden, backend=backend)
        got = va.score_attention(**{**x, "group_bias": bias}, **of, attn_mask=mask, backend=backend)
        torch.testing.assert_close(got, want)
        bias = x["group_bias"].clone()
        bias[:, :, 0] = others
        for mask in (~hidden, torch.zeros(B, 1, N, M, dtype=bias.dtype).masked_fill(hidden, masks)):
            got = va.score_attention(**{**x, "group_bias": bias}, **of, attn_mask=mask, backend=backend)
            torch.testing.assert_close(got, want)


@on(*backends())
def test_no_group_is_no_bias(backend: str) -> None:
    x, of = leaves(tensors(backend)), {name: torch.full_like(each, -1) for name, each in groups().items()}
    got = va.score_attention(**x, **of, backend=backend)
    torch.testing.assert_close(got, va.score_attention(x["query"], x["key"], x["value"], backend=backend))
    assert not torch.autograd.grad(got.sum(), x["group_bias"])[0].any()


@on(*[name for name in backends() if name != "reference"])
@pytest.mark.slow("triton")
def test_dropout_drops_what_it_drops_with_a_dense_mask(backend: str) -> None:
    x, of = tensors(backend), groups()
    mask = dense(x["group_bias"], **of)
    torch.manual_seed(5)
    got = va.score_attention(**x, **of, dropout_p=0.4, backend=backend)
    bias = x.pop("group_bias")
    torch.manual_seed(5)
    torch.testing.assert_close(got, va.score_attention(**x, attn_mask=mask, dropout_p=0.4, backend=backend))
    leaf = bias.clone().requires_grad_()
    torch.manual_seed(5)
    va.score_attention(**x, **of, group_bias=leaf, dropout_p=0.4, backend=backend).sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


@on(*backends())
@pytest.mark.parametrize("per_sample", [False, True])
def test_head_gate(backend: str, per_sample: bool) -> None:
    """The gradient is sum out * dout of each head: first-order patching."""
    x = {name: each for name, each in tensors(backend).items() if name != "group_bias"}
    gate = torch.linspace(-1, 2, H, dtype=finest(backend))
    gate = (torch.stack([gate, gate + 1]) if per_sample else gate).requires_grad_()
    plain = va.score_attention(**x, backend=backend)
    got = va.score_attention(**x, head_gate=gate, backend=backend)
    torch.testing.assert_close(got, plain * gate[..., None, None])
    cotangent = torch.randn_like(got)
    (grad,) = torch.autograd.grad((got * cotangent).sum(), gate)
    torch.testing.assert_close(grad, (plain * cotangent).sum((2, 3) if per_sample else (0, 2, 3)))


def test_the_cases_of_verify_have_groups() -> None:
    for name in ON_GROUPS:
        examples = list(cases_of(name).verify(torch.Generator().manual_seed(0), Sizes()))
        assert any("group_bias" in each.tensors for each in examples), name


def test_statistics_take_groups_of_keys_alone() -> None:
    """Those of `mass`; with a bias its groups are the same ones."""
    x, of = tensors(), groups()
    query, key, bias = x["query"], x["key"], x["group_bias"]
    mass = va.attention_statistics(query, key, key_groups=of["key_groups"], num_groups=GK).mass
    assert mass.shape == (B, H, N, GK)
    assert va.attention_statistics(query, key, **of, group_bias=bias).mass.shape == (B, H, N, GK)
    with pytest.raises(ValueError, match="num_groups must be None or group_bias's number of groups of keys, 2; got 5"):
        va.attention_statistics(query, key, **of, group_bias=bias, num_groups=5)
