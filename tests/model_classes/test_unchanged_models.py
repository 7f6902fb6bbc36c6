"""Functions that change nothing beside a model's own attention: `python -m tools.model_classes --unchanged`."""

import pytest

from tools.model_classes import unchanged
from tools.model_classes.compare import outcome_of


@pytest.mark.parametrize(
    ("mapping", "name"),
    [
        ("causal", "DeepseekV32ForCausalLM"),  # whose indexer chooses keys
        ("causal", "DeepseekV4ForCausalLM"),  # adds masks by hand
        ("image-text", "MiniMaxM3SparseForConditionalGeneration"),  # whose indexer chooses blocks of keys
        ("causal", "MixtralForCausalLM"),  # whose router may choose differently after a rounding
        ("sequence", "T5ForConditionalGeneration"),  # learns a bias of positions
        ("text", "ModernBertForSequenceClassification"),  # reads from padding, which sees no key in its window
    ],
)
def test_three_functions_change_nothing(mapping: str, name: str) -> None:
    row = outcome_of(mapping, name, unchanged.compared)
    ways = ["by name"] if name.startswith("DeepseekV4") else unchanged.WAYS
    assert row.outcome == "equal" and all(f"{way}: equal" in row.reason for way in ways), row


def test_a_model_without_names_is_refused() -> None:
    row = outcome_of("causal", "BloomForCausalLM", unchanged.compared)
    assert row.outcome == "equal" and "by name: refused" in row.reason and "edited: equal" in row.reason, row


def test_a_change_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unchanged, "NOTHING", 1 + 1e-6)
    row = outcome_of("causal", "LlamaForCausalLM", unchanged.compared)
    assert row.outcome == "wrong" and "by name: equal" in row.reason and "edited: wrong, float64 " in row.reason, row
