"""The questions of a data set: an item with an answer asks one for each of its tokens, or one for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import describe
from vlattn_fast.interpret.explaining.answer import adapter_of, explained_number, prepare_answer, start_tokens, with_prompts
from vlattn_fast.interpret.explaining.request import tokenizer_of
from vlattn_fast.interpret.relevancy.method import LOG_PROBABILITY
from vlattn_fast.interpret.result.numbers.words import join_tokens

KEYS = "inputs", "target", "answer", "boxes", "text_truth"
ALL, WORDS = "all", "words"


class TokenPlace(NamedTuple):
    """Which token of the data set is judged."""

    item: int
    position: int  # in the answer
    token: str  # or its id
    word: str


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        inputs, target, boxes, text_truth: see `evaluate`; for a token of an answer the inputs end with the answer in front of it.
        before: where the answer begins among the columns of `input_ids`: words from there on stay. None = no answer there.
        place: of a token of an answer.
        whole: the prompt, and the ids of an answer that is one question.
    """

    inputs: Mapping[str, Any]
    target: Any
    boxes: Any
    before: int | None = None
    place: TokenPlace | None = None
    whole: tuple[Mapping[str, Any], list[int]] | None = None
    text_truth: Any = None


def check_tokens(tokens: Any) -> None:
    """TypeError or ValueError unless `tokens` is None, "words", "all", indices or a callable."""
    if isinstance(tokens, str):
        if tokens not in (ALL, WORDS):
            raise ValueError(f"tokens must be 'words', 'all', indices or a callable; got {tokens!r}")
    elif tokens is not None and not callable(tokens):
        if not isinstance(tokens, Sequence) or not all(type(one) is int for one in tokens):
            raise TypeError(f"tokens must be 'words', 'all', indices or a callable; got {describe(tokens)}")


def items_of(model: nn.Module, number: int, item: Any, tokens: Any, per_token: bool, processor: Any) -> Iterator[Item]:
    """The questions of the data set's item of this number."""
    if isinstance(item, (tuple, list)) and len(item) == 3:
        yield Item(*item)
        return
    if not isinstance(item, Mapping):
        got = f"{len(item)} of them" if isinstance(item, (tuple, list)) else type(item).__name__
        raise TypeError(f"dataset must yield (inputs, target, boxes or None), or a mapping with 'inputs'; got {got}")
    if "inputs" not in item or set(item) - {*KEYS}:
        raise ValueError(f"dataset must give mappings with 'inputs' and among {', '.join(KEYS)}; got {', '.join(map(str, item))}")
    inputs: Mapping[str, Any] = item["inputs"]
    target, answer, boxes, truth = (item.get(name) for name in KEYS[1:])
    if answer is None:
        yield Item(inputs, target, boxes, text_truth=truth)
        return
    if target is not None:
        raise ValueError("dataset must give a target or an answer for each input; got both")
    adapter, tokenizer = adapter_of(model), tokenizer_of(processor)
    prepared = prepare_answer(answer, tokenizer, inputs, adapter, model)
    if len(prepared.ids) != 1:
        raise ValueError(f"dataset must give inputs with an answer one by one; got a batch of {len(prepared.ids)}")
    (ids,), is_text = prepared.ids, adapter.answers == "input_ids"
    before = int(prepared.answer_positions[0, 0]) + 1 if is_text else None
    if not per_token:
        if before is not None and before + len(ids) != prepared.arguments["input_ids"].shape[1]:
            raise ValueError("inputs must have no padding after the prompt if per_token=False; got some. Leave it out")
        yield Item(prepared.arguments, _Whole(ids), boxes, before, None, (inputs, ids), truth)
        return
    begin = inputs
    if not is_text and adapter.answers not in inputs:
        begin = {**inputs, adapter.answers: start_tokens(model, inputs)}
    names = [str(one) for one in (tokenizer.convert_ids_to_tokens(ids) if _names(tokenizer) else ids)]
    word_of = {n: word.text for word in join_tokens(names) for n in word.tokens} if _names(tokenizer) else dict(enumerate(names))
    for n in _chosen(tokens, names, word_of, _names(tokenizer)):
        prefix = with_prompts([ids[:n]], begin, adapter)
        arguments = prepare_answer(prefix, None, begin, adapter, model).arguments if n else begin
        place = TokenPlace(number, n, names[n], word_of[n])
        of_image, of_text = (_of_token(part, n, word_of[n]) for part in (boxes, truth))
        yield Item(arguments, ids[n], of_image, before, place, None, of_text)


def _names(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "convert_ids_to_tokens")


def _chosen(tokens: Any, names: Sequence[str], word_of: Mapping[int, str], named: bool) -> list[int]:
    """The numbers of the tokens that are judged."""
    count = len(names)
    if callable(tokens):
        chosen = [*tokens([*names])]
        if len(chosen) != count:
            raise ValueError(f"tokens must return True or False for each of the {count} tokens; got {len(chosen)}")
        return [n for n, one in enumerate(chosen) if one]
    if isinstance(tokens, str) or tokens is None:
        only_words = named if tokens is None else tokens == WORDS
        return [n for n in range(count) if not only_words or any(letter.isalnum() for letter in word_of[n])]
    for one in tokens:
        if not -count <= one < count:
            raise ValueError(f"tokens must be from {-count} to {count - 1}; got {one}")
    return sorted({one % count for one in tokens})


def _of_token(boxes: Any, n: int, word: str) -> Any:
    """The ground truth of a token: that of its number or of its word, or that of all."""
    if not isinstance(boxes, Mapping):
        return boxes
    return boxes.get(n, boxes.get(word))


class _Whole:
    """The probability of an answer, by outputs of which the answer's tokens are the last."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = torch.tensor([*ids])

    def __call__(self, outputs: Any) -> Tensor:
        logits = outputs.logits if hasattr(outputs, "logits") else outputs
        count = len(self.ids)
        rows = logits[:, -count - 1 : -1]
        ids = self.ids.to(logits.device).expand(len(rows), -1)
        return explained_number(LOG_PROBABILITY, rows, ids).sum(1).exp()
