"""Which row of the relevancy matrix is read in each tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.records.readouts import READOUTS
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace

Read = str | int | Tensor | Sequence[float]
_NAMED = {"cls": READOUTS["cls"], "last": READOUTS["target"], "mean": READOUTS["mean"]}


def check_read(read: Any) -> None:
    """TypeError or ValueError unless `read` is None, or one way to read a row, or a dict of them."""
    if isinstance(read, Mapping) and not read:
        raise ValueError("read must name at least one tower; got an empty mapping")
    for value in read.values() if isinstance(read, Mapping) else [] if read is None else [read]:
        if isinstance(value, str) and value not in _NAMED:
            raise ValueError(f"read must be one of {', '.join(_NAMED)}, an index or weights; got {value!r}")
        if isinstance(value, bool) or not (isinstance(value, (str, int, Sequence)) or hasattr(value, "tolist")):
            raise TypeError(f"read must be a name, an index or weights; got {type(value).__name__}")


def start_rows(tower: TowerTrace, read: Read | None, inputs: Mapping[str, Any], like: Tensor) -> Tensor:
    """The weights (B, 1, N) with which the recursion starts at the end of the tower.

    Args:
        read: what the caller asks for; None = what the record says.
        like: (B, 1, N), the carrier that leaves the tower (behind a pooling head N is its number of probes).
    """
    batch, _, count = like.shape
    if read is not None and tower.pooled:
        raise ValueError(f"read must not name a row of tower '{tower.name}', which its pooling head reads; got {read!r}")
    if read is not None and not isinstance(read, (str, int)):
        weights = torch.as_tensor(read, dtype=like.dtype, device=like.device)
        if tuple(weights.shape) not in ((count,), (batch, count), (1, count)):
            raise ValueError(f"read must be weights of shape (N,) = ({count},) or (B, N); got {tuple(weights.shape)}")
        if not bool(weights.isfinite().all()):
            raise ValueError(f"read must be finite weights; got {weights[~weights.isfinite()][0].item()}")
        return torch.zeros_like(like) + weights.reshape(-1, 1, count)
    if isinstance(read, int):
        if not -count <= read < count:
            raise ValueError(f"read must be from {-count} to {count - 1} in tower '{tower.name}'; got {read}")
        rows = torch.zeros_like(like)
        rows[:, :, read] = 1.0
        return rows
    if read is None and tower.record is None:
        raise ValueError(f"read must say which row of tower '{tower.name}' is read; got None")
    readout = tower.record.row if read is None and tower.record is not None else _NAMED[str(read)]
    return readout.weights(tower.tokens_in(inputs), like)
