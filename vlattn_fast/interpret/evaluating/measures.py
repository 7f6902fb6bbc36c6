"""The tests of `evaluate`: each takes the maps of a batch and adds to the table."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.attachments import add_pre_hook
from vlattn_fast._ground.extras import with_progress
from vlattn_fast.attach.session import at_rest
from vlattn_fast.interpret.evaluating.box_scores import BOX_SCORES, grid_entries
from vlattn_fast.interpret.evaluating.curves import BOTH, CURVES, PARTS
from vlattn_fast.interpret.evaluating.evaluation import Tally
from vlattn_fast.interpret.evaluating.maps import Batch, maps_of, run_method
from vlattn_fast.interpret.evaluating.model_answers import Judge, Key
from vlattn_fast.interpret.evaluating.plan import INTERVENTION, MEASURED, Plan
from vlattn_fast.interpret.evaluating.ties import coarsest, constant, rounding
from vlattn_fast.interpret.explaining.question import UndefinedRelevancy
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation

_NEEDS = {
    **{test: curve.needs for test, curve in CURVES.items()},
    **dict.fromkeys(BOX_SCORES, "boxes or a mask and a map of its image"),
    "sanity": "a finite map that is not constant, also with random weights",
    **dict.fromkeys(MEASURED[INTERVENTION], "a map with three pieces or words of different values that the model attends to"),
}


def check_samples(tally: Tally, named: Iterable[str]) -> None:
    """ValueError for a data set without a sample, and for a test that the user named and that no sample supports."""
    table = tally.table()
    if not any(entry["samples"] or entry["left_out"] for entry in table):
        raise ValueError("dataset must hold at least one sample; got none")
    counted = {entry["test"] for entry in table if entry["samples"]}
    for test in named:
        if test not in counted:
            lack = max((entry["note"] for entry in table if entry["test"] == test), key=len)
            raise ValueError(f"Test {test!r} is impossible with this model and data set: {lack}. Leave it out of tests=")


def lacks(tally: Tally, batch: Batch, plan: Plan) -> None:
    """Notes for each test what no sample of the batch has."""
    texts = "input_ids" in batch.question.paired and not any(plan.options.get(name) for name in ("tokenizer", "processor"))
    for name, test, part in plan.keys:
        unnamed = texts and part != "image" and isinstance(plan.methods[name], (str, Method))
        hint = "; pass processor= to find the words" if unnamed and batch.maps[name][0]["text"] is None else ""
        needs = "true words" if part == "text" and test in BOX_SCORES else _NEEDS[test]
        tally.lacks[name, test, part] = f"no sample has {needs}{hint}"


def score_boxes(plan: Plan, batch: Batch, tally: Tally) -> None:
    """The agreement of each map with the ground truth. Words are in a row, each with its width."""
    tally.asks_words |= batch.item.text_truth is not None
    for name, maps in batch.maps.items():
        for sample, parts, *truths in zip(batch.samples, maps, batch.truths["image"], batch.truths["text"], strict=True):
            places = {"image": sample.boxes, "text": grid_entries(1, sample.count("text"))}
            for (part, boxes), truth in zip(places.items(), truths, strict=True):
                values = parts[part]
                for test in (test for test in plan.tests if test in BOX_SCORES):
                    if truth is None or boxes is None or values is None or not len(values):
                        tally.add((name, test, part), None)
                    else:
                        tally.add((name, test, part), BOX_SCORES[test](values, boxes, truth))


def perturb(plan: Plan, judge: Judge, batch: Batch, tally: Tally) -> None:
    """Curves of every method. An input that several steps, tests or methods share runs once."""
    indices: dict[Key, int] = {}
    planned: list[tuple[tuple[str, str, str], list[Key]]] = []
    for name, maps in batch.maps.items():
        for test, steps in plan.steps.items():
            for part in CURVES[test].parts:
                for number, values in enumerate(maps):
                    maps_by_part = {one: value for one, value in values.items() if part in (one, BOTH) and value is not None}
                    if len(maps_by_part) < (2 if part == BOTH else 1) or not all(map(len, maps_by_part.values())):
                        tally.add((name, test, part), None)
                        continue
                    keys = [(number, batch.samples[number].stays(left)) for left in CURVES[test].inputs(maps_by_part, steps)]
                    for key in keys:
                        indices.setdefault(key, len(indices))
                    planned.append(((name, test, part), keys))
    measures = dict(zip(("accuracy", "probability"), judge.run(batch.question, batch.samples, list(indices)), strict=True))
    noise = rounding(coarsest(plan.model.parameters()))
    for entry, keys in planned:
        curve, steps = CURVES[entry[1]], plan.steps[entry[1]]
        scores = [measures[curve.measure][indices[key]] for key in keys]
        for (number, stays), score in zip(keys, scores, strict=True):
            if math.isnan(score):
                sample = batch.samples[number]
                left = " and ".join(f"{len(entries)} of {sample.count(part)} entries of the {part}" for part, entries in stays)
                raise ValueError(
                    f"The model returned NaN for sample {number} of a batch with {left or 'all'} left. Pass steps= that keep more"
                )
        if max(scores) - min(scores) > noise * max(map(abs, scores)):
            tally.changed.add((curve.measure, entry[2]))
        drawn = curve.curve(scores, steps)
        tally.add(entry, curve.value(drawn, steps), drawn)


def compare_randomised(plan: Plan, batches: list[Batch], tally: Tally, generator: torch.Generator) -> None:
    """Correlations with the maps of ever more randomised models, except for constant and non-finite maps, which have none."""
    changed = copy.deepcopy(plan.model)
    with torch.no_grad(), at_rest(changed):
        groups = _cascade(changed, batches[0].question.inputs, plan.sanity_stages)
    weights = torch.Generator().manual_seed(plan.seed)
    curves: dict[tuple[str, str, int, int], list[float | None]] = {}  # by method, part, batch and sample
    for group in with_progress(groups, "randomising"):
        _randomise(group, weights)
        for item, batch in enumerate(with_progress(batches, "explaining", leave=False)):
            for name, method in plan.methods.items():
                try:
                    result = run_method(changed, batch.item, batch.question, name, method, plan.options)
                    again = maps_of(name, result, batch.samples, generator)
                except UndefinedRelevancy:  # random weights may cause it
                    again = [dict.fromkeys(PARTS) for _ in batch.samples]
                for number, (before, after) in enumerate(zip(batch.maps[name], again, strict=True)):
                    for part in PARTS:
                        value = _correlation(before[part], after[part])
                        curves.setdefault((name, part, item, number), []).append(value)
    for (name, part, item, _), curve in curves.items():
        tally.place = batches[item].item.place
        numbers = [value for value in curve if value is not None]
        tally.add((name, "sanity", part), curve[-1], numbers if len(numbers) == len(curve) else None)


def _correlation(one: Tensor | None, two: Tensor | None) -> float | None:
    if one is None or two is None or not len(one) or not bool(two.isfinite().all()) or constant(one) or constant(two):
        return None
    return rank_correlation(one, two)


@torch.no_grad()
def _randomise(parameters: Iterable[nn.Parameter], generator: torch.Generator) -> None:
    """Replaces every tensor by normal numbers with the tensor's mean and standard deviation."""
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.numel():
            trained = parameter.float()
            noise = torch.randn(parameter.shape, generator=generator).to(trained.device)
            parameter.copy_(trained.mean() + trained.std(correction=0) * noise)


def _cascade(model: nn.Module, inputs: Mapping[str, Any], stages: int) -> list[list[nn.Parameter]]:
    """The model's parameters from its output to its input, in `stages` groups of as many modules.

    The order is the reverse of the modules' first calls. A model with fewer modules has empty groups.
    """
    order: list[nn.Module] = []

    def note(module: nn.Module, args: Any) -> None:
        if module not in order:
            order.append(module)

    holders = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    with contextlib.ExitStack() as stack:
        for module in holders:
            stack.callback(add_pre_hook(module, note))
        model(**inputs)
    never = [module for module in holders if module not in order]  # other modules read their parameters
    groups: list[list[nn.Parameter]] = []
    done: set[int] = set()
    backwards = [*reversed(order), *never]
    sizes = [len(backwards) * (stage + 1) // stages for stage in range(stages)]
    for start, end in zip([0, *sizes], sizes, strict=False):
        members = [p for module in backwards[start:end] for p in module.parameters(recurse=False) if id(p) not in done]
        done |= {id(parameter) for parameter in members}
        groups.append(members)
    return groups
