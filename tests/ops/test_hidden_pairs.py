"""NaN and Inf in pairs that a mask hides and rows of NaN that no mask hides.

The formula says which rows of the result are finite. torch's fused CPU kernel, which "sdpa" and "streaming" call, adds -inf to
what is hidden, and takes rows of NaN for hidden ones where keys are few.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.backends import DTYPES, F64, assert_refused, each, on
from vlattn_fast.backends import native

N, M = 20, 18
SOME = torch.ones(N, M, dtype=torch.bool)
SOME[:7, 5] = False
MASKS: dict[str, dict[str, Any]] = {
    "bool, in all rows": {"attn_mask": torch.arange(M) != 5},
    "bool, in some rows": {"attn_mask": SOME},
    "causal": {"is_causal": True},
    "causal, key": {"is_causal": True, "key_mask": torch.ones(1, M, dtype=torch.bool)},
    "causal, bool": {"is_causal": True, "attn_mask": SOME},
    "causal, negative scale": {"is_causal": True, "scale": -0.5},
    "float": {"attn_mask": torch.where(SOME, 0.0, -math.inf)},
}
EVERY = (F64, torch.float32, torch.bfloat16, torch.float16)


def inputs_of(dtype: torch.dtype, m: int = M) -> tuple[Tensor, ...]:
    return torch.randn(1, 2, N, 8, dtype=dtype), torch.randn(1, 2, m, 8, dtype=dtype), torch.randn(1, 2, m, 8, dtype=dtype)


@each("dtype", auto=EVERY, streaming=EVERY, cpu=DTYPES["cpu"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_hidden_key_reaches_no_row(backend: str, dtype: torch.dtype, mask: str) -> None:
    """And every row that sees it, as in the formula."""
    inputs = inputs_of(dtype)
    for row, logit in ((8, math.inf), (9, -math.inf)):  # of an infinite key
        inputs[0][:, :, row].copysign_(torch.tensor(logit))
    for value in (math.nan, math.inf):
        inputs[1][:, :, 5] = value
        formula = va.reference.score_attention(*inputs, **MASKS[mask]).isfinite().all(-1)
        assert formula[:, :, :5].all()
        for requires_grad in (False, True):
            tensors = [x.clone().requires_grad_(requires_grad) for x in inputs]
            got = va.score_attention(*tensors, **MASKS[mask], backend=backend)
            assert torch.equal(got.isfinite().all(-1), formula), (value, requires_grad)


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "causal"])
def test_sdpa_refuses_what_torch_would_leave_nan(mask: str) -> None:
    assert_refused("sdpa", "SDPA", lambda: va.score_attention(*inputs_of(torch.float32), **MASKS[mask], backend="sdpa"))


@on("streaming", "sdpa", "cpu", "reference")
def test_nan_in_a_query_that_sees_no_key_stays_there(backend: str) -> None:
    query, key, value = (x.requires_grad_() for x in inputs_of(torch.float32))
    with torch.no_grad():
        query[:, :, 3] = math.nan
    out = va.score_attention(query, key, value, key_mask=torch.zeros(1, M, dtype=torch.bool), backend=backend)
    assert not any(x.any() for x in (out, *torch.autograd.grad(out.sum(), (query, key, value))))


@each("dtype", auto=EVERY, reference=EVERY, streaming=EVERY, sdpa=DTYPES["sdpa"], cpu=DTYPES["cpu"])
@pytest.mark.parametrize("built", [True, False], ids=["our kernels", "no kernels of ours"])
def test_a_row_of_nan_is_nan(backend: str, dtype: torch.dtype, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "cpu":
        monkeypatch.setattr(native, "library", native.library._replace(exists=built))
    for m in (1, 7, 15, 16):
        options: list[dict[str, Any]] = [{}, {"key_mask": torch.arange(m)[None] < max(1, m - 2)}, {"is_causal": True}]
        for masks, bad in itertools.product(options if backend != "sdpa" or m == 16 else options[:2], range(2)):
            x = inputs_of(dtype, m)
            x[bad][:] = math.nan
            for tensors in (x, [one.clone().requires_grad_() for one in x]):
                assert va.score_attention(*tensors, **masks, backend=backend).isnan().all(), (m, masks, bad)
            if backend != "sdpa":
                assert va.score_attention(*x, **masks, return_lse=True, backend=backend)[1].isnan().all(), (m, masks, bad)
