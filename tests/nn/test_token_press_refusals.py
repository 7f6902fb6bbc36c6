"""What a press of token_scores refuses, which needs no kvpress, and what its extra brings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import vlattn_fast as va

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("visionzip", 0.5), {}, "rule must be one of ('snapkv', 'h2o', 'tova'); got 'visionzip'"),
        (("fastv", 0.5), {}, "rule must be one of ('snapkv', 'h2o', 'tova'); got 'fastv'"),
        (("knorm", 0.5), {}, "rule must be one of ('snapkv', 'h2o', 'tova'); got 'knorm'"),
        (("snapkv", 1.0), {}, "compression_ratio must be"),
        (("snapkv", 0.5), {"kernel_size": 4}, "kernel_size must be odd"),
        (("snapkv", 0.5), {"queries": torch.ones(1, 5, dtype=torch.bool)}, "queries must be a name or a number"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        va.nn.token_press(*arguments, **options)


def test_its_extra_asks_for_the_transformers_of_explain() -> None:
    """So pip chooses a kvpress beside them: the newest ones want an older transformers."""
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    assert "vlattn_fast[explain]" in extras["press"] and any(one.startswith("transformers>=") for one in extras["explain"])
