"""Masks of every kind and shape, alone and joined: every operator that has them gives the formula, forward and backward."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.ops.backends import finest
from tests.helpers.ops.choices import WITHOUT_MASKS
from tests.helpers.ops.masks import MASKS
from tests.helpers.ops.properties import Turn, calls, check, every, every_choice, outputs_of


@every_choice(list(MASKS), without=WITHOUT_MASKS)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, in the interpreter: finfo.min log2(e)
@pytest.mark.usefixtures("small_tiles")
def test_masks(backend: str, operator: str, turn: Turn) -> None:
    for call, name in turn.meet(calls(operator, backend)):
        (b, h, n, _), m = call.tensors["query"].shape, call.tensors["key"].shape[2]
        if "H" in name and (operator == "indexer_divergence" or "other heads" in call.title):
            continue  # a mean over heads has one mask for all
        call = replace(call, name=f"{call.name}, {name}", options={**call.options, **MASKS[name](B=b, H=h, N=n, M=m)})
        assert not any(x.isnan().any() for x in check(call, backend).values()), call.title


@every("streaming", "cpu", without=WITHOUT_MASKS)
def test_a_key_that_a_float_mask_hides_may_be_infinite(backend: str, operator: str) -> None:
    """Its score plus -inf is NaN; the pair is masked."""
    call, found = calls(operator, backend)[0], []
    hidden = torch.randn(call.tensors["query"].shape[2], call.tensors["key"].shape[2])
    hidden[:, 3] = -torch.inf
    for number in (0.0, torch.inf):
        tensors = {name: x.clone() for name, x in call.in_dtype(finest(backend)).items()}
        tensors["key"][..., 3, :] = number
        found.append(outputs_of(call.run(tensors, attn_mask=hidden, backend=backend)))
    for x, y in zip(*found, strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5), call.title
