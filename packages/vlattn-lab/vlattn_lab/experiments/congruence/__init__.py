"""Does a loss on attention (CACR: Pandey et al., ACL 2023; IAIS: Ren et al., ACL 2021) or on relevancy help with swapped pairs?

A model trains on so few scenes that it learns order and relation in part. A search on validation scenes chooses the weight, the
schedule, the layer and the direction of each loss. Then the model trains without a loss and with each, from the same initial
weights on the same batches, with other seeds.

In: options of the experiment.
Out: its records.
Imports: vlattn_lab, vlattn_lab.experiments, vlattn_lab.train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from vlattn_fast.backends.reference.congruence_loss import KINDS as PUBLISHED
from vlattn_lab.experiments.congruence.cost import PROBLEMS
from vlattn_lab.experiments.congruence.cost import measure as measure_cost
from vlattn_lab.experiments.congruence.report import FIGURES, LOSSES, best, effects, tables
from vlattn_lab.experiments.congruence.training import KINDS, MATCHED, Setting, Sizes, scores, train
from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage

SIZES = Sizes(scenes=360, steps=720, every=60, validation=500, test=1000)
SMOKE = Sizes(scenes=48, steps=4, every=2, validation=12, test=12)
WEIGHTS = {loss: (0.1, 1.0, 10.0) if loss == "cacr" else (0.01, 0.1, 1.0) for loss in LOSSES}
FRACTION = (  # weight, schedule, layer, direction
    (0, "exp", 0, "both"),
    (0, "log", 1, "alternate"),
    (1, "linear", 1, "both"),
    (1, "const", 0, "text"),
    (2, "exp", 1, "text"),
    (2, "const", 0, "alternate"),
)
SEARCH_SEEDS = (100, 101)  # no reported run has these; the first sees all settings, the second the best ones
FINALISTS = 2
ROUNDS = 7
SETTING = tuple(asdict(Setting()))


def settings_of(loss: str) -> list[Setting]:
    """The settings that the search tries. Of a congruence loss these are six of 72, in which each level of weight, layer and
    direction occurs equally often. The other losses have no layer or direction."""
    weights = WEIGHTS[loss]
    if loss not in KINDS:
        return [Setting(loss, weight, schedule) for weight, schedule in zip(weights, ("linear", "log", "const"), strict=True)]
    return [Setting(loss, weights[i], schedule, layer, direction) for i, schedule, layer, direction in FRACTION]


def search_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    tried = [Setting(), *(one for loss in LOSSES for one in settings_of(loss)[: 1 if settings.smoke else None])]
    return [{"what": "search", **asdict(one), "seed": SEARCH_SEEDS[0]} for one in tried]


def final_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    finalists = [Setting(), *(setting(one) for loss in LOSSES for one in best(records, loss)[:FINALISTS])]
    return [{"what": "search", **asdict(one), "seed": SEARCH_SEEDS[1]} for one in finalists]


def room_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    sizes = SMOKE if settings.smoke else SIZES
    counts = (sizes.scenes + 5 * MATCHED, sizes.steps * MATCHED)  # some more; a new scene each time
    return [{"what": "room", "scenes": count, "seed": seed} for count in counts for seed in SEARCH_SEEDS[:1]]


def training_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    arms = [Setting("untrained"), Setting(), *(setting(best(records, loss)[0]) for loss in LOSSES)]
    return [{"what": "training", **asdict(arm), "seed": seed} for seed in range(settings.seeds) for arm in arms]


def cost_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    kinds = PUBLISHED[:1] if settings.smoke else PUBLISHED
    return [{"what": "cost", "problem": problem, "loss": kind, "seed": 0} for problem in PROBLEMS for kind in kinds]


def setting(record: Record) -> Setting:
    return Setting(**{name: record[name] for name in SETTING})


def measure_search(cell: Cell, settings: Settings) -> dict[str, Any]:
    """The scores on validation scenes alone."""
    sizes = SMOKE if settings.smoke else SIZES
    tried = Setting() if cell["what"] == "room" else setting(cell)
    sizes = replace(sizes, every=sizes.steps + 1, scenes=cell.get("scenes", sizes.scenes))
    model, _ = train(cell["seed"], tried, sizes)
    return {"validation": scores(model, sizes.validation, "validation", "seen")}


def measure_training(cell: Cell, settings: Settings) -> dict[str, Any]:
    sizes, arm = SMOKE if settings.smoke else SIZES, setting(cell)
    if arm.loss == "untrained":
        sizes, arm = replace(sizes, steps=0), Setting()
    model, curve = train(cell["seed"], arm, sizes)
    return {"curve": curve, **{pairs: scores(model, sizes.test, "test", pairs) for pairs in ("held_out", "seen")}}


def measure_costs(cell: Cell, settings: Settings) -> dict[str, Any]:
    return measure_cost(PROBLEMS[cell["problem"]], cell["loss"], 1 if settings.smoke else ROUNDS)


EXPERIMENT = Experiment(
    stages=[
        Stage(search_cells, measure_search),
        Stage(final_cells, measure_search),
        Stage(training_cells, measure_training),
        Stage(room_cells, measure_search),
        Stage(cost_cells, measure_costs, alone=True),
    ],
    tables=tables,
    figures=FIGURES,
    effects=effects,
)
