"""The page of models says what the records say, and each record has a test."""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlattn_fast.interpret.records.encoders import ENCODERS
from vlattn_fast.interpret.records.two_towers import LINKED
from vlattn_lab.pages.models_page import KINDS, PAGE, ROOT, page, row


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m vlattn_lab.pages.models_page writes it anew"


def made_in(file: Path) -> Iterator[str]:
    """What the code of a test may make: names and strings that are no docstrings; `both("CLIPSeg")` makes CLIPSegModel."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (node.value, f"{node.value}Model")
        elif isinstance(node, ast.alias):
            yield node.name


def test_every_record_is_tested():
    folders = (ROOT / "tests" / "interpret", ROOT / "tests" / "helpers" / "interpret")
    made = {name for folder in folders for file in folder.rglob("*.py") for name in made_in(file)}
    assert {name for families in KINDS.values() for name in families} <= made


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
