"""Do maps tell a model that looks at the objects from its twin that takes a shortcut, when both answer alike?

Twins of one size, which begin alike, answer statements about grids (vlattn_lab.grids). One needs the objects; the other learned
from statements whose cue tells the answer. Both get the same told statements, and those that both answer right count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.provenance import fingerprint
from vlattn_fast.measuring.records import markdown, spread
from vlattn_lab.experiments.experiment import Cell, Effect, Experiment, Record, Settings, Stage, dots, effects_of
from vlattn_lab.grids import CELLS, CUES, MASK, STEPS, Grids, grid_statements
from vlattn_lab.scenes import joined, select
from vlattn_lab.train.twins import SHORTCUT_STEPS, TWIN_STEPS, train
from vlattn_lab.twins import additive_accuracy, asked_states, colour_logits, load_twin, twin_accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNT = 40  # statements of each number of steps
TESTED, ADDITIVE = 300, 60  # for accuracies; the latter takes all pairs
LEARNED = 0.99  # of statements whose cue says nothing; a training that ends below has no twins
WITHOUT_POSITION = ("input_gradient", "integrated_gradients", "smoothgrad", "occlusion")  # they explain the score alone
METHODS = ("weighted", "gradient", "gradcam", "rollout", "attention", *WITHOUT_POSITION)
EDGES, CUTS, REMOVED, RANDOM = "edges, first order", "region cut", "object removed", "random"
NEEDS, TAKES = "needs the objects", "takes the cue"
CASES = ("told", "not told", "told, objects removed")


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"seed": seed} for seed in range(settings.seeds)]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    count, tested = (4, 8) if settings.smoke else (COUNT, TESTED)
    needs = _twin(None, cell["seed"], settings)
    untold = [twin_accuracy(needs, cue, count=tested, seed=1 + cell["seed"])["not told"].values() for cue in CUES]
    least = min(min(of_steps) for of_steps in untold)
    found: dict[str, Any] = {"weights": {"none": fingerprint(needs)}, "least": least, "cues": {}}
    if least < LEARNED and not settings.smoke:
        return found
    for cue in CUES:
        takes = _twin(cue, cell["seed"], settings)
        found["weights"][cue] = fingerprint(takes)
        parts = [grid_statements(count, steps=n, cue=cue, told=True, seed=100 + cell["seed"]) for n in STEPS[1:]]
        grids, pair = joined(parts), {NEEDS: needs, TAKES: takes}
        right = torch.stack([_right(model, grids) for model in pair.values()]).all(0) | settings.smoke
        kept = select(grids, right.nonzero()[:, 0].tolist())
        maps = {name: {way: shares(of(model, kept), kept.deciding) for way, of in WAYS.items()} for name, model in pair.items()}
        some = select(kept, [*range(min(ADDITIVE, len(kept)))])
        found["cues"][cue] = {
            "both right": round(float(right.double().mean()), 4),
            "accuracy": {name: twin_accuracy(model, cue, count=tested, seed=1 + cell["seed"]) for name, model in pair.items()},
            "additive": {name: round(additive_accuracy(model, some), 4) for name, model in pair.items()},
            "mass": {name: {way: round(float(x.mean()), 4) for way, (x, _) in of.items()} for name, of in maps.items()},
            "iou": {name: {way: round(float(x.mean()), 4) for way, (_, x) in of.items()} for name, of in maps.items()},
            "auroc": {way: round(above(maps[NEEDS][way][0], maps[TAKES][way][0]), 4) for way in WAYS},
        }
    return found


def _twin(cue: str | None, seed: int, settings: Settings) -> Any:
    if settings.models is not None:
        return load_twin(settings.models / str(seed) / (cue or "none"))
    steps = 2 if settings.smoke else TWIN_STEPS if cue is None else SHORTCUT_STEPS[cue]
    return train(steps, seed=seed, log_every=0, cue=cue)


def _scores(model: Any, grids: Grids, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """(B,), the log-probability of the right colour."""
    with torch.no_grad():
        logits = colour_logits(model, asked_states(model, grids.inputs() if inputs is None else inputs))
    return logits.log_softmax(-1).gather(1, grids.label[:, None])[:, 0]


def _right(model: Any, grids: Grids) -> Tensor:
    with torch.no_grad():
        return colour_logits(model, asked_states(model, grids.inputs())).argmax(-1) == grids.label


def _target(model: Any, inputs: dict[str, Tensor], grids: Grids) -> Callable[[Any], Tensor]:
    place = (inputs["input_ids"] == MASK).int().argmax(1)

    def of(outputs: Any) -> Tensor:
        states = outputs.last_hidden_state[torch.arange(len(place)), place]
        return colour_logits(model, states).log_softmax(-1).gather(1, grids.label[:, None])[:, 0]

    return of


def explained(method: str, model: Any, grids: Grids) -> Tensor:
    """(B, 17), what a method says of the regions."""
    inputs = grids.inputs()
    asked = torch.nn.functional.pad((inputs["input_ids"] == MASK).float(), (0, CELLS + 1))
    position = None if method in WITHOUT_POSITION else asked
    regions = va.explain(model, inputs, target=_target(model, inputs, grids), method=method, position=position).regions
    assert isinstance(regions, Tensor)
    return regions


def edges(model: Any, grids: Grids) -> Tensor:
    """(B, 17), first-order effects of all edges from a region to other tokens, in all layers and heads."""
    rows = []
    for number in range(len(grids)):
        one = select(grids, [number])
        inputs = one.inputs()
        words, names = inputs["input_ids"].shape[1], [f"region {n}" for n in range(CELLS + 1)]
        tokens = torch.eye(words + CELLS + 1, dtype=torch.bool)
        groups = {"words": (tokens[:words].any(0))[None], **{name: tokens[words + n][None] for n, name in enumerate(names)}}
        table = va.attribute_edges(model, inputs, groups, target=_target(model, inputs, one))
        rows.append(
            torch.stack([torch.stack([table.matrix(name, to).sum() for to in groups if to != name]).sum() for name in names])
        )
    return torch.stack(rows)


def cut(model: Any, grids: Grids) -> Tensor:
    """(B, 17), the fall of the log-probability if no token attends to a region."""
    inputs, falls, whole = grids.inputs(), [], _scores(model, grids)
    for region in range(CELLS + 1):
        mask = inputs["region_mask"].clone()
        mask[:, region] = False
        falls.append(whole - _scores(model, grids, {**inputs, "region_mask": mask}))
    return torch.stack(falls, 1)


def removed(model: Any, grids: Grids) -> Tensor:
    """(B, 17), the fall of the log-probability without an object, or with a grey frame."""
    falls, whole = [], _scores(model, grids)
    for region in range(CELLS + 1):
        there = torch.zeros(len(grids), CELLS + 1, dtype=torch.bool)
        there[:, region] = True
        falls.append(whole - _scores(model, grids.without(there)))
    return torch.stack(falls, 1)


def _random(model: Any, grids: Grids) -> Tensor:
    begin = int(model.uniter.embeddings.word_embeddings.weight.detach().double().abs().sum() * 1e6)  # another one for each twin
    return torch.rand(len(grids), CELLS + 1, generator=torch.Generator().manual_seed(begin))


def _by(method: str) -> Callable[[Any, Grids], Tensor]:
    return lambda model, grids: explained(method, model, grids)


WAYS: dict[str, Callable[[Any, Grids], Tensor]] = {
    **{f"`{name}`": _by(name) for name in METHODS},
    EDGES: edges,
    CUTS: cut,
    REMOVED: removed,
    RANDOM: _random,
}


def shares(maps: Tensor, deciding: Tensor) -> tuple[Tensor, Tensor]:
    """Of maps (B, 17), by sample: the share of what is positive that lies in the regions that decide, and the overlap of as many
    largest regions with these, over all regions that are either. A map without a positive number has no share: that of chance."""
    positive, count = maps.double().clamp(min=0), deciding.sum(1)
    total = positive.sum(1)
    mass = torch.where(total > 0, (positive * deciding).sum(1) / total.clamp(min=1e-300), count / deciding.shape[1])
    places = maps.argsort(1, descending=True).argsort(1)
    hits = ((places < count[:, None]) & deciding).sum(1)
    return mass, hits / (2 * count - hits)


def above(first: Tensor, second: Tensor) -> float:
    """The area under the ROC curve: how often a number of the first is above one of the second; equal ones count half."""
    difference = first[:, None] - second
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def _values(records: Sequence[Record], cue: str, *keys: str) -> list[Any]:
    values = []
    for record in records:
        value = record["cues"][cue]
        for key in keys:
            value = value[key]
        values.append(value)
    return values


def tables(records: Sequence[Record]) -> Iterator[str]:
    found = learned(records)
    yield _of_twins(found)
    yield _of_maps(found)


def learned(records: Sequence[Record]) -> list[Record]:
    """Those of trainings that learned to need the objects."""
    return [record for record in records if record["cues"]]


def _of_twins(records: Sequence[Record]) -> str:
    lines = []
    for cue in CUES:
        for name in (NEEDS, TAKES):
            of_cases = [
                [sum(by_steps.values()) / len(by_steps) for by_steps in _values(records, cue, "accuracy", name, case)]
                for case in CASES
            ]
            additive = _values(records, cue, "additive", name)
            lines.append([cue, name, *(spread(values, ".3f") for values in (*of_cases, additive))])
    return markdown(["cue", "twin", *CASES, "told, additive"], lines, words=(0, 1))


def _of_maps(records: Sequence[Record]) -> str:
    lines = []
    for cue in CUES:
        for way in WAYS:
            numbers = [_values(records, cue, fact, name, way) for fact in ("mass", "iou") for name in (NEEDS, TAKES)]
            lines.append([cue, way, *(spread(values, ".2f") for values in (*numbers, _values(records, cue, "auroc", way)))])
    heads = [f"{fact}: {name}" for fact in ("mass", "IoU") for name in (NEEDS, TAKES)]
    return markdown(["cue", "map", *heads, "AUROC"], lines, words=(0, 1))


def effects(records: Sequence[Record]) -> list[Effect]:
    found = learned(records)
    return effects_of(
        [
            (f"{cue}: {way}", "AUROC - 0.5", [value - 0.5 for value in _values(found, cue, "auroc", way)])
            for cue in CUES
            for way in WAYS
            if way != RANDOM
        ]
    )


def figure(records: Sequence[Record]) -> Figure:
    drawn, axes = panels(1, len(CUES), (9.6, 3.4), sharey=True)
    for axis, cue in zip(axes.flat, CUES, strict=True):
        dots(axis, {way.strip("`"): _values(learned(records), cue, "auroc", way) for way in WAYS}, "tab:blue")
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set_title(f"cue: {cue}")
    axes.flat[0].set_ylabel("AUROC")
    return drawn


EXPERIMENT = Experiment([Stage(cells, measure)], tables, {"twins": figure}, effects)
