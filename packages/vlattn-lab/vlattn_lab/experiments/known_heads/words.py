"""When each word is spoken, from rows of attention or of maps and dynamic time warping, compared with the true times.

The steps are those of Whisper's own word times: rows of the tokens, each position standardised over the rows, a median over
seven positions, the mean over heads, and the monotone path along which these are largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va

STEP = 0.02  # seconds of a position
WIDTH = 7  # positions of a median
TOLERANCES = (0.02, 0.05, 0.1)  # seconds


def attention_rows(attention: Any, query: Tensor, key: Tensor) -> Tensor:
    """(H, T, M), the attention of T queries to M keys by `va.attention_statistics`: what keys receive from one query each.
    query (T, H * D), key (M, H * D), as a module of attention projects them."""
    heads = attention.num_heads
    queries = query.unflatten(-1, (heads, -1))[:, :, None]  # (T, H, 1, D)
    keys = key.unflatten(-1, (heads, -1)).transpose(0, 1)[None].expand(len(query), -1, -1, -1)
    found = va.attention_statistics(queries, keys, statistics=("received",), scale=attention.scaling)
    return found.received.transpose(0, 1)


def cleaned(rows: Tensor) -> Tensor:
    """Rows (..., T, M), standardised over T at each position, then the median of WIDTH positions."""
    deviation, mean = torch.std_mean(rows, dim=-2, keepdim=True, correction=0)
    scaled = torch.nn.functional.pad((rows - mean) / deviation.clamp(min=1e-9), [WIDTH // 2] * 2, mode="reflect")
    return scaled.unfold(-1, WIDTH, 1).median(-1).values


def warped(gain: Tensor) -> list[int]:
    """For each row of gain (T, M) its first position on the path from the first row and position to the last ones along which
    the sum is largest. A step goes to the next row, the next position, or both."""
    total = torch.full((gain.shape[0] + 1, gain.shape[1] + 1), -torch.inf, dtype=torch.float64).tolist()
    total[0][0] = 0.0
    moves = [[0] * gain.shape[1] for _ in gain]
    for i, row in enumerate(gain.tolist()):
        for j, value in enumerate(row):
            options = total[i][j], total[i][j + 1], total[i + 1][j]
            best = max(range(3), key=options.__getitem__)
            total[i + 1][j + 1], moves[i][j] = options[best] + value, best
    i, j = gain.shape[0] - 1, gain.shape[1] - 1
    first = [0] * gain.shape[0]
    while i >= 0 and j >= 0:
        first[i], move = j, moves[i][j]
        i, j = i - (move < 2), j - (move != 1)
    return first


def starts(rows: Tensor, words: Sequence[int | None]) -> dict[int, float]:
    """Word -> the second at which its first token begins. rows (H, T, M) of T tokens; words: the word of each token."""
    first = warped(cleaned(rows.double()).mean(0))
    found: dict[int, float] = {}
    for word, position in zip(words, first, strict=True):
        if word is not None:
            found.setdefault(word, position * STEP)
    return found


def within(found: dict[int, float], true: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    """The shares of words whose beginning is within each of TOLERANCES, and the median error in seconds. Words that are spoken
    as one with the word before have no beginning of their own."""
    own = [n for n, (_, begin, _) in enumerate(true) if n in found and (n == 0 or begin > true[n - 1][1])]
    errors = torch.tensor([abs(found[n] - true[n][1]) for n in own], dtype=torch.float64)
    shares = {f"{round(1000 * limit)} ms": round(float((errors <= limit + 1e-9).double().mean()), 4) for limit in TOLERANCES}
    return {**shares, "median": round(float(errors.median()), 4), "words": len(own)}
