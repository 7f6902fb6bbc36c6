"""From how many tokens on cuDNN's forward pass is taken, by measured rows."""

from typing import Any

import pytest

from tools.gpu.lengths import EVERY, LENGTHS, NEVER, Length, chosen


def rows(*ratios: float, features: int = 128, is_causal: bool = True) -> list[dict[str, Any]]:
    """Rows of all lengths, in which cuDNN takes these shares of our time."""
    facts = {"features": features, "is_causal": is_causal}
    return [
        {**facts, "tokens": tokens, "us": {"ours": 100.0, "cuDNN": 100.0 * ratio}}
        for tokens, ratio in zip(LENGTHS, ratios, strict=False)
    ]


@pytest.mark.parametrize(
    "ratios, least",
    [
        ((0.5, 0.5, 0.5, 0.5, 0.5), 1024),
        ((1.1, 1.1, 0.9, 0.9, 0.6), 4096),
        ((0.9, 0.9, 1.0, 0.9, 0.9), 8192),  # slower in between: only from the next on
        ((1.0, 1.0, 1.0, 1.0, 0.98), NEVER),  # two percent are noise
    ],
)
def test_from_where_cudnn_is_faster_at_each_length(ratios: tuple[float, ...], least: int) -> None:
    assert chosen(rows(*ratios)) == {"score_attention cudnn True 128": {"FROM": least}}


def test_each_kind_of_call_has_its_own_and_unmeasured_lengths_say_nothing() -> None:
    fast, slow = rows(*5 * (0.5,), is_causal=False), rows(*5 * (2.0,), features=64)
    assert chosen([*fast, *slow, *rows(*4 * (0.5,))]) == {
        "score_attention cudnn False 128": {"FROM": 1024},
        "score_attention cudnn True 64": {"FROM": NEVER},
    }


def test_every_length_is_measured_once() -> None:
    assert len(EVERY) == len({one.item for one in EVERY}) == 4 * len(LENGTHS)
    assert Length(1024, 64, True).item == "1024 tokens of 64, causal"
