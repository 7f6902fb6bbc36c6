"""`freeze`, and functions of ours that change nothing, by class: `python -m tools.model_classes`."""

import json
from typing import Any

import pytest

from tools.model_classes import held, unchanged
from tools.model_classes.compare import BOUND, outcome_of
from tools.model_classes.run import HELD, classes
from vlattn_fast.attach import frozen


@pytest.mark.parametrize(
    ("mapping", "name", "kept"),
    [
        ("causal", "LlamaForCausalLM", ""),
        ("causal", "BambaForCausalLM", ""),  # has recurrences, and a norm behind a gate
        ("causal", "DbrxForCausalLM", "DbrxFFN"),  # whose router divides by a norm of its weights
        ("zero-shot", "CLIPModel", "CLIPModel"),  # divides by the norms of both embeddings
        ("sequence", "T5ForConditionalGeneration", ""),
        ("image", "ViTForImageClassification", ""),
    ],
)
def test_norms_and_attention_are_those_of_a_plain_implementation(mapping: str, name: str, kept: str) -> None:
    row = outcome_of(mapping, name, held.compared)
    said, _, named = row.reason.partition(held.KEPT)
    assert row.outcome == "equal" and said.startswith("gradient ") and "refused" not in said, row
    assert named == kept


def test_another_denominator_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = frozen._Norm.over_root
    monkeypatch.setattr(frozen._Norm, "over_root", lambda norm, x: right(norm, x) * (1 + 1e-6))
    row = outcome_of("image", "ViTForImageClassification", held.compared)
    assert row.outcome == "wrong" and row.reason.startswith("gradients differ by"), row


def test_attention_that_keeps_its_derivative_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen.Frozen, "constant", lambda one, tensor: tensor)
    row = outcome_of("image", "ViTForImageClassification", held.compared)
    assert row.outcome == "wrong" and row.reason.startswith("norms and attention held fixed: rows differ by"), row


def test_the_stored_outcomes_are_of_classes_and_none_is_wrong() -> None:
    table: dict[str, Any] = json.loads(HELD.read_text(encoding="utf-8"))
    table.pop("transformers")
    assert sum(outcome == "equal" for rows in table.values() for _, outcome, _ in rows.values()) >= 350
    for mapping, rows in table.items():
        named = classes(mapping)
        for kind, (name, outcome, reason) in rows.items():
            assert named[kind] == name and outcome in ("equal", "refused", "cannot be built", "cannot be compared")
            assert outcome != "equal" or float(reason.removeprefix("gradient ").partition(",")[0]) <= BOUND


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
