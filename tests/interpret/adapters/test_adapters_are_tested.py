"""Each record has a test."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from vlattn_fast.interpret.adapters.decoders import DECODERS
from vlattn_fast.interpret.adapters.encoders import ENCODERS
from vlattn_fast.interpret.adapters.two_towers import LINKED


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
    tests = Path(__file__).parents[2]
    folders = (tests / "interpret", tests / "helpers" / "interpret")
    made = {name for folder in folders for file in folder.rglob("*.py") for name in made_in(file)}
    assert {*ENCODERS, *DECODERS, *LINKED} <= made
