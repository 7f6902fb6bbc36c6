"""Gradients of relevancy_step and attention_map in the dtypes of the kernels, by the tolerance rule."""

from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.ops.abar_cases import check, inputs
from tests.helpers.ops.backends import LOW, each, on
from tests.helpers.ops.masks import COMMON, masks_of
from tests.helpers.ops.tile_edges import covering

RULES = ("gradient", "attention")
REDUCTIONS = ("mean", "max", "min")


def everywhere(cases: list[tuple[Any, ...]]) -> dict[str, list[tuple[Any, ...]]]:
    """The cases of each backend. Triton's take one of each last choice: its interpreter is slow, and so is compiling."""
    each_once = {case[-1]: case for case in reversed(cases)}
    return {"streaming": cases, "cpu": cases, "triton": list(each_once.values())}


@each("case", **everywhere(covering(LOW, RULES, (False, True), REDUCTIONS, ("none", "softcap", "bool of each H", *COMMON))))
def test_map(backend: str, case: tuple[torch.dtype, str, bool, str, str]) -> None:
    dtype, rule, row_normalize, reduction, mask = case
    torch.manual_seed(0)
    options = {"rule": rule, "row_normalize": row_normalize, "head_reduction": reduction}
    options |= {"softcap": 0.8, "is_causal": True} if mask == "softcap" else masks_of(mask, 17, 19)
    check(backend, "map", lambda seed: inputs(17, 19, seed=seed), dtype, **options)


@on("streaming", "cpu", "triton")
@pytest.mark.parametrize("rule", RULES)
def test_logits_far_from_zero(backend: str, rule: str) -> None:
    """A common part of all keys shifts each row's logits, by up to a thousand, and changes no probability."""

    def shifted(seed: int) -> dict[str, torch.Tensor]:
        made = inputs(17, 19, seed=seed)
        return made | {"key": made["key"] + 256.0}

    for dtype in (torch.float32, torch.float16):
        check(backend, "step", shifted, dtype, rule=rule)


@pytest.mark.slow("triton")
@on("streaming", "cpu", "triton")
@pytest.mark.parametrize("operator", ["step", "map"])
def test_a_sink_and_the_lse_that_holds_it(backend: str, operator: str) -> None:
    """The sink's gradient goes through the log-sum-exp."""
    for dtype in LOW:
        results = []
        for name, wide in (("reference", torch.float64), ("reference", dtype), (backend, dtype)):
            of_draws = []
            for seed in range(3, 6 if backend == "triton" else 11):  # torch rounds; a sink has two numbers a draw
                tensors = {key: x.to(dtype).to(wide).requires_grad_() for key, x in inputs(17, 19, seed=seed).items()}
                sink = torch.tensor([0.3, 2.0], dtype=wide, requires_grad=True)
                if operator == "map":
                    del tensors["relevancy"]
                call = va.relevancy_step if operator == "step" else va.attention_map
                result = call(**tensors, rule="gradient", sink=sink, is_causal=True, backend=name)
                weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
                of_draws.append(torch.autograd.grad((result * weight).sum(), [sink, *tensors.values()]))
            results.append([torch.stack(grads) for grads in zip(*of_draws, strict=True)])
        exact, formula, ours = results
        for one, plain, truth in zip(ours, formula, exact, strict=True):
            assert one.dtype == dtype
            error, yardstick = ((x.double() - truth).square().mean().sqrt() for x in (one, plain))
            assert error <= 2 * yardstick + torch.finfo(dtype).eps * truth.square().mean().sqrt()


@on("streaming", "cpu", "triton")
@pytest.mark.parametrize("operator", ["step", "map"])
def test_a_sink_has_its_gradient_beside_a_detached_lse(backend: str, operator: str) -> None:
    tensors = {name: x.float() for name, x in inputs(17, 19, seed=3).items()}
    sink = torch.tensor([0.3, 2.0], requires_grad=True)
    _, lse = va.score_attention(*(tensors[name] for name in ("query", "key", "value")), sink=sink, return_lse=True)
    if operator == "map":
        del tensors["relevancy"]
    call = va.relevancy_step if operator == "step" else va.attention_map
    results = [call(**tensors, rule="gradient", sink=sink, lse=x, backend=backend) for x in (None, lse, lse.detach())]
    weight = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1))
    plain, *beside = (torch.autograd.grad((result * weight).sum(), sink)[0] for result in results)
    assert plain.abs().min() > 0.01
    for grad in beside:
        torch.testing.assert_close(grad, plain, rtol=1e-4, atol=1e-5)


@on("streaming", "cpu", "triton")
@pytest.mark.parametrize("reduction", ["max", "min"])
@pytest.mark.slow("triton")
def test_equal_heads_share_the_gradient(backend: str, reduction: str) -> None:
    """Whatever tile they are computed in; to the bit, where the products are not torch's. The logits are exact, and so equal in
    any order of sums."""
    made = inputs(70, 90, h=4, kv=4)
    rounded = ((4.0 * made[name][:, :1].detach().float()).round() / 4.0 for name in ("query", "key"))
    query, key = (x.expand(-1, 4, -1, -1).clone().requires_grad_() for x in rounded)
    options = {"head_reduction": reduction, "backend": backend, "scale": 0.25}
    result = va.attention_map(query, key, **options)
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(result, [query, key], weight)
    single = va.attention_map(query[:, :1], key[:, :1], **options)
    for whole, one in zip(grads, torch.autograd.grad(single, [query, key], weight), strict=True):
        assert backend == "streaming" or all(torch.equal(whole[:, h], whole[:, 0]) for h in range(4))
        torch.testing.assert_close(4 * whole, one[:, :1].expand_as(whole), rtol=1e-5, atol=1e-7)
