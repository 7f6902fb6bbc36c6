"""The score that is explained, one number per row of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.families import Family
from vlattn_fast.interpret.inputs import indices, last_real


def choose_score(
    outputs: Any,
    family: Family,
    target: None | int | Tensor | list[int] | Callable[[Any], Tensor],
    inputs: Mapping[str, Any],
    pairs: list[int] | None,
    shapes: list[tuple[int, int]],
    required: bool,
) -> tuple[Tensor | None, list[int] | None]:
    """Scores (B,) and the index each belongs to (text, class or token; None for a callable).

    Args:
        outputs: the model's.
        pairs: see `prepare_inputs`.
        shapes: (B, N) of each tower.
        required: False for methods without a gradient, which go without a score where there is none.

    Raises:
        TypeError, ValueError: `target`, or what the callable returned, does not fit.
    """
    batch = shapes[0][0]
    if callable(target):
        scores = target(outputs)
        if not isinstance(scores, Tensor):
            raise TypeError(f"target: the callable must return a tensor of scores, got {type(scores).__name__}")
        for count, _ in shapes:
            if scores.shape != (count,):
                raise ValueError(f"target: the callable must return scores of shape ({count},), got {tuple(scores.shape)}")
        chosen = None
    elif family.score == "pair":
        scores, chosen = outputs.logits_per_image.diagonal(), pairs
    else:
        logits = getattr(outputs, "logits", None)
        if logits is None:
            if required or target is not None:
                raise ValueError("target: the outputs have no logits; give a callable(outputs) -> (B,) scores")
            return None, None
        if family.score == "token":
            position = last_real(family.towers[0], inputs, shapes[0]).to(logits.device)
            if isinstance(kept := inputs.get("logits_to_keep"), Tensor):
                position = torch.searchsorted(kept.to(logits.device), position)
            logits = logits[torch.arange(batch, device=logits.device), position]
        if logits.ndim != 2:
            raise ValueError(f"target: expected logits of shape (B, classes), got {tuple(logits.shape)}; give a callable")
        what = "tokens" if family.score == "token" else "classes"
        chosen = logits.argmax(-1).tolist() if target is None else indices(target, batch, logits.shape[1], what)
        scores = logits.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0]
    if required and not scores.requires_grad:
        raise ValueError("target: the scores do not depend on the explained layers, so they have no gradient")
    return scores, chosen
