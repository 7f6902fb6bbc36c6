"""The page of models says what the records say, and each record has a test."""

from __future__ import annotations

from tests.interpret.models_page import KINDS, PAGE, named, page, sources


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.interpret.models_page writes it anew"


def test_every_record_is_tested():
    text = sources()
    missing = [name for families in KINDS.values() for name in families if not named(name, text)]
    assert not missing
