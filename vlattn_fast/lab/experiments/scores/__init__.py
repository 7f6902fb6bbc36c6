"""Score functions of attention on three tasks (Cao et al., "Understanding Attention for Vision-and-Language Tasks", COLING 2022).

The same small models are trained with each score function: matching of images and texts, question answering, pictures from
captions. The paper finds that the more accurate score is not the more interpretable one. Does that hold here?
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from vlattn_fast.lab.experiments.experiment import Cell, Experiment, Row, Settings, Stage
from vlattn_fast.lab.experiments.scores import answering, generation, matching, timing
from vlattn_fast.lab.experiments.scores.attend import ARMS, SCORES
from vlattn_fast.lab.experiments.scores.page import accuracy_and_interpretability, pictures, tables

TASKS: dict[str, Any] = {"matching": matching, "answering": answering, "generation": generation}
REFERENCES = {"answering": "frequent", "generation": "real"}  # arms without a model


def trainings(settings: Settings, rows: Sequence[Row]) -> list[Cell]:
    """Those of one seed follow one another, since a process keeps its scenes and encoders."""
    cells = [
        {"task": task, "arm": arm, "seed": seed}
        for seed in range(settings.seeds)
        for task in TASKS
        for arm in (*ARMS, *([REFERENCES[task]] if task in REFERENCES else []))
    ]
    return cells


def train(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Without denormal numbers: gradients of a saturated sigmoid are some, and CPUs are slow on them."""
    torch.set_flush_denormal(True)
    try:
        return _train(cell, settings)
    finally:
        torch.set_flush_denormal(False)


def _train(cell: Cell, settings: Settings) -> dict[str, Any]:
    module, arm, seed = TASKS[cell["task"]], cell["arm"], cell["seed"]
    sizes = module.SMOKE if settings.smoke else module.Sizes()
    if arm == "frequent":
        return {"trained": _rounded(answering.blind(sizes, seed))}
    if arm == "real":
        return {"trained": _rounded(generation.measure_real(seed, sizes)), **_shown(None, seed, sizes)}
    if module is generation:
        generation.prepare(seed, sizes)
    began = time.process_time()
    model, first = module.train(arm, seed, sizes)
    found: dict[str, Any] = {"training_seconds": round(time.process_time() - began, 2)}
    for name, one in (("trained", model), ("untrained", first)):
        found[name] = _rounded(module.measure(one, seed, sizes))
    return found | (_shown(model, seed, sizes) if module is generation else {})


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in found.items()}


def _shown(model: generation.Generator | None, seed: int, sizes: generation.Sizes) -> dict[str, Any]:
    return generation.samples(model, seed, sizes) if seed == 0 else {}


def timings(settings: Settings, rows: Sequence[Row]) -> list[Cell]:
    arms = list(SCORES)[:1] if settings.smoke else list(SCORES)
    return [{"what": what, "arm": arm, "seed": 0} for what in timing.MADE for arm in arms]


def time_steps(cell: Cell, settings: Settings) -> dict[str, Any]:
    if settings.smoke:
        return timing.measure(cell["what"], cell["arm"], rounds=1, least=0.0, variants=("ours", "formula"))
    return timing.measure(cell["what"], cell["arm"], rounds=5, least=0.03)


EXPERIMENT = Experiment(
    stages=[Stage(trainings, train), Stage(timings, time_steps, alone=True)],
    tables=tables,
    figures={"scores": accuracy_and_interpretability, "scores-pictures": pictures},
)
