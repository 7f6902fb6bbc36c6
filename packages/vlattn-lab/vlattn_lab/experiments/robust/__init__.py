"""Does a loss on relevancy (Chefer et al., NeurIPS 2022) turn a classifier from a spurious cue to the object, with few masks?

A classifier on the trained CLIP's vision tower learns from scenes whose shade goes with the answer. Then it trains on 12 of these
scenes with masks of the digit, by several losses. A sweep with separate seeds chooses the settings of each on validation scenes.

In: options of the experiment.
Out: its records.
Imports: vlattn_lab, vlattn_lab.experiments, vlattn_lab.train.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage
from vlattn_lab.experiments.robust.report import LABELS, Setting, chosen, effects, figure, tables
from vlattn_lab.experiments.robust.training import (
    Classifier,
    Scenes,
    Sizes,
    accuracies,
    draw,
    facts_of_picture,
    few,
    first_training,
    pointing,
    second_training,
    shown_scenes,
)

SIZES = Sizes(scenes=300, steps=60, fine=40, test=200)
SMOKE = Sizes(scenes=30, steps=1, fine=1, test=6)
SWEEP_SEEDS = (100, 101)  # no reported run has these
WEIGHTS, RATES = (1.0, 4.0), (3e-4, 1e-3)
MEASURED = 1000  # added to a seed: its measured scenes have no layout of its training scenes


def sweep_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"what": "sweep", "seed": seed} for seed in SWEEP_SEEDS[: 1 if settings.smoke else None]]


def measure_sweep(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Validation accuracies of each setting, from one first training."""
    sizes, seed = SMOKE if settings.smoke else SIZES, cell["seed"]
    seen, validation = draw(sizes.scenes, "fit", seed).shaded("as in training"), draw(sizes.test, "validation", seed + MEASURED)
    before = first_training(seen, seed, sizes)
    tried = []
    for loss, weight, rate in tried_settings(settings):
        model = after(before, seen, (loss, weight, rate), sizes)
        tried.append({"loss": loss, "weight": weight, "rate": rate, **accuracies(model, validation)})
    return {"tried": tried}


def tried_settings(settings: Settings) -> list[Setting]:
    weights, rates = (WEIGHTS[:1], RATES[:1]) if settings.smoke else (WEIGHTS, RATES)
    losses = [loss for loss in LABELS if loss != "before"]
    return [(loss, weight, rate) for loss in losses for weight in (weights if loss != "none" else (0.0,)) for rate in rates]


def training_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    best = [list(setting) for setting in chosen(records)]  # lists, as JSON has them
    return [{"what": "training", "seed": seed, "settings": best} for seed in range(settings.seeds)]


def measure_training(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Each loss with its chosen setting: "shaded", trained and measured as described above; "clean", the accuracy where neither
    training has a shade."""
    sizes, seed = SMOKE if settings.smoke else SIZES, cell["seed"]
    plain, test, shown = draw(sizes.scenes, "fit", seed), draw(sizes.test, "test", seed + MEASURED), shown_scenes(seed)
    measured: dict[str, Any] = {}
    for name, cue in (("shaded", "as in training"), ("clean", "none")):
        seen = plain.shaded(cue)
        before = first_training(seen, seed, sizes)
        measured[name] = []
        for setting in (None, *cell["settings"]):
            model = before if setting is None else after(before, seen, setting, sizes)
            facts: dict[str, Any] = {"loss": "before" if setting is None else setting[0]}
            if name == "clean":
                facts |= accuracies(model, test, cues=("none",))
            else:
                facts |= {**accuracies(model, test), **pointing(model, test), **facts_of_picture(model, shown.shaded(cue))}
            measured[name].append(facts)
    return measured


def after(before: Classifier, seen: Scenes, setting: Sequence[Any], sizes: Sizes) -> Classifier:
    """A copy of the classifier after its second training."""
    model = copy.deepcopy(before)
    loss, weight, rate = setting
    second_training(model, few(seen), loss, weight, rate, sizes.fine)
    return model


EXPERIMENT = Experiment(
    (Stage(sweep_cells, measure_sweep), Stage(training_cells, measure_training)), tables, {"robust": figure}, effects
)
