"""The fourth stage of `explain`: which scores are explained, and which row of each tower is read.

A question is about a target, about an answer, or about nothing, where the batch is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.explaining.answer import Answer
from vlattn_fast.interpret.explaining.prompt import Prompt
from vlattn_fast.interpret.explaining.request import Request
from vlattn_fast.interpret.explaining.run import Run
from vlattn_fast.interpret.explaining.score import check_scores, choose_score
from vlattn_fast.interpret.explaining.start_rows import start_rows
from vlattn_fast.interpret.records.tokens import decoder_inputs
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace

Pass = tuple[Tensor | None, list[Tensor]]  # of one backward pass: the score (B,), and the rows (B, 1, N) to read in each tower


@dataclass(frozen=True)
class Question:
    """A question about a run: scores, and the rows that are read.

    Args:
        scores: (B,), or (B, T) of the tokens of an answer; None for a method without a gradient and a model without logits.
        passes: the backward passes; none for an empty batch.
        target: the index of the text, class, token or object query of each row; None for a callable and for an answer.
        start_positions: of each tower, int64 (B,), or (B, T) of an answer: the token whose row is read, where it is one token
            alone; None for an empty batch.
        answer: the answer, as it stands among the tokens of the tower that is read; None where a target is explained.
    """

    scores: Tensor | None
    passes: list[Pass] = field(default_factory=list)
    target: list[int] | None = None
    start_positions: dict[str, Tensor] | None = None
    answer: Answer | None = None


def ask(request: Request, prompt: Prompt, run: Run) -> Question:
    if prompt.empty:
        return _about_nothing(request, prompt, run)
    question = (
        _about_target(request, prompt, run) if prompt.answer is None else _about_answer(request, prompt, run, prompt.answer)
    )
    if question.scores is not None:
        edges = [edge for tower in run.carrying for edge in request.method.edges(tower, request.start_layer)]
        check_scores(question.scores, edges if request.method.needs_score else None)
        _check_batches(run.read, len(question.scores))
    return question


def _about_nothing(request: Request, prompt: Prompt, run: Run) -> Question:
    if request.record.scoring.logits(run.outputs) is None and not callable(request.target):
        return Question(None, answer=prompt.answer)
    tower = run.towers[0]
    scores = torch.zeros(0, dtype=tower.dtype, device=tower.device)
    return Question(scores, target=None if callable(request.target) else [], answer=prompt.answer)


def _about_target(request: Request, prompt: Prompt, run: Run) -> Question:
    first, record, read = run.read[0], request.record, request.read
    scores, target = choose_score(request, prompt, run.outputs, first.shape[0])
    if record.scoring.names_row and target is not None:
        read = torch.eye(first.size)[target]
    starts = [_start(tower, read, prompt.arguments, bool(run.attended)) for tower in run.read]
    places = ((tower.name, _single_position(start)) for tower, start in zip(run.read, starts, strict=True))
    return Question(scores, [(scores, starts)], target, {name: place for name, place in places if place is not None})


def _about_answer(request: Request, prompt: Prompt, run: Run, answer: Answer) -> Question:
    before = run.read[0].tokens_in(prompt.arguments).before  # patches stand in front of the text
    answer = replace(answer, answer_positions=answer.answer_positions + before)
    scores = answer.scores(request.record.scoring.logits(run.outputs), prompt.arguments.get("logits_to_keep"))
    likes = [torch.zeros(*tower.shape, dtype=tower.dtype, device=tower.device)[:, None] for tower in run.read]
    if request.each:
        passes: list[Pass] = [(scores[:, t], [answer.start(like, t) for like in likes]) for t in range(scores.shape[1])]
    else:
        scores = scores.sum(1)
        passes = [(scores, [answer.start(like, None) for like in likes])]
    return Question(scores, passes, None, {tower.name: answer.start_positions for tower in run.read}, answer)


def _start(tower: TowerTrace, read: Any, arguments: Mapping[str, Any], attends: bool) -> Tensor:
    """The weights (B, 1, N) of the rows that are read at the end of a tower, which may attend to others."""
    arguments = decoder_inputs(arguments) if attends and tower.record is None else arguments
    like = torch.zeros(tower.batch or 0, 1, tower.rows_at_end(), dtype=tower.dtype, device=tower.device)
    return start_rows(tower, read[tower.name] if isinstance(read, Mapping) else read, arguments, like)


def _single_position(start: Tensor) -> Tensor | None:
    """int64 (B,), the one token that has a weight in `start` (B, 1, N); None where several have."""
    weights = start[:, 0]
    single = bool(((weights == 1).sum(-1) == 1).all()) and bool(((weights != 0).sum(-1) == 1).all())
    return weights.argmax(-1).cpu() if single else None


def _check_batches(towers: list[TowerTrace], scores: int) -> None:
    """ValueError for a tower that does not run once over each input."""
    for tower in towers:
        if tower.batch != scores:
            raise ValueError(
                f"model must call the attention of tower '{tower.name}' on whole inputs; got a batch of {tower.batch} for "
                f"{scores} scores, as attention in windows or chunks has. Read other towers by read={{...}}"
            )
