"""The fourth stage of `explain`: which scores are explained, and which positions of each tower.

A question is about a target, about an answer, or about nothing, if the batch is empty.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from vlattn_fast._ground.checks import call_on
from vlattn_fast.attach.session import named
from vlattn_fast.interpret.explaining.answer import Answer, explained_number
from vlattn_fast.interpret.explaining.explained_positions import start_vectors
from vlattn_fast.interpret.explaining.forward_pass import Run
from vlattn_fast.interpret.explaining.inputs import packed
from vlattn_fast.interpret.explaining.request import Prompt
from vlattn_fast.interpret.relevancy.method import LOG_PROBABILITY, LOGIT, BackwardPass, PredictedTokens, single_tokens
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace

# Of one backward pass: the score (B,), and the weights (B, T, N) of the explained positions in each tower.
Pass = tuple[Tensor | None, list[Tensor]]


class UndefinedRelevancy(ValueError):
    """The call is correct, but with this model's weights the score is NaN, or only depends on the explained position itself."""


@dataclass(frozen=True)
class Question:
    """A question about a run: scores, and the explained positions."""

    run: Run
    scores: Tensor | None  # (B,), or (B, T) of an answer's tokens; None for a method and a model that give none
    passes: list[Pass] = field(default_factory=list)  # the backward passes; none for an empty batch
    target: list[int] | None = None  # index of each row's text, class, token or query; None for a callable and for an answer
    # The explained token of each tower, if it is one: int64 (B,), or (B, T) of an answer; None for an empty batch.
    start_positions: dict[str, Tensor] | None = None
    answer: Answer | None = None  # with positions in the explained tower; None if a target is explained

    def predicted(self, logits: Tensor, number: int) -> PredictedTokens | None:
        """The answer's tokens, or the target, of which backward pass `number` explains one; None if it explains no single
        token."""
        if self.answer is not None:
            each = self.scores is not None and self.scores.ndim == 2
            length = self.answer.answer_positions.shape[1]
            ids = [[*row, *[0] * (length - len(row))] for row in self.answer.ids]
            return PredictedTokens(logits, ids, self.answer.answer_positions, number) if each else None
        positions = list((self.start_positions or {}).values())
        return (
            PredictedTokens(logits, [[token] for token in self.target], positions[0][:, None], 0)
            if self.target and positions
            else None
        )


def ask(run: Run) -> Question:
    if run.prompt.empty:
        return _about_nothing(run)
    question = _about_target(run) if run.prompt.answer is None else _about_answer(run, run.prompt.answer)
    if question.scores is not None:
        check_scores("target", question.scores, run)
        for tower in run.explained:
            if tower.batch != len(question.scores):
                raise ValueError(
                    f"model must call the attention of tower '{tower.name}' on whole inputs; got a batch of {tower.batch} for "
                    f"{len(question.scores)} scores, such as for attention in windows or chunks. Explain other towers with "
                    "position={...}"
                )
    return question


def _about_nothing(run: Run) -> Question:
    request, answer, first = run.request, run.prompt.answer, run.towers[0]
    if request.adapter.scoring.logits(run.outputs) is None and not callable(request.target):
        return Question(run, None, answer=answer)
    scores = torch.zeros(0, dtype=first.dtype, device=first.device)
    return Question(run, scores, target=None if callable(request.target) else [], answer=answer)


def _about_target(run: Run) -> Question:
    request, first = run.request, run.explained[0]
    scores, target = choose_score(run.prompt, run.outputs, first.shape[0])
    if not request.method.uses_position:
        return Question(run, scores, [(scores, [])], target, {})
    names_query = request.adapter.scoring.names_position and target is not None
    starts = start_vectors(run, torch.eye(first.size)[target] if names_query else request.position, scores)
    # The queries of a pooling head are not tokens.
    token_starts = ((tower, start) for tower, start in zip(run.explained, starts, strict=True) if not tower.pooled)
    positions = ((tower.name, _single_position(start)) for tower, start in token_starts)
    singles = {name: position for name, position in positions if position is not None}
    return Question(run, scores, [(scores, starts)], target, singles)


def _about_answer(run: Run, answer: Answer) -> Question:
    request, arguments = run.request, run.prompt.arguments
    before = run.explained[0].tokens_in(arguments).before  # patches come before the text
    answer = replace(answer, answer_positions=answer.answer_positions + before)
    logits, of = request.adapter.scoring.logits(run.outputs), request.method.of or LOG_PROBABILITY
    scores = answer.scores(logits, arguments.get("logits_to_keep"), of)
    rows = run.explained if request.method.uses_position else []
    likes = [torch.zeros(*tower.shape, dtype=tower.dtype, device=tower.device)[:, None] for tower in rows]
    passes: list[Pass] = []
    if request.per_token:
        count, step = scores.shape[1], run.prompt.n_vectors
        for first in range(0, count, step):
            tokens = range(first, min(first + step, count))
            passes.append((scores[:, first], [torch.cat([answer.start(like, token) for token in tokens], 1) for like in likes]))
    else:
        scores = scores.sum(1)
        passes.append((scores, [answer.start(like, None) for like in likes]))
    return Question(run, scores, passes, None, {tower.name: answer.start_positions for tower in rows}, answer)


# --- scores ---


def choose_score(prompt: Prompt, outputs: Any, batch: int) -> tuple[Tensor | None, list[int] | None]:
    """Scores (B,) and the index each belongs to (text, class, token or object query; None for a callable); no scores for a method
    without a gradient if the outputs have no logits, or logits at each token and no index says which."""
    request, adapter, target, of = prompt.request, prompt.request.adapter, prompt.request.target, prompt.request.method.of
    if callable(target):
        if of is not None:
            raise ValueError(f"of must be left out if target is a callable, which gives the score; got {of!r}")
        scores = call_on("target", target, outputs, packed(prompt.arguments, request.packs))
        if not isinstance(scores, Tensor):
            raise TypeError(f"target must return a tensor of scores; got {type(scores).__name__}")
        if scores.ndim != 1 or (adapter.towers and scores.shape != (batch,)):
            raise ValueError(f"target must return scores of shape (B,) = ({batch},); got {tuple(scores.shape)}")
        return scores, None
    scoring, place = adapter.scoring, request.place
    if not request.method.needs_score and target is None:
        if scoring.logits(outputs) is None or (scoring.at_places(outputs) and not isinstance(place, int)):
            return None, None
    scores, chosen = scoring.choose(outputs, target if prompt.pairs is None else prompt.pairs, prompt.arguments, place)
    if of is None and scoring.at_places(outputs):
        of = LOG_PROBABILITY
    if of in (None, LOGIT):
        return scores, chosen
    if not scoring.among_logits or chosen is None:
        raise ValueError(
            f"of must be 'logit' if the score is not one of several logits; got {of!r} for {type(request.model).__name__}"
        )
    logits = scoring.per_row(scoring.logits(outputs), prompt.arguments, place)
    return explained_number(of, logits, torch.tensor(chosen, device=logits.device)), chosen


def check_scores(name: str, scores: Tensor, run: Run) -> None:
    """UndefinedRelevancy for a score (B,) that is NaN, and ValueError for scores that do not depend on the explained layers,
    if the method takes their gradient. `name`: of the argument that gives them."""
    if bool(scores.isnan().any()):
        samples = scores.isnan().nonzero()[:, 0].tolist()
        raise UndefinedRelevancy(f"{name} must give scores that are numbers; got nan for samples {samples} of the batch")
    method = run.request.method
    edges = [edge for tower in run.carrying for edge in method.edges(tower)]
    if method.needs_score and torch.is_grad_enabled() and not _depends_on(scores, edges):
        raise ValueError(
            f"{name} must give scores that depend on the explained layers; got scores without a gradient there{_why(run)}"
        )


def _depends_on(scores: Tensor, edges: Sequence[GradientEdge]) -> bool:
    """Whether a path in the autograd graph leads from the scores to one of the edges; no gradient is computed."""
    if not scores.requires_grad:
        return False
    aims = {edge.node for edge in edges}
    visited = {get_gradient_edge(scores).node}
    waiting = list(visited)
    while waiting:
        node = waiting.pop()
        if node in aims:
            return True
        following = {after for after, _ in node.next_functions if after is not None} - visited
        visited |= following
        waiting.extend(following)
    return False


# --- explained positions ---


def backward_pass(run: Run, scores: Tensor | None, starts: list[Tensor], **options: Any) -> BackwardPass:
    """The backward pass of `scores` (B,) from the positions `starts`; `options` are further fields of it."""
    return BackwardPass(
        towers=run.carrying,
        attended=run.attended,
        calls=run.trace.calls,
        starts=starts,
        scores=scores if run.request.method.needs_score else None,
        arguments=run.prompt.masked,
        **options,
    )


def _single_position(start: Tensor) -> Tensor | None:
    """int64 (B,), the one token that has a weight in `start` (B, 1, N); None if several have."""
    weights = start[:, 0]
    single = bool(((weights == 1).sum(-1) == 1).all()) and bool(((weights != 0).sum(-1) == 1).all())
    return weights.argmax(-1).cpu() if single else None


def check_relevancy(question: Question, relevancy: list[Tensor], contribution: Mapping[TowerTrace, Tensor]) -> None:
    """UndefinedRelevancy if no relevancy vector (B, T, N) has an entry besides the explained position, which may be the wrong
    one. `contribution`: the part that comes from attention, if the method knows."""
    run, request = question.run, question.run.request
    # A decoder's logits are at the explained position itself: if it only attends to itself, nothing else counts for it.
    predicts = request.adapter.scoring.predicts and request.position is None and not callable(request.target)
    if predicts or not request.method.holds_start:
        return
    starts = [torch.cat(tower_starts, 1) for tower_starts in zip(*(starts for _, starts in question.passes), strict=True)]
    if any(bool((row != 0).any()) for row in relevancy[len(starts) :]):  # of towers that are explained through others
        return
    for tower, row, start in zip(run.towers, relevancy, starts, strict=False):
        if row.shape != start.shape or row.shape[-1] == 1:  # after a pooling head, whose probes are not tokens
            return
        single = single_tokens(start)
        others = row.masked_fill(single, 0.0) if bool(single.any()) else contribution.get(tower, row - start)
        if bool((others != 0).any()):
            return
    raise UndefinedRelevancy(
        f"The score does not depend on the explained token{_why(run) or '. Pass position= with the token it is computed from'}"
    )


def warn_of(remarks: Iterable[str]) -> None:
    """A warning for each remark, once."""
    for remark in dict.fromkeys(remarks):
        warnings.warn(remark, stacklevel=2)


def lost_gradients(run: Run) -> Iterator[str]:
    """A remark if gradients end in modules of the explained layers: relevancy leaves out what goes through them."""
    layers = tuple(f"{path}." for tower in run.carrying for path in tower.calls.lists)
    if lost := [path for path in run.trace.without_gradient if path.startswith(layers)]:
        yield f"The relevancy leaves out what goes through {_names(run, lost)}"


def missed_norms(run: Run) -> Iterator[str]:
    """A remark if modules divide by a norm of their input that is not held fixed."""
    if missed := run.trace.frozen.missed:
        more = f" and {len(missed) - 3} more modules" if len(missed) > 3 else ""
        yield f"The norm in {', '.join(missed[:3])}{more} is not held fixed: it keeps its derivative"


def other_keys(run: Run) -> Iterator[str]:
    """A remark for towers that attend to keys that are not their tokens: relevancy has no entries for them."""
    for tower in run.towers:
        if not tower.others:
            continue
        (path, (count, _)), more = next(iter(tower.others.items())), len(tower.others) - 1
        where = f"{count} in '{path}'" + (f", and in {more} more modules" if more else "")
        shares = [float(share) for _, share in tower.others.values() if share is not None]
        taken = f"; they take {sum(shares) / len(shares):.1%} of the attention there" if shares else ""
        yield (
            f"Tower '{tower.name}' attends to keys that are not its tokens ({where}{taken}). Its relevancy leaves their part out"
        )


def _why(run: Run) -> str:
    return f": gradients end in {_names(run, run.trace.without_gradient)}" if run.trace.without_gradient else ""


def _names(run: Run, paths: Sequence[str]) -> str:
    """Modules in which a gradient ends, and what to do."""
    some = [named(path, run.trace.model.get_submodule(path)) for path in paths[:3]]
    more = f" and {len(paths) - 3} more modules" if len(paths) > 3 else ""
    return f"{', '.join(some)}{more}, whose output has no gradient. Explain the model before you quantise it"
