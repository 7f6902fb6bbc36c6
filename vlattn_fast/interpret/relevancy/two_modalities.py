"""Relevancy between towers that attend to one another: the rules for two modalities of Chefer, Gur, Wolf (ICCV 2021).

R_st (B, N_s, N_t) holds how much the tokens of tower t count for those of tower s. It begins as the identity where s = t, and as
zero elsewhere. The attention calls are gone through in the order in which they ran; Abar (N x M) is a call's head mean
relu(A * dA), streamed without a head axis.

Keys may be older than the tokens they are of: both directions of a cross-attention layer read its input, so neither sees what
the other adds. So a call takes R of its keys as it was behind the last call that they came through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlattn_fast.interpret.relevancy.methods import Attended, Method, gradcam, raw_attention
from vlattn_fast.interpret.relevancy.through_call import mean_map, step
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


@dataclass(frozen=True)
class Call:
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


Real = Callable[[TowerTrace], Tensor | None]
Weights = tuple[Tensor, Tensor]
Relevancies = dict[tuple[TowerTrace, TowerTrace], Tensor]


def relevancies(
    calls: Sequence[Call], grads: Sequence[Tensor | None], method: Method, weights: Sequence[Weights | None]
) -> Relevancies:
    """R_st of all towers of `calls`, whose outputs have the gradients `grads` (None = the score does not depend on it).

    With weights an addition to R becomes diag(a) R + diag(b) (what is added), our reading of weighted relevancy (after Huang et
    al. 2023) between towers. Equations 8 and 9 keep what is added to the identity in bounds. Where a + b = 1, and the rows of
    Abar are divided by their sums, rows sum to one anyway, so R itself stands in equation 10 but with equal weights.

    Args:
        method: "gradient", "weighted" or an ablation of these.
        weights: a and b (B, N) of each call; None = 1 and 1.
    """
    found: Relevancies = {}
    for call in calls:
        for tower in (call.tower, call.source):
            eye = torch.eye(tower.size, dtype=tower.dtype, device=tower.device)
            found.setdefault((tower, tower), eye.expand(tower.batch or 0, -1, -1))
    if not method.aggregates:  # zeros count where they take the place of something
        linked = {(call.tower, call.source) for call in calls if call.tower is not call.source}
        for s, q in linked:
            if (q, s) in linked:
                found[s, q] = found[s, s].new_zeros(s.batch or 0, s.size, q.size)
    waited = Counter(call.seen for call in calls if call.seen is not None)
    behind: dict[int, Relevancies] = {}  # R_s behind a call of s that keys came through, while calls wait for it
    for call, grad, weight in zip(calls, grads, weights, strict=True):
        of_keys = found if call.seen is None else behind[call.seen]
        for pair, addition in _additions(found, of_keys, call, grad, method):
            old = found.get(pair) if method.aggregates else None
            if weight is not None:
                a, b = (part[..., None].to(addition) for part in weight)
                old, addition = None if old is None else a * old, b * addition
            found[pair] = addition if old is None else old + addition
        if call.seen is not None:
            waited[call.seen] -= 1
            if not waited[call.seen]:
                del behind[call.seen]
        if waited[call.number]:
            behind[call.number] = {pair: part for pair, part in found.items() if pair[0] is call.tower}
    return found


def _additions(
    found: Relevancies, of_keys: Mapping[tuple[TowerTrace, TowerTrace], Tensor], call: Call, grad: Tensor | None, method: Method
) -> list[tuple[tuple[TowerTrace, TowerTrace], Tensor]]:
    """What a call adds to the relevancies (equations 6, 7, 10 and 11)."""
    if grad is None:
        return []
    s, q, seen = call.tower, call.source, call.attended
    abar = mean_map(seen.query, seen.key, seen.value, grad, seen.masks, seen.mesh)
    abar = abar.to(found[s, s])  # layers may have several devices
    if method.row_normalize:
        total = abar.sum(-1, keepdim=True)
        abar = abar / total.masked_fill(total == 0, 1.0)
    if s is q:
        return [((s, t), abar @ part) for (of, t), part in found.items() if of is s]
    of_s, of_q = found[s, s], of_keys[q, q].to(abar)
    if method.normalizes and (not method.weighted or s.weighting == "equal"):
        of_s, of_q = normalized(of_s), normalized(of_q)
    additions = [((s, q), of_s.transpose(1, 2) @ abar @ of_q if method.mixes else abar)]
    if (q, s) in of_keys:
        additions.append(((s, s), abar @ of_keys[q, s].to(abar)))
    return additions


def normalized(relevancy: Tensor) -> Tensor:
    """Equations 8 and 9: what lies beside the identity, each row divided by its sum, plus the identity. Zero rows stay zero."""
    eye = torch.eye(relevancy.shape[-1], dtype=relevancy.dtype, device=relevancy.device)
    beside = relevancy - eye
    total = beside.sum(-1, keepdim=True)
    return beside / total.masked_fill(total == 0, 1.0) + eye


# --- the baselines, as the code of the same authors has them ---


def rolled_out(calls: Sequence[Call], tower: TowerTrace, source: TowerTrace, start: Tensor, real: Real) -> Tensor:
    """Rollout: the row `start` (B, 1, N) of `tower` over its own tokens, or over those of `source`, which it attends to.

    Between towers it is rollout(tower)^T A rollout(source), with A = mean_h A of the last attention from one to the other and the
    self-attention in front of it. Rows of padding are left out of the sum that the transposition makes.
    """
    if tower is source:
        return _rolled(calls, tower, start)
    last = _last(calls, tower, source)
    column, eye = start, torch.eye(tower.size, dtype=start.dtype, device=start.device).expand(start.shape[0], -1, -1)
    for call in calls[:last]:
        if call.tower is tower and call.source is tower:
            column = (column + column @ _mean_attention(eye, call).mT) / 2
    if (words := real(tower)) is not None:
        column = column.masked_fill(~words[:, None].to(column.device), 0.0)
    return _rolled(calls[:last], source, _mean_attention(column, calls[last]))


def _rolled(calls: Sequence[Call], tower: TowerTrace, row: Tensor) -> Tensor:
    """row (B, 1, N) times the product of (I + mean_h A) / 2 over the self-attention of a tower, the last on the left."""
    for call in reversed(calls):
        if call.tower is tower and call.source is tower:
            row = (row + _mean_attention(row, call)) / 2
    return row


def _mean_attention(rows: Tensor, call: Call) -> Tensor:
    """rows (B, T, N) @ mean_h A, (B, T, M)."""
    seen = call.attended
    found = step(rows.to(seen.query.device), seen.query, seen.key, seen.value, None, seen.masks, "attention", False, seen.mesh)
    return found.to(rows)  # layers may have several devices


def last_attention(
    calls: Sequence[Call], grads: Sequence[Tensor | None] | None, tower: TowerTrace, source: TowerTrace, start: Tensor, real: Real
) -> Tensor:
    """The row `start` (B, 1, N) of the last attention from `tower` to `source`: of mean_h A, or Grad-CAM's with `grads`.

    Args:
        real: bool (B, N) of a tower, False = padding; None = no padding.
    """
    last = _last(calls, tower, source)
    seen = calls[last].attended
    rows, device = start.to(seen.query.device), seen.query.device
    if grads is None:
        return raw_attention(rows, seen).to(start)
    grad = torch.zeros_like(seen.output) if (of_call := grads[last]) is None else of_call
    queries, keys = (None if (words := real(of)) is None else words.to(device) for of in (tower, source))
    return gradcam(rows, seen, grad, queries, keys).to(start)


def _last(calls: Sequence[Call], tower: TowerTrace, source: TowerTrace) -> int:
    numbers = [number for number, call in enumerate(calls) if call.tower is tower and call.source is source]
    if not numbers:
        raise ValueError(f"model must attend from tower '{tower.name}' to '{source.name}' for this method; got no such call")
    return numbers[-1]
