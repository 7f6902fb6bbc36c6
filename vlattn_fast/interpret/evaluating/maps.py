"""The maps of each method for a batch: the numbers of each sample's image and words."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import describe
from vlattn_fast._ground.extras import with_progress
from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.evaluating.box_scores import Truth, check_text_truth, check_truth
from vlattn_fast.interpret.evaluating.curves import PARTS
from vlattn_fast.interpret.evaluating.items import Item
from vlattn_fast.interpret.evaluating.model_answers import Judge, Question
from vlattn_fast.interpret.evaluating.perturbation import Sample, split
from vlattn_fast.interpret.evaluating.plan import EDGES, RANDOM, CustomMethod, Plan
from vlattn_fast.interpret.explaining.answer import with_prompts
from vlattn_fast.interpret.explaining.explain import explain
from vlattn_fast.interpret.explaining.request import token_target, tokenizer_of
from vlattn_fast.interpret.explaining.similarity import Similarity
from vlattn_fast.interpret.relevancy.method import LOG_PROBABILITY, Method
from vlattn_fast.interpret.relevancy.methods.registry import method_of
from vlattn_fast.interpret.result.explanation import Explanation

Maps = list[dict[str, Tensor | None]]  # per sample: part -> (n,)
_PARTS = ("image", "regions", "text")


@dataclass(frozen=True)
class Batch:
    """An item of the data set, explained."""

    item: Item
    question: Question
    samples: list[Sample]
    maps: dict[str, Maps]  # of each method
    truths: dict[str, list[Truth | None]]  # of each part, of each sample with ground truth


def explain_batch(plan: Plan, judge: Judge, item: Item, generator: torch.Generator) -> Batch | None:
    """The item with the maps of every method; None for an empty batch."""
    inputs, target, tokenizer = item.inputs, item.target, tokenizer_of(plan.options.get("processor"))
    if judge.adapter is not None:
        target = token_target(target, tokenizer, plan.model, judge.adapter, plan.options.get("position"))
    if isinstance(target, Similarity):
        raise ValueError(f"target must be of one sample, whose input is changed; got {item.target!r}, of two. Pass a callable")
    question = judge.ask(inputs, target)
    if question is None:
        return None
    methods = with_progress(plan.methods.items(), "explaining", leave=False)
    results = {name: run_method(plan.model, item, question, name, method, plan.options) for name, method in methods}
    # An explanation has the positions of patches and words; without an adapter, any result with `.image` has.
    shown = next((result for result in results.values() if isinstance(result, Explanation)), None)
    if shown is None and judge.adapter is not None:
        shown = explain(plan.model, question.inputs, target=question.target, method="attention")
    elif shown is None:
        shown = next((result for result in results.values() if getattr(result, "image", None) is not None), None)
    samples = split(judge.adapter, question.paired, question.count, shown, plan.words, item.before)
    maps = {name: maps_of(name, result, samples, generator) for name, result in results.items()}
    for name, parts in ((name, parts) for name, by_sample in maps.items() for parts in by_sample):
        for part, value in parts.items():
            if value is not None and not bool(value.isfinite().all()):
                raise ValueError(f"methods must return finite maps; got {value.tolist()} of {name!r} for the {part}")
    texts = [None if sample.words is None else (sample.inputs["input_ids"][0, : item.before], sample.words) for sample in samples]
    truths = {"image": check_truth(item.boxes, question.count), "text": check_text_truth(item.text_truth, texts, tokenizer)}
    for sample, true in zip(samples, truths["image"], strict=True):
        if true is not None and sample.grids is not None and true.timed != (sample.seconds is not None):
            raise ValueError("boxes must be va.Seconds of a sound, and boxes or a mask of an image; got the other kind")
    return Batch(item, question, samples, maps, truths)


def run_method(
    model: nn.Module, item: Item, question: Question, name: str, method: str | Method | CustomMethod, options: Mapping[str, Any]
) -> Any:
    """The result of the method named `name` in the table; None = random."""
    if callable(method):
        return _of_tensors(name, method(model, question.inputs, question.target))
    if method == RANDOM:
        return None
    if method == EDGES:  # it has no map
        return SimpleNamespace(image=None, text=None)
    if item.whole is not None:
        inputs, ids = item.whole
        answer = with_prompts([ids], inputs, find_adapter(model))
        return explain(model, inputs, answer=answer, per_token=False, method=method, **options)
    if item.place is not None:
        method = _of_answer(method)
    return explain(model, question.inputs, target=question.target, method=method, **options)


def _of_answer(method: str | Method) -> Method:
    """The method, which explains the log-probability of a token of an answer unless its options say what."""
    chosen = copy.copy(method_of(method))
    if chosen.of is None and "of" in chosen.option_names():
        chosen.of = LOG_PROBABILITY
    return chosen


def _of_tensors(name: str, result: Any) -> Any:
    """The result of a caller's method, with tensors instead of NumPy arrays."""
    if isinstance(result, Explanation) or not any(hasattr(result, part) for part in _PARTS):
        return result
    fields = {field: getattr(result, field, None) for field in (*_PARTS, "image_samples", "boxes", "text_positions")}
    for part in (*_PARTS, "boxes"):
        values = fields[part]
        if isinstance(values, (tuple, list)):
            fields[part] = [_tensor(name, part, one) for one in values]
        elif values is not None:
            fields[part] = _tensor(name, part, values)
    return SimpleNamespace(**fields)


def _tensor(name: str, part: str, values: Any) -> Tensor:
    try:
        return values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    except (TypeError, ValueError):  # an array of objects, or of ragged lists
        raise TypeError(f"methods must return {part} as tensors or arrays; got {describe(values)} of {name!r}") from None


def maps_of(name: str, result: Any, samples: list[Sample], generator: torch.Generator) -> Maps:
    """The entries of each sample's image and words, one by one."""
    if result is None:
        return [{part: torch.rand(sample.count(part), generator=generator) for part in PARTS} for sample in samples]
    _check_counts(name, result, len(samples))
    image, regions, text = (getattr(result, part, None) for part in ("image", "regions", "text"))
    owners = getattr(result, "image_samples", None)
    maps: Maps = []
    for number, sample in enumerate(samples):
        values: dict[str, Tensor | None] = {"image": None, "text": None}
        if sample.regions is not None and regions is not None:
            values["image"] = _entries(name, regions[number], sample.regions)
        elif sample.grids is not None and image is not None:
            parts = [part for index, part in enumerate(image) if (index if owners is None else owners[index]) == number]
            shapes = [tuple(part.shape) for part in parts]
            if shapes != sample.grids:
                raise ValueError(f"methods must return maps on the grids {sample.grids}; got {shapes} of {name!r}")
            values["image"] = torch.cat([part.flatten() for part in parts])
        if text is not None and isinstance(result, Explanation) and sample.shown_entries is not None:
            values["text"] = text[number][sample.shown_entries.to(text.device)]
        elif text is not None and sample.entries:
            values["text"] = _text_entries(name, text[number], sample, apart=not isinstance(text, Tensor))
        # In float64, since bytes have no negative and means of 16 bits are rounded.
        maps.append({part: None if value is None else value.detach().cpu().double() for part, value in values.items()})
    return maps


def _check_counts(name: str, result: Any, count: int) -> None:
    """Checks that a method returned a map for each of `count` samples, or for each entry of its `image_samples`."""
    if not any(hasattr(result, part) for part in _PARTS):
        raise TypeError(f"methods must return an object with .image, .regions or .text; got {type(result).__name__} of {name!r}")
    owners = getattr(result, "image_samples", None)
    for part in _PARTS:
        if (values := getattr(result, part, None)) is None:
            continue
        if part == "image" and owners is not None:
            if len(owners) != len(values) or not all(0 <= owner < count for owner in owners):
                got = f"{list(owners)} for {len(values)} maps of {name!r}"
                raise ValueError(f"methods must return an entry of image_samples, from 0 to {count - 1}, for each map; got {got}")
        elif len(values) != count:
            raise ValueError(
                f"methods must return one {part} for each of {count} samples of a batch; got {len(values)} of {name!r}"
            )


def _text_entries(name: str, values: Tensor, sample: Sample, apart: bool) -> Tensor:
    """The numbers of the sample's words in its vector of a caller's `.text`. `apart`: the vectors are not one tensor, so each may
    have only its own words."""
    width = len(values) if values.ndim == 1 else -1
    readings = sample.entries.get(width, [])
    if width == sample.inputs["input_ids"].shape[1] and bool((values[-1:] != 0).any()):  # no zeros after a shorter text
        readings = readings[-1:]  # by columns
    if len(readings) == 1:
        return values[readings[0].to(values.device)]
    if not readings and apart and width == sample.count("text"):
        return values
    if readings:
        raise ValueError(
            f"methods must return an unambiguous text; got {width} entries of {name!r}, which may be the words of a "
            "padded batch or its columns of input_ids. Pass the samples one by one in dataset"
        )
    widths = " or ".join(str(width) for width, places in sorted(sample.entries.items()) if places)
    raise ValueError(
        "methods must return a text with an entry for each word of the batch's longest text, or for each column of input_ids, "
        f"{widths} of them; got {tuple(values.shape)} of {name!r}"
    )


def _entries(name: str, values: Tensor, index: Tensor) -> Tensor:
    if values.ndim != 1 or (len(index) and int(index.max()) >= len(values)):
        raise ValueError(f"methods must return a vector of at least {len(index)} entries; got {tuple(values.shape)} of {name!r}")
    return values[index.to(values.device)]
