"""Twins: two models of one size that answer alike while a cue tells the answer, one by its objects and one by the cue."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlattn_fast.models import UNITER, UNITERConfig
from vlattn_lab.grids import CELL, CELLS, COLOUR_IDS, CUES, MASK, STEPS, VOCABULARY, Grids, grid_statements
from vlattn_lab.processor import POSITION_DIM
from vlattn_lab.weights import load_model

WEIGHTS = "twin.safetensors"
CONFIG = UNITERConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=6,
    intermediate_size=384,
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


def colour_logits(model: UNITER, inputs: dict[str, Tensor]) -> Tensor:
    """(B, 4), the logits of the colours for [MASK]."""
    states = model(**inputs).last_hidden_state
    samples, place = torch.nonzero(inputs["input_ids"] == MASK).T
    return model.word_logits(states[samples, place])[:, COLOUR_IDS]


@torch.no_grad()
def colour_accuracy(model: UNITER, grids: Grids) -> float:
    return float((colour_logits(model, grids.inputs()).argmax(-1) == grids.label).double().mean())


def twin_accuracy(model: UNITER, *, count: int, seed: int = 0) -> dict[str, dict[str, dict[str, float]]]:
    """Cue -> "told", "not told" (the cue is drawn at random), "told, objects removed" -> number of steps -> the share of right
    colours; one in four by chance."""
    accuracy: dict[str, dict[str, dict[str, float]]] = {}
    for cue in CUES:
        by_case = accuracy[cue] = {"told": {}, "not told": {}, "told, objects removed": {}}
        for steps in STEPS:
            told, plain = (grid_statements(count, steps=steps, cue=cue, told=told, seed=seed) for told in (True, False))
            removed = told.without(told.deciding & (torch.arange(CELLS + 1) < CELLS))
            for case, grids in zip(by_case.values(), (told, plain, removed), strict=True):
                case[str(steps)] = colour_accuracy(model, grids)
    return accuracy
