"""A score of a model, as in `explain`, for runs with edited attention, one or several at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.attach.session import at_rest
from vlattn_fast.interpret.explaining.inputs import packing
from vlattn_fast.interpret.explaining.question import choose_score
from vlattn_fast.interpret.explaining.request import Prompt, Request, lay_out
from vlattn_fast.interpret.intervening.editing import EditedCalls
from vlattn_fast.interpret.intervening.plans import Plans
from vlattn_fast.interpret.intervening.token_sets import TokenSet
from vlattn_fast.interpret.intervening.traced_model import NotesCalls, TowerName, TracedModel, run_traced, trace_arguments
from vlattn_fast.interpret.relevancy.method import LOG_PROBABILITY
from vlattn_fast.interpret.relevancy.methods.input_gradient import InputGradient


@dataclass(frozen=True, eq=False)
class Asked:
    """A score of a model, its inputs and the attention calls of these."""

    prompt: Prompt
    traced: TracedModel
    outputs: Any = None  # of the model, whose calls were noted by a method of the caller's

    @classmethod
    def check(
        cls,
        model: Any,
        inputs: Mapping[str, Any],
        *,
        target: Any,
        answer: Any,
        processor: Any,
        tower: TowerName,
        of: str | None = None,
        notes: NotesCalls | None = None,
    ) -> Asked:
        """Raises the errors of `explain`, for the method "input_gradient", which needs no position. `notes`: gets the calls, with
        gradients if the caller has them on; then the outputs of this run are stored."""
        request = Request.check(
            model,
            inputs,
            method=InputGradient(freeze=(), of=of),
            target=target,
            answer=answer,
            per_token=answer is None,
            processor=processor,
        )
        with torch.inference_mode(False), at_rest(request.model):
            prompt = lay_out(request)
        run = request.model, request.adapter, prompt.arguments, [tower], prompt.answer
        with packing(request.model, request.packs):
            traced = (trace_arguments(*run),) if notes is None else run_traced(notes, *run)
            return cls(prompt, *traced)

    @property
    def request(self) -> Request:
        return self.prompt.request

    @property
    def batch(self) -> int:
        """The number of samples. A tower without an adapter, such as that of several cameras, may have a larger batch."""
        recorded = [tower.name for tower in self.request.adapter.towers]
        return next((tower for tower in self.traced.towers if tower.name in recorded), self.traced.towers[0]).shape[0]

    def run(self, plans: Plans) -> Any:
        """The outputs of the edited model in eval mode."""
        model, packs = self.request.model, self.request.packs
        with torch.inference_mode(False), at_rest(model), packing(model, packs), EditedCalls(plans).observer():
            return model(**self.prompt.arguments)

    def scores(self, outputs: Any) -> tuple[Tensor, Any]:
        """The scores (B,), and their target."""
        request, prompt = self.request, self.prompt
        if prompt.answer is None:
            scores, target = choose_score(prompt, outputs, self.batch)
            if scores is None:
                raise ValueError("target must be a callable if the outputs have no logits; got None")
            return scores, request.target if target is None else target
        answer = replace(prompt.answer, answer_positions=prompt.answer.answer_positions + self._before)
        logits, of = request.adapter.scoring.logits(outputs), request.method.of or LOG_PROBABILITY
        return answer.scores(logits, prompt.arguments.get("logits_to_keep"), of).sum(1), None

    @property
    def _before(self) -> int:
        """The number of tokens before the text."""
        return next((tower.tokens.before for tower in self.traced.towers if bool(tower.answered.any())), 0)

    def probabilities(self, outputs: Any) -> Tensor:
        """The probabilities (B,) of the answer, or of the target among all logits; or the result of a callable target."""
        scores, _ = self.scores(outputs)
        if self.prompt.answer is not None:
            return scores.exp()
        if callable(self.request.target):
            return scores
        scoring = self.request.adapter.scoring
        if scoring.pairs or scoring.names_position:
            raise ValueError(
                f"model must predict tokens or classes, which have probabilities; got {type(self.request.model).__name__}. "
                "Pass target=, a callable(outputs) -> (B,) numbers"
            )
        if scoring.at_places(outputs):  # whose scores are log-probabilities
            return scores.exp()
        logits = scoring.per_row(scoring.logits(outputs), self.prompt.arguments)
        return (scores.double() - logits.double().logsumexp(-1)).exp()

    def at_once(self, batch_size: int) -> int:
        """How many copies of the batch run at once: one for a callable target, which expects the outputs of exactly the batch."""
        return 1 if callable(self.request.target) else batch_size

    def repeated(self, copies: int, target: Any) -> Asked:
        """The same for `copies` of the batch, one after the other, with the target that a first run has chosen."""
        prompt = self.prompt.repeated(copies, self.batch)
        if isinstance(target, Sequence) and not isinstance(target, str):
            prompt = prompt.about(list(target) * copies)
        return Asked(prompt, self.traced)


def repeated_set(tokens: TokenSet, copies: int) -> TokenSet:
    return replace(tokens, mask=tokens.mask.repeat(copies, 1))


def check_scores(scores: Tensor) -> None:
    """ValueError for scores that are NaN."""
    if bool(scores.isnan().any()):
        samples = scores.isnan().nonzero()[:, 0].tolist()
        raise ValueError(f"target must give scores that are numbers; got nan for samples {samples} of the batch")
