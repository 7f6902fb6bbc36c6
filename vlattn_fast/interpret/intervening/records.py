"""Recorded outputs of attention heads, and recorded states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadRecord:
    """The result of `va.record_heads`: outputs of heads before the output projection.

    Args:
        tower: the tower of the queries, and that of the keys, by their names.
        means: layer -> (H, Dv), over all real tokens of all samples.
        outputs: layer -> (B, H, N, Dv) of one run; None for a data set of several items.
        count: the number of tokens in the means.
        model: the class of the model. Edits of a model of another class raise a ValueError.
    """

    tower: tuple[str, str]
    means: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor] | None
    count: int
    model: str = ""


@dataclass(frozen=True, eq=False)
class StateRecord:
    """The result of `va.record_states`: the residual stream after layers, or the outputs of their MLPs.

    Args:
        of: "residual" or "mlp".
        tower: the name of the tower.
        means: layer -> (C), over all real tokens of all samples.
        states: layer -> (B, N, C) of one run; None for a data set of several items.
        count: the number of tokens in the means.
        model: the class of the model. Edits of a model of another class raise a ValueError.
    """

    of: str
    tower: str
    means: Mapping[int, Tensor]
    states: Mapping[int, Tensor] | None
    count: int
    model: str = ""
