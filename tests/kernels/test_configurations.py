"""Tile sizes that were measured take the place of those that the rules choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vlattn_fast.kernels import _device

import vlattn_fast as va

RULE, MEASURED = {"BLOCK_Q": 64}, {"BLOCK_Q": 16}


def test_without_measured_ones_the_rules_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ({}, {"sm_90": {"map 64": MEASURED}}):  # no GPU is in use
        monkeypatch.setattr(_device, "MEASURED", table)
        assert _device.configured(RULE, "map", 64) == RULE


def test_measured_ones_hold_on_their_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "MEASURED", {"sm_90": {"map torch.bfloat16 64 1 True": MEASURED}})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for architecture, expected in (("sm_90", MEASURED), ("sm_80", RULE)):
        monkeypatch.setattr(_device, "_architecture", lambda device, name=architecture: name)
        for size in (33, 64):  # up to the next power of two
            assert _device.configured(RULE, "map", torch.bfloat16, size, 1, True) == expected
        for facts in (("map", torch.bfloat16, 65, 1, True), ("map", torch.bfloat16, 64, 1, False), ("map",)):
            assert _device.configured(RULE, *facts) == RULE


class Override(dict[str, Any]):
    """For every launch of one kind; it notes what is asked for."""

    def get(self, key: str, default: Any = None) -> Any:
        self[key] = default
        return {**default, "BLOCK_Q": 16, "BLOCK_KV": 16}


def test_a_launch_takes_what_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    override = Override(unused={})
    monkeypatch.setattr(_device, "OVERRIDES", override)
    query, key, value = (torch.randn(1, 2, 20, 8, dtype=torch.float32) for _ in range(3))
    torch.testing.assert_close(va.attention_map(query, key, backend="triton"), va.reference.attention_map(query, key))
    tanh = va.scores.General(torch.eye(8), activation="tanh")
    out = va.score_attention(query, key, value, score=tanh, backend="triton")
    torch.testing.assert_close(out, va.reference.score_attention(query, key, value, score=tanh))
    asked = [
        "attention_map map attention torch.float32 32 32 8 False",
        "attention_map rows attention torch.float32 32 32 8 False",  # as a tile of 16 holds no whole row
        "score_attention forward dot_tanh torch.float32 32 32 16 False",
    ]
    assert [*override] == ["unused", *asked]
