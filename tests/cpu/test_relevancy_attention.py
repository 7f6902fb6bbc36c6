"""relevancy_attention and relevancy_step by the CPU kernels: many carried rows, the log-sum-exp of more keys, few queries."""

from functools import partial

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import assert_close_to
from tests.helpers.ops import abar_cases, tile_edges
from tests.helpers.ops.backends import LOW
from tests.helpers.ops.masks import COMMON, masks_of, real_keys
from tests.helpers.ops.relevancy_cases import RULES, check, tensors


@pytest.mark.parametrize(
    "rule, mask, rows", tile_edges.covering(RULES, (*COMMON, "bool of each H", "float, transposed", "no pair"), (3, 17, 40))
)
def test_many_carried_rows_under_masks(rule: tuple[str, bool], mask: str, rows: int) -> None:
    """The step reduces the heads of a tile first where rows are more than two; the backward pass does where they are many for a
    head_dim, here more than 22."""
    for n in (60, 800):
        inputs = tensors(n, b=2, rows=rows)
        options = {"rule": rule[0], "row_normalize": rule[1], **masks_of(mask, n, n)}
        check("cpu", inputs, what=str(n), **options)
        query, key, value, carrier = inputs.values()
        extra = (value, torch.randn_like(value)) if rule[0] == "gradient" else (None, None)
        step = partial(va.relevancy_step, **options, backend="cpu")
        formula = partial(va.reference.relevancy_step, **options)
        wide = [None if x is None else x.double() for x in (carrier, query, key, *extra)]
        assert_close_to(step(carrier, query, key, *extra), formula(*wide), formula(carrier, query, key, *extra), what=str(n))


@pytest.mark.parametrize("rule", ("gradient", "attention"))
def test_step_with_the_lse_of_more_keys(rule: str) -> None:
    """The log-sum-exp counts keys that are not here: halves of the keys give halves of the step."""
    for n in (60, 900):
        query, key, value, carrier = tensors(n, rows=3).values()
        extra = (value, torch.randn_like(value)) if rule == "gradient" else (None, None)
        lse = va.score_attention(query, key, value, return_lse=True, backend="cpu")[1]
        halves = []
        for part in (slice(0, n // 2), slice(n // 2, None)):
            some_value = None if extra[0] is None else extra[0][:, :, part]
            halves.append(
                va.relevancy_step(carrier, query, key[:, :, part], some_value, extra[1], rule=rule, lse=lse, backend="cpu")
            )
        wide = [None if x is None else x.double() for x in (carrier, query, key, *extra)]
        exact = va.reference.relevancy_step(*wide, rule=rule)
        formula = va.reference.relevancy_step(carrier, query, key, *extra, rule=rule)
        assert_close_to(torch.cat(halves, -1), exact, formula, what=f"{rule} {n}")


@pytest.mark.parametrize("dtype, case, n", tile_edges.covering(LOW, RULES, (1, 2, 5, 16)))
def test_step_of_few_queries_over_many_keys(n: int, case: tuple[str, bool], dtype: torch.dtype) -> None:
    """Three blocks of keys, whose exponentials are kept from the pass that finds the rows' statistics."""
    rule, row_normalize = case
    m, draws = 1300, 6  # errors of a row's sum are in all its numbers: one draw has few of them
    real = real_keys(2, m)
    real[0, :600] = False  # a block and more
    bias = torch.randn(2, 1, n, m)
    bias[0, :, 0] = -torch.inf  # a row without keys
    bias[1, :, :, 512:1024] = -torch.inf
    slope = torch.linspace(0.1, 8, m)[:, None]  # the largest logit comes late, or early
    # the formula scales sums and the kernel queries: by a power of two that is the same
    options = {"rule": rule, "row_normalize": row_normalize, "enable_gqa": True, "scale": 0.25}
    for what, factor, masks in (
        ("rising", slope, {}),
        ("falling", slope.flip(0), {"key_mask": real}),
        ("masked", 1.0, {"attn_mask": bias}),
        ("both", slope, {"attn_mask": bias, "key_mask": real}),
    ):
        results: list[list[torch.Tensor]] = [[], [], []]
        for _ in range(draws):
            query, grad = (torch.randn(2, 4, n, 24).to(dtype) for _ in range(2))
            key, value = ((torch.randn(2, 2, m, 24) * by).to(dtype) for by in (factor, 1.0))
            inputs = (torch.rand(2, 3, n), query, key, *((value, grad) if rule == "gradient" else (None, None)))
            results[0].append(va.relevancy_step(*inputs, **masks, **options, backend="cpu"))
            for found, wide in zip(results[1:], (torch.float64, torch.float32), strict=True):
                found.append(va.reference.relevancy_step(*(x if x is None else x.to(wide) for x in inputs), **masks, **options))
        assert_close_to(*results, what=what)


@pytest.mark.parametrize("keys, size", ((2000, 0), (30000, 8)))
def test_step_over_many_keys_of_few_features(keys: int, size: int) -> None:
    """The shifts of the kept exponentials' blocks lie behind all else that a thread has, and were not counted."""
    inputs = torch.rand(1, 1, 3), torch.randn(1, 2, 3, size), torch.randn(1, 2, keys, size)
    exact = va.reference.relevancy_step(*(x.double() for x in inputs), rule="attention")
    formula = va.reference.relevancy_step(*inputs, rule="attention")
    assert_close_to(va.relevancy_step(*inputs, rule="attention", backend="cpu"), exact, formula, what=str(keys))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("row_normalize", (False, True))
@pytest.mark.slow
def test_more_key_heads_than_the_sums_of_the_threads_may_take(row_normalize: bool) -> None:
    """A head has 2^16 sums, of which seven threads take 2^24: 36 heads, then 4."""
    torch.set_num_threads(7)
    make = lambda seed: abar_cases.inputs(112, 512, b=1, h=40, kv=40, d=64, dv=64, rows=30, seed=seed)  # noqa: E731
    abar_cases.check("cpu", "step", make, rule="gradient", row_normalize=row_normalize)
