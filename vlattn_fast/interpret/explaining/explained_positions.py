"""The explained position of each tower: the caller's, the adapter's, or the one that the score's gradient names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast.interpret.adapters.tokens import decoder_inputs
from vlattn_fast.interpret.explaining.forward_pass import Run
from vlattn_fast.interpret.explaining.request import Position
from vlattn_fast.interpret.explaining.similarity import NAMED_POSITIONS
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


def start_vectors(run: Run, position: Any, scores: Tensor | None, name: str = "target") -> list[Tensor]:
    """The weights (B, 1, N) of the explained positions of each tower. `name`: of the argument that gives the scores."""
    arguments = run.prompt.arguments
    for tower in run.explained:  # names attention in windows as such
        if scores is None or tower.batch == len(scores):
            tower.positions.check()
    if position is not None or scores is None or not any(tower.gradients.finds_position for tower in run.explained):
        return [_start(tower, position, arguments, bool(run.attended)) for tower in run.explained]
    found = {tower: _score_tokens(tower, scores) for tower in run.explained if tower.gradients.finds_position}
    pooled = {tower for tower in found if tower.pooled and _depends(scores, tower.gradients.after_pooling)}
    _check_last_layer(run, [one for one in found.values() if one is not None], bool(pooled), scores, name)
    starts = []
    for tower in run.explained:
        row = None
        if tower.pooled and tower not in pooled and found.get(tower) is not None:
            raise ValueError(
                f"{name} must give scores that depend on the pooling head of tower '{tower.name}', as its adapter says; got "
                "scores of the tokens before it"
            )
        if tower.gradients.finds_position and not tower.pooled:
            row = _weights_by_gradient(tower, found[tower], arguments)
        if row is None:
            starts.append(_start(tower, None, arguments, bool(run.attended)))
        else:
            starts.append(row.to(tower.device, tower.dtype)[:, None])
    return starts


def _start(tower: TowerTrace, position: Any, arguments: Mapping[str, Any], attends: bool) -> Tensor:
    """The weights (B, 1, N) of the explained positions at the end of a tower, which may attend to others. After a pooling head N
    is its number of probes."""
    count = tower.size if tower.probes is None else tower.probes
    like = torch.zeros(tower.batch or 0, 1, count, dtype=tower.dtype, device=tower.device)
    asked: Position | None = position[tower.name] if isinstance(position, Mapping) else position
    if asked is not None and not tower.pooled and (ends := tower.positions.ends()) is not None:
        return _start_at(tower, asked, ends, arguments, like)
    if asked is None:
        if tower.entry is None or tower.entry.rule.by_gradient:
            raise ValueError(f"position must name the explained token of tower '{tower.name}'; got None")
        return tower.entry.rule.weights(tower.tokens_in(arguments), like)
    if tower.pooled:
        raise ValueError(f"position must be None for tower '{tower.name}', which ends in a pooling head; got {asked!r}")
    if isinstance(asked, str):
        decodes = attends and tower.entry is None
        return NAMED_POSITIONS[asked].weights(tower.tokens_in(decoder_inputs(arguments) if decodes else arguments), like)
    return _weights_of(tower, asked, like[:, 0])[:, None]


def _weights_of(tower: TowerTrace, asked: Any, zeros: Tensor) -> Tensor:
    """The weights of the rows that an index, or weights (N,) or (B, N), names, in the shape (B, N) of `zeros`."""
    batch, count = zeros.shape
    if isinstance(asked, int):
        if not -count <= asked < count:
            raise ValueError(f"position must be from {-count} to {count - 1} in tower '{tower.name}'; got {asked}")
        weights = zeros.clone()
        weights[:, asked] = 1.0
        return weights
    weights = torch.as_tensor(asked, dtype=zeros.dtype, device=zeros.device)
    if tuple(weights.shape) not in ((count,), (batch, count), (1, count)):
        raise ValueError(f"position must be weights of shape (N,) = ({count},) or (B, N); got {tuple(weights.shape)}")
    if not bool(weights.isfinite().all()):
        raise ValueError(f"position must be finite weights; got {weights[~weights.isfinite()][0].item()}")
    return zeros + weights


def _start_at(tower: TowerTrace, asked: Position, ends: Tensor, arguments: Mapping[str, Any], like: Tensor) -> Tensor:
    """The weights (B, 1, N) of the explained positions if tokens are at other positions (B', K) at the end of their tower than
    where they entered: a position is counted at the end. `ends` are the tokens there."""
    batch, count = ends.shape
    weights = torch.zeros(batch, count, dtype=like.dtype)
    if isinstance(asked, str):
        real = tower.tokens_in(arguments).real()
        real_ends = (
            torch.ones_like(ends, dtype=torch.bool) if real is None else real.cpu().flatten()[ends.clamp(min=0)] & (ends >= 0)
        )
        if asked == "mean":
            weights = real_ends.to(weights) / real_ends.sum(-1, keepdim=True).clamp(min=1)
        else:
            last = (real_ends * torch.arange(1, count + 1)).argmax(-1)
            weights[torch.arange(batch), 0 if asked == "cls" else last] = 1.0
    else:
        weights = _weights_of(tower, asked, weights)
    if bool((weights[ends < 0] != 0).any()):
        raise ValueError(
            f"position must name a token that entered tower '{tower.name}'; got {asked!r}, which was added between its layers"
        )
    start = like.flatten().index_add(0, ends.clamp(min=0).flatten().to(like.device), weights.flatten().to(like))
    return start.view_as(like)


# --- the position that the gradient names ---


class ScoreTokens(NamedTuple):
    """The tokens of a tower from which the scores are computed."""

    tokens: Tensor  # bool (B, N), those that count after the last attention that the scores depend on
    gradients: list[Tensor]  # (B, N, C), the gradients of the scores at the states after it
    later: int  # the number of attention calls after that one


def _score_tokens(tower: TowerTrace, scores: Tensor) -> ScoreTokens | None:
    """None if the scores depend on no token of the tower."""
    for later, states in enumerate(reversed(tower.gradients.states) if scores.requires_grad else ()):
        edges = [edge for edge, _ in states]
        gradients = torch.autograd.grad(scores.sum(), edges, retain_graph=True, allow_unused=True) if states else ()
        with_numbers = [(g, numbers) for g, (_, numbers) in zip(gradients, states, strict=False) if g is not None]
        if tower.positions.is_flat:
            placed = [tower.positions.as_entered(g, numbers) for g, numbers in with_numbers]
            whole = [g for g in placed if g is not None]
        else:
            whole = [g for g, _ in with_numbers if g.shape[-2] == tower.size]  # not of a part of the sequence
        counting = [(g != 0).flatten(1, -3).any(1).any(-1) if g.ndim > 3 else (g != 0).any(-1) for g in whole]
        if not counting or not any(bool(tokens.any()) for tokens in counting):
            continue
        # A sample whose attention does not count, such as a dropped branch, uses the residual stream after it.
        in_stream = torch.stack(counting).any(0)
        tokens = torch.where(counting[0].any(-1, keepdim=True), counting[0], in_stream)
        return ScoreTokens(tokens, [g for g in whole if g.ndim == 3], later)
    return None


def _depends(scores: Tensor, edge: Any) -> bool:
    if edge is None or not scores.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(scores.sum(), [edge], retain_graph=True, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())


def _check_last_layer(run: Run, found: Sequence[ScoreTokens], pooled: bool, scores: Tensor, name: str) -> None:
    """ValueError if a method without gradients would go through layers after those that the scores depend on. `pooled`: they
    depend on a pooling head."""
    method = run.request.method
    last = pooled or any(not one.later for one in found)
    if not method.needs_score and (any(one.later for one in found) or (scores.requires_grad and not last)):
        raise ValueError(
            f"{name} must give scores that depend on the last layer for method {method.name!r}, which goes through all of them; "
            "got scores of an earlier layer"
        )


def _weights_by_gradient(tower: TowerTrace, found: ScoreTokens | None, arguments: Mapping[str, Any]) -> Tensor | None:
    """The weights (B, N) of the tokens from which the scores are computed: one, or the mean of several; None = the adapter's.
    ValueError if several count differently, and the adapter has no weights for them."""
    listed = None
    if tower.entry is not None and not tower.entry.rule.by_gradient:
        if found is None:  # a tower that the scores do not depend on
            return None
        listed = _start(tower, None, arguments, False)[:, 0]
    tokens = torch.zeros(tower.shape, dtype=torch.bool) if found is None else found.tokens
    gradients = [] if found is None else found.gradients
    counts, some = tokens.sum(-1), tokens.any(-1)
    named = bool((counts == 1).all()) or (bool(some.any()) and any(_is_same(g[some], tokens[some]) for g in gradients))
    if named and (listed is not None or bool(some.all())):
        weights = tokens.to(tower.dtype) / counts.clamp(min=1)[:, None]
        return weights if listed is None else torch.where(some[:, None], weights.to(listed.device), listed)
    if listed is not None and _is_listed(listed[some], tokens[some], [g[some] for g in gradients]):
        return None
    raise ValueError(
        f"position must name the explained token of tower '{tower.name}'; got None, and after the last attention the score "
        f"depends on {counts.tolist()} of its {tower.size} tokens, but not on their mean. Pass their weights"
    )


def _is_same(gradient: Tensor, tokens: Tensor) -> bool:
    """Whether the gradient (B, N, C) is the same, and not zero, at all `tokens`, bool (B, N), of which each row has some. Behind
    the last step that mixes features it is, if tokens are averaged."""
    first = gradient[torch.arange(len(tokens)), tokens.int().argmax(-1)][:, None]
    bound = 1e-4 * first.abs().amax(-1, keepdim=True)
    return bool((((gradient - first).abs() <= bound).all(-1) | ~tokens).all()) and bool(first.any())


def _is_listed(listed: Tensor, tokens: Tensor, gradients: Sequence[Tensor]) -> bool:
    """Whether the scores are computed from the tokens with a weight in `listed` (B, N), equally from those of equal weight."""
    if not bool(((listed != 0) == tokens).all()):
        return False
    groups = [listed == weight for weight in listed.unique() if weight != 0]
    rows = [group.any(-1) for group in groups]
    return any(all(_is_same(g[row], group[row]) for row, group in zip(rows, groups, strict=True)) for g in gradients)
