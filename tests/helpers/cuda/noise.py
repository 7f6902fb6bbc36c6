"""A plugin of pytest: each test runs once with each of two noises of the emulated special function unit."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, params=("1", "2"))
def _noise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLATTN_EMULATION_NOISE", request.param)  # which each launch reads
