"""Answers of many tokens: rows of several backward passes, or several rows of one, beside a call for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.interpret.edited_maps import decoder
from vlattn_fast.interpret.explaining import request

LENGTHS = 35, 12  # a whole chunk of rows and a part of one; the second answer ends within the first chunk


@pytest.mark.parametrize("method", ["gradient", "rollout", "attention", "weighted"])
@pytest.mark.parametrize("family", ["Qwen2ForCausalLM", "Qwen2_5_VLForConditionalGeneration", "GPT2LMHeadModel"])
def test_each_token_is_as_a_call_for_it_alone(family: str, method: str) -> None:
    model, inputs = decoder(family)
    answer = [torch.arange(length).add(5 + 7 * row).remainder(40).add(4).tolist() for row, length in enumerate(LENGTHS)]
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    together = va.explain(model, inputs, answer=answer, method=method)
    assert len(runs) == 1 and together.relevancy["language"].shape[:2] == (2, 35)
    size = inputs["input_ids"].shape[1]
    for token in (0, 11, 31, 32, 34):
        ids = torch.tensor([row[: token + 1] + [0] * (token + 1 - len(row)) for row in answer])
        longer = dict(inputs, input_ids=torch.cat([inputs["input_ids"], ids[:, :-1]], 1))
        real = torch.arange(token) < torch.tensor(LENGTHS)[:, None]
        longer["attention_mask"] = torch.cat([inputs["attention_mask"], real.long()], 1)
        if "mm_token_type_ids" in inputs:
            longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids[:, :-1])], 1)
        alone = va.explain(model, longer, answer=ids[:, -1:].tolist(), method=method)
        for row in [row for row, length in enumerate(LENGTHS) if token < length]:
            expected, got = alone.relevancy["language"][row, 0], together.relevancy["language"][row, token]
            torch.testing.assert_close(got[: size + token + 1], expected, rtol=1e-9, atol=1e-12)
            assert not bool(got[size + token + 1 :].any())
    padding = together.relevancy["language"][1, LENGTHS[1] :]
    assert not bool(padding.any())


def test_a_method_without_a_score_carries_several_rows_in_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = decoder("LlavaForConditionalGeneration")
    passes: list[int] = []
    grad = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    answer = [list(range(5, 40)), list(range(7, 20))]
    several = va.explain(model, inputs, answer=answer, method="rollout").relevancy["language"]
    assert len(passes) == 2
    monkeypatch.setattr(request, "_MOST_VECTORS", 1)
    single = va.explain(model, inputs, answer=answer, method="rollout").relevancy["language"]
    assert len(passes) == 2 + 35
    torch.testing.assert_close(several, single, rtol=1e-12, atol=0)
