"""An answer: its tokens behind the prompt, their log-probabilities, and the rows that predict them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.inputs import last_real
from vlattn_fast.interpret.records import Family


@dataclass(frozen=True)
class Answer:
    """An answer of T tokens (shorter ones are padded) to prompts of N tokens.

    Args:
        ids: each row's tokens.
        arguments: the model's inputs with the answer behind the last real token of each prompt, N + T tokens in all.
        positions: int64 (B, T), where each token of the answer is predicted: the place in front of its own.
    """

    ids: list[list[int]]
    arguments: dict[str, Any]
    positions: Tensor

    @property
    def real(self) -> Tensor:
        """bool (B, T), False = padding of a shorter answer."""
        lengths = torch.tensor([len(row) for row in self.ids])
        return torch.arange(self.positions.shape[1]) < lengths[:, None]

    def scores(self, logits: Any, kept: Tensor | None) -> Tensor:
        """The log-probabilities (B, T) of the answer's tokens, 0 for padding.

        Args:
            logits: (B, N + T, vocabulary), or of the positions `kept` alone.

        Raises:
            ValueError: other logits, or none.
        """
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else "none"
            raise ValueError(f"answer must be of a model whose logits are (B, N, vocabulary); got logits {got}")
        positions = self.positions.to(logits.device)
        if kept is not None:
            positions = torch.searchsorted(kept.to(logits.device), positions)
        rows = torch.arange(len(positions), device=logits.device)[:, None]
        ids = torch.zeros_like(positions)
        for row, tokens in enumerate(self.ids):
            ids[row, : len(tokens)] = torch.tensor(tokens, device=ids.device)
        log_probabilities = logits[rows, positions].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return log_probabilities.gather(2, ids[..., None])[..., 0].masked_fill(~self.real.to(ids.device), 0.0)

    def start(self, like: Tensor, token: int | None) -> Tensor:
        """The weights (B, 1, N + T) of the row that predicts `token`, or of all such rows together; `like` has their shape."""
        real = self.real if token is None else self.real[:, token : token + 1]
        positions = self.positions if token is None else self.positions[:, token : token + 1]
        weights = real.to(device=like.device, dtype=like.dtype)
        return torch.zeros_like(like[:, 0]).scatter_add_(1, positions.to(like.device), weights)[:, None]


def prepare_answer(answer: Any, tokenizer: Any, inputs: Mapping[str, Any], family: Family | None, model: nn.Module) -> Answer:
    """`answer` behind the prompts of `inputs`; in an encoder-decoder behind the decoder's, which is its start token alone unless
    `inputs` have another.

    Raises:
        TypeError: neither token ids nor texts.
        ValueError: the model is neither a decoder with a record nor an encoder-decoder; no tokenizer for texts; no tokens;
            nothing to put them behind.
    """
    if family is None or family.score != "token":
        raise ValueError(
            "answer must be of a decoder with a record, which predicts the next token, or of an encoder-decoder; got "
            f"{type(model).__name__}"
        )
    if family.answers not in inputs and family.answers != "input_ids":
        inputs = {**inputs, family.answers: _start_tokens(model, inputs)}
    prompts = inputs.get(family.answers)
    if not isinstance(prompts, Tensor) or prompts.ndim != 2:
        raise ValueError(f"inputs must contain '{family.answers}' (B, N), which the answer is put behind; got none")
    ids = token_ids(answer, tokenizer, len(prompts))
    length = max((len(row) for row in ids), default=0)
    shape = (prompts.shape[0], prompts.shape[1])
    prefix = family.answers.removesuffix("input_ids")
    beside = {name.removeprefix(prefix): name for name in inputs if name.startswith(prefix)}  # what goes along with the tokens
    of_tower = "text" if prefix else family.towers[0].tokens
    last = last_real(of_tower, {name: inputs[full] for name, full in beside.items()}, shape)
    arguments = dict(inputs)
    if inputs.get(f"{prefix}attention_mask") is None and any(len(row) < length for row in ids):
        arguments[f"{prefix}attention_mask"] = torch.ones_like(prompts)
        beside["attention_mask"] = f"{prefix}attention_mask"
    # Where each of the N + T columns comes from: the prompt, the answer, then what was behind the prompt's last real token.
    column = torch.arange(shape[1] + length)
    answered = (column > last[:, None]) & (column <= last[:, None] + length)
    source = torch.where(column > last[:, None] + length, column - length, torch.minimum(column, last[:, None]))
    tokens = torch.zeros(shape[0], length, dtype=torch.long)
    for row, row_ids in enumerate(ids):
        tokens[row, : len(row_ids)] = torch.tensor(row_ids)
    real = torch.arange(length) < torch.tensor([len(row) for row in ids])[:, None]
    for name, full in beside.items():
        value = arguments[full]
        if not isinstance(value, Tensor) or value.shape[:2] != shape or name.startswith("pixel"):
            continue
        places = answered.to(value.device)
        rows = torch.arange(shape[0], device=value.device)[:, None]
        longer = value[rows, source.to(value.device)]  # the answer repeats what the last real token has
        if name == "input_ids":
            longer[places] = tokens.to(value).flatten()
        elif name == "attention_mask":
            longer[places] = real.to(value).flatten()
        elif name == "position_ids":
            longer[places] += torch.arange(1, length + 1, device=value.device).repeat(shape[0])
        elif name.endswith("type_ids"):
            longer[places] = 0  # text
        arguments[full] = longer
    return Answer(ids, arguments, last[:, None] + torch.arange(length))


def encoder_decoder(model: nn.Module) -> Family | None:
    """The family of an encoder-decoder without a record, whose towers are found; None for other models."""
    config = getattr(model, "config", None)
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, getattr(config, "text_config", None))):
        return Family((), "token", answers="decoder_input_ids")
    return None


def _start_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """(B, 1), the token that the answers of an encoder-decoder begin with."""
    configs = [getattr(model, "generation_config", None), config := getattr(model, "config", None)]
    configs += [getattr(config, name, None) for name in ("text_config", "decoder")]
    known = (getattr(config, "decoder_start_token_id", None) for config in configs)
    start = next((token for token in known if isinstance(token, int)), None)
    first = next((value for value in inputs.values() if isinstance(value, Tensor) and value.ndim), None)
    if start is None or first is None:
        raise ValueError(
            f"inputs must contain 'decoder_input_ids' where the config has no decoder_start_token_id; got {sorted(inputs)}"
        )
    return torch.full((len(first), 1), start, device=first.device)


def token_ids(answer: Any, tokenizer: Any, batch: int) -> list[list[int]]:
    if isinstance(answer, str):
        answer = [answer] * batch
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if not isinstance(answer, Sequence) or not answer:
        if batch == 0:
            return []
        raise TypeError(f"answer must be token ids (B, T), (T,), a text or one text a row; got {answer!r}")
    if all(isinstance(part, str) for part in answer):
        if tokenizer is None:
            raise ValueError("tokenizer must be given for an answer that is text; got None")
        encode = getattr(tokenizer, "tokenizer", tokenizer)
        answer = [list(encode(part, add_special_tokens=False)["input_ids"]) for part in answer]
    answer = [part.tolist() if hasattr(part, "tolist") else part for part in answer]  # NumPy's and torch's
    if all(isinstance(part, int) for part in answer):
        answer = [answer] * batch
    if not all(isinstance(row, Sequence) and all(type(token) is int for token in row) for row in answer):
        raise TypeError(f"answer must be token ids (B, T), (T,), a text or one text a row; got {answer!r}")
    rows = [list(row) for row in answer]
    if (lowest := min((token for row in rows for token in row), default=0)) < 0:  # as -100, which fills up labels
        raise ValueError(f"answer must hold token ids from 0 on; got {lowest}")
    if len(rows) != batch:
        raise ValueError(f"answer must have one row for each of the {batch} prompts; got {len(rows)}")
    if not all(rows):
        raise ValueError("answer must have at least one token in each row; got an empty one")
    return rows
