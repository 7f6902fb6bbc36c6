"""An attention call that a trace sees, and one that is read after the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlattn_fast.interpret.relevancy.through_call import attention


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call of a model, while it runs.

    Args:
        path: of the module that calls.
        query, key, value: (B, H, N, D) as the operators take them; keys of grouped-query attention have fewer heads.
        masks: the options of the call, see `through_call`.
        mesh: the processes that share its heads; None = all heads are here.
        begins_layer: it is the first self-attention call of its layer.
        chunk: it takes a further part of the sequence through the module of the last call.
    """

    path: str
    query: Tensor
    key: Tensor
    value: Tensor
    masks: dict[str, Any]
    mesh: Any = None
    begins_layer: bool = False
    chunk: bool = False

    def output(self) -> Tensor:
        """(B, H, N, Dv), as the model asked for it."""
        return attention(self.query, self.key, self.value, self.masks)

    def attended(self, output: Tensor) -> Attended:
        return Attended(self.query, self.key, self.value, self.masks, output, self.mesh)


@dataclass(frozen=True, eq=False)
class Attended:
    """An attention call that is read later, and its output (B, H, N, Dv)."""

    query: Tensor
    key: Tensor
    value: Tensor
    masks: dict[str, Any]
    output: Tensor
    mesh: Any = None
