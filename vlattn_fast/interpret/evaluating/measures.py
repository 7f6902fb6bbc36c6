"""The tests of `evaluate`: each reads the maps of a batch and adds to the table."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vlattn_fast._ground.extras import with_progress
from vlattn_fast.attach.session import at_rest
from vlattn_fast.interpret.evaluating.box_scores import BOX_SCORES
from vlattn_fast.interpret.evaluating.maps import Batch, maps_of, run_method
from vlattn_fast.interpret.evaluating.model_answers import Judge
from vlattn_fast.interpret.evaluating.perturbation import area_under, kept
from vlattn_fast.interpret.evaluating.plan import PARTS, Plan
from vlattn_fast.interpret.evaluating.randomised_weights import cascade
from vlattn_fast.interpret.evaluating.result_table import Tally
from vlattn_fast.interpret.records.unsupported import UndefinedRelevancy
from vlattn_fast.interpret.result.rank_correlation import rank_correlation


def score_boxes(plan: Plan, batch: Batch, tally: Tally) -> None:
    """The agreement of each map with the boxes."""
    for name, rows in batch.maps.items():
        for sample, row, boxes in zip(batch.samples, rows, batch.boxes, strict=True):
            values = row["image"]
            for test in (test for test in plan.tests if test in BOX_SCORES):
                if boxes is None or sample.boxes is None or values is None or len(values) == 0:
                    tally.add((name, test, "image"), None)
                else:
                    tally.add((name, test, "image"), BOX_SCORES[test](values, sample.boxes, boxes))


def perturb(plan: Plan, judge: Judge, batch: Batch, tally: Tally) -> None:
    """Curves of every method. An input that several steps, tests or methods share is run once."""
    places_of: dict[tuple[int, str, tuple[int, ...]], int] = {}
    plans: list[tuple[tuple[str, str, str], Sequence[float], list[tuple[int, str, tuple[int, ...]]]]] = []
    for name, rows in batch.maps.items():
        for test, steps in plan.steps.items():
            for part in PARTS:
                for row, values in enumerate(rows):
                    value = values[part]
                    if value is None or len(value) == 0:
                        tally.add((name, test, part), None)
                        continue
                    keys = [(row, part, tuple(entries)) for entries in kept(value, test, steps)]
                    for key in keys:
                        places_of.setdefault(key, len(places_of))
                    plans.append(((name, test, part), steps, keys))
    accuracy, probability = judge.run(batch.question, batch.samples, list(places_of))
    for line, x_axis, keys in plans:
        measured = accuracy if line[1] in ("positive", "negative") else probability
        curve = [measured[places_of[key]] for key in keys]
        for (row, part, entries), score in zip(keys, curve, strict=True):
            if math.isnan(score):
                left = f"{len(entries)} of {batch.samples[row].count(part)} entries of the {part}"
                raise ValueError(f"model must give scores that are numbers; got NaN for row {row} of a batch with {left} left")
        tally.add(line, area_under(x_axis, curve), curve)


def randomise(plan: Plan, batches: list[Batch], tally: Tally, generator: torch.Generator) -> None:
    """Correlations with the maps of ever more randomised models, except for constant and non-finite maps, which have none."""
    changed = copy.deepcopy(plan.model)
    curves: dict[tuple[str, str, int, int], list[float | None]] = {}
    first = batches[0].question.inputs
    for _ in with_progress(_stages(changed, first, plan.sanity_stages, plan.seed), "randomising"):
        for item, batch in enumerate(batches):
            for name, method in plan.methods.items():
                try:
                    result = run_method(changed, batch.question, method, plan.options)
                    again = maps_of(name, result, batch.samples, generator)
                except UndefinedRelevancy:  # as random weights may cause
                    again = [dict.fromkeys(PARTS) for _ in batch.samples]
                for row, (before, after) in enumerate(zip(batch.maps[name], again, strict=True)):
                    for part in PARTS:
                        one, two = before[part], after[part]
                        finite = two is not None and bool(two.isfinite().all())
                        value = rank_correlation(one, two) if one is not None and two is not None and finite else None
                        curves.setdefault((name, part, item, row), []).append(value)
    for (name, part, _, _), curve in curves.items():
        numbers = [value for value in curve if value is not None]
        tally.add((name, "sanity", part), curve[-1], numbers if len(numbers) == len(curve) else None)


def _stages(model: nn.Module, inputs: Mapping[str, Any], stages: int, seed: int) -> Iterator[int]:
    with torch.no_grad(), at_rest(model):
        groups = cascade(model, inputs, stages)
    generator = torch.Generator().manual_seed(seed)
    for stage, group in enumerate(groups):
        group.randomise(generator)
        yield stage
