"""Does a term on attention or on relevancy keep a model from guessing, if it learns by policy gradient from guessable questions?

A first training gives a model that answers in part. A second one, by policy gradient, has questions whose words tell the answer;
the test has others. A search on validation scenes chooses the weight of each term. Then the model trains without a term and with
each, from the same first training on the same questions, with other seeds.

In: options of the experiment.
Out: its records.
Imports: vlattn_lab, vlattn_lab.experiments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vlattn_fast.measuring.memory import peak_of_call
from vlattn_fast.models import UNITER
from vlattn_lab.experiments.congruence.training import new_model
from vlattn_lab.experiments.evidence.report import FIGURES, best, effects, tables
from vlattn_lab.experiments.evidence.training import (
    BATCH,
    TERMS,
    Objective,
    Sizes,
    Term,
    batches,
    first_training,
    natural,
    sample,
    scores,
    second_training,
    step,
)
from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage, least_seconds

SIZES = Sizes(questions=1000, base=60, guessable=1024, steps=160, test=1000)
SMOKE = Sizes(questions=64, base=2, guessable=256, steps=4, test=12)
WEIGHTS = {
    "reward": (1.0, 10.0),
    "evidence": (0.1, 1.0),
    "divergence": (1.0, 100.0),
    "cacr": (1.0, 10.0),
    "relevancy": (0.1, 1.0),
}
SEARCH_SEED = 100  # no reported run has it
SEEDS = {"validation": 7, "test": 8}  # of the questions that measure a model
ROUNDS = 20


def search_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    tried = [("none", 0.0), *((name, weight) for name in TERMS for weight in WEIGHTS[name][: 1 if settings.smoke else None])]
    return [{"what": "search", "term": name, "weight": weight, "seed": SEARCH_SEED} for name, weight in tried]


def training_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    arms = [("first", 0.0), ("none", 0.0), *((name, best(records, name)["weight"]) for name in TERMS)]
    return [
        {"what": "training", "term": name, "weight": weight, "seed": seed}
        for seed in range(settings.seeds)
        for name, weight in arms
    ]


def cost_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"what": "cost", "seed": 0}]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    """ "first" is the model before its second training."""
    sizes, split = SMOKE if settings.smoke else SIZES, "validation" if cell["what"] == "search" else "test"
    model = first_training(cell["seed"], sizes)
    if cell["term"] != "first":
        second_training(model, cell["seed"], Term(cell["term"], cell["weight"]), sizes)
    return scores(model, sizes.test, split, SEEDS[split])


def measure_costs(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Least milliseconds of an update with each term, in turns, and the peak MiB of one."""
    calls: dict[str, Callable[[], None]] = {}
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name in ("none", *TERMS):
        generator = torch.Generator().manual_seed(cell["seed"])
        model, term = new_model(cell["seed"]), Term(name, 1.0)
        inputs, right, named = next(batches(natural(BATCH, "fit", generator), BATCH, generator))
        rollout = sample(model, inputs, right, named, term, generator)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # same cost, and the weights stay equal
        calls[name] = partial(_update, optimizer, model, Objective(term), (inputs, right, named, rollout))
        calls[name]()
        peak, _ = peak_of_call(calls[name])
        result[f"{name} MiB"] = None if peak is None else round(peak / 2**20, 2)
    seconds = least_seconds(calls, 1 if settings.smoke else ROUNDS)
    return result | {f"{name} ms": round(1e3 * value, 3) for name, value in seconds.items()}


def _update(optimizer: torch.optim.Optimizer, model: UNITER, objective: Objective, given: tuple[Any, ...]) -> None:
    step(optimizer, model, objective(model, *given))


EXPERIMENT = Experiment(
    stages=[Stage(search_cells, measure), Stage(training_cells, measure), Stage(cost_cells, measure_costs, alone=True)],
    tables=tables,
    figures=FIGURES,
    effects=effects,
)
