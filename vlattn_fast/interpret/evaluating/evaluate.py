"""`evaluate`: how well maps tell what a model's answer rests on, measured as the papers do it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_callable, check_integer, check_items, check_names
from vlattn_fast._ground.extras import extra, with_progress
from vlattn_fast.attach.session import at_rest, never_compiled, unwrapped
from vlattn_fast.interpret.evaluating.box_scores import check_boxes, intersection_over_union, mass, pointing
from vlattn_fast.interpret.evaluating.model_answers import Judge, Question
from vlattn_fast.interpret.evaluating.perturbation import STEPS, Sample, Words, area_under, check_maps, kept, split
from vlattn_fast.interpret.evaluating.randomised_weights import cascade
from vlattn_fast.interpret.evaluating.result_table import Tally
from vlattn_fast.interpret.explaining.explain import explain
from vlattn_fast.interpret.records.registry import find_family
from vlattn_fast.interpret.records.unsupported import UndefinedRelevancy
from vlattn_fast.interpret.relevancy.methods import ABLATIONS, METHODS
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.rank_correlation import rank_correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT = "vlattn_fast.evaluation.1"
_PERTURBED = ("positive", "negative", "insertion", "deletion")
_BOXES: dict[str, Callable[[Tensor, Tensor, Tensor], float]] = {
    "pointing": pointing,
    "iou": intersection_over_union,
    "mass": mass,
}
_READERS = {"steps": _PERTURBED, "accuracy": _PERTURBED[:2], "probability": _PERTURBED[2:]}
TESTS = (*_PERTURBED, *_BOXES, "sanity")
PARTS = ("image", "text")
WEIGHTINGS = ("contribution", "norm", "equal")

Rival = Callable[[nn.Module, Mapping[str, Any], Any], Any]
Maps = list[dict[str, Tensor | None]]  # of each row: part -> (n,)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` measured.

    Args:
        table: a row for each method, test and part: "method", "test", "part" ("image" or "text"), "value" (the mean over
            samples; None without any), "sd" (their standard deviation; None below two), "samples", and "left_out": samples
            that have no such part, no boxes, or too little of them.
        curves: a row for each method, test and part with a curve: "method", "test", "part", "steps", "mean" and "sd" (a number
            a step), "samples". Of "sanity" the steps are the share of randomised modules, and samples have maps at each of them.
        facts: the arguments of the run.
    """

    table: list[dict[str, Any]]
    curves: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def value(self, method: str, test: str, part: str = "image") -> float | None:
        """The mean of one row of the table. ValueError where there is no such row."""
        for row in self.table:
            if (row["method"], row["test"], row["part"]) == (method, test, part):
                return row["value"]
        raise ValueError(f"method, test and part must be those of a row of the table; got {method!r}, {test!r}, {part!r}")

    def save(self, path: str | Path) -> Path:
        """Write everything to `path` as JSON; `Evaluation.load` reads it back."""
        whole = {"format": _FORMAT, "facts": self.facts, "table": self.table, "curves": self.curves}
        Path(path).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what `save` wrote. ValueError where `path` holds something else."""
        try:
            whole = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            whole = None
        if not isinstance(whole, dict) or whole.get("format") != _FORMAT:
            raise ValueError(f"path must be a file that Evaluation.save wrote ({_FORMAT}); got {path}")
        return cls(whole["table"], whole["curves"], whole["facts"])

    def plot(self) -> Figure:
        """Draw a curve for each test with steps, and bars with standard deviations for the others.

        Returns:
            A matplotlib Figure (without pyplot: nothing is shown or kept open).
        """
        with extra("viz"):
            from vlattn_fast.interpret.evaluating.charts import draw

            return draw(self.table, self.curves)

    def __str__(self) -> str:
        """The table as text."""
        width = max([len(row["method"]) for row in self.table], default=0)
        lines = [f"{'method':{max(width, 6)}}  {'test':9}  {'part':5}  {'value':>7}  {'s.d.':>7}  samples  left out"]
        for row in self.table:
            value, sd = ("-" if row[name] is None else f"{row[name]:.4f}" for name in ("value", "sd"))
            head = f"{row['method']:{max(width, 6)}}  {row['test']:9}  {row['part']:5}"
            lines.append(f"{head}  {value:>7}  {sd:>7}  {row['samples']:7}  {row['left_out']:8}")
        return "\n".join(lines)


@never_compiled
def evaluate(
    model: nn.Module,
    dataset: Iterable[tuple[Mapping[str, Any], Any, Any]],
    *,
    methods: Sequence[str | Rival] | Mapping[str, str | Rival] = ("gradient",),
    tests: Sequence[str] = ("positive", "negative", "pointing"),
    steps: Sequence[float] | None = None,
    accuracy: Callable[[Any], Tensor] | None = None,
    probability: Callable[[Any], Tensor] | None = None,
    words: Words | None = None,
    sanity_stages: int = 5,
    batch_size: int = 64,
    seed: int = 0,
    **options: Any,
) -> Evaluation:
    """Measure explanations of a model over a data set.

    Tests of the "image" (patches or regions) and of the "text" (words), each with the other part whole:

    - "positive", "negative": area under the accuracy while the most (the least) relevant entries are removed (Chefer, Gur, Wolf,
      ICCV 2021). A good map has a low positive and a high negative area. Relevancy is computed once. int((1 - step) n) entries
      stay, truncated as in the published code. Areas are trapezoids over the fraction removed, not normalised, so from 0 to 1.
    - "insertion", "deletion": area under the probability while the most relevant entries are put into an empty input (taken from
      the whole one) (Petsiuk, Das, Saenko, BMVC 2018, with removed entries in place of a blurred picture).

    Tests of the image against ground-truth boxes:

    - "pointing": 1 where the centre of the largest entry lies in a box (Zhang et al., ECCV 2016).
    - "iou": intersection over union of the boxes and the entries above the map's mean. Areas are exact.
    - "mass": the share of positive mass inside the boxes.

    A map that is constant points nowhere: 0 in the first two. Equal entries go by their position, here and above.

    And of both parts:

    - "sanity": Spearman's correlation with the map of the same model with every weight randomised (Adebayo et al., NeurIPS
      2018). A map that depends on what the model learned is near 0. The curve has the cascade from the output to the input.
      Weights become normal numbers with the mean and standard deviation of the trained tensor. A correlation with a map that
      is constant or not finite is undefined, and such a sample is left out.

    Removed patches become 0, the mean pixel of normalised images. Removed regions and words are dropped from the inputs; special
    tokens stay, and so does the token that is read, of a decoder and of VisualBERT for questions.

    Args:
        model: as `explain` takes it. Any other model serves where `methods` are callables and the outputs have `logits`
            (B, classes) or `target` is a callable; its patches are those of the maps' grid.
        dataset: (inputs, target, boxes) for each sample or batch. inputs and target as for `explain`. target None = what the
            model answers to the whole input: the class, the token or, of an image with several texts, the text. boxes = ground
            truth (K, 4), x1, y1, x2, y2 relative to the image; of a batch, one (K, 4) or None a row; or None.
        methods: names of `explain`'s methods and ablations, "weighted:norm" and "weighted:equal" (and
            "weighted:norm:no_normalization") with another weighting, "random", or callables (model, inputs, target) -> whatever
            has `.image` (B, h, w), `.regions` (B, R) or `.text` (B, T) as an `Explanation` has. A dict names them.
        tests: some of "positive", "negative", "insertion", "deletion", "pointing", "iou", "mass", "sanity".
        steps: increasing fractions removed (of "insertion": put in), from 0 to 1. None = 0, .25, .5, .75, .8, .85, .9, .95, 1 as
            published; for "insertion" and "deletion" 0, .05, ..., 1.
        accuracy: what "positive" and "negative" measure, a callable(outputs) -> (B,). None = 1 where the target has the largest
            logit, else 0. Of a callable target: its score.
        probability: what "insertion" and "deletion" measure, likewise. None = the softmax of the target's logit. Of a callable
            target: its score.
        words: a callable(inputs) -> bool (B, N), True = a token that may be removed. None = every word; of a model without a
            record all but padding and the first and last token.
        sanity_stages: randomised models of the cascade, the wholly randomised one included; 1000 at most.
        batch_size: rows of one forward pass over perturbed inputs.
        seed: of the random maps and weights.
        options: further arguments of `explain` for the methods given by name, as `read` and `start_layer`; `weighting` is for the
            weighted ones alone.

    Returns:
        An `Evaluation`. A sample without a part, or without boxes, is left out of that row and counted in it.

    Raises:
        TypeError, ValueError: an unknown method or test, an argument that no chosen test or method reads, steps out of order, an
            item of `dataset` that is no triple, boxes outside of the image, a similarity without a second text to tell apart, a
            map that is not finite or whose shape does not fit; and what `explain` raises.
    """
    chosen = _named(methods)
    if "weighting" in options:
        _check_weighting(options["weighting"], chosen.values())
    tests = check_names("tests", tests, TESTS)
    _check_used(tests, chosen.values(), options, steps=steps, accuracy=accuracy, probability=probability)
    drawn = {test: _checked_steps(steps, test) for test in tests if test in _PERTURBED}
    check_callable(accuracy=accuracy, probability=probability, words=words)
    check_integer("sanity_stages", sanity_stages, low=1, high=1000)  # each explains the whole data set anew
    check_integer("batch_size", batch_size, low=1)
    check_integer("seed", seed)
    check_items("dataset", dataset, "(inputs, target, boxes) for each sample or batch")
    model = unwrapped(model)
    judge = Judge(model, find_family(model), accuracy, probability, batch_size)
    generator = torch.Generator().manual_seed(seed)
    found = Tally([(name, test, part) for name in chosen for test in tests for part in _parts(test)])
    remembered: list[tuple[Question, list[Sample], dict[str, Maps]]] = []
    for item in with_progress(dataset, "evaluating"):
        inputs, target, boxes = _triple(item)
        question = judge.ask(inputs, target)
        if question is None:
            continue
        explained = {name: _explained(model, question, method, options) for name, method in chosen.items()}
        shown = next((e for e in explained.values() if isinstance(e, Explanation)), None)
        if shown is None and judge.family is not None:
            shown = explain(model, question.inputs, target=question.target, method="attention")
        if shown is None:
            shown = next((e for e in explained.values() if getattr(e, "image", None) is not None), None)
        samples = split(judge.family, question.rows_inputs, question.rows, shown, words)
        maps = {name: _maps(name, result, samples, generator) for name, result in explained.items()}
        truth = check_boxes(boxes, question.rows)
        for name, rows in maps.items():
            _check_finite(name, rows)
            for sample, row, true in zip(samples, rows, truth, strict=True):
                for test in (test for test in tests if test in _BOXES):
                    values = row["image"]
                    fits = true is not None and sample.boxes is not None and values is not None and len(values) > 0
                    found.add((name, test, "image"), _BOXES[test](values, sample.boxes, true) if fits else None)  # type: ignore[arg-type]
        _perturb(judge, question, samples, maps, drawn, found)
        if "sanity" in tests:
            remembered.append((question, samples, maps))
    if remembered:
        _sanity(model, chosen, options, remembered, sanity_stages, seed, generator, found)
    facts = {
        "model": type(model).__name__,
        "methods": list(chosen),
        "tests": list(tests),
        "steps": {test: list(values) for test, values in drawn.items()},
        "seed": seed,
        "sanity_stages": sanity_stages,
    }
    x_axes = {**drawn, "sanity": [(stage + 1) / sanity_stages for stage in range(sanity_stages)]}
    return Evaluation(found.table(), found.curves(x_axes), facts)


# --- arguments ---


def _named(methods: Any) -> dict[str, str | Rival]:
    check_items("methods", methods, "a sequence or a dict of names and callables")
    if isinstance(methods, Mapping):
        named = dict(methods)
    else:
        named = {}
        for method in methods:
            name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
            if name in named:
                raise ValueError(f"methods must have different names (a dict gives them); got {name!r} twice")
            named[name] = method
    if not named:
        raise ValueError("methods must name at least one; got none")
    for method in named.values():
        if callable(method):
            continue
        if not isinstance(method, str):
            raise TypeError(f"methods must be names and callables; got {type(method).__name__}")
        rule, weighting = _with_weighting(method)
        known = [*METHODS, *ABLATIONS]
        if method != "random" and (rule not in known or (weighting and not rule.startswith("weighted"))):
            known += [*(f"weighted:{name}" for name in WEIGHTINGS), "random"]
            raise ValueError(f"methods must be callables or among {', '.join(known)}; got {method!r}")
    return named


def _with_weighting(method: str) -> tuple[str, str]:
    """`explain`'s method and its weighting, "" where the name says none: "weighted:norm:no_normalization" has both."""
    rule, *parts = method.split(":")
    weighting = parts.pop(0) if parts and parts[0] in WEIGHTINGS else ""
    return ":".join([rule, *parts]), weighting


def _check_weighting(weighting: Any, methods: Iterable[str | Rival]) -> None:
    """ValueError where no method takes the weighting that is asked for, or one names another."""
    weighted = [method for method in methods if isinstance(method, str) and method.startswith("weighted")]
    if not weighted or any(_with_weighting(method)[1] for method in weighted):
        raise ValueError(f"weighting must be for methods 'weighted' that name none themselves; got {weighting!r} for {weighted}")


def _check_used(tests: Iterable[str], methods: Iterable[str | Rival], options: Mapping[str, Any], **given: Any) -> None:
    """ValueError where none of the tests reads an argument, or none of the methods the options."""
    for name, value in given.items():
        if value is not None and not set(_READERS[name]) & set(tests):
            readers = ", ".join(_READERS[name])
            raise ValueError(f"{name} must be given with one of the tests {readers}; got tests {', '.join(tests)}")
    if options and all(callable(method) or method == "random" for method in methods):
        raise ValueError(f"{', '.join(options)} must be given with methods of explain; got callables and 'random' alone")


def _checked_steps(steps: Any, test: str) -> tuple[float, ...]:
    if steps is None:
        return STEPS if test in ("positive", "negative") else tuple(step / 20 for step in range(21))
    try:
        values = tuple(float(step) for step in steps)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"steps must be two or more increasing fractions from 0 to 1; got {steps!r}") from None
    rising = all(one < two for one, two in zip(values, values[1:], strict=False))
    if len(values) < 2 or not rising or values[0] < 0 or values[-1] > 1:
        raise ValueError(f"steps must be two or more increasing fractions from 0 to 1; got {list(values)}")
    return values


def _triple(item: Any) -> tuple[Mapping[str, Any], Any, Any]:
    if not isinstance(item, (tuple, list)) or len(item) != 3:
        got = f"{len(item)} of them" if isinstance(item, (tuple, list)) else type(item).__name__
        raise TypeError(f"dataset must give (inputs, target, boxes or None); got {got}")
    return item[0], item[1], item[2]


def _parts(test: str) -> tuple[str, ...]:
    return ("image",) if test in _BOXES else PARTS


# --- maps ---


def _explained(model: nn.Module, question: Question, method: str | Rival, options: Mapping[str, Any]) -> Any:
    """What a method says; None = random."""
    if callable(method):
        return method(model, question.inputs, question.target)
    if method == "random":
        return None
    rule, weighting = _with_weighting(method)
    arguments = {name: value for name, value in options.items() if name != "weighting" or rule.startswith("weighted")}
    arguments |= {"weighting": weighting} if weighting else {}
    return explain(model, question.inputs, target=question.target, method=rule, **arguments)


def _maps(name: str, result: Any, samples: list[Sample], generator: torch.Generator) -> Maps:
    """The entries of each row's image and words, one by one."""
    if result is None:
        return [{part: torch.rand(sample.count(part), generator=generator) for part in PARTS} for sample in samples]
    check_maps(name, result, len(samples))
    image, regions, text = (getattr(result, part, None) for part in ("image", "regions", "text"))
    owners = getattr(result, "image_rows", None)
    rows: Maps = []
    for row, sample in enumerate(samples):
        values: dict[str, Tensor | None] = {"image": None, "text": None}
        if sample.regions is not None and regions is not None:
            values["image"] = _entries(name, regions[row], sample.regions)
        elif sample.grids is not None and image is not None:
            own = [part for index, part in enumerate(image) if (index if owners is None else owners[index]) == row]
            shapes = [tuple(part.shape) for part in own]
            if shapes != sample.grids:
                raise ValueError(f"methods must give maps on the grids {sample.grids}; got {shapes} of {name!r}")
            values["image"] = torch.cat([part.flatten() for part in own])
        if sample.entries is not None and text is not None:
            values["text"] = _entries(name, text[row], sample.entries)
        # In float64, since bytes cannot be negated, and means of 16 bits are rounded.
        rows.append({part: None if value is None else value.detach().cpu().double() for part, value in values.items()})
    return rows


def _check_finite(name: str, rows: Maps) -> None:
    for row in rows:
        for part, value in row.items():
            if value is not None and not bool(value.isfinite().all()):
                raise ValueError(f"methods must give finite maps; got {value.tolist()} of {name!r} for the {part}")


def _entries(name: str, values: Tensor, index: Tensor) -> Tensor:
    if values.ndim != 1 or (len(index) and int(index.max()) >= len(values)):
        raise ValueError(f"methods must give a row of {len(index)} entries or more; got {tuple(values.shape)} of {name!r}")
    return values[index.to(values.device)]


# --- tests ---


def _perturb(
    judge: Judge,
    question: Question,
    samples: list[Sample],
    maps: Mapping[str, Maps],
    drawn: Mapping[str, Sequence[float]],
    found: Tally,
) -> None:
    """Curves of every method; inputs that several steps, tests or methods come to are run once."""
    wanted: dict[tuple[int, str, tuple[int, ...]], int] = {}
    plans: list[tuple[tuple[str, str, str], Sequence[float], list[tuple[int, str, tuple[int, ...]]]]] = []
    for name, rows in maps.items():
        for test, steps in drawn.items():
            for part in PARTS:
                for row, values in enumerate(rows):
                    value = values[part]
                    if value is None or len(value) == 0:
                        found.add((name, test, part), None)
                        continue
                    keys = [(row, part, tuple(entries)) for entries in kept(value, test, steps)]
                    for key in keys:
                        wanted.setdefault(key, len(wanted))
                    plans.append(((name, test, part), steps, keys))
    accuracy, probability = judge.run(question, samples, list(wanted))
    for line, steps, places in plans:
        measured = accuracy if line[1] in ("positive", "negative") else probability
        curve = [measured[wanted[place]] for place in places]
        for (row, part, entries), score in zip(places, curve, strict=True):
            if math.isnan(score):
                left = f"{len(entries)} of {samples[row].count(part)} entries of the {part}"
                raise ValueError(f"model must give scores that are numbers; got NaN for row {row} of a batch with {left} left")
        found.add(line, area_under(steps, curve), curve)


def _sanity(
    model: nn.Module,
    chosen: Mapping[str, str | Rival],
    options: Mapping[str, Any],
    remembered: list[tuple[Question, list[Sample], dict[str, Maps]]],
    stages: int,
    seed: int,
    generator: torch.Generator,
    found: Tally,
) -> None:
    """Correlations with the maps of ever more randomised models. They are undefined for maps that are constant or not finite,
    which are left out."""
    changed = copy.deepcopy(model)
    curves: dict[tuple[str, str, int, int], list[float | None]] = {}
    first = remembered[0][0].inputs
    for _ in with_progress(_stages(changed, first, stages, seed), "randomising"):
        for item, (question, samples, maps) in enumerate(remembered):
            for name, method in chosen.items():
                try:
                    again = _maps(name, _explained(changed, question, method, options), samples, generator)
                except UndefinedRelevancy:  # of random weights it may be
                    again = [dict.fromkeys(PARTS) for _ in samples]
                for row, (before, after) in enumerate(zip(maps[name], again, strict=True)):
                    for part in PARTS:
                        one, two = before[part], after[part]
                        finite = two is not None and bool(two.isfinite().all())
                        value = rank_correlation(one, two) if one is not None and two is not None and finite else None
                        curves.setdefault((name, part, item, row), []).append(value)
    for (name, part, _, _), curve in curves.items():
        numbers = [value for value in curve if value is not None]
        found.add((name, "sanity", part), curve[-1], numbers if len(numbers) == len(curve) else None)


def _stages(model: nn.Module, inputs: Mapping[str, Any], stages: int, seed: int) -> Iterator[int]:
    with torch.no_grad(), at_rest(model):
        groups = cascade(model, inputs, stages)
    generator = torch.Generator().manual_seed(seed)
    for stage, group in enumerate(groups):
        group.randomise(generator)
        yield stage
