"""NaN and overflow in one place: where the formula's results are not finite, those of a backend are not either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.backends import each, on

NAN, INF = float("nan"), float("inf")
Call = Callable[[str], Any]


def with_value(x: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    x = x.clone()
    x[place] = value
    return x


def calls() -> dict[str, Call]:
    """Functions of the backend's name."""
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, v, g = (torch.randn(1, 2, 5, 8, generator=generator, device="cpu") for _ in range(4))
    r = torch.rand(1, 2, 5, generator=generator, device="cpu")
    device = torch.get_default_device()
    q, k, v, g, r = (x.to(device) for x in (q, k, v, g, r))
    place = (0, 0, 1, 2)
    q_nan, g_nan, g_inf = with_value(q, place, NAN), with_value(g, place, NAN), with_value(g, place, INF)
    mask = with_value(torch.zeros(5, 5), (1, 2), NAN)
    overflow = with_value(g, place, 60000.0).half() * 4  # infinite in float16
    half = [x.half() for x in (q, k, v)]
    found: dict[str, Call] = {}
    for rule in ("gradient", "attention"):
        for normalize in (False, True):
            for reduction in ("mean", "max", "min"):
                options: dict[str, Any] = {"rule": rule, "row_normalize": normalize, "head_reduction": reduction}
                name = f"attention_map {rule} {reduction}{' normalized' if normalize else ''}"
                value = v if rule == "gradient" else None
                found[f"{name}, query"] = lambda b, o=options, v=value: va.attention_map(
                    q_nan, k, v, g if v is not None else None, backend=b, **o
                )
                if rule == "gradient":
                    found[f"{name}, gradient"] = lambda b, o=options: va.attention_map(q, k, v, g_nan, backend=b, **o)
                    found[f"{name}, overflow"] = lambda b, o=options: va.attention_map(q, k, v, g_inf, backend=b, **o)
    for name, query in (("query", q_nan), ("mask", q)):
        attn_mask = mask if name == "mask" else None
        found[f"attention_statistics, {name}"] = lambda b, q=query, m=attn_mask: va.attention_statistics(
            q, k, attn_mask=m, key_groups=torch.zeros(5, dtype=torch.int64), num_groups=1, backend=b
        )
        for rule in ("gradient", "attention"):
            found[f"relevancy_step {rule}, {name}"] = lambda b, q=query, m=attn_mask, rule=rule: va.relevancy_step(
                r, q, k, v, g, attn_mask=m, rule=rule, backend=b
            )
        found[f"relevancy_attention, {name}"] = lambda b, q=query, m=attn_mask: relevancy(q, k, v, g, r, m, b)
        found[f"score_attention, {name}"] = lambda b, q=query, m=attn_mask: score(q, k, v, g, m, b)
    found["relevancy_step, gradient"] = lambda b: va.relevancy_step(r, q, k, v, g_nan, backend=b)
    found["relevancy_step, gradient of many rows"] = lambda b: va.relevancy_step(r.repeat(1, 9, 1), q, k, v, g_nan, backend=b)
    found["relevancy_step, float16 overflow"] = lambda b: va.relevancy_step(r, *half, overflow, backend=b)
    found["relevancy_attention, float16 overflow"] = lambda b: relevancy(*half, overflow, r, None, b)
    pairs = torch.randn(4, 3, 8, generator=generator, device="cpu").to(device)
    for aggregation in ("logsumexp", "max", "sum", "mean"):
        for side in ("images", "captions"):
            sides = {"images": pairs[:2], "captions": pairs[2:]}
            sides[side] = with_value(sides[side], (0, 1, 2), NAN)
            options = {"aggregation": aggregation}
            found[f"stacked_cross_attention {aggregation}, {side}"] = lambda b, s=sides, o=options: similarity(s, o, b)
    for kind in ("cacr", "iais_singular", "iais_distributed"):
        found[f"congruence_loss {kind}"] = lambda b, kind=kind: congruence((q_nan, k), (v, g), kind, b)
    return found


def similarity(sides: dict[str, Tensor], options: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    inputs = [x.clone().requires_grad_() for x in sides.values()]
    out = va.stacked_cross_attention(*inputs, **options, backend=backend)
    return out, *torch.autograd.grad(out.sum(), inputs)


def congruence(text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor], kind: str, backend: str) -> tuple[Tensor, ...]:
    inputs = [x.clone().requires_grad_() for x in (*text, *image)]
    loss = va.congruence_loss(tuple(inputs[:2]), tuple(inputs[2:]), kind=kind, backend=backend)
    return loss, *torch.autograd.grad(loss, inputs)


def relevancy(q: Tensor, k: Tensor, v: Tensor, g: Tensor, r: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    inputs = [x.clone().requires_grad_() for x in (q, k, v, torch.zeros_like(r))]
    return torch.autograd.grad(va.relevancy_attention(*inputs, attn_mask=mask, backend=backend), inputs, (g, r))


def score(q: Tensor, k: Tensor, v: Tensor, g: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = va.scores.Additive(torch.linspace(-1, 1, q.shape[3]))
    out, lse = va.score_attention(*inputs, score=scores, attn_mask=mask, return_lse=True, backend=backend)
    return out, lse, *torch.autograd.grad(out, inputs, g)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


NAMES = tuple(calls())
WITH_CUDA = tuple(
    name for name in NAMES if name.startswith(("relevancy", "score_attention", "congruence")) and "singular" not in name
)


@each("name", streaming=NAMES, cpu=NAMES, triton=NAMES, cuda=WITH_CUDA)
def test_no_result_is_finite_where_the_formula_has_none(backend: str, name: str) -> None:
    """And rows of the first result that are finite in the formula are so here.

    Where an infinite number meets another the formula may have NaN and a kernel Inf. Autograd leaves NaN out of some gradients of
    the formula, as of a clamp.
    """
    call = calls()[name]
    for n, (got, formula) in enumerate(zip(_tensors(call(backend)), _tensors(call("reference")), strict=True)):
        lost = torch.isfinite(got) & ~torch.isfinite(formula)
        assert not lost.any(), f"result {n} is finite at {lost.nonzero().tolist()}"
        if n == 0:
            more = ~torch.isfinite(got).all(-1) & torch.isfinite(formula).all(-1)
            assert not more.any(), f"result {n} is not finite in rows {more.nonzero().tolist()}"


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # by the interpreter of Triton 3.6
@on("streaming", "cpu", "triton")
def test_the_largest_weight_of_a_row_of_nan_is_the_first(backend: str) -> None:
    query = with_value(torch.randn(1, 1, 4, 8), (0, 0, 1, 2), NAN)
    key = torch.randn(1, 1, 40, 8)
    rows = [va.attention_statistics(query, key, backend=name).argmax[0, 0] for name in (backend, "reference")]
    assert rows[0].equal(rows[1]) and rows[0][1] == 0
