"""Recurrences that `explain` refuses: those that it does not see, and those that are not what their names say."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.interpret.relevancy.test_recurrences_of_models import IDS, INPUTS, made
from vlattn_fast.interpret import explain
from vlattn_fast.nn import capture_relevancy

PLACE = r"'model\.layers\.0\.linear_attn' \(Qwen3NextGatedDeltaNet\)"


def test_heads_of_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlattn_fast.interpret.relevancy.recurrent_calls.has_dtensors", lambda module: True)
    with pytest.raises(ValueError, match=rf"got {PLACE}, which has its heads in several processes. Run it in one"):
        explain(made("Qwen3Next"), INPUTS, target=7)


@pytest.mark.parametrize("method", ["glimpse", "gradcam"])
def test_methods_without_a_rule_refuse(method: str) -> None:
    with pytest.raises(ValueError, match=rf"method must support recurrences.*got '{method}' and 'model\.layers\."):
        explain(made("OlmoHybrid"), INPUTS, method=method)


def test_a_state_of_an_earlier_pass_is_refused() -> None:
    model = made("Qwen3Next")
    cache = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=rf"got {PLACE}, which continues from the state of an earlier pass"):
        with capture_relevancy(model, method="gradient"):
            model(input_ids=IDS[:, 5:], past_key_values=cache)


def test_a_recurrence_that_is_not_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("Qwen3Next")
    kind = type(model.model.layers[0].linear_attn)

    def forward(self: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        return hidden_states.cumsum(1)

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(
        ValueError, match=r"'model\.layers\.0\.linear_attn' \(Qwen3NextGatedDeltaNet\), whose recurrence cannot be traced"
    ):
        explain(model, INPUTS, target=7)


def test_a_recurrence_of_a_users_class_beside_attention_is_refused() -> None:
    model = made("FalconH1")

    class Mine(type(model.model.layers[0].mamba)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
            return hidden_states.cumsum(1)

    model.model.layers[0].mamba.__class__ = Mine
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mamba' \(Mine\), whose recurrence cannot be traced"):
        explain(model, INPUTS, target=7)


def test_a_convolution_in_front_of_a_recurrence_that_is_not_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own map alone would leave out the recurrence."""
    monkeypatch.setattr("vlattn_fast.interpret.relevancy.recurrent_calls.FUNCTIONS", {})
    with pytest.raises(
        ValueError, match=rf"got {PLACE}, whose short convolution comes before attention or an unsupported recurrence"
    ):
        explain(made("Qwen3Next"), INPUTS, target=7)


def test_a_convolution_that_is_not_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("Qwen3Next")
    monkeypatch.setattr("vlattn_fast.interpret.relevancy.recurrent_calls.CONVOLUTIONS", {})
    with pytest.raises(ValueError, match=r"short convolutions with causal_conv1d_fn; got 'model\.layers\.0\.linear_attn'"):
        explain(model, INPUTS, target=7)


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "causal_conv1d_fn"])
def test_a_function_of_a_known_name_computes_what_the_name_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of a user may have something else under the name."""
    model, file = made("Qwen3Next"), transformers.models.qwen3_next.modeling_qwen3_next
    want = explain(model, INPUTS, target=7).relevancy["language"]
    original = getattr(file, name)

    def same(*args: Any, **options: Any) -> Any:
        return original(*args, **options)

    same.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(file, name, same)
    torch.testing.assert_close(explain(model, INPUTS, target=7).relevancy["language"], want, rtol=0, atol=0)

    def halved(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        return result / 2 if isinstance(result, Tensor) else (result[0] / 2, *result[1:])

    def renamed(x: Tensor, *args: Any, **options: Any) -> Any:
        return original(x, *args, **options)

    halved.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    for other in (halved, renamed):
        monkeypatch.setattr(file, name, other)
        with pytest.raises(ValueError, match=rf"got {PLACE}, whose function has the name of one in transformers, but other"):
            explain(model, INPUTS, target=7)
