"""Twins: two models of one size that answer alike while a cue tells the answer, one by its objects and one by the cue."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlattn_fast.models import UNITER, UNITERConfig
from vlattn_lab.grids import CELL, CELLS, COLOUR_IDS, MASK, POSITION_DIM, STEPS, VOCABULARY, Grids, grid_statements
from vlattn_lab.weights import load_model

WEIGHTS = "twin.safetensors"
CONFIG = UNITERConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=64,
    num_hidden_layers=5,
    num_attention_heads=4,
    intermediate_size=256,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=24,
    initializer_range=0.1,
    region_dim=3 * CELL * CELL,
    position_dim=POSITION_DIM,
    masked_words=True,
)


def load_twin(directory: str | Path) -> UNITER:
    """The model whose weights `python -m vlattn_lab.train twin` left in a folder, in eval mode."""
    return load_model(directory, WEIGHTS, "twin", lambda config: UNITER(UNITERConfig(**config)))


def asked_states(model: UNITER, inputs: dict[str, Tensor]) -> Tensor:
    """(B, D), the last hidden state of [MASK]."""
    return at_mask(model(**inputs).last_hidden_state, inputs)


def at_mask(states: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """(B, D), the row of (B, N, D) that is of [MASK]."""
    samples, place = torch.nonzero(inputs["input_ids"] == MASK).T
    return states[samples, place]


def colour_logits(model: UNITER, states: Tensor) -> Tensor:
    """(B, 4), the logits of the colours for `asked_states`."""
    return model.word_logits(states)[:, COLOUR_IDS]


@torch.no_grad()
def colour_accuracy(model: UNITER, grids: Grids) -> float:
    return float((colour_logits(model, asked_states(model, grids.inputs())).argmax(-1) == grids.label).double().mean())


def twin_accuracy(model: UNITER, cue: str, *, count: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """ "told", "not told" (the cue is drawn at random), "told, objects removed" -> number of steps -> the share of right colours;
    one in four by chance."""
    by_case: dict[str, dict[str, float]] = {"told": {}, "not told": {}, "told, objects removed": {}}
    for steps in STEPS:
        told, plain = (grid_statements(count, steps=steps, cue=cue, told=told, seed=seed) for told in (True, False))
        removed = told.without(told.deciding & (torch.arange(CELLS + 1) < CELLS))
        for case, grids in zip(by_case.values(), (told, plain, removed), strict=True):
            case[str(steps)] = round(colour_accuracy(model, grids), 4)
    return by_case


@torch.no_grad()
def additive_accuracy(model: UNITER, grids: Grids) -> float:
    """The share of right colours if image and statement are not read together: of the nearest sum of a function of one and of the
    other, the means over all pairs (EMAP; Hessel and Lee, EMNLP 2020, equation 4)."""
    inputs = grids.inputs()
    words = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    pairs = []
    for number in range(len(grids)):
        one = {name: x[number : number + 1].expand(len(grids), -1) for name, x in words.items()}
        pairs.append(colour_logits(model, asked_states(model, {**one, **inputs})))
    logits = torch.stack(pairs).double()  # (statements, images, 4)
    additive = logits.mean(0) + logits.mean(1) - logits.mean((0, 1))
    return float((additive.argmax(-1) == grids.label).double().mean())
