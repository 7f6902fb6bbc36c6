"""First-order effects come from the run that sees the calls, and equal those of a second run with biases."""

from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.decoder_cases import DECODERS, text
from tests.helpers.interpret.edited_maps import made
from vlattn_fast.interpret.intervening.first_order import KeepsCalls
from vlattn_fast.interpret.relevancy.traced_call import TracedCall

GROUPS = {"first": (0, 4), "some": (4, 8), "last": "last"}


def case_of(family: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    if family == "clip":
        return *made("clip"), {"tower": "vision"}
    case = text("GptOss", sliding_window=4, num_local_experts=4) if family == "GptOssForCausalLM" else DECODERS[family]()
    if family == "GptOssForCausalLM":
        case.model.set_experts_implementation("eager")  # torch's grouped products take no float64
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in case.inputs("left").items()}
    return lively(case.model).double().eval(), inputs, {"target": 7}


def runs_of(model: Any) -> list[int]:
    """Grows by each forward pass."""
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("family", ["clip", "LlavaForConditionalGeneration", "Gemma2ForCausalLM", "GptOssForCausalLM"])
def test_one_forward_pass_gives_what_a_run_with_biases_gives(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, question = case_of(family)
    groups = {"patches": "image", "cls": "special"} if family == "clip" else GROUPS
    runs = runs_of(model)
    table = va.attribute_edges(model, inputs, groups, **question)
    assert len(runs) == 1

    def computed(self: KeepsCalls, call: TracedCall) -> torch.Tensor:
        self.takes_all = False
        return call.computed()

    monkeypatch.setattr(KeepsCalls, "output", computed)
    again = va.attribute_edges(model, inputs, groups, **question)
    assert len(runs) == 3
    torch.testing.assert_close(table.effects, again.effects, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(table.scores, again.scores, rtol=0, atol=1e-12)
    assert float(table.effects.abs().max()) > 1e-6 and [e.layer for e in table] == [e.layer for e in again]
