"""The second stage of `explain`: the model's arguments, with an answer behind the prompts if one is explained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlattn_fast.interpret.explaining.answer import Answer, prepare_answer
from vlattn_fast.interpret.explaining.inputs import is_empty, prepare_inputs
from vlattn_fast.interpret.explaining.request import Request


@dataclass(frozen=True)
class Prompt:
    """The arguments of the model's call.

    Args:
        arguments: its keyword arguments.
        pairs: where images are compared with texts, the text of each row.
        answer: the answer among the tokens; None where a target is explained.
    """

    arguments: dict[str, Any]
    pairs: list[int] | None
    answer: Answer | None

    @property
    def empty(self) -> bool:
        """Whether the batch has no row."""
        return is_empty(self.arguments)


def lay_out(request: Request, inputs: Mapping[str, Any]) -> Prompt:
    answer = None
    if request.answer is not None:
        answer = prepare_answer(request.answer, request.tokenizer, inputs, request.record, request.model)
        inputs = answer.arguments
    logit_positions = None if answer is None else answer.answer_positions
    arguments, pairs = prepare_inputs(request.model, inputs, request.record, request.target, logit_positions)
    return Prompt(arguments, pairs, answer)
