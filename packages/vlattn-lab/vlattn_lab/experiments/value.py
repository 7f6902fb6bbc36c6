"""The five observations of VALUE (Cao et al., "Behind the Scene", ECCV 2020), on UNITER trained on DigitScenes.

Observations (i), (ii) and (iii) of the paper's abstract are tested. For (iv), relations of regions in plotted attention, a linear
probe reads two numbers of each head. For (v), linguistic knowledge in attention heads, linear probes read the states after a
layer.

A seed stands for a trained model, the same model untrained, and its test scenes. Controls are the untrained model and captions of
other scenes. [CLS] and [SEP] count as neither text nor image: otherwise seven of eleven tokens would be text, and a head that
attends evenly would be cross-modal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlattn_fast import probe
from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.provenance import fingerprint
from vlattn_fast.measuring.records import markdown, spread
from vlattn_fast.models import UNITER
from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage, spearman
from vlattn_lab.probing import probe_samples
from vlattn_lab.train.fit import seeded
from vlattn_lab.train.uniter import train
from vlattn_lab.uniter import CONFIG, load_uniter, matching_accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = ("trained", "untrained", "other captions")
TOKENS = {"text": 5, "image": 4, "special": 2}  # in a caption and a scene
SAMPLES, SCENES = 300, 500  # for the probes, and for an accuracy
KEPT = ("test", "kind", "layer", "head", "value", "chance", "control")


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"seed": seed} for seed in range(settings.seeds)]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    seed = cell["seed"]
    samples, scenes = (20, 10) if settings.smoke else (SAMPLES, SCENES)
    untrained = fresh(seed)
    model = trained(seed, settings)
    measured: dict[str, Any] = {"weights": fingerprint(model)}
    for name, one in zip(MODELS, (model, untrained, model), strict=True):
        data = other_captions(samples, seed) if name == "other captions" else probe_samples(samples, seed=seed)
        tests = ("modality", "cross_modal", "fusion") if name == "other captions" else None
        report = probe(one, data, tests=tests, special=False)
        measured[name] = [
            {key: round(record[key], 4) if isinstance(record[key], float) else record[key] for key in KEPT}
            for record in report.table
            if record["value"] is not None
        ]
    measured["accuracy"] = mean_accuracy(model, scenes, seed)
    heads = itertools.product(range(CONFIG.num_hidden_layers), range(CONFIG.num_attention_heads))
    measured["without_head"] = []
    for layer, head in heads:
        with without_head(model, layer, head):
            accuracy = mean_accuracy(model, scenes, seed)
        measured["without_head"].append({"layer": layer, "head": head, "accuracy": accuracy})
    return measured


def fresh(seed: int) -> UNITER:
    """The model before its training."""
    return seeded(seed, lambda: UNITER(CONFIG)).eval()


def trained(seed: int, settings: Settings) -> UNITER:
    if settings.models is not None:
        return load_uniter(Path(settings.models) / str(seed))[0]
    return train(2, seed=seed, log_every=0) if settings.smoke else train(seed=seed, log_every=0)


def other_captions(count: int, seed: int) -> Iterator[tuple[dict[str, Tensor], None]]:
    """The scenes, each with the caption of the scene before."""
    for inputs, _ in probe_samples(count, seed=seed, batch=count):
        yield {**inputs, "input_ids": inputs["input_ids"].roll(1, 0)}, None


def mean_accuracy(model: UNITER, count: int, seed: int) -> float:
    """Mean accuracy over the three kinds of wrong captions."""
    accuracies = matching_accuracy(model, count=count, seed=seed)
    return sum(accuracies.values()) / len(accuracies)


def without_head(model: UNITER, layer: int, head: int) -> RemovableHandle:
    """A context in which the result of a head is 0."""
    chosen: Any = model.uniter.encoder.layer[layer]
    width = chosen.attention.self.head_dim

    def silence(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = inputs[0].clone()
        heads[..., head * width : (head + 1) * width] = 0
        return (heads, *inputs[1:])

    return chosen.attention.output.register_forward_pre_hook(silence)


# --- facts of the records ---


def values(record: Record, model: str, test: str, kind: str | None = None, column: str = "value") -> dict[tuple[Any, Any], float]:
    """(layer, head) -> value, of one model and test."""
    return {(one["layer"], one["head"]): one[column] for one in record[model] if (one["test"], one["kind"]) == (test, kind)}


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def per_token(record: Record, model: str, layer: int | None = None) -> float:
    """[CLS]'s mean attention on a word over its attention on a region, over the heads of one layer or of all layers."""
    mass = {
        kind: _mean([v for place, v in values(record, model, "modality", kind).items() if layer in (None, place[0])])
        for kind in ("text", "image")
    }
    return (mass["text"] / TOKENS["text"]) / (mass["image"] / TOKENS["image"])


def facts(record: Record) -> list[tuple[str, str, dict[str, float]]]:
    """(observation, name of the measurement, value by model) of one seed."""
    observed: list[tuple[str, str, dict[str, float]]] = []
    for kind, count in TOKENS.items():
        mass = {model: _mean([*values(record, model, "modality", kind).values()]) for model in MODELS}
        observed.append(("i", f"attention of [CLS] on the {kind}, {count} tokens of 11", mass))
    ratios = {model: per_token(record, model) for model in MODELS}
    observed.append(("i", "attention on a word over attention on a region", ratios))
    crossing = {model: _mean([v > 0.5 for v in values(record, model, "cross_modal").values()]) for model in MODELS}
    observed.append(("ii", "share of heads that are cross-modal in most samples", crossing))
    drops = {(one["layer"], one["head"]): record["accuracy"] - one["accuracy"] for one in record["without_head"]}
    shares = values(record, "trained", "cross_modal")
    head_numbers = torch.tensor([(shares[place], drop) for place, drop in drops.items()], dtype=torch.float64)
    goes_with = {"trained": float(spearman(*head_numbers.T))}
    observed.append(("ii", "rank correlation over heads: cross-modal, and what accuracy loses without the head", goes_with))
    probed = MODELS[:2]
    for number, test, what in (
        ("iii", "coreference", "the region of a phrase"),
        ("iv", "relation", "the relation of two regions"),
    ):
        told = {model: values(record, model, test) for model in probed}
        best = {model: max(v for (layer, _), v in told[model].items() if layer is not None) for model in probed}
        shuffled = {model: values(record, model, test, column="control")[None, None] for model in probed}
        observed.append((number, f"accuracy for {what} from all heads", {model: told[model][None, None] for model in probed}))
        observed.append((number, f"accuracy for {what} from the best head", best))
        observed.append((number, f"accuracy for {what} from all heads, shuffled labels", shuffled))
    for task, what in (("word_order", "two exchanged neighbours"), ("first_digit", "the first word")):
        for layer in (0, CONFIG.num_hidden_layers - 1):
            states = {model: values(record, model, "linguistic", task)[layer, None] for model in probed}
            observed.append(("v", f"accuracy for {what} from states after layer {layer + 1}", states))
    return observed


def tables(records: Sequence[Record]) -> Iterator[str]:
    per_seed, lines = [facts(record) for record in records], []
    for observations in zip(*per_seed, strict=True):
        observation, what, first = observations[0]
        by_models = [[by_model[model] for _, _, by_model in observations] if model in first else [] for model in MODELS]
        lines.append([f"({observation})", what, *(spread(seed_values, none="–") for seed_values in by_models)])
    yield markdown(["", "measured", "trained", "untrained", "captions of other scenes"], lines, words=(0, 1))

    lines = []
    for layer in range(CONFIG.num_hidden_layers):

        def heads(record: Record, test: str, layer: int = layer) -> list[float]:
            return [v for (one, _), v in values(record, "trained", test).items() if one == layer]

        spreads = [
            [per_token(record, "trained", layer) for record in records],
            [_mean([v > 0.5 for v in heads(record, "cross_modal")]) for record in records],
            *([max(heads(record, test)) for record in records] for test in ("coreference", "relation")),
            [values(record, "trained", "fusion")[layer, None] for record in records],
        ]
        lines.append([str(layer + 1), *map(spread, spreads)])
    head = ["layer", "a word over a region", "cross-modal heads", "best head for a phrase's region", "for a relation", "fusion"]
    yield markdown(head, lines, words=())


def figure(records: Sequence[Record]) -> Figure:
    """A dot for every head: how well its two numbers tell a phrase's region, and a relation; trained and untrained."""
    drawn, (axes,) = panels(1, 2, (9, 3.4))
    tests = (("coreference", 0.5, "region of a phrase"), ("relation", 0.25, "relation of two regions"))
    for axis, (test, chance, title) in zip(axes, tests, strict=True):
        for model, colour, shift in (("untrained", "#9a9a9a", 0.12), ("trained", "#c2410c", -0.12)):
            points = [
                (layer + 1 + shift + 0.03 * (record["seed"] - 2), value)
                for record in records
                for (layer, _), value in values(record, model, test).items()
                if layer is not None
            ]
            axis.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.7, linewidths=0, label=model)
        axis.axhline(chance, color="black", linewidth=0.8, linestyle=":")
        axis.annotate("chance", (0.52, chance), xytext=(0, 3), textcoords="offset points", fontsize=8)
        axis.set(title=title, xlabel="layer", ylabel="accuracy of one head", ylim=(0, 1.02), xlim=(0.5, 3.5))
        axis.set_xticks(range(1, CONFIG.num_hidden_layers + 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right")
    return drawn


EXPERIMENT = Experiment((Stage(cells, measure),), tables, {"value": figure})
