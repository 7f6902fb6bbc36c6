"""Method "rollout": carried <- (carried + carried mean_h A) / 2 (Abnar and Zuidema 2020). It takes no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlattn_fast.interpret.relevancy.method import BackwardPass, CarriedMethod, LinkedCall
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import Recursion
from vlattn_fast.interpret.relevancy.two_modalities import last_between, rows_between


class Rollout(CarriedMethod):
    """r <- (r + r mean_h A) / 2 (Abnar and Zuidema 2020). It takes no gradient.

    A + I is divided by its row sum, which is 2 wherever a row of A sums to one.
    """

    name = "rollout"
    needs_score = False
    takes_rows = True
    recursion = Recursion("attention", residual_weight=0.5, attention_weight=0.5)

    def between(self, backward: BackwardPass) -> list[Tensor]:
        """As the code of Chefer et al. 2021 has it: rollout(tower)^T A rollout(source), with A = mean_h A of the last attention
        from one to the other and the self-attention in front of it. Rows of padding are left out of the sum that the
        transposition makes.
        """
        calls = backward.reaching_calls()

        def read(tower: TowerTrace, source: TowerTrace, start: Tensor) -> Tensor:
            if tower is source:
                row, backward.brought[tower] = _rolled(calls, tower, start)
                return row
            last = last_between(calls, tower, source)
            column, eye = start, torch.eye(tower.size, dtype=start.dtype, device=start.device).expand(start.shape[0], -1, -1)
            for call in calls[:last]:
                if call.tower is tower and call.source is tower:
                    column = (column + column @ _mean_attention(eye, call).mT) * _over_row_sum(call, column)
            if (real := backward.real(tower)) is not None:
                column = column.masked_fill(~real[:, None].to(column.device), 0.0)
            return _rolled(calls[:last], source, _mean_attention(column, calls[last]))[0]

        return rows_between(backward, read)


def _rolled(calls: Sequence[LinkedCall], tower: TowerTrace, row: Tensor) -> tuple[Tensor, Tensor]:
    """row (B, 1, N) times the product of I + mean_h A, over its row sum, for the self-attention of a tower, the last to the left;
    and the same without what is left of the row itself."""
    brought = torch.zeros_like(row)
    for call in reversed(calls):
        if call.tower is tower and call.source is tower:
            weight = _over_row_sum(call, row)
            step = _mean_attention(row * weight, call)
            row, brought = row * weight + step, brought * weight + step
    return row, brought


def _over_row_sum(call: LinkedCall, like: Tensor) -> Tensor | float:
    weight = call.attention.over_row_sum()
    return weight[:, None].to(like) if isinstance(weight, Tensor) else float(weight)


def _mean_attention(carried: Tensor, call: LinkedCall) -> Tensor:
    """carried (B, T, N) @ mean_h A, (B, T, M)."""
    step = call.attention.step(carried.to(call.attention.query.device), None, Recursion("attention"))
    return step.to(carried)  # layers may have several devices
