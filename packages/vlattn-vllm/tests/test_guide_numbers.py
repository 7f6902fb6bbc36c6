"""The numbers of the guide are stored rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parents[1]
DOCS = PACKAGE.parents[1] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the package is tested without the repository")


def rows(name: str) -> list[dict[str, Any]]:
    stored: list[dict[str, Any]] = json.loads((PACKAGE / "results" / f"{name}.json").read_text())
    return stored


def test_shares_of_the_speed() -> None:
    text = (DOCS / "guides" / "serve.md").read_text()
    shares = {row["serve"]: row["share"] for row in rows("serve-cpu") if row["requests"] == 1}  # the last of a kind
    asked = {name.removeprefix("all ask: ").replace("nobody asks", "nothing"): share for name, share in shares.items()}
    del asked["without the plug-in"]
    assert len(asked) == 5
    for name, share in asked.items():
        assert f"| {name} | {share:.1%} |".replace("%", " %") in text, (name, share)


def test_bytes_of_answers() -> None:
    guide = (DOCS / "guides" / "serve.md").read_text().replace("\n", " ")
    lists, compact = (next(row for row in rows("answer-bytes") if row["compact"] is kind) for kind in (False, True))
    assert f"has {thousands(lists['bytes'])} kB of numbers as lists and {thousands(compact['bytes'])} kB as compact" in guide
    both = thousands(lists["bytes_in_a_stream"]), thousands(compact["bytes_in_a_stream"])
    assert "as a stream, {} kB and {} kB".format(*both) in guide


def thousands(size: Any) -> int:
    return round(size / 1000)
