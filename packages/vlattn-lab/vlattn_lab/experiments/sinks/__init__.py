"""Which tokens receive attention without content, what do they take of each map, and does leaving them out help?

The models of DigitScenes as they are, and with a planted sink: a patch without a digit takes a known share of every query's
attention, and its values are nearly zero.

In: options of the experiment.
Out: its records.
Imports: vlattn_lab, vlattn_lab.experiments, vlattn_lab.experiments.flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage
from vlattn_lab.experiments.sinks.measures import detected, explained, seconds, thresholds
from vlattn_lab.experiments.sinks.planted import SHARES, plant
from vlattn_lab.experiments.sinks.report import effects, figure, tables
from vlattn_lab.experiments.sinks.samples import TASKS, draw

SAMPLES = 64


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    shares = SHARES[:2] if settings.smoke else SHARES
    tasks = [*TASKS][: 1 if settings.smoke else None]
    return [{"task": task, "seed": seed, "share": share} for seed in range(settings.seeds) for task in tasks for share in shares]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    task, share = cell["task"], cell["share"]
    model, asked = draw(task, cell["seed"], 4 if settings.smoke else SAMPLES, settings)
    right = asked.right(model)
    if share:
        plant(model, share)
    return {
        "samples": len(asked),
        "agreement": round(float((asked.right(model) == right).double().mean()), 4),
        "sinks": detected(model, asked),
        "thresholds": thresholds(model, asked) if share <= SHARES[1] else [],
        "maps": explained(model, asked),
    }


def cost(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"task": "cost", "seed": 0, "tokens": 64 if settings.smoke else 1024}]


def measure_cost(cell: Cell, settings: Settings) -> dict[str, Any]:
    return {"times": seconds(cell["tokens"], 1 if settings.smoke else 3)}


EXPERIMENT = Experiment((Stage(cells, measure), Stage(cost, measure_cost)), tables, {"sinks": figure}, effects)
