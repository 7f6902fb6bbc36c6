"""The small UNITER trained on DigitScenes: its sizes, its shipped weights, how it is measured."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.models import UNITER, UNITERConfig
from vlattn_lab.processor import POSITION_DIM, REGION_DIM, VOCABULARY, DigitProcessor
from vlattn_lab.scenes import NEGATIVES, Scenes, digit_scenes, swapped_pairs
from vlattn_lab.weights import DATA, load_model

WEIGHTS = "uniter_digitscenes.safetensors"
CONFIG = UNITERConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    intermediate_size=384,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=16,
    initializer_range=0.1,
    region_dim=REGION_DIM,
    position_dim=POSITION_DIM,
)


def load_uniter(directory: str | Path = DATA) -> tuple[UNITER, DigitProcessor]:
    """The UNITER trained on DigitScenes, in eval mode, and its processor. A directory holds the weights that
    `python -m vlattn_lab.train uniter --output DIR` writes; the default holds the shipped weights."""
    return load_model(directory, WEIGHTS, "uniter", lambda config: UNITER(UNITERConfig(**config))), DigitProcessor()


def log_odds(outputs: Any) -> Tensor:
    """(B): log odds that the caption is true of the picture."""
    logits: Tensor = outputs.logits
    return logits[:, 1] - logits[:, 0]


@torch.no_grad()
def matching_score(model: UNITER, scenes: Scenes, *, input_ids: Tensor | None = None) -> Tensor:
    """(B): log odds that a caption is true of its scene; input_ids (B, 7) replaces the captions."""
    inputs = scenes.inputs()
    if input_ids is not None:
        inputs["input_ids"] = input_ids
    return log_odds(model(**inputs))


def matching_accuracy(
    model: UNITER, *, count: int = 1000, seed: int = 0, split: str = "test", pairs: str | None = None
) -> dict[str, float]:
    """Accuracy for each kind of wrong caption: "digit", "relation", "order". Each is over `count` scenes with their true caption
    and the same scenes with a false caption. The remaining arguments are as in `digit_scenes`."""
    drawn = functools.partial(digit_scenes, count, seed=seed, split=split, pairs=pairs)
    true = (_comparable("a true caption", matching_score(model, drawn())) > 0).double().mean()
    accuracy = {}
    for negative in NEGATIVES:
        scores = _comparable(f"a caption with another {negative}", matching_score(model, drawn(negative=negative)))
        false = (scores <= 0).double().mean()
        accuracy[negative] = float(true + false) / 2
    return accuracy


def winoground_scores(
    model: UNITER, *, count: int = 1000, seed: int = 0, split: str = "test", pairs: str | None = None
) -> dict[str, float]:
    """Text, image and group score over `count` swapped pairs of scenes (Thrush et al., "Winoground", CVPR 2022,
    equations 1 to 3); chance is 1/4, 1/4 and 1/6."""
    one, two = swapped_pairs(count, seed=seed, split=split, pairs=pairs)
    own_one = _comparable("picture 0 with caption 0", matching_score(model, one))
    own_two = _comparable("picture 1 with caption 1", matching_score(model, two))
    crossed_one = _comparable("picture 0 with caption 1", matching_score(model, one, input_ids=two.input_ids))
    crossed_two = _comparable("picture 1 with caption 0", matching_score(model, two, input_ids=one.input_ids))
    text = (own_one > crossed_one) & (own_two > crossed_two)
    image = (own_one > crossed_two) & (own_two > crossed_one)
    return {name: float(hit.double().mean()) for name, hit in (("text", text), ("image", image), ("group", text & image))}


def _comparable(name: str, scores: Tensor) -> Tensor:
    """`scores` (B). ValueError for a NaN, which would lose every comparison."""
    places = scores.isnan().nonzero()[:, 0].tolist()
    if places:
        raise ValueError(f"model must give scores that can be compared; got NaN for {name}, at {places!r:.80}")
    return scores
