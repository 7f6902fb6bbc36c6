"""Where does information flow from a region to a word, and which lists of attention's edges name what an answer needs?

Two CLIPMapper a seed, one that answers questions and one that writes captions. Attention between groups of tokens is cut layer by
layer; first-order effects of all edges and heads stand beside true ones; the first edges of several lists are cut together.

In: options of the experiment.
Out: its records.
Imports: vlattn_lab, vlattn_lab.experiments, vlattn_lab.train.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlattn_fast.measuring.provenance import fingerprint
from vlattn_fast.models import CLIPMapper
from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage
from vlattn_lab.experiments.flow.edges import Effects, cut_together, falls, head_effects
from vlattn_lab.experiments.flow.failures import by_mass, by_source, correlations, largest_miss
from vlattn_lab.experiments.flow.report import effects, flow_figure, tables
from vlattn_lab.experiments.flow.samples import draw
from vlattn_lab.mapper import load_captioner, load_vqa
from vlattn_lab.train.mapper import train

STEPS = {"vqa": 800, "captions": 400}  # a sixth of the shipped models' training, so that five seeds take under half an hour
DRAWN, SAMPLES = 200, 16  # scenes that tell the accuracy, and those of them that are measured


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    tasks = [*STEPS][: 1 if settings.smoke else None]
    return [{"task": task, "seed": seed} for seed in range(settings.seeds) for task in tasks]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    task, seed = cell["task"], cell["seed"]
    drawn, samples = (12, 2) if settings.smoke else (DRAWN, SAMPLES)
    model = trained(task, seed, settings)
    asked, accuracy = draw(task, model, drawn, samples, seed, every=settings.smoke)
    effects = Effects.of(model, asked)
    heads = head_effects(model, asked)
    return {
        "weights": fingerprint(model),
        "accuracy": accuracy,
        "probability": round(float(effects.probability.mean()), 4),
        "flow": falls(model, asked),
        "cuts": cut_together(model, asked, effects, seed),
        "correlations": correlations(effects, heads),
        "by mass": by_mass(effects),
        "by source": by_source(effects),
        "largest miss": largest_miss(effects),
        "edges": {name: _rounded(getattr(effects, name)) for name in ("first_order", "behind", "true", "mass")},
        "heads": dict(zip(("first_order", "true"), map(_rounded, heads), strict=True)),
    }


def trained(task: str, seed: int, settings: Settings) -> CLIPMapper:
    if settings.models is not None:
        load = load_vqa if task == "vqa" else load_captioner
        return load(Path(settings.models) / str(seed))[0]
    return train(task, 2 if settings.smoke else STEPS[task], seed=seed, log_every=0)


def _rounded(values: Any) -> list[float]:
    """The mean of each edge or head over the samples."""
    return [round(value, 5) for value in values.mean(1).tolist()]


EXPERIMENT = Experiment((Stage(cells, measure),), tables, {"flow": flow_figure}, effects)
