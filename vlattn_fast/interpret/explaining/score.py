"""The score that is explained, one number per row of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from vlattn_fast.interpret.explaining.inputs import indices
from vlattn_fast.interpret.records.record import Family
from vlattn_fast.interpret.records.tokens import last_real
from vlattn_fast.interpret.records.unsupported import UndefinedRelevancy


def choose_score(
    outputs: Any,
    family: Family,
    target: None | int | Tensor | list[int] | Callable[[Any], Tensor],
    inputs: Mapping[str, Any],
    pairs: list[int] | None,
    shape: tuple[int, int],
    required: bool,
) -> tuple[Tensor | None, list[int] | None]:
    """Scores (B,) and the index each belongs to (text, class or token; None for a callable).

    Args:
        outputs: the model's.
        pairs: see `prepare_inputs`.
        shape: (B, N) of the tower that is read.
        required: False for methods without a gradient. They run without a score where the outputs have no logits.

    Raises:
        TypeError, ValueError: `target`, or what the callable returned, has a wrong type or shape.
    """
    batch = shape[0]
    if callable(target):
        scores = target(outputs)
        if not isinstance(scores, Tensor):
            raise TypeError(f"target must return a tensor of scores; got {type(scores).__name__}")
        if scores.ndim != 1 or (family.towers and scores.shape != (batch,)):
            raise ValueError(f"target must return scores of shape (B,) = ({batch},); got {tuple(scores.shape)}")
        chosen = None
    elif family.score == "query":
        scores, chosen = _of_query(getattr(outputs, family.logits), family, target)
    elif family.score == "pair":
        scores, chosen = outputs.logits_per_image.diagonal(), pairs
    else:
        logits = getattr(outputs, family.logits, None)
        if logits is None:
            if required or target is not None:
                raise ValueError("target must be a callable(outputs) -> (B,) scores where the outputs have no logits; got none")
            return None, None
        if family.score == "token":
            position = last_real(family.towers[0].tokens, inputs, shape).to(logits.device)
            if isinstance(kept := inputs.get("logits_to_keep"), Tensor):
                position = torch.searchsorted(kept.to(logits.device), position)
            logits = logits[torch.arange(batch, device=logits.device), position]
        if logits.ndim != 2:
            raise ValueError(f"target must be a callable where logits are not (B, classes); got logits {tuple(logits.shape)}")
        what = "tokens" if family.score == "token" else "classes"
        chosen = logits.argmax(-1).tolist() if target is None else indices(target, batch, logits.shape[1], what)
        scores = logits.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0]
    return scores, chosen


def _of_query(logits: Tensor, family: Family, target: Any) -> tuple[Tensor, list[int]]:
    """The largest class logit (B,) of an object query, and the query: by default the one that is surest of its class.

    Args:
        logits: (B, queries, classes).
    """
    objects = logits[..., :-1] if family.background else logits
    if target is None:
        # Where a logit stands for no object, the others are sure relative to it; else each is sure by itself.
        sure = logits.softmax(-1)[..., :-1] if family.background else logits
        chosen = sure.amax(-1).argmax(-1).tolist()
    else:
        chosen = indices(target, logits.shape[0], logits.shape[1], "object queries")
    return objects[torch.arange(len(chosen), device=logits.device), chosen].max(-1).values, chosen


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
