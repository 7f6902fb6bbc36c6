"""The score that is explained, one number per row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from vlattn_fast.interpret.explaining.prompt import Prompt
from vlattn_fast.interpret.explaining.request import Request
from vlattn_fast.interpret.records.unsupported import UndefinedRelevancy


def choose_score(request: Request, prompt: Prompt, outputs: Any, batch: int) -> tuple[Tensor | None, list[int] | None]:
    """Scores (B,) and the index each belongs to (text, class, token or object query; None for a callable).

    Methods without a gradient run without a score where the outputs have no logits.

    Raises:
        TypeError, ValueError: `target`, or what the callable returned, has a wrong type or shape.
    """
    record, target = request.record, request.target
    if callable(target):
        scores = target(outputs)
        if not isinstance(scores, Tensor):
            raise TypeError(f"target must return a tensor of scores; got {type(scores).__name__}")
        if scores.ndim != 1 or (record.towers and scores.shape != (batch,)):
            raise ValueError(f"target must return scores of shape (B,) = ({batch},); got {tuple(scores.shape)}")
        return scores, None
    if not request.method.needs_score and target is None and record.scoring.logits(outputs) is None:
        return None, None
    return record.scoring.choose(outputs, target if prompt.pairs is None else prompt.pairs, prompt.arguments)


def check_scores(scores: Tensor, edges: Sequence[GradientEdge] | None) -> None:
    """UndefinedRelevancy for a score that is NaN, and ValueError for scores that do not depend on the explained layers.

    Args:
        scores: (B,).
        edges: where gradients enter the explained layers; None if the method takes no gradient.
    """
    if bool(scores.isnan().any()):
        rows = scores.isnan().nonzero()[:, 0].tolist()
        raise UndefinedRelevancy(f"target must give scores that are numbers; got nan in rows {rows} of the batch")
    if edges is not None and not _depends_on(scores, edges):
        raise ValueError("target must give scores that depend on the explained layers; got scores without a gradient there")


def _depends_on(scores: Tensor, edges: Sequence[GradientEdge]) -> bool:
    """Whether a path in the autograd graph leads from the scores to one of the edges; no gradient is computed."""
    if not scores.requires_grad:
        return False
    aims = {edge.node for edge in edges}
    seen = {get_gradient_edge(scores).node}
    waiting = list(seen)
    while waiting:
        node = waiting.pop()
        if node in aims:
            return True
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        waiting.extend(following)
    return False
