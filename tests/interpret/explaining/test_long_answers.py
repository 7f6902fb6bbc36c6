"""Answers of many tokens: rows of several backward passes, or several rows of one. properties/ has short ones token by token."""

from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.interpret.edited_maps import decoder
from vlattn_fast.interpret.explaining import request


@pytest.mark.parametrize("method", ["gradient", "rollout", "attention", "weighted"])
@pytest.mark.parametrize("family", ["LlavaForConditionalGeneration", "GPT2LMHeadModel"])
def test_several_rows_at_once_are_those_of_one_at_a_time(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole chunk of rows and a part of one; the second answer ends within the first chunk."""
    model, inputs = decoder(family)
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    grad = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    answer, rows, counts = [list(range(5, 40)), list(range(7, 20))], [], []
    for most in (request._MOST_VECTORS, 1):
        passes: list[int] = []
        monkeypatch.setattr(request, "_MOST_VECTORS", most)
        rows.append(va.explain(model, inputs, answer=answer, method=method).relevancy["language"])
        counts.append(len(passes))
    assert len(runs) == 2 and rows[0].shape[:2] == (2, 35) and not rows[0][1, 13:].any()
    assert counts == {"rollout": [2, 35], "attention": [0, 0]}.get(method, [35, 35])
    torch.testing.assert_close(*rows, rtol=1e-9, atol=1e-12)
