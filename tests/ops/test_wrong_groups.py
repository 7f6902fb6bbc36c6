"""Groups, biases and gates that do not fit, refused by name at every call of attention."""

from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.ops.backends import on
from tests.helpers.ops.group_cases import GK, GQ, ON_GROUPS, H, M, N, groups, tensors
from tests.helpers.ops.properties import calls

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no bias": ({"group_bias": None}, ValueError, "group_bias must be given if one of query_groups"),
    "no pairs": ({"group_bias": torch.ones(H, 0, GK)}, ValueError, "Gq > 0 and Gk > 0; got a torch.float32 tensor"),
    "too large": (
        {"query_groups": torch.full((N,), GQ)},
        ValueError,
        r"query_groups must hold values from -1 \(no group\) to below 3; got values from 3 to 3",
    ),
    "too small": ({"key_groups": torch.full((M,), -2)}, ValueError, "key_groups must hold values from -1"),
}


@pytest.mark.parametrize("backend", ["streaming", "reference", "auto"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(backend: str, case: str) -> None:
    wrong, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        va.score_attention(**{**tensors(), **groups(), **wrong}, backend=backend)


@pytest.mark.parametrize("backend", ["streaming", "reference"])
@pytest.mark.parametrize("operator", ON_GROUPS)
def test_every_operator_checks_its_groups(operator: str, backend: str) -> None:
    call = next(call for call in calls(operator, "streaming") if "group_bias" in call.tensors)
    for wrong, words in ((torch.full((5,), 7), "query_groups must hold values from -1"), (None, "query_groups must be given")):
        with pytest.raises(ValueError, match=words):
            call.run(call.tensors, query_groups=wrong, backend=backend)


@on("sdpa")
def test_sdpa_refuses_it(backend: str) -> None:
    with pytest.raises(ValueError, match="SDPA has no group_bias"):
        va.score_attention(**tensors(backend), **groups(), backend=backend)
