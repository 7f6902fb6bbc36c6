"""The page of models says what the records say."""

from __future__ import annotations

import inspect
import typing

import pytest

from vlattn_fast.interpret.records.encoders import ENCODERS
from vlattn_fast.interpret.records.two_towers import LINKED
from vlattn_lab.pages.models_page import PAGE, page, row


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m vlattn_lab.pages.models_page writes it anew"


def test_a_class_without_logits_has_no_default_score():
    """What the forward pass of a class of transformers gives says so itself."""
    transformers = pytest.importorskip("transformers")
    seen = {True: 0, False: 0}
    for name, family in {**ENCODERS, **LINKED}.items():
        if family.score != "class" or (model := getattr(transformers, name, None)) is None:
            continue
        returned = inspect.signature(inspect.unwrap(model.forward)).return_annotation
        outputs = [kind for kind in typing.get_args(returned) or (returned,) if hasattr(kind, "__dataclass_fields__")]
        assert len(outputs) == 1, f"{name}: {returned}"
        has_logits = family.logits in outputs[0].__dataclass_fields__
        assert ("| largest logit |" in row(name, family)) == has_logits, name
        seen[has_logits] += 1
    assert all(seen.values())
