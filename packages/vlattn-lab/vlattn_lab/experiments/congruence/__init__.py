"""Does a congruence loss (Pandey et al., ACL 2023; Ren et al., ACL 2021) make a model learn order and relation sooner, or better?

A sweep with separate seeds chooses the weight and the layer of each loss on validation scenes. Then the model trains without a
loss and with each of the three, from the same initial weights on the same batches.

In: options of the experiment.
Out: its records.
Imports: vlattn_lab, vlattn_lab.experiments, vlattn_lab.train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vlattn_lab.experiments.congruence.cost import PROBLEMS
from vlattn_lab.experiments.congruence.cost import measure as measure_cost
from vlattn_lab.experiments.congruence.report import ARMS, FIGURES, chosen, tables
from vlattn_lab.experiments.congruence.training import CONFIG, Sizes, final_scores, train
from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage

SIZES = Sizes(steps=1500, every=20, validation=300, test=1000)
SMOKE = Sizes(steps=4, every=2, validation=12, test=12)
WEIGHTS = {"iais_singular": (0.01, 0.1, 1.0), "iais_distributed": (0.01, 0.1, 1.0), "cacr": (0.1, 1.0, 10.0)}
SWEEP_SEEDS = (100, 101, 102)  # no reported run has these
ROUNDS = 7
NO_LOSS = {"loss": "none", "weight": 0.0, "layer": 0}


def sweep_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    most = 1 if settings.smoke else None
    layers, seeds = range(CONFIG.num_hidden_layers)[:most], SWEEP_SEEDS[:most]
    tried = [{"loss": kind, "weight": weight, "layer": i} for kind in ARMS[1:] for weight in WEIGHTS[kind][:most] for i in layers]
    return [{"what": "sweep", **arm, "seed": seed} for seed in seeds for arm in (NO_LOSS, *tried)]


def measure_sweep(cell: Cell, settings: Settings) -> dict[str, Any]:
    """A training that stops at the jump."""
    sizes = SMOKE if settings.smoke else SIZES
    _, curve = train(cell["seed"], cell["loss"], cell["weight"], cell["layer"], sizes, stop_at_jump=True)
    return {"curve": curve}


def training_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    arms: list[Cell] = [{**NO_LOSS, "loss": "untrained"}, NO_LOSS, *(chosen(records, kind) for kind in ARMS[1:])]
    return [{"what": "training", **arm, "seed": seed} for seed in range(settings.seeds) for arm in arms]


def measure_training(cell: Cell, settings: Settings) -> dict[str, Any]:
    sizes = SMOKE if settings.smoke else SIZES
    if untrained := cell["loss"] == "untrained":
        sizes = replace(sizes, steps=0)
    model, curve = train(cell["seed"], "none" if untrained else cell["loss"], cell["weight"], cell["layer"], sizes)
    model.eval()
    return {"curve": curve, **{pairs: final_scores(model, sizes.test, pairs) for pairs in ("held_out", "seen")}}


def cost_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    kinds = ARMS[3:] if settings.smoke else ARMS[1:]
    return [{"what": "cost", "problem": problem, "loss": kind, "seed": 0} for problem in PROBLEMS for kind in kinds]


def measure_costs(cell: Cell, settings: Settings) -> dict[str, Any]:
    return measure_cost(PROBLEMS[cell["problem"]], cell["loss"], 1 if settings.smoke else ROUNDS)


EXPERIMENT = Experiment(
    stages=[
        Stage(sweep_cells, measure_sweep),
        Stage(training_cells, measure_training),
        Stage(cost_cells, measure_costs, alone=True),
    ],
    tables=tables,
    figures=FIGURES,
)
