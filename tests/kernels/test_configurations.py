"""Tile sizes that were measured take the place of those of the table."""

from typing import Any

import pytest
import torch

import vlattn_fast as va
from vlattn_fast.kernels import _configurations
from vlattn_fast.kernels._configurations import LINES, Line, _meets, configuration

FACTS: dict[str, Any] = {"rule": "attention", "dtype": torch.bfloat16, "N": 64, "M": 64, "size": 64, "masked": False}
TABLE = next(line.config for line in LINES["attention_map map"] if line.reason == "holds whole rows")
MEASURED = {"BLOCK_Q": 16}
NAME = "attention_map map attention torch.bfloat16 64 64 64 False"


def test_without_measured_ones_the_table_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # no GPU is in use
    monkeypatch.setattr(_configurations, "TARGET", None)  # nor is one emulated
    for measured in ({}, {"sm_90": {NAME: MEASURED}}):
        monkeypatch.setattr(_configurations, "MEASURED", measured)
        assert configuration("attention_map", "map", **FACTS) == TABLE


def test_measured_ones_hold_on_their_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_configurations, "MEASURED", {"sm_90": {NAME: MEASURED}})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for architecture, expected in (("sm_90", MEASURED), ("sm_80", TABLE)):
        monkeypatch.setattr(_configurations, "architecture", lambda device, name=architecture: name)
        for size in (33, 64):  # up to the next power of two
            assert configuration("attention_map", "map", **{**FACTS, "size": size}) == expected
        for changed in ({"N": 65}, {"rule": "gradient"}, {"dtype": torch.float16}):
            assert configuration("attention_map", "map", **{**FACTS, **changed}) == TABLE


def test_a_line_may_name_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the device, or where there is none that which kernels are compiled for."""
    facts = {"score": "dot", "dtype": torch.bfloat16, "N": 577, "M": 577, "size": 128, "masked": False}
    for architecture in (None, "sm_80", "sm_89", "sm_90", "sm_100"):
        monkeypatch.setattr(_configurations, "TARGET", architecture)
        config = configuration("score_attention", "forward", **facts)
        assert ("AHEAD" in config) == (architecture in ("sm_90", "sm_100"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_configurations, "architecture", lambda device: "sm_80")
    assert "AHEAD" not in configuration("score_attention", "forward", **facts)


def test_a_b300_takes_the_lines_of_a_b200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    assert _configurations.architecture.__wrapped__(0) == "sm_100"


def test_each_line_is_reached_and_one_holds_for_every_launch() -> None:
    """A kernel's last line has no conditions. Where a line's conditions hold, those of no line above it follow."""
    for name, lines in LINES.items():
        assert lines[-1].conditions == {}, name
        for n, line in enumerate(lines):
            assert line.reason, name
            for above in lines[:n]:
                assert not all(_follows(line, fact, condition) for fact, condition in above.conditions.items()), (name, n)


def _follows(line: Line, fact: str, condition: Any) -> bool:
    """Whether a condition on a fact holds wherever the line does."""
    own = line.conditions.get(fact)
    return own is not None and (own == condition or _meets(own, condition))


class Override(dict[str, Any]):
    """For every launch of one kind; it notes what is asked for."""

    def get(self, key: str, default: Any = None) -> Any:
        self[key] = default
        return {**default, "BLOCK_Q": 16, "BLOCK_KV": 16}


def test_a_launch_takes_what_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    override = Override(unused={})
    monkeypatch.setattr(_configurations, "OVERRIDES", override)
    query, key, value = (torch.randn(1, 2, 20, 8, dtype=torch.float32) for _ in range(3))
    torch.testing.assert_close(va.attention_map(query, key, backend="triton"), va.reference.attention_map(query, key))
    tanh = va.scores.General(torch.eye(8), activation="tanh")
    out = va.score_attention(query, key, value, score=tanh, backend="triton")
    torch.testing.assert_close(out, va.reference.score_attention(query, key, value, score=tanh))
    asked = [
        "attention_map map attention torch.float32 32 32 8 False",
        "attention_map rows attention torch.float32 32 32 8 False",  # as a tile of 16 holds no whole row
        "score_attention forward dot_tanh torch.float32 32 32 8 False",
    ]
    assert [*override] == ["unused", *asked]


class LargeForward(dict[str, Any]):
    """Forward passes with tiles of 128 rows, which row vectors of a backward pass are not padded to."""

    def get(self, key: str, default: Any = None) -> Any:
        return {**default, "BLOCK_Q": 128} if key.startswith("score_attention forward ") else default


def test_a_large_forward_tile_leaves_the_backward_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_configurations, "OVERRIDES", LargeForward(unused={}))
    inputs = [torch.randn(1, 1, n, 8, dtype=torch.float32).requires_grad_() for n in (150, 20, 20)]
    mask = torch.randn(150, 20, dtype=torch.float32)  # with a float mask the backward pass finds the rows' statistics anew
    found, formula = (
        torch.autograd.grad(va.score_attention(*inputs, attn_mask=mask, backend=backend).square().sum(), inputs)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, formula, rtol=1e-4, atol=1e-5)
