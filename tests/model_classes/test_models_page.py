"""The page of models says what the adapters say."""

import inspect
import json
import typing

import pytest

from tools.model_classes.run import EDITS, HELD, TABLE, UNCHANGED
from tools.pages.models_page import KINDS, MAPPED, listed_models, measured_models, row
from vlattn_fast.interpret.adapters.encoders import ENCODERS
from vlattn_fast.interpret.adapters.two_towers import LINKED


def test_the_tables_show_every_class():
    """What was measured, by a line or among those that are equal, and each listed record."""
    measured, listed = measured_models(), listed_models()
    for number, file in enumerate((TABLE, EDITS, HELD, UNCHANGED)):
        part = measured.split("\n## ")[number]
        for mapping, rows in json.loads(file.read_text(encoding="utf-8")).items():
            if mapping in MAPPED:
                section = part.split(f"\n### {MAPPED[mapping]}\n")[1].split("\n### ")[0]
                assert f"{len(rows)} model types: " in section
                for name, outcome, _ in rows.values():
                    assert f"`{name}`" in section or (outcome == "equal" and file != TABLE), (file.name, name)
    for adapters in KINDS.values():
        for name, adapter in adapters.items():
            assert row(name, adapter) in listed


def test_a_class_without_logits_has_no_default_score():
    """What the forward pass of a class of transformers gives says so itself."""
    transformers = pytest.importorskip("transformers")
    seen = {True: 0, False: 0}
    for name, adapter in {**ENCODERS, **LINKED}.items():
        if adapter.score != "class" or (model := getattr(transformers, name, None)) is None:
            continue
        returned = inspect.signature(inspect.unwrap(model.forward)).return_annotation
        outputs = [kind for kind in typing.get_args(returned) or (returned,) if hasattr(kind, "__dataclass_fields__")]
        assert len(outputs) == 1, f"{name}: {returned}"
        has_logits = adapter.logits in outputs[0].__dataclass_fields__
        assert ("| largest logit |" in row(name, adapter)) == has_logits, name
        seen[has_logits] += 1
    assert all(seen.values())
