"""One backward pass of a run: what it starts from, and what it must bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.records.tokens import decoder_inputs
from vlattn_fast.interpret.records.unsupported import UndefinedRelevancy
from vlattn_fast.interpret.relevancy.attention_call import Attended
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


@dataclass(frozen=True, eq=False)
class LinkedCall:
    """An attention call whose queries are tokens of `tower` and whose keys are tokens of `source`, often the same.

    Args:
        number: of the call in the run.
        seen: of cross-attention, the number of the last call of `source` that the keys came through; None without one.
    """

    path: str
    tower: TowerTrace
    source: TowerTrace
    attended: Attended
    number: int
    seen: int | None


@dataclass(frozen=True, eq=False)
class BackwardPass:
    """The towers, scores and calls of one backward pass.

    Args:
        towers: those whose own rows are read; `starts` (B, 1, N) has the weights of their rows.
        attended: those that they attend to.
        calls: attention calls in the order in which they ran, where towers may attend to one another; else none.
        scores: (B,); None for methods without a gradient.
        arguments: of the model.
        keep: keep the graph for a further pass.
        again: runs the model once more, with the method's hooks, and returns the score (B,) of the same question. It is for
            methods that take gradients at changed inputs.
    """

    towers: Sequence[TowerTrace]
    attended: Sequence[TowerTrace]
    calls: Sequence[LinkedCall]
    starts: Sequence[Tensor]
    scores: Tensor | None
    start_layer: int
    arguments: Mapping[str, Any]
    keep: bool
    again: Callable[[], Tensor | None]

    def gradients(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradient of the score at each tensor; None where it does not depend on it."""
        if self.scores is None:
            raise ValueError("scores must be given to a method that takes gradients; got None")
        used = [tensor for tensor in tensors if tensor.requires_grad]
        of_used = iter(torch.autograd.grad(self.scores.sum(), used, retain_graph=self.keep, allow_unused=True))
        return [next(of_used) if tensor.requires_grad else None for tensor in tensors]

    def reaching_calls(self) -> list[LinkedCall]:
        """The calls through which something counts for `towers`: calls of other towers cost time, and bring nothing."""
        reached = set(self.towers)
        while more := {call.source for call in self.calls if call.tower in reached} - reached:
            reached |= more
        return [call for call in self.calls if call.tower in reached]

    def real(self, tower: TowerTrace) -> Tensor | None:
        """bool (B, N), False = padding; None = no padding."""
        decodes = bool(self.attended) and tower.record is None and tower in self.towers
        return tower.tokens_in(decoder_inputs(self.arguments) if decodes else self.arguments).real()


def read_tokens(start: Tensor) -> Tensor:
    """bool (B, T, N), True = a token that is read by itself: weights that leave no token out name none."""
    return (start == 1) & (start == 0).any(-1, keepdim=True)


def check_rows(carried: list[Tensor], starts: list[Tensor]) -> None:
    """UndefinedRelevancy where no row (B, T, N) is more than the row that was read: the score does not depend on what is read.

    Args:
        starts: the weights (B, T, N) of the rows that are read; there are none for towers that are read through others.
    """
    if any(bool((row != 0).any()) for row in carried[len(starts) :]):
        return
    for row, start in zip(carried, starts, strict=False):
        alone = read_tokens(start)
        beside = row.masked_fill(alone, 0.0) if bool(alone.any()) else row - start
        if row.shape != start.shape or row.shape[-1] == 1 or bool((beside != 0).any()):
            return
    raise UndefinedRelevancy(
        "target must be a score that the row which is read has a part in; got a relevancy that is this row alone. Name the row "
        'by read=, e.g. read="last" or the position (or (B, N) weights) that the score is computed from'
    )
