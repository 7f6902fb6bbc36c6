"""The relevancy rows of one run, by each kind of method. One backward pass, where a score has a part in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.backends.reference.relevancy_residual import residual_weights
from vlattn_fast.interpret.records.record import Tower
from vlattn_fast.interpret.records.tokens import decoder_inputs
from vlattn_fast.interpret.records.unsupported import UndefinedRelevancy
from vlattn_fast.interpret.relevancy.methods import Method, gradcam, raw_attention
from vlattn_fast.interpret.relevancy.model_trace import Trace
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.two_modalities import Call, Weights, last_attention, relevancies, rolled_out


def read_rows(
    trace: Trace,
    towers: list[TowerTrace],
    others: list[TowerTrace],
    starts: list[Tensor],
    scores: Tensor | None,
    start_layer: int,
    arguments: Mapping[str, Any],
    keep: bool,
) -> list[Tensor]:
    """The rows (B, 1, N) of `towers` and of `others`.

    Args:
        towers: those whose own rows are read; `starts` (B, 1, N) has the weights of their rows.
        others: those that they attend to.
        scores: (B,); None for methods without a gradient.
        keep: keep the graph for a further call.
    """
    if not others and trace.method.between_alone:
        raise ValueError(
            f"method must be 'gradient' for towers that do not attend to one another; got {trace.method.name!r}, which leaves "
            "out a part of the rules for those that do"
        )
    if others:
        return _between(trace, towers, others, starts, scores, start_layer, arguments, keep)
    if trace.method.carries:
        return _carried(towers, start_layer, starts, scores, keep)
    return _last_only(towers, starts, arguments, scores, keep)


def _carried(towers: list[TowerTrace], start_layer: int, starts: list[Tensor], scores: Tensor | None, keep: bool) -> list[Tensor]:
    """The finished rows (B, 1, N). One backward pass starts at the score and at the carrier that leaves each tower."""
    carriers = [tower.carriers(start_layer) for tower in towers]
    outputs = [leaving for _, leaving in carriers]
    rows = [start.to(output.device) for start, output in zip(starts, outputs, strict=True)]
    if scores is not None:
        outputs, rows = [scores.sum(), *outputs], [torch.ones_like(scores.sum()), *rows]
    parts = [part for entering, _ in carriers for part in entering]
    grads = iter(torch.autograd.grad(outputs, parts, rows, retain_graph=keep))
    return [torch.cat([next(grads) for _ in entering], 2) for entering, _ in carriers]


def _last_only(
    towers: list[TowerTrace], starts: list[Tensor], arguments: Mapping[str, Any], scores: Tensor | None, keep: bool
) -> list[Tensor]:
    """The rows (B, 1, N) of the last attention alone: Grad-CAM with a score, raw attention without."""
    calls = [tower.last_call_read() for tower in towers]
    grads: tuple[Tensor | None, ...] = (None,) * len(calls)
    if scores is not None:
        grads = torch.autograd.grad(scores.sum(), [call.output for call in calls], retain_graph=keep, allow_unused=True)
    rows = []
    with torch.no_grad():
        for tower, start, call, grad in zip(towers, starts, calls, grads, strict=True):
            start = start.to(call.query.device)
            if scores is None:
                rows.append(raw_attention(start, call))
                continue
            grad = torch.zeros_like(call.output) if grad is None else grad
            real = tower.tokens_in(arguments).real()
            real = None if real is None else real.to(start.device)
            rows.append(gradcam(start, call, grad, None if tower.pooled else real, real))
    return rows


def _between(
    trace: Trace,
    towers: list[TowerTrace],
    others: list[TowerTrace],
    starts: list[Tensor],
    scores: Tensor | None,
    start_layer: int,
    arguments: Mapping[str, Any],
    keep: bool,
) -> list[Tensor]:
    """The rows (B, 1, N) of `towers`, their own entries set to zero, and those of `others` that they count for them."""
    method = trace.method
    check_between(method, start_layer, [tower.record for tower in [*towers, *others]])
    reached = set(towers)  # calls of other towers cost time, and no row that is read comes through them
    while more := {call.source for call in trace.calls if call.tower in reached} - reached:
        reached |= more
    calls = [call for call in trace.calls if call.tower in reached]
    sums = _sums(trace, reached) if method.weighted else []
    grads = None
    weights: list[Weights | None] = [None] * len(calls)
    if scores is not None:
        outputs = [*(call.attended.output for call in calls), *(branch for _, branch in sums)]
        used = [output for output in outputs if output.requires_grad]
        of_used = iter(torch.autograd.grad(scores.sum(), used, retain_graph=keep, allow_unused=True))
        grads = [next(of_used) if output.requires_grad else None for output in outputs]
        grads, at_sums = grads[: len(calls)], grads[len(calls) :]
        if sums:
            weights = [_weights(call, *terms, grad) for call, terms, grad in zip(calls, sums, at_sums, strict=True)]

    def real(tower: TowerTrace) -> Tensor | None:
        inputs = decoder_inputs(arguments) if tower.record is None and tower in towers else arguments
        return tower.tokens_in(inputs).real()

    with torch.no_grad():
        found = relevancies(calls, grads, method, weights) if method.carries and grads is not None else {}

        def read(tower: TowerTrace, source: TowerTrace, start: Tensor) -> Tensor:
            if method.name == "rollout":
                return rolled_out(calls, tower, source, start, real)
            if not method.carries:
                return last_attention(calls, grads, tower, source, start, real)
            if (tower, source) not in found:  # the score depends on no attention between them
                return start.new_zeros(*start.shape[:2], source.size)
            return start @ found[tower, source]

        linked = {(call.tower, call.source) for call in calls}
        pairs = list(zip(towers, starts, strict=True))
        rows = [read(tower, tower, start).masked_fill(_read_tokens(start), 0.0) for tower, start in pairs]
        for other in others:
            rows.append(torch.stack([read(tower, other, start) for tower, start in pairs if (tower, other) in linked]).sum(0))
    return rows


def _sums(trace: Trace, reached: set[TowerTrace]) -> list[tuple[Tensor, Tensor]]:
    """x and o behind each call of the towers `reached`."""
    of_tower = {tower: iter(tower.sums) for tower in reached}
    return [next(of_tower[call.tower]) for call in trace.calls if call.tower in reached]


def _weights(call: Call, stream: Tensor, branch: Tensor, grad: Tensor | None) -> Weights | None:
    """a and b; None where the score does not depend on the sum."""
    return None if grad is None else residual_weights(stream, branch.detach(), grad, call.tower.weighting)


def check_between(method: Method, start_layer: int, records: Sequence[Tower | None]) -> None:
    """ValueError for a method without rules for towers that attend to one another, or layers that they cannot begin with."""
    if method.weighted and not all(r is not None and r.branch and (r.sums or not r.further) for r in records):
        raise ValueError(f"method must be another one for towers that attend to one another; got {method.name!r}")
    if method.carries and start_layer != 0:
        raise ValueError(f"start_layer must be 0 for towers that attend to one another; got {start_layer}")


def _read_tokens(start: Tensor) -> Tensor:
    """bool (B, T, N), True = a token that is read by itself: weights that leave no token out name none."""
    return (start == 1) & (start == 0).any(-1, keepdim=True)


def check_rows(rows: list[Tensor], starts: list[Tensor]) -> None:
    """UndefinedRelevancy where no row (B, T, N) is more than the row that was read: the score does not depend on what is read.

    Args:
        starts: the weights (B, T, N) of the rows that are read; there are none for towers that are read through others.
    """
    if any(bool((row != 0).any()) for row in rows[len(starts) :]):
        return
    for row, start in zip(rows, starts, strict=False):
        own = _read_tokens(start)
        beside = row.masked_fill(own, 0.0) if bool(own.any()) else row - start
        if row.shape != start.shape or row.shape[-1] == 1 or bool((beside != 0).any()):
            return
    raise UndefinedRelevancy(
        "target must be a score that the row which is read has a part in; got a relevancy that is this row alone. Name the row "
        'by read=, e.g. read="last" or the position (or (B, N) weights) that the score is computed from'
    )
