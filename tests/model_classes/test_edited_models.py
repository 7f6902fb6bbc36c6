"""Edits beside eager attention with edited maps, as `python -m tools.model_classes --edits` compares them for any class."""

import json
from pathlib import Path

import pytest

from tools.model_classes import edited
from tools.model_classes.compare import outcome_of
from tools.model_classes.run import EDITS, UNCHANGED, classes


@pytest.mark.parametrize(
    ("mapping", "name"),
    [
        ("causal", "LlamaForCausalLM"),
        ("causal", "GptOssForCausalLM"),
        ("causal", "BloomForCausalLM"),
        ("causal", "GPTJForCausalLM"),
        ("causal", "Gemma3ForConditionalGeneration"),
        ("image-text", "Qwen2VLForConditionalGeneration"),
        ("image-text", "PaliGemmaForConditionalGeneration"),
        ("image-text", "Blip2ForConditionalGeneration"),
        ("causal", "HrmTextForCausalLM"),  # runs its layers several times
        ("causal", "GraniteSWAForCausalLM"),  # has sinks behind its softmax
        ("causal", "FalconH1ForCausalLM"),  # has recurrences beside its attention
        ("text", "DebertaV2ForSequenceClassification"),
        ("text", "AlbertForSequenceClassification"),
        ("text", "MPNetForSequenceClassification"),
        ("zero-shot", "CLIPModel"),
        ("sequence", "T5ForConditionalGeneration"),
    ],
)
def test_a_knockout_and_a_steer_equal_edited_maps(mapping: str, name: str) -> None:
    assert outcome_of(mapping, name, edited.compared).outcome == "equal"


def test_another_edit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = edited.weights_of

    def slightly_wrong(*asked: object) -> list[object]:
        return [weight * (1 + 1e-6 * (weight == 0) + 1e-6 * (weight == 1)) for weight in right(*asked)]  # type: ignore[arg-type]

    monkeypatch.setattr(edited, "weights_of", slightly_wrong)
    row = outcome_of("causal", "LlamaForCausalLM", edited.compared)
    assert row.outcome == "wrong" and row.reason.startswith("logits differ by")


def test_attention_that_is_not_seen_is_refused() -> None:
    row = outcome_of("text", "YosoForSequenceClassification", edited.compared)
    assert row.outcome == "refused" and "model must call attention through" in row.reason


@pytest.mark.parametrize("stored", [EDITS, UNCHANGED], ids=lambda path: path.stem)
def test_the_stored_outcomes_are_of_classes_and_none_is_wrong(stored: Path) -> None:
    table = json.loads(stored.read_text(encoding="utf-8"))
    table.pop("transformers")
    assert sum(len(rows) for rows in table.values()) >= 20
    for mapping, rows in table.items():
        named = classes(mapping)
        for kind, (name, outcome, _) in rows.items():
            assert named[kind] == name and outcome in ("equal", "refused", "cannot be built", "cannot be compared")
