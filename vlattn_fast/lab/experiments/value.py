"""The five observations of VALUE (Cao et al., "Behind the Scene", ECCV 2020), on UNITER trained on DigitScenes.

A seed stands for a trained model, the same model untrained, and its test scenes. Controls are the untrained model and captions of
other scenes. [CLS] and [SEP] count as neither text nor image: otherwise seven of eleven tokens would be text, and a head that
attends evenly would be cross-modal.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.probing import probe
from vlattn_fast.lab.experiments.experiment import Cell, Experiment, Row, Settings, Stage, mean_and_deviation, rank_correlation
from vlattn_fast.lab.probing import probe_samples
from vlattn_fast.lab.provenance import fingerprint
from vlattn_fast.lab.uniter import CONFIG, load_uniter, matching_accuracy
from vlattn_fast.models.uniter import UNITER, UNITERLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = ("trained", "untrained", "other captions")
TOKENS = {"text": 5, "image": 4, "special": 2}  # in a caption and a scene
SAMPLES, SCENES = 300, 500  # for the probes, and for an accuracy
KEPT = ("test", "kind", "layer", "head", "value", "chance", "control")


def cells(settings: Settings, rows: Sequence[Row]) -> list[Cell]:
    return [{"seed": seed} for seed in range(settings.seeds)]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    seed = cell["seed"]
    samples, scenes = (20, 10) if settings.smoke else (SAMPLES, SCENES)
    untrained = fresh(seed)
    model = trained(seed, settings)
    measured: dict[str, Any] = {"weights": fingerprint(model)}
    for name, one in zip(MODELS, (model, untrained, model), strict=True):
        data = other_captions(samples, seed) if name == "other captions" else probe_samples(samples, seed=seed)
        report = probe(
            one, data, tests=("modality", "cross_modal", "fusion") if name == "other captions" else None, special=False
        )
        measured[name] = [
            {key: round(row[key], 4) if isinstance(row[key], float) else row[key] for key in KEPT}
            for row in report.table
            if row["value"] is not None
        ]
    measured["accuracy"] = mean_accuracy(model, scenes, seed)
    measured["without_head"] = [
        {"layer": layer, "head": head, "accuracy": accuracy} for layer, head, accuracy in ablated(model, scenes, seed)
    ]
    return measured


def fresh(seed: int) -> UNITER:
    """The model before its training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNITER(CONFIG).eval()


def trained(seed: int, settings: Settings) -> UNITER:
    if settings.models is not None:
        return load_uniter(Path(settings.models) / str(seed))[0]
    train = importlib.import_module("vlattn_fast.lab.train.uniter").train
    model: UNITER = train(2, seed=seed, log_every=0) if settings.smoke else train(seed=seed, log_every=0)
    return model


def other_captions(count: int, seed: int) -> Iterator[tuple[dict[str, Tensor], None]]:
    """The scenes, each with the caption of the scene before."""
    for inputs, _ in probe_samples(count, seed=seed, batch=count):
        yield {**inputs, "input_ids": inputs["input_ids"].roll(1, 0)}, None


def mean_accuracy(model: UNITER, count: int, seed: int) -> float:
    """Mean accuracy over the three kinds of wrong captions."""
    accuracies = matching_accuracy(model, count=count, seed=seed)
    return sum(accuracies.values()) / len(accuracies)


def ablated(model: UNITER, count: int, seed: int) -> Iterator[tuple[int, int, float]]:
    """(layer, head, accuracy of the model when that head's result is 0)."""
    for layer in range(model.config.num_hidden_layers):
        for head in range(model.config.num_attention_heads):
            with without_head(model, layer, head):
                yield layer, head, mean_accuracy(model, count, seed)


@contextlib.contextmanager
def without_head(model: UNITER, layer: int, head: int) -> Iterator[None]:
    chosen = model.uniter.encoder.layer[layer]
    assert isinstance(chosen, UNITERLayer)
    width = chosen.attention.self.head_dim

    def silence(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = inputs[0].clone()
        heads[..., head * width : (head + 1) * width] = 0
        return (heads, *inputs[1:])

    hook = chosen.attention.output.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        hook.remove()


# --- facts from the rows ---


def values(row: Row, model: str, test: str, kind: str | None = None, column: str = "value") -> dict[tuple[Any, Any], float]:
    """(layer, head) -> value, of one model and test."""
    return {(one["layer"], one["head"]): one[column] for one in row[model] if (one["test"], one["kind"]) == (test, kind)}


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def per_token(row: Row, model: str, layer: int | None = None) -> float:
    """[CLS]'s mean attention on a word over its attention on a region, over the heads of one layer or of all layers."""
    mass = {
        kind: _mean([v for place, v in values(row, model, "modality", kind).items() if layer in (None, place[0])])
        for kind in ("text", "image")
    }
    return (mass["text"] / TOKENS["text"]) / (mass["image"] / TOKENS["image"])


def facts(row: Row) -> list[tuple[str, str, dict[str, float]]]:
    """(observation, name of the measurement, value by model) of one seed."""

    def of(measure: Any, models: Sequence[str] = MODELS) -> dict[str, float]:
        return {model: measure(model) for model in models}

    def best(model: str, test: str) -> float:
        return max(v for (layer, _), v in values(row, model, test).items() if layer is not None)

    probed = MODELS[:2]
    observed: list[tuple[str, str, dict[str, float]]] = []
    for kind, count in TOKENS.items():
        mass = of(lambda model, kind=kind: _mean(list(values(row, model, "modality", kind).values())))
        observed.append(("i", f"attention of [CLS] on the {kind}, {count} tokens of 11", mass))
    observed.append(("i", "attention on a word over attention on a region", of(lambda model: per_token(row, model))))
    crossing = of(lambda model: _mean([v > 0.5 for v in values(row, model, "cross_modal").values()]))
    observed.append(("ii", "share of heads that are cross-modal in most samples", crossing))
    drops = {(one["layer"], one["head"]): row["accuracy"] - one["accuracy"] for one in row["without_head"]}
    shares = values(row, "trained", "cross_modal")
    goes_with = rank_correlation([shares[place] for place in drops], list(drops.values()))
    observed.append(
        ("ii", "rank correlation over heads: cross-modal, and what accuracy loses without the head", {"trained": goes_with})
    )
    for number, test, what in (("iii", "coreference", "the region of a phrase"), ("iv", "relation", "how two regions lie")):
        whole = of(lambda model, test=test: values(row, model, test)[None, None], probed)
        shuffled = of(lambda model, test=test: values(row, model, test, column="control")[None, None], probed)
        observed.append((number, f"telling {what} from all heads", whole))
        observed.append((number, f"telling {what} from the best head", of(lambda model, test=test: best(model, test), probed)))
        observed.append((number, f"telling {what} from all heads, shuffled labels", shuffled))
    for task, what in (("word_order", "two exchanged neighbours"), ("first_digit", "the first word")):
        for layer in (0, CONFIG.num_hidden_layers - 1):
            states = of(lambda model, task=task, layer=layer: values(row, model, "linguistic", task)[layer, None], probed)
            observed.append(("v", f"telling {what} from states behind layer {layer + 1}", states))
    return observed


def tables(rows: Sequence[Row]) -> Iterator[str]:
    lines = ["| | measured | trained | untrained | captions of other scenes |", "| --- | --- | ---: | ---: | ---: |"]
    per_seed = [facts(row) for row in rows]
    for index, (number, what, first) in enumerate(per_seed[0]):
        cells = []
        for model in MODELS:
            numbers = [spreads[index][2][model] for spreads in per_seed if model in first]
            cells.append("{:.3f} ± {:.3f}".format(*mean_and_deviation(numbers)) if numbers else "–")
        lines.append(f"| ({number}) | {what} | {' | '.join(cells)} |")
    yield "\n".join(lines)

    lines = ["| layer | a word over a region | cross-modal heads | best head for a phrase's region | for a relation | fusion |"]
    lines.append("| ---: |" + " ---: |" * 5)
    for layer in range(CONFIG.num_hidden_layers):
        spreads = [
            [per_token(row, "trained", layer) for row in rows],
            [_mean([v > 0.5 for (one, _), v in values(row, "trained", "cross_modal").items() if one == layer]) for row in rows],
            *[
                [max(v for (one, _), v in values(row, "trained", test).items() if one == layer) for row in rows]
                for test in ("coreference", "relation")
            ],
            [values(row, "trained", "fusion")[layer, None] for row in rows],
        ]
        lines.append(f"| {layer + 1} | " + " | ".join("{:.3f} ± {:.3f}".format(*mean_and_deviation(v)) for v in spreads) + " |")
    yield "\n".join(lines)


def figure(rows: Sequence[Row]) -> Figure:
    """A dot for every head: how well its two numbers tell a phrase's region, and a relation; trained and untrained."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.4), layout="constrained")
    axes = drawn.subplots(1, 2)
    tests = (("coreference", 0.5, "region of a phrase"), ("relation", 0.25, "relation of two regions"))
    for axis, (test, chance, title) in zip(axes, tests, strict=True):
        for model, colour, shift in (("untrained", "#9a9a9a", 0.12), ("trained", "#c2410c", -0.12)):
            points = [
                (layer + 1 + shift + 0.03 * (row["seed"] - 2), value)
                for row in rows
                for (layer, _), value in values(row, model, test).items()
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
