"""An answer: its tokens after the prompt, their log-probabilities, and the positions that predict them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.adapters.adapter import WITHOUT_ADAPTER, Adapter
from vlattn_fast.interpret.adapters.derived import drafts, generates
from vlattn_fast.interpret.adapters.image_grids import is_ids
from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.adapters.tokens import Text
from vlattn_fast.interpret.relevancy.method import LOG_PROBABILITY, LOGIT


@dataclass(frozen=True)
class Answer:
    """An answer of T tokens (shorter ones are padded) to prompts of N tokens."""

    ids: list[list[int]]  # each row's tokens
    arguments: dict[str, Any]  # the model's inputs with the answer after the last real token of each prompt, N + T in all
    answer_positions: Tensor  # int64 (B, T), the position that predicts each token of the answer, one before its own
    name: str = "input_ids"  # of the input that it is put into

    @functools.cached_property
    def real(self) -> Tensor:
        """bool (B, T), False = padding of a shorter answer."""
        return _padded(self.ids)[1]

    @property
    def start_positions(self) -> Tensor:
        """int64 (B, T), the position that predicts each token; padding of a shorter answer repeats its last token's."""
        last = self.real.sum(1, keepdim=True).sub(1).clamp(min=0)
        column = torch.arange(self.answer_positions.shape[1]).expand(len(last), -1)
        return self.answer_positions.gather(1, torch.minimum(column, last))

    def masked(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """The model's arguments, with a mask of the decoder's padding if an encoder-decoder has none."""
        mask = "decoder_attention_mask"
        if self.name == "input_ids" or arguments.get(mask) is not None:
            return arguments
        last = self.answer_positions[:, :1] + self.real.sum(1, keepdim=True)
        return {**arguments, mask: torch.arange(arguments[self.name].shape[1]) <= last}

    def scores(self, logits: Any, kept: Tensor | None, of: str = LOG_PROBABILITY) -> Tensor:
        """The logits, log-probabilities or margins (`of`) of the answer's tokens, (B, T), 0 for padding; see `predicting`."""
        rows, ids = self.predicting(logits, kept)
        return explained_number(of, rows, ids).masked_fill(~self.real.to(rows.device), 0.0)

    def predicting(self, logits: Any, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """The logits (B, T, vocabulary) that predict the answer's tokens, and these (B, T), 0 for padding.

        Args:
            logits: (B, N + T, vocabulary), or only of the positions `kept`; ValueError for others, or none.
        """
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else "none"
            raise ValueError(f"model must return logits (B, N, vocabulary) if answer is given; got logits {got}")
        logit_positions = self.answer_positions.to(logits.device)
        if kept is not None:
            logit_positions = torch.searchsorted(kept.to(logits.device), logit_positions)
        samples = torch.arange(len(logit_positions), device=logits.device)[:, None]
        return logits[samples, logit_positions], _padded(self.ids)[0].to(logits.device)

    def repeated(self, copies: int) -> Answer:
        """The answers of `copies` of the batch, one after the other."""
        return replace(self, ids=self.ids * copies, answer_positions=self.answer_positions.repeat(copies, 1))

    def start(self, like: Tensor, token: int | None) -> Tensor:
        """The weights (B, 1, N + T) of the row that predicts `token`, or of all such rows together; `like` has their shape."""
        some = slice(None) if token is None else slice(token, token + 1)
        weights = self.real[:, some].to(device=like.device, dtype=like.dtype)
        return torch.zeros_like(like[:, 0]).scatter_add_(1, self.answer_positions[:, some].to(like.device), weights)[:, None]


def explained_number(of: str, logits: Tensor, index: Tensor) -> Tensor:
    """The logit (...) of a class or token `index` among logits (..., C); its log-probability; or its margin, the logit less the
    log-sum-exp of all others."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, index[..., None])[..., 0]
    if of == LOGIT:
        return chosen
    if of == LOG_PROBABILITY:
        return chosen - logits.logsumexp(-1)
    return chosen - logits.scatter(-1, index[..., None], -torch.inf).logsumexp(-1)


class EmptyAnswer(ValueError):
    """An answer ends at once."""


def prepare_answer(answer: Any, tokenizer: Any, inputs: Mapping[str, Any], adapter: Adapter, model: nn.Module) -> Answer:
    """`answer` after the prompts of `inputs`; in an encoder-decoder after the decoder's prompt, by default the tokens that
    `generate` begins with.

    Raises:
        TypeError: neither token ids nor texts.
        ValueError: no tokenizer for texts; no tokens; no prompt; an input with an entry for each token that the
            answer cannot make longer; labels of an encoder-decoder; tokens before the answer that are not known.
    """
    begins = adapter.answers not in inputs and adapter.answers != "input_ids"
    prompts = start_tokens(model, inputs) if begins else inputs.get(adapter.answers)
    if not isinstance(prompts, Tensor) or prompts.ndim != 2:
        raise ValueError(f"inputs must contain '{adapter.answers}' (B, N), the prompt of the answer; got none")
    ids = token_ids(answer, tokenizer, len(prompts))
    is_bare = _is_text(answer)  # a text may begin like its prompt
    if begins:
        prompts, ids = _after_start(ids, prompts, model, is_bare)
        inputs = {**inputs, adapter.answers: prompts}
    elif not is_bare:
        ids = _after_prompts(ids, prompts, model)
    if adapter.answers == "input_ids":  # a decoder after an encoder may have another vocabulary
        _check_vocabulary(ids, model)
    shape = (prompts.shape[0], prompts.shape[1])
    renamed = not adapter.answers.endswith("input_ids")  # in a model of the caller's
    prefix = f"{adapter.answers}_" if renamed else adapter.answers.removesuffix("input_ids")
    if prefix and inputs.get("labels") is not None:
        raise ValueError(
            "inputs must not contain 'labels' if answer is given, since an encoder-decoder takes labels for the answer; got "
            "both. Leave one of them out"
        )
    if adapter.answer_type and inputs.get("token_type_ids") is None:  # they distinguish answer and prompt
        raise ValueError(
            "inputs must contain 'token_type_ids' (B, N) if answer is given, since they say which tokens attend to each other in "
            "both directions; got none. The model's processor returns them"
        )
    arguments = {name: value for name, value in inputs.items() if name != "labels"}  # a decoder computes a loss alone of them
    following = {name.removeprefix(prefix): value for name, value in arguments.items() if name.startswith(prefix)}
    following |= {"input_ids": prompts} if renamed else {}
    following = {name: value for name, value in following.items() if _follows_tokens(name, value, shape, prefix)}
    knows_masks = bool(adapter.towers) or hasattr(model, "can_generate")  # else the caller's own, which is causal
    if knows_masks and following.get("attention_mask") is None and len({len(row) for row in ids}) > 1:
        following["attention_mask"] = torch.ones_like(prompts)
    kind = adapter.towers[0].kind if adapter.towers and not prefix else Text
    positions = _AnswerPositions(ids, kind(following, shape).last_real(), shape[1], adapter.answer_type)
    for name, value in following.items():
        called = adapter.answers if name == "input_ids" else f"{prefix}{name}"
        if called in inputs or not renamed:
            arguments[called] = positions.longer(name, value, following)
    return Answer(ids, arguments, positions.answer_positions, adapter.answers)


def _padded(ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) with zeros after shorter answers, and bool (B, T), False = those zeros."""
    length = max((len(row) for row in ids), default=0)
    tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in ids], dtype=torch.long).view(len(ids), length)
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.long)
    return tokens, torch.arange(length) < lengths[:, None]


class _AnswerPositions:
    """Where answers `ids` of at most T tokens stand, after the tokens `last` (B,) of prompts of N = `size` tokens.

    Args:
        answer_type: the `token_type_ids` of an answer; None = as the last real token of the prompt has.
    """

    def __init__(self, ids: list[list[int]], last: Tensor, size: int, answer_type: int | None) -> None:
        self.tokens, self.real = _padded(ids)
        length, self.answer_type = self.tokens.shape[1], answer_type
        column, last = torch.arange(size + length), last[:, None]
        self.answered = (column > last) & (column <= last + length)  # bool (B, N + T)
        # The column of the prompt that each one repeats: the answer's repeat the last real token, what stood after it follows.
        self.source = torch.where(column > last + length, column - length, torch.minimum(column, last))
        self.answer_positions = last + torch.arange(length)

    def longer(self, name: str, value: Tensor, following: Mapping[str, Tensor]) -> Tensor:
        """An input with an entry for each token of the prompts, with those of the answer.

        transformers' `generate` does the same, but for `token_type_ids`, whose meaning the adapter says.
        """
        if name == "position_ids":
            return self._position_ids(value, following)
        new = {"input_ids": self.tokens, "attention_mask": self.real}
        types = {"mm_token_type_ids": 0, "token_type_ids": self.answer_type}  # 0 = text
        filling = new.get(name, types.get(name))
        if filling is None:
            return self._repeated(value)  # also of cross_attention_mask: words see what the last one sees (Mllama)
        return self._filled(value, filling)

    def _repeated(self, value: Tensor) -> Tensor:
        """(B, N, ...) as (B, N + T, ...), in which the answer repeats the last real token of its prompt."""
        samples = torch.arange(len(value), device=value.device)[:, None]
        return value[samples, self.source.to(value.device)]

    def _filled(self, value: Tensor, new: Tensor | int) -> Tensor:
        """(B, N) as (B, N + T), in which the answer has `new` (B, T), or one number for all."""
        new = torch.as_tensor(new).expand(self.tokens.shape)
        return self._repeated(value).masked_scatter(self.answered.to(value.device), new.to(value))

    def _position_ids(self, position_ids: Tensor, following: Mapping[str, Tensor]) -> Tensor:
        """Positions (B, N) count on from the last real token's, as (1, N) of all prompts do. Those of Qwen-VL (3, B, N) are all
        three one more than the largest of the prompt: an image's last token has not the largest in each of them."""
        prompts = following["input_ids"]
        steps = torch.arange(1, self.tokens.shape[1] + 1, device=position_ids.device)
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(prompts.shape)
            first = self.answer_positions[:, :1].to(position_ids.device)
            last = position_ids.gather(1, first) if len(prompts) else position_ids[:, :1]
            return self._filled(position_ids, last + steps)
        mask = following.get("attention_mask")
        real = torch.ones_like(prompts, dtype=torch.bool) if mask is None else mask.bool()
        lowest = torch.iinfo(position_ids.dtype).min
        largest = position_ids.masked_fill(~real.to(position_ids.device), lowest).amax((0, 2))
        return torch.stack([self._filled(axis, largest[:, None] + steps) for axis in position_ids])


# Inputs that have an entry for each token, and their shapes.
_SHAPES = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"), "(B, N)")
_SHAPES |= {"position_ids": "(B, N), (1, N) or (3, B, N)", "cross_attention_mask": "(B, N, images, tiles)"}
# Inputs about images, whose sizes may equal those of the prompts.
_OF_IMAGES = (
    *("pixel_", "aspect_ratio_", "image_sizes", "image_grid_", "video_grid_"),
    *("qformer_", "batch_num_images", "second_per_grid_"),
)


def _follows_tokens(name: str, value: Any, shape: tuple[int, int], prefix: str) -> bool:
    """Whether an input has an entry for each token of the prompts, and an answer makes it longer. ValueError if it has, and
    the answer's entries are unknown, or its shape is another one."""
    if value is None:
        return False
    sizes = tuple(value.shape) if isinstance(value, Tensor) else None
    if name not in _SHAPES:
        alike = sizes is not None and shape in (sizes[:2], sizes[-2:]) and not name.startswith(_OF_IMAGES)
        if alike or (prefix and sizes is not None):
            raise ValueError(
                f"inputs must not contain '{prefix}{name}' if answer is given, since its entries for the answer's tokens are "
                f"unknown; got {sizes}. Put the answer into the inputs yourself, and pass target= and position="
            )
        return False
    if name == "cross_attention_mask":
        fits = sizes is not None and sizes[:2] == shape
    elif name == "position_ids":
        fits = sizes in (shape, (1, shape[1]), (3, *shape))
    else:
        fits = sizes == shape
    if not fits:
        got = type(value).__name__ if sizes is None else sizes
        raise ValueError(f"{prefix}{name} must have shape {_SHAPES[name]} with (B, N) = {shape}; got {got}")
    return True


def encoder_decoder(model: nn.Module) -> Adapter | None:
    """The adapter of an encoder-decoder of a class without an adapter, whose towers are found; None for other models."""
    config = getattr(model, "config", None)
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, getattr(config, "text_config", None))):
        return Adapter((), "token", answers="decoder_input_ids")
    return None


def adapter_of(model: nn.Module) -> Adapter:
    """A model's adapter, or that of a generating encoder-decoder; WITHOUT_ADAPTER for other models, whose towers are found."""
    return find_adapter(model) or (encoder_decoder(model) if generates(model) else None) or WITHOUT_ADAPTER


def custom_decoder(model: nn.Module, inputs: Mapping[str, Any], answers: bool = False) -> Adapter | None:
    """The adapter of a model that is not of transformers and predicts tokens, whose towers are found; None for others. Its
    decoder takes 'decoder_input_ids'; or, for `answers`, the only input of ids (B, N)."""
    if hasattr(model, "can_generate"):  # of transformers
        return None
    name = "decoder_input_ids"
    if name not in inputs and name not in inspect.signature(model.forward).parameters:
        names = ids_in(inputs)
        if not answers or len(names) != 1:
            return None
        name = names[0]
    return Adapter((), "token", answers=name)


def ids_in(inputs: Mapping[str, Any]) -> list[str]:
    """The names of inputs that are token ids (B, N)."""
    return [name for name, value in inputs.items() if is_ids(value) and not name.endswith("mask")]


def block_decoder(model: nn.Module) -> Adapter | None:
    """The adapter of a model that predicts all tokens of its decoder's input at once, as in block diffusion: the last one is
    explained. It explains no answer, whose tokens would be predicted one after the other."""
    return Adapter((), "token", answers="decoder_input_ids") if drafts(model) else None


def start_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """(B, 1), the token that the answers of an encoder-decoder begin with."""
    configs = [getattr(model, "generation_config", None), config := getattr(model, "config", None)]
    configs += [getattr(config, name, None) for name in ("text_config", "decoder")]
    starts = (getattr(config, "decoder_start_token_id", None) for config in configs)
    start = next((token for token in starts if isinstance(token, int)), None)
    first = next((value for value in inputs.values() if isinstance(value, Tensor) and value.ndim), None)
    if start is None or first is None:
        raise ValueError(
            "inputs must contain 'decoder_input_ids' (B, 1), the token that texts begin with, if the config has no "
            f"decoder_start_token_id; got {sorted(inputs)}"
        )
    return torch.full((len(first), 1), start, device=first.device)


def _after_start(ids: list[list[int]], start: Tensor, model: nn.Module, is_bare: bool) -> tuple[Tensor, list[list[int]]]:
    """What an encoder-decoder's answers follow, (B, N), and the answers alone. `ids` may contain the start token (B, 1) and what
    follows it without the model's choice, as most of transformers' `generate` return them; Whisper's leaves them out."""
    first, ends = start[:1].flatten().tolist(), set[Any](end_tokens(model))
    config: Any = getattr(model, "generation_config", None)
    if ids and not is_bare and all(len(row) > 1 and row[:1] == first for row in ids):
        tables = (getattr(config, name, None) or {} for name in ("lang_to_id", "task_to_id"))
        forced = {token for table in tables for token in table.values()}
        forced |= {getattr(config, "no_timestamps_token_id", None), *_forced(model)}
        count = min(next((n for n, token in enumerate(row) if n and token not in forced), 1) for row in ids)
        return start.new_tensor([row[:count] for row in ids]), without_ends([row[count:] for row in ids], ends)
    before = start.new_tensor(_before_answers(model, ids))
    if len(before) and not is_bare:  # without an end token, shorter answers are filled up
        ends.add(getattr(config, "pad_token_id", None))
        if any(first[0] in row and first[0] not in ends for row in ids):
            raise ValueError(f"answer must begin with the start token {first[0]}, or not contain it; got other tokens before it")
        ids = without_ends(ids, ends)
    return torch.cat([start, before.expand(len(start), -1)], 1), ids


def _forced(model: nn.Module) -> list[int | None]:
    """The tokens that the config puts after the start token; None = one that the model finds out, as the language of speech."""
    configs = [getattr(model, name, None) for name in ("generation_config", "config")]
    tables = (getattr(config, "forced_decoder_ids", None) for config in configs)
    bos = getattr(configs[0], "forced_bos_token_id", None)
    return [*([] if bos is None else [bos]), *dict(next(filter(None, tables), [])).values()]


def _before_answers(model: nn.Module, ids: list[list[int]]) -> list[int]:
    """The tokens between the start token and answers `ids`. In Whisper these are the language and the task, and one that says
    that there are no time stamps. ValueError if the config does not say them."""
    before, config = _forced(model), getattr(model, "generation_config", None)
    names = ("language", "task", "lang_to_id", "task_to_id", "no_timestamps_token_id")
    settings: list[Any] = [getattr(config, name, None) for name in names]
    language, task, languages, tasks, no_times = settings
    if languages and (language is not None or task is not None):
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        name = str(language).lower()
        spellings = (name, f"<|{name}|>", f"<|{TO_LANGUAGE_CODE.get(name)}|>")
        before = [next((languages[key] for key in spellings if key in languages), None), tasks[task or "transcribe"]]
    if languages and before[:1] in ([], [None]):
        raise ValueError(
            "inputs must contain 'decoder_input_ids' (B, N), the tokens before the answer, if the generation config does not say "
            f"the language; got language={language!r}. model.generate(..., return_dict_in_generate=True) returns them with the "
            "answer"
        )
    if no_times is not None:
        before = [token for token in before if token != no_times]
        has_times = getattr(config, "return_timestamps", False) or (ids and all(row[0] > no_times for row in ids))
        before += [] if has_times else [no_times]
    return [token for token in before if token is not None]


def without_ends(answers: list[list[int]], ends: set[int]) -> list[list[int]]:
    """Answers without their first token of `ends` and all after it. EmptyAnswer if nothing is left of one."""
    cut = [row[: next((number for number, token in enumerate(row) if token in ends), len(row))] for row in answers]
    if not all(cut):
        raise EmptyAnswer("each answer must have a token before its end token; got an empty one")
    return cut


def end_tokens(model: Any) -> set[int]:
    """The ids that end what a model generates."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])


def _after_prompts(ids: list[list[int]], prompts: Tensor, model: nn.Module) -> list[list[int]]:
    """Only the answers, if `ids` are what `model.generate` returned: the prompt, the answer, and what follows its end."""
    before = prompts.tolist()
    if not ids or not all(
        len(row) > len(prompt) and row[: len(prompt)] == prompt for row, prompt in zip(ids, before, strict=True)
    ):
        return ids
    return without_ends([row[prompts.shape[1] :] for row in ids], end_tokens(model))


def with_prompts(answers: list[list[int]], inputs: Mapping[str, Any], adapter: Adapter | None) -> list[list[int]]:
    """Answers as `model.generate` returns them, each after its prompt: one may begin like its prompt, and is whole."""
    prompts = None if adapter is None else inputs.get(adapter.answers)
    return answers if prompts is None else [[*prompt, *row] for prompt, row in zip(prompts.tolist(), answers, strict=True)]


def _check_vocabulary(ids: list[list[int]], model: nn.Module) -> None:
    """ValueError for tokens that the model has no embedding of."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)
    try:
        size = getattr(embedding(), "num_embeddings", None)
    except NotImplementedError:
        return
    largest = max((max(row) for row in ids), default=0)
    if size is not None and largest >= size:
        raise ValueError(f"answer must hold token ids below {size}, the vocabulary of {type(model).__name__}; got {largest}")


def _is_text(answer: Any) -> bool:
    """Whether an answer is a text, or one text a row."""
    return isinstance(answer, str) or (isinstance(answer, Sequence) and all(isinstance(part, str) for part in answer))


def token_ids(answer: Any, tokenizer: Any, batch: int) -> list[list[int]]:
    answer = getattr(answer, "sequences", answer)  # of generate(return_dict_in_generate=True)
    if isinstance(answer, str):
        answer = [answer] * batch
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if not isinstance(answer, Sequence) or not answer:
        if batch == 0:
            return []
        raise TypeError(f"answer must be token ids (B, T) or (T,), a text, or a text for each prompt; got {answer!r}")
    if _is_text(answer):
        if tokenizer is None:
            raise ValueError("processor must have a tokenizer for an answer that is text; got none")
        encode = getattr(tokenizer, "tokenizer", tokenizer)
        answer = [encoded("answer", part, encode) for part in answer]
    answer = [part.tolist() if hasattr(part, "tolist") else part for part in answer]  # NumPy's and torch's
    if all(isinstance(part, int) for part in answer):
        answer = [answer] * batch
    if not all(isinstance(row, Sequence) and all(type(token) is int for token in row) for row in answer):
        raise TypeError(f"answer must be token ids (B, T) or (T,), a text, or a text for each prompt; got {answer!r}")
    answers = [list(row) for row in answer]
    if (lowest := min((token for row in answers for token in row), default=0)) < 0:  # as -100, which fills up labels
        raise ValueError(f"answer must hold token ids from 0 on; got {lowest}")
    if len(answers) != batch:
        raise ValueError(f"answer must have one answer for each of the {batch} prompts; got {len(answers)}")
    if not all(answers):
        raise ValueError("each answer must have at least one token; got an empty one")
    return answers


def encoded(name: str, text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text without special ones. ValueError, with the argument's `name`, if a part is not in the vocabulary."""
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    unknown = getattr(tokenizer, "unk_token", None)
    if unknown and tokenizer.unk_token_id in ids and unknown not in text:
        raise ValueError(f"{name} must be text in the tokenizer's vocabulary; got {text!r}, for which it gives {unknown!r}")
    return ids
