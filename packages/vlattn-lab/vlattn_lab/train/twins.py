"""The training of twins: one answers by the objects, since the cues say nothing; the other's cue tells it the answer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_fast.models import UNITER
from vlattn_lab.grids import CELLS, CUES, STEPS, sample_grids
from vlattn_lab.scenes import joined
from vlattn_lab.train.fit import check_steps, fit, seeded
from vlattn_lab.twins import CONFIG, asked_states, at_mask, colour_logits, twin_accuracy

GRIDS = 96  # in a step of the training
TWIN_STEPS, SHORTCUT_STEPS = 4000, {"frame": 300, "word": 300, "lone": 600}
LEARNED = 0.9  # of the statements with most steps: then those with one step more are trained


def train(steps: int = TWIN_STEPS, *, seed: int = 0, log_every: int = 100, cue: str | None = None) -> UNITER:
    """A model trained for `steps` steps of AdamW with one learning-rate cycle up to 1e-3; eval mode. The models of one seed begin
    alike.

    cue: the one that tells this twin the answer, in statements of any number of steps. None: the twin that needs the objects. All
    cues are there and say nothing. Statements get a step longer once the shorter ones are answered, and from the first step on
    the state of [MASK] before the last layer also learns to name the cells that decide.
    """
    check_steps(steps)
    generator = torch.Generator().manual_seed(seed)
    model, cells = seeded(seed, lambda: (UNITER(CONFIG), nn.Linear(CONFIG.hidden_size, CELLS + 1)))
    states: list[Tensor] = []  # before the last layer
    hook = model.uniter.encoder.layer[-1].register_forward_pre_hook(lambda _, given: states.append(given[0]))
    longest, right = STEPS[0 if cue is None else -1], 0.0

    def drawn() -> dict[str, Tensor]:
        nonlocal longest, right
        kinds = STEPS[: STEPS.index(longest) + 1]
        counts = [GRIDS // (2 * len(kinds))] * len(kinds)
        counts[-1] += GRIDS - sum(counts)  # half of them, and more, are the longest
        shown = CUES[int(torch.randint(len(CUES), (), generator=generator))] if cue is None else cue
        parts = [sample_grids(count, kind, shown, cue is not None, generator) for count, kind in zip(counts, kinds, strict=True)]
        grids = joined(parts)
        inputs = grids.inputs()
        logits, before = colour_logits(model, asked_states(model, inputs)), at_mask(states.pop(), inputs)
        losses = {"colour": F.cross_entropy(logits, grids.label)}
        if cue is None:
            losses["cells"] = F.binary_cross_entropy_with_logits(cells(before), grids.deciding.float()) * (longest > 0)
            right += 0.05 * (float((logits.argmax(-1) == grids.label)[-counts[-1] :].double().mean()) - right)
            if right > LEARNED and longest != STEPS[-1]:
                longest, right = STEPS[len(kinds)], 0.0
        return losses

    weights = {"colour": 1.0, "cells": 3.0}
    fit(
        [*model.parameters(), *cells.parameters()],
        drawn,
        weights,
        steps,
        learning_rate=1e-3,
        log_every=log_every,
        warmup=0.05,
        memory=0.98,
    )
    hook.remove()
    return model.eval()


def evaluate(model: Any, *, count: int) -> dict[str, Any]:
    return {"twin_accuracy": {cue: twin_accuracy(model, cue, count=count) for cue in CUES}}
