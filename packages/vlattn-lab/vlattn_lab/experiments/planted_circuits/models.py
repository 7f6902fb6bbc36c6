"""Transformers of transformers' own classes with an algorithm written into their weights, so that the cause is known exactly.

A token is a sum of orthonormal directions without a mean, one for each fact about it. LayerNorm changes only the length of such a
sum, so a planted head reads a fact by its direction, matches it, and writes another one. All other heads and the MLPs keep the
small random weights of a new model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

TOKENS, WORDS = 20, 20  # of the decoder: the length of its text, [BOS] included, and its vocabulary without [BOS]
COLOURS = REGIONS = 8  # of the encoder: its scene has a region of each colour
DIGITS = 10
FILLERS = 4  # words of the encoder that say nothing, around the colour
NOISE = 0.05  # standard deviation of the random weights
HEADS, HEAD_DIM = 4, 32
WIDTH = HEADS * HEAD_DIM
LENGTH = math.sqrt(WIDTH)  # of a direction in the residual stream, as a norm leaves one

Planted = tuple[int, int, str, str]  # layer, head, the group that is read, and the group that reads


@dataclass(frozen=True)
class Samples:
    """Inputs of a planted model, and what is known about them.

    answers: (B,), the token or class that the algorithm gives. groups: bool (B, N) by name; each token is in one of them. read:
    the group of the token that gives the answer. content, key: the groups, of one token each, that the answer is copied from, and
    that this token is found by.
    """

    inputs: dict[str, Tensor]
    answers: Tensor
    groups: dict[str, Tensor]
    read: str
    content: str
    key: str

    def part(self, chosen: slice) -> Samples:
        """Some of them."""
        inputs, groups = ({name: x[chosen] for name, x in each.items()} for each in (self.inputs, self.groups))
        return replace(self, inputs=inputs, answers=self.answers[chosen], groups=groups)


@dataclass(frozen=True)
class Circuit:
    """A model with planted heads.

    edges: by which the content is found, and by which it is copied. is_causal: a token sees none that comes after it. draw:
    (count, seed) -> samples.
    """

    model: nn.Module
    edges: tuple[Planted, Planted]
    is_causal: bool
    draw: Callable[[int, int], Samples]


def planted(circuit: str, share: float, seed: int) -> Circuit:
    """One of CIRCUITS. share: of its attention that a planted head gives the token it looks for. seed: of all random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CIRCUITS[circuit](share)


def induction(share: float) -> Circuit:
    """GPT-2 of two layers: a text that ends in a word that it has had before, and the word that came after it is the answer.

    Head 0 of layer 0 attends to the token before and writes what this is; head 0 of layer 1 attends to the token behind the same
    word, and writes what this is to the output.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": TOKENS, "vocab_size": WORDS + 1}
    config = GPT2Config(**sizes, initializer_range=NOISE, tie_word_embeddings=False, bos_token_id=WORDS, eos_token_id=WORDS)
    model = GPT2LMHeadModel(config).eval()
    place, word, before, out = _directions([TOKENS, WORDS + 1, WORDS + 1, WORDS + 1])
    model.transformer.wpe.weight.data = LENGTH * place
    model.transformer.wte.weight.data = LENGTH * word
    model.lm_head.weight.data = out.clone()
    first, second = (block.attn for block in model.transformer.h)
    _plant_conv(first, *_head(place[:-1], place[1:], word, before, (2, 2), share))
    _plant_conv(second, *_head(before, word, word, out, (3, 3), share))

    def draw(count: int, seed: int) -> Samples:
        random = torch.Generator().manual_seed(seed)
        words = torch.rand(count, WORDS, generator=random).argsort(1)[:, : TOKENS - 2]
        place = torch.randint(TOKENS - 3, (count, 1), generator=random)
        start = torch.full((count, 1), WORDS)
        ids = torch.cat([start, words, words.gather(1, place)], 1)
        number = torch.arange(TOKENS).expand(count, -1)
        groups = {"matched": number == place + 1, "copied": number == place + 2, "last": number == TOKENS - 1}
        groups["others"] = ~torch.stack([*groups.values()]).any(0)
        answers = words.gather(1, place + 1)[:, 0]
        return Samples({"input_ids": ids}, answers, groups, "last", "copied", "matched")

    return Circuit(model, ((0, 0, "matched", "copied"), (1, 0, "copied", "last")), True, draw)


def lookup(share: float) -> Circuit:
    """VisualBERT of two layers: a scene of regions with a colour and a digit each, a text that names a colour, and the digit of
    the region of this colour is the answer, a class that is read at [CLS].

    At [CLS], head 0 of layer 0 attends to the word of a colour and writes which colour it is; head 0 of layer 1 attends to the
    region of this colour and writes its digit to the output.
    """
    from transformers import VisualBertConfig, VisualBertForVisualReasoning

    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": WIDTH,
    }
    sizes |= {"vocab_size": COLOURS + FILLERS + 2, "visual_embedding_dim": COLOURS + DIGITS, "num_labels": DIGITS}
    model = VisualBertForVisualReasoning(VisualBertConfig(**sizes, initializer_range=NOISE, pad_token_id=None)).eval()
    named, filler, flags, asked, colour, digit, out = _directions([COLOURS, FILLERS + 1, 2, COLOURS, COLOURS, DIGITS, DIGITS])
    first, is_colour = flags.split(1)
    embeddings = model.visual_bert.embeddings
    for name in ("position_embeddings", "token_type_embeddings", "visual_position_embeddings", "visual_token_type_embeddings"):
        nn.init.zeros_(getattr(embeddings, name).weight)
    embeddings.word_embeddings.weight.data = torch.cat([named + is_colour, filler, first])  # [SEP] and [CLS] are the last ones
    embeddings.visual_projection.weight.data = torch.cat([colour, digit]).T.contiguous()
    one, two = (layer.attention for layer in model.visual_bert.encoder.layer)
    _plant_linear(one, *_head(is_colour, first, named, asked, (2, 1), share))
    _plant_linear(two, *_head(colour, asked, digit, out, (2, 2), share))
    model.visual_bert.pooler.dense.weight.data[:DIGITS] = out / 10  # so small that its tanh is nearly linear
    model.cls.weight.data = 10 * torch.eye(DIGITS, WIDTH)

    def draw(count: int, seed: int) -> Samples:
        random = torch.Generator().manual_seed(seed)
        colours, digits = (torch.rand(count, size, generator=random).argsort(1)[:, :REGIONS] for size in (COLOURS, DIGITS))
        asked = torch.randint(COLOURS, (count, 1), generator=random)
        fillers = COLOURS + torch.rand(count, FILLERS, generator=random).argsort(1)
        place = torch.randint(FILLERS + 1, (count, 1), generator=random)
        words = torch.cat([asked, fillers], 1)
        order = torch.arange(FILLERS + 1).expand(count, -1)
        words = words.gather(1, torch.where(order == place, 0, order + (order < place)))
        end, start = (torch.full((count, 1), COLOURS + FILLERS + extra) for extra in (0, 1))
        features = torch.cat([nn.functional.one_hot(colours, COLOURS), nn.functional.one_hot(digits, DIGITS)], -1).float()
        inputs = {"input_ids": torch.cat([start, words, end], 1), "visual_embeds": features}
        text = inputs["input_ids"].shape[1]
        inputs |= {"attention_mask": torch.ones(count, text), "visual_attention_mask": torch.ones(count, REGIONS)}
        number = torch.arange(text + REGIONS).expand(count, -1)
        groups = {"class": number == 0, "word": number == 1 + place, "fillers": (number > 0) & (number < text)}
        groups["fillers"] = groups["fillers"] & ~groups["word"]
        is_asked = colours == asked
        groups["region"] = nn.functional.pad(is_asked, (text, 0))
        groups["regions"] = nn.functional.pad(~is_asked, (text, 0))
        return Samples(inputs, digits[is_asked], groups, "class", "region", "word")

    return Circuit(model, ((0, 0, "word", "class"), (1, 0, "region", "class")), False, draw)


CIRCUITS: dict[str, Callable[[float], Circuit]] = {"induction": induction, "lookup": lookup}


def _directions(sizes: list[int]) -> tuple[Tensor, ...]:
    """Orthonormal directions (size, WIDTH) without a mean, in so many sets."""
    random = torch.randn(WIDTH, WIDTH - 1, dtype=torch.float64)
    basis = torch.linalg.qr(random - random.mean(0)).Q.T.float()
    return basis[: sum(sizes)].split(sizes)


def _head(
    key: Tensor, query: Tensor, value: Tensor, out: Tensor, terms: tuple[int, int], share: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights (HEAD_DIM, WIDTH) of query, key and value, and (WIDTH, HEAD_DIM) of the output of one head.

    A query with the i-th direction of `query` attends to the key with the i-th of `key`, by a logit beyond the others' that gives
    it `share` among TOKENS tokens; the j-th direction of `value` becomes the j-th of `out`, LENGTH long. terms: of how many
    directions the tokens of keys and of queries consist, since a norm makes their sum that long.
    """
    key_length, query_length = (LENGTH / math.sqrt(count) for count in terms)
    scale = math.log(share / (1 - share) * (TOKENS - 1)) * math.sqrt(HEAD_DIM) / (key_length * query_length)
    weights = torch.zeros(4, HEAD_DIM, WIDTH)
    for weight, rows in zip(weights, (scale * query, key, value, out), strict=True):
        weight[: len(rows)] = rows
    return weights[0], weights[1], weights[2], weights[3].T * LENGTH / key_length


def _plant_conv(attention: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Into head 0 of GPT-2, whose weights are transposed, and whose queries, keys and values lie side by side."""
    joined = attention.c_attn.weight.data.unflatten(1, (3, WIDTH))[:, :, :HEAD_DIM]
    joined.copy_(torch.stack([query, key, value]).permute(2, 0, 1))
    attention.c_proj.weight.data[:HEAD_DIM] = out.T


def _plant_linear(attention: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Into head 0 of BERT's classes."""
    for name, weight in (("query", query), ("key", key), ("value", value)):
        getattr(attention.self, name).weight.data[:HEAD_DIM] = weight
    attention.output.dense.weight.data[:, :HEAD_DIM] = out
