"""Groups, biases and gates that do not fit, refused by name at every call of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.ops.backends import on
from tests.helpers.ops.group_cases import GK, GQ, ON_GROUPS, B, H, M, N, groups, operator_calls, tensors
from vlattn_fast.ops import OPERATORS

LONG = torch.int64
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no bias": ({"group_bias": None}, ValueError, "group_bias must be given if one of query_groups"),
    "no groups of queries": ({"query_groups": None}, ValueError, "query_groups must be given if"),
    "no groups of keys": ({"key_groups": None}, ValueError, "key_groups must be given if"),
    "of integers": ({"group_bias": torch.ones(H, GQ, GK, dtype=LONG)}, TypeError, "group_bias must be floating point"),
    "other heads": ({"group_bias": torch.ones(H + 1, GQ, GK)}, ValueError, r"group_bias must have shape \(H, Gq, Gk\) or"),
    "other samples": ({"group_bias": torch.ones(B + 1, H, GQ, GK)}, ValueError, "group_bias must have shape"),
    "without heads": ({"group_bias": torch.ones(GQ, GK)}, ValueError, "group_bias must have shape"),
    "no pairs": ({"group_bias": torch.ones(H, 0, GK)}, ValueError, "Gq > 0 and Gk > 0; got a torch.float32 tensor"),
    "floating groups": ({"query_groups": torch.zeros(N)}, TypeError, r"query_groups must be int64 \(-1 = no group\)"),
    "too few": ({"query_groups": torch.zeros(N - 1, dtype=LONG)}, ValueError, r"query_groups must have shape \(N\) or \(B, N\)"),
    "keys of queries": ({"key_groups": torch.zeros(N, dtype=LONG)}, ValueError, r"key_groups must have shape \(M\) or \(B, M\)"),
    "too large": (
        {"query_groups": torch.full((N,), GQ)},
        ValueError,
        r"query_groups must hold values from -1 \(no group\) to below 3; got values from 3 to 3",
    ),
    "too small": ({"key_groups": torch.full((M,), -2)}, ValueError, "key_groups must hold values from -1"),
    "a list": ({"query_groups": [0] * N}, TypeError, "query_groups must be a torch.Tensor"),
    "gate of integers": ({"head_gate": torch.ones(H, dtype=LONG)}, TypeError, "head_gate must be floating point"),
    "gate of others": ({"head_gate": torch.ones(H + 1)}, ValueError, r"head_gate must have shape \(H\) or \(B, H\)"),
    "on another device": ({"group_bias": torch.ones(H, GQ, GK, device="meta")}, ValueError, "group_bias must be on the device"),
}


@pytest.mark.parametrize("backend", ["streaming", "reference", "auto"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(backend: str, case: str) -> None:
    wrong, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        va.score_attention(**{**tensors(), **groups(), **wrong}, backend=backend)


@pytest.mark.parametrize("operator", ON_GROUPS)
def test_every_operator_checks_its_groups(operator: str) -> None:
    calls = {"score_attention": (tensors(), groups()), **operator_calls("streaming")}
    x, options = calls[operator]
    for backend in ("streaming", "reference"):
        with pytest.raises(ValueError, match="query_groups must hold values from -1"):
            OPERATORS[operator].call(**x, **{**options, "query_groups": torch.full((N,), 7)}, backend=backend)
        with pytest.raises(ValueError, match="query_groups must be given"):
            OPERATORS[operator].call(**x, **{**options, "query_groups": None}, backend=backend)


@on("sdpa")
def test_sdpa_refuses_it(backend: str) -> None:
    with pytest.raises(ValueError, match="SDPA has no group_bias"):
        va.score_attention(**tensors(backend), **groups(), backend=backend)
