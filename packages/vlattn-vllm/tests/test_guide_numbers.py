"""The numbers of the guide are stored rows, or what is computed here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlattn_vllm.attention import Attention

PACKAGE = Path(__file__).resolve().parents[1]
DOCS = PACKAGE.parents[1] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the package is tested without the repository")


def test_shares_of_the_speed() -> None:
    text = (DOCS / "guides" / "serve.md").read_text()
    rows: list[dict[str, Any]] = json.loads((PACKAGE / "results" / "serve-cpu.json").read_text())
    shares = {row["serve"]: row["share"] for row in rows if row["requests"] == 1}  # the last of a kind
    asked = {name.removeprefix("all ask: ").replace("nobody asks", "nothing"): share for name, share in shares.items()}
    del asked["without the plug-in"]
    assert len(asked) == 5
    for name, share in asked.items():
        assert f"| {name} | {share:.1%} |".replace("%", " %") in text, (name, share)


def test_bytes_of_answers() -> None:
    """At once, and as a stream whose client is in time."""
    guide = (DOCS / "guides" / "serve.md").read_text().replace("\n", " ")
    mass = torch.randn(300, 3, 4, 3).softmax(-1)
    whole = Attention((0, 1, 2), ("image", "question", "answer"), mass)
    stream = [replace(whole, mass=row[None]) for row in mass]
    sizes = [[len(json.dumps(part.to_dict(compact), separators=(",", ":"))) for part in parts]
             for parts in ([whole], stream) for compact in (False, True)]  # fmt: skip
    lists, compact, *both = (round(sum(some) / 1000) for some in sizes)
    assert f"has {lists} kB of numbers as lists and {compact} kB as compact" in guide, sizes
    assert "as a stream, {} kB and {} kB".format(*both) in guide, both
