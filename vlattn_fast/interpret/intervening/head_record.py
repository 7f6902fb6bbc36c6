"""The outputs of attention heads that were recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadRecord:
    """The result of `va.record_heads`: outputs of heads in front of the output projection.

    Args:
        tower: the tower of the queries, and that of the keys, by their names.
        means: layer -> (H, Dv), over all real tokens of all samples.
        outputs: layer -> (B, H, N, Dv) of one run; None of a data set.
        count: how many tokens the means are of.
        model: the class of the model. Edits of a model of another class refuse the record.
    """

    tower: tuple[str, str]
    means: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor] | None
    count: int
    model: str = ""
