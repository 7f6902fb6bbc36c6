"""Which row of the relevancy matrix is read in each tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.explaining.token_parts import end_of_text, prefix_tokens
from vlattn_fast.interpret.records.tokens import before_sep, last_real
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace

Read = str | int | Tensor | Sequence[float]
_NAMED = ("cls", "last", "mean")


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
    rows = torch.zeros_like(like)
    batch, _, count = like.shape
    if read is not None and tower.pooled:
        raise ValueError(f"read must not name a row of tower '{tower.name}', which its pooling head reads; got {read!r}")
    if read is not None and not isinstance(read, (str, int)):
        weights = torch.as_tensor(read, dtype=rows.dtype, device=rows.device)
        if tuple(weights.shape) not in ((count,), (batch, count), (1, count)):
            raise ValueError(f"read must be weights of shape (N,) = ({count},) or (B, N); got {tuple(weights.shape)}")
        if not bool(weights.isfinite().all()):
            raise ValueError(f"read must be finite weights; got {weights[~weights.isfinite()][0].item()}")
        return rows + weights.reshape(-1, 1, count)
    if isinstance(read, int):
        if not -count <= read < count:
            raise ValueError(f"read must be from {-count} to {count - 1} in tower '{tower.name}'; got {read}")
        position = torch.full((batch,), read % count)
    else:
        readout = read
        if readout is None:
            if tower.record is None:
                raise ValueError(f"read must say which row of tower '{tower.name}' is read; got None")
            readout = tower.record.readout
        if readout == "query":
            raise ValueError("read must say which object query a callable target scores; got None")
        if readout == "pool":
            return rows.fill_(1.0)
        if readout in ("mean", "patch_mean"):
            skipped = prefix_tokens(tower.record, tower.config) if tower.record is not None and readout == "patch_mean" else 0
            rows[:, :, skipped:] = 1.0 / (count - skipped)
            return rows
        if readout == "cls":
            position = torch.zeros(batch, dtype=torch.long)
        elif readout == "eot":
            position = end_of_text(tower, inputs)
        elif readout == "before_sep":
            position = before_sep(inputs)
        elif readout == "last" and read is None:
            position = torch.full((batch,), count - 1)
        else:
            position = last_real(tower.tokens, inputs, tower.shape)
    return rows.scatter_(2, position.to(rows.device)[:, None, None], 1.0)
