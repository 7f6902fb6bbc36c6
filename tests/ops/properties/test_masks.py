"""Masks of every kind and shape, alone and joined: every operator that has them gives the formula, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.ops.choices import WITHOUT_MASKS
from tests.helpers.ops.masks import MASKS
from tests.helpers.ops.properties import Turn, calls, check, every_choice


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
