"""Method "rollout": carried <- (carried + carried mean_h A) / 2 (Abnar and Zuidema 2020), without a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_bool
from vlattn_fast.interpret.relevancy.method import BackwardPass, CarriedMethod, Link
from vlattn_fast.interpret.relevancy.sink_detection import KEEP
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import Recursion, as_factor
from vlattn_fast.interpret.relevancy.two_modalities import last_between, vectors_between


class Rollout(CarriedMethod):
    """Averages each layer's map with the identity: r <- (r + r mean_h A) / 2 (Abnar and Zuidema 2020). No gradient.

    It costs one forward pass, and one backward pass of r; up to 32 tokens of an answer share it. A + I is divided by its row sum,
    which is 2 if a row of A sums to one. Between towers R_ti is rollout(t)^T mean_h A_ti rollout(i), with the last attention from
    t to i (Chefer et al. 2021). In a causal decoder rollout(t)^T is partly of later tokens: `one_hot` puts e_t^T in its place.

    Examples:
        >>> import vlattn_fast as va
        >>> va.methods.Rollout(start_layer=2)  # pass it as va.explain(..., method=...)
        <method rollout(start_layer=2)>
    """

    name = "rollout"
    needs_score = False
    adds_parallel = True
    carries_several = True
    recursion = Recursion("attention", residual_weight=0.5, attention_weight=0.5)

    def __init__(self, *, one_hot: bool = False, start_layer: int = 0, sinks: str = KEEP) -> None:
        """
        Args:
            one_hot: between towers that attend to one another, only the explained token t counts: row t of the last attention to
                the source in place of the rows that column t of rollout(t) weighs. Also named "rollout:one_hot".
            start_layer, sinks: see `Gradient`.

        Raises:
            TypeError, ValueError: an option has a wrong type or value.
        """
        super().__init__(start_layer=start_layer, sinks=sinks)
        check_bool(one_hot=one_hot)
        self.one_hot = one_hot

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        if self.one_hot:
            raise ValueError(
                "method must be 'rollout' for towers that do not attend to one another; "
                f"got {self.label!r}, which is another rule for those that do"
            )
        return super().carry(backward)

    def between(self, backward: BackwardPass) -> list[Tensor]:
        """rollout(tower)^T A rollout(source), as in the code of Chefer et al. 2021, with A = mean_h A of the last attention from
        one to the other and the self-attention before it. The sum that the transposition makes leaves out rows of padding. Towers
        whose tokens share one softmax are one sequence, and roll out as one.
        """
        calls = backward.reaching_calls()
        if any(call.joint for call in calls):
            return _rolled_as_one(backward, calls)

        def vector(tower: TowerTrace, source: TowerTrace, start: Tensor) -> Tensor:
            if tower is source:
                row, backward.contribution[tower] = _rolled(calls, tower, start)
                return row
            last = last_between(calls, tower, source)
            queries = self.attending(backward, tower, start, calls[:last])
            return _rolled(calls[:last], source, _mean_attention(queries, calls[last]))[0]

        return vectors_between(backward, vector)

    def attending(self, backward: BackwardPass, tower: TowerTrace, start: Tensor, calls: Sequence[Link]) -> Tensor:
        """The weights (B, 1, N) with which the attention after `calls` sums its rows: column t of rollout(tower), for the one-hot
        vector `start` of t."""
        if self.one_hot:
            return start
        column, eye = start, torch.eye(tower.size, dtype=start.dtype, device=start.device).expand(start.shape[0], -1, -1)
        for call in calls:
            if call.tower is tower and call.source is tower:
                column = (column + column @ _mean_attention(eye, call).mT) * _over_row_sum(call, column)
        if (real := backward.real(tower)) is not None:
            column = column.masked_fill(~real[:, None].to(column.device), 0.0)
        if bool((_later(start) & (column != 0) & (_rolled(calls, tower, start)[0] == 0)).any()):
            backward.remarks.append(
                f"A part of the map belongs to later tokens: the tokens of '{tower.name}' do not attend to later ones, and "
                "column t of its rollout, which method 'rollout' takes as published, is what later tokens take from t. Pass "
                "method='rollout:one_hot' for only the attention of t"
            )
        return column


class OneHot(Rollout):
    """Takes e_t^T mean_h A_ti rollout(i) as a source's map in "rollout", for towers that attend to one another.

    That is row t of the last attention to the source, so that only the explained token t counts. The published rule takes column
    t of rollout(t), which in a causal decoder is of later tokens, on which the score cannot depend. If the tokens of the towers
    share one softmax, they are one sequence, and "rollout" takes row t itself: both are the same.
    """

    name = "rollout:one_hot"

    def __init__(self, *, start_layer: int = 0, sinks: str = KEEP) -> None:
        super().__init__(one_hot=True, start_layer=start_layer, sinks=sinks)


def _later(start: Tensor) -> Tensor:
    """bool (B, T, N), True = a token after the last one that has a weight in `start`."""
    weighted = (start != 0).int()
    return weighted.flip(-1).cumsum(-1).flip(-1) == 0


def _rolled(calls: Sequence[Link], tower: TowerTrace, row: Tensor) -> tuple[Tensor, Tensor]:
    """row (B, 1, N) times the product of I + mean_h A, over its row sum, for the self-attention of a tower, the last to the left;
    and the same without the part that remains of `row` itself."""
    contribution = torch.zeros_like(row)
    for call in reversed(calls):
        if call.tower is tower and call.source is tower:
            weight = _over_row_sum(call, row)
            step = _mean_attention(row * weight, call)
            row, contribution = row * weight + step, contribution * weight + step
    return row, contribution


def _rolled_as_one(backward: BackwardPass, calls: Sequence[Link]) -> list[Tensor]:
    """The relevancy vectors of towers whose tokens are one sequence. Keys may come from an earlier call of their tower: relevancy
    that goes to them waits for that call."""
    if separate := next((call for call in calls if call.source is not call.tower and not call.joint), None):
        raise ValueError(
            "model must attend to other towers either in one softmax with its own tokens, or in separate calls, for method "
            f"'rollout'; got both, such as in '{separate.attention.path}'"
        )

    def vector(tower: TowerTrace, source: TowerTrace, start: Tensor) -> Tensor:
        rows, contribution = {tower: start}, {tower: torch.zeros_like(start)}
        waiting: dict[tuple[TowerTrace, int | None], Tensor] = {}
        for number in sorted({call.number for call in calls}, reverse=True):
            same_number = [call for call in calls if call.number == number]
            queries = same_number[0].tower
            before = waiting.pop((queries, number), None)
            row = _sum(rows.get(queries), before)
            if row is None:
                continue
            weight = _over_row_sum(same_number[0], row)
            rows[queries], contribution[queries] = row * weight, _sum(contribution.get(queries), before) * weight
            for call in same_number:
                step = _mean_attention(row * weight, call)
                if call.source is queries:
                    rows[queries], contribution[queries] = rows[queries] + step, contribution[queries] + step
                else:
                    waiting[call.source, call.source_call] = _sum(waiting.get((call.source, call.source_call)), step)
        if source is tower:
            backward.contribution[tower] = contribution[tower]
        row = _sum(rows.get(source), waiting.get((source, None)))
        return start.new_zeros(*start.shape[:2], source.size) if row is None else row

    return vectors_between(backward, vector)


def _sum(row: Tensor | None, addition: Tensor | None) -> Any:
    return addition if row is None else row if addition is None else row + addition


def _over_row_sum(call: Link, like: Tensor) -> Tensor | float:
    weight: Tensor | float = as_factor(call.attention.over_row_sum(), like)
    return weight


def _mean_attention(carried: Tensor, call: Link) -> Tensor:
    """carried (B, T, N) @ mean_h A, (B, T, M)."""
    step = call.attention.step(carried.to(call.attention.query.device), None, Recursion("attention"))
    return step.to(carried)  # layers may have several devices
