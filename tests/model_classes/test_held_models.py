"""`freeze` beside norms that are written out with detached denominators: `python -m tools.model_classes --held`."""

import json
from typing import Any

import pytest

from tools.model_classes import held
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
