"""NaN and overflow reach every result of the Triton kernels that they reach in the formula."""

from __future__ import annotations

import pytest

from tests.ops.nan_cases import assert_not_hidden, cases

OPERATORS = ("attention_map", "attention_statistics", "relevancy_step", "relevancy_attention", "score_attention")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("name", cases(OPERATORS))
def test_nan_and_overflow_stay(name: str) -> None:
    assert_not_hidden(cases(OPERATORS)[name], "triton")
