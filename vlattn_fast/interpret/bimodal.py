"""Relevancy between towers that attend to one another: the rules for two modalities of Chefer, Gur, Wolf (ICCV 2021).

R_st (B, N_s, N_t) holds how much the tokens of tower t count for those of tower s. It begins as the identity where s = t, and as
zero elsewhere. The attention calls are gone through in the order in which they ran; Abar (N x M) is a call's head mean
relu(A * dA), streamed without a head axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlattn_fast.interpret.methods import Attended
from vlattn_fast.interpret.scored import mean_map
from vlattn_fast.interpret.towers import TowerTrace


@dataclass(frozen=True)
class Call:
    """An attention call whose queries are tokens of `tower` and whose keys are tokens of `source`, often the same."""

    path: str
    tower: TowerTrace
    source: TowerTrace
    attended: Attended


Relevancies = dict[tuple[TowerTrace, TowerTrace], Tensor]


def relevancies(calls: Sequence[Call], grads: Sequence[Tensor | None]) -> Relevancies:
    """R_st of all towers of `calls`, whose outputs have the gradients `grads` (None = the score does not depend on it)."""
    found: Relevancies = {}
    for call in calls:
        for tower in (call.tower, call.source):
            eye = torch.eye(tower.size, dtype=tower.dtype, device=tower.device)
            found.setdefault((tower, tower), eye.expand(tower.batch or 0, -1, -1))
    number = 0
    while number < len(calls):
        # Both directions of a cross-attention layer read its input, so neither sees what the other adds.
        paired = number + 1 < len(calls) and _is_pair(calls[number], calls[number + 1])
        step = range(number, number + 1 + paired)
        additions = [addition for i in step for addition in _additions(found, calls[i], grads[i])]
        for pair, addition in additions:
            found[pair] = found[pair] + addition if pair in found else addition
        number = step.stop
    return found


def _is_pair(one: Call, other: Call) -> bool:
    return one.tower is not one.source and (one.tower, one.source) == (other.source, other.tower)


def _additions(found: Relevancies, call: Call, grad: Tensor | None) -> list[tuple[tuple[TowerTrace, TowerTrace], Tensor]]:
    """What a call adds to the relevancies (equations 6, 7, 10 and 11)."""
    if grad is None:
        return []
    s, q, seen = call.tower, call.source, call.attended
    abar = mean_map(seen.query, seen.key, seen.value, grad, seen.masks).to(found[s, s])  # layers may have several devices
    if s is q:
        return [((s, t), abar @ part) for (of, t), part in found.items() if of is s]
    additions = [((s, q), normalized(found[s, s]).transpose(1, 2) @ abar @ normalized(found[q, q]).to(abar))]
    if (q, s) in found:
        additions.append(((s, s), abar @ found[q, s].to(abar)))
    return additions


def normalized(relevancy: Tensor) -> Tensor:
    """Equations 8 and 9: what lies beside the identity, each row divided by its sum, plus the identity. Zero rows stay zero."""
    eye = torch.eye(relevancy.shape[-1], dtype=relevancy.dtype, device=relevancy.device)
    beside = relevancy - eye
    total = beside.sum(-1, keepdim=True)
    return beside / total.masked_fill(total == 0, 1.0) + eye
