"""Does a student of half the heads learn more from few scenes if its attention follows a teacher's?

The teacher and the student are those of the experiment on congruence losses, the student with half of the heads. A search on
validation scenes chooses the weight of the divergence of attentions, without and with the teacher's outputs. Then students train
from the same initial weights on the same batches, with other seeds.

In: options of the experiment.
Out: its records.
Imports: vlattn_lab, vlattn_lab.experiments, vlattn_lab.experiments.congruence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import having, markdown, mean_and_deviation, spread
from vlattn_fast.models import UNITER, UNITEROutput
from vlattn_fast.nn import AttentionDivergence, capture_attention
from vlattn_lab.experiments.congruence.training import (
    CONFIG,
    MATCHED,
    RELATION,
    SEEDS,
    Curve,
    Inputs,
    Sizes,
    fewer,
    log_odds,
    model_inputs,
    new_model,
    scores,
    train_with,
)
from vlattn_lab.experiments.experiment import (
    Cell,
    Effect,
    Experiment,
    Record,
    Settings,
    Stage,
    band,
    effects_of,
    less,
    paired_change,
)
from vlattn_lab.scenes import digit_scenes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HALF = replace(CONFIG, num_attention_heads=CONFIG.num_attention_heads // 2)
TEACHER = Sizes(scenes=2400, steps=1200, every=10**9, validation=0, test=0)
STUDENT = Sizes(scenes=360, steps=720, every=120, validation=500, test=1000)
SMOKE = Sizes(scenes=48, steps=4, every=2, validation=12, test=12)
LAYERS = range(CONFIG.num_hidden_layers)
WEIGHTS = (0.1, 1.0, 10.0)  # of the divergence
SEARCH_SEEDS = (100, 101)  # no reported run has these
TEACHERS = 500  # added to a seed: no student has the teacher's initial weights or scenes
SCORES = ("text", "image", "group", "digit", "relation", "order")
LABELS = {
    "labels": "labels",
    "labels, attention": "labels and attention",
    "outputs": "labels and outputs",
    "outputs, attention": "labels, outputs and attention",
}
COLOURS = dict(zip(LABELS, ("#999999", "#1b7f79", "#c8702a", "#6a4fa3"), strict=True))
PAIRS = (("labels, attention", "labels"), ("outputs, attention", "outputs"), ("outputs", "labels"))


class Distillation:
    """Runs a student with losses of a teacher: (its output, the losses with their weights). outputs, attention: weights of the
    divergences of outputs and of attention."""

    def __init__(self, teacher: UNITER, outputs: float, attention: float) -> None:
        self.teacher, self.outputs, self.attention = teacher, outputs, attention
        self._divergence = AttentionDivergence()

    def __call__(self, model: UNITER, inputs: Inputs, named: Tensor, step: int) -> tuple[UNITEROutput, Tensor | float]:
        if not self.outputs and not self.attention:
            return model(**inputs), 0.0
        with torch.no_grad(), capture_attention(self.teacher, layers=LAYERS) as target:
            told = self.teacher(**inputs)
        with capture_attention(model, layers=LAYERS) as captured:
            output = model(**inputs)
        extra = self.attention * self._divergence(target, captured) if self.attention else output.logits.new_zeros(())
        if self.outputs:
            extra = extra + self.outputs * sum(
                F.kl_div(own.log_softmax(-1), other.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
                for own, other in zip(_answers(model, output), _answers(self.teacher, told), strict=True)
            )
        return output, extra


def _answers(model: UNITER, output: UNITEROutput) -> tuple[Tensor, Tensor]:
    """Logits of matching and of the masked relations, to which the labels belong, too."""
    return output.logits[: 2 * MATCHED], model.word_logits(output.last_hidden_state[2 * MATCHED :, RELATION])


def train_teacher(seed: int, settings: Settings) -> UNITER:
    sizes = SMOKE if settings.smoke else TEACHER
    teacher, _ = train_with(lambda model, inputs, *_: (model(**inputs), 0.0), new_model(seed + TEACHERS), seed + TEACHERS, sizes)
    return teacher.eval()


def train_student(seed: int, teacher: UNITER, outputs: float, attention: float, sizes: Sizes) -> tuple[UNITER, Curve]:
    """The seed alone gives initial weights, scenes, captions and noise, whatever the losses."""
    return train_with(Distillation(teacher, outputs, attention), new_model(seed, HALF), seed, sizes)


@torch.no_grad()
def likeness(student: UNITER, teacher: UNITER, count: int) -> dict[str, float]:
    """On test scenes with held-out captions: the divergence of attentions by layer, and the share of captions, true and false,
    on which both decide alike."""
    alike, divergences = list[Tensor](), list[float]()
    for negative in (None, "order"):
        scenes = digit_scenes(count, split="test", seed=SEEDS["test"], pairs="held_out", negative=negative)
        inputs, captures, decisions = model_inputs(fewer(scenes)), [], []
        for model in (teacher, student):
            with capture_attention(model, layers=LAYERS) as captured:
                decisions.append(log_odds(model, inputs) > 0)
            captures.append(captured)
        alike.append(decisions[0] == decisions[1])
        if negative is None:
            divergences = [float(AttentionDivergence()(*(captured[layer] for captured in captures))) for layer in LAYERS]
    measured = {f"divergence in layer {layer}": float(f"{value:.4g}") for layer, value in enumerate(divergences)}
    return measured | {"agreement": round(float(torch.cat(alike).double().mean()), 4)}


# --- the stages ---


def search_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"what": "search", "seed": seed} for seed in SEARCH_SEEDS[: 1 if settings.smoke else None]]


def measure_search(cell: Cell, settings: Settings) -> dict[str, Any]:
    """The group score on validation scenes of students with each weight, from one teacher."""
    sizes = replace(SMOKE if settings.smoke else STUDENT, every=10**9)
    teacher, tried = train_teacher(cell["seed"], settings), list[dict[str, float]]()
    for outputs in (0.0, 1.0):
        for attention in (0.0, *WEIGHTS[: 1 if settings.smoke else None]):
            model, _ = train_student(cell["seed"], teacher, outputs, attention, sizes)
            group = scores(model, sizes.validation, "validation", "seen")["group"]
            tried.append({"outputs": outputs, "attention": attention, "group": group})
    return {"tried": tried}


def mean_of(records: Sequence[Record], outputs: float, attention: float) -> float:
    """The mean group score on validation scenes over the seeds of the search."""
    search = having(records, what="search")
    found = [having(record["tried"], outputs=outputs, attention=attention)[0]["group"] for record in search]
    return mean_and_deviation(found)[0]


def chosen(records: Sequence[Record], outputs: float) -> float:
    """The weight of the divergence with the highest mean; of equals the first."""
    tried = [one["attention"] for one in having(having(records, what="search")[0]["tried"], outputs=outputs) if one["attention"]]
    return max(tried, key=lambda attention: mean_of(records, outputs, attention))


def training_cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    weights = [chosen(records, outputs) for outputs in (0.0, 1.0)]
    return [{"what": "training", "seed": seed, "weights": weights} for seed in range(settings.seeds)]


def measure_training(cell: Cell, settings: Settings) -> dict[str, Any]:
    sizes, seed = SMOKE if settings.smoke else STUDENT, cell["seed"]
    teacher, arms = train_teacher(seed, settings), dict[str, Any]()
    first, second = cell["weights"]
    for name, weights in zip(LABELS, ((0.0, 0.0), (0.0, first), (1.0, 0.0), (1.0, second)), strict=True):
        began = time.process_time()
        model, curve = train_student(seed, teacher, *weights, sizes)
        seconds = round(time.process_time() - began, 1)
        kept = {key: curve[key] for key in ("step", "group")}
        arms[name] = {
            **test_scores(model, sizes.test),
            **likeness(model, teacher, sizes.test),
            "curve": kept,
            "training": seconds,
        }
    return {"teacher": test_scores(teacher, sizes.test), "arms": arms}


def test_scores(model: UNITER, count: int) -> dict[str, float]:
    found = scores(model, count, "test", "held_out")
    return {name: round(found[name], 4) for name in SCORES}


# --- the report ---


def values(records: Sequence[Record], arm: str, measured: str) -> list[float]:
    """One a seed."""
    return [record["arms"][arm][measured] for record in having(records, what="training")]


def effects(records: Sequence[Record]) -> list[Effect]:
    """What the losses add to the group score and to finding the digit."""
    return effects_of(
        [
            (f"{LABELS[arm]} less {LABELS[plain]}", score, less(values(records, arm, score), values(records, plain, score)))
            for arm, plain in PAIRS
            for score in ("group", "digit")
        ]
    )


def tables(records: Sequence[Record]) -> Iterator[str]:
    search = having(records, what="search")
    lines = []
    for one in search[0]["tried"]:
        outputs, attention = one["outputs"], one["attention"]
        name = ("labels and outputs" if outputs else "labels") + (f", attention with weight {attention:g}" if attention else "")
        mark = " (chosen)" if attention and attention == chosen(records, outputs) else ""
        each = [having(record["tried"], outputs=outputs, attention=attention)[0]["group"] for record in search]
        lines.append([name + mark, *(f"{value:.3f}" for value in each), f"{mean_of(records, outputs, attention):.3f}"])
    yield markdown(["group score, validation", *(f"seed {record['seed']}" for record in search), "mean"], lines)
    teachers = [record["teacher"] for record in having(records, what="training")]
    lines = [["teacher", *(spread([teacher[score] for teacher in teachers]) for score in SCORES)]]
    lines += [[label, *(spread(values(records, arm, score)) for score in SCORES)] for arm, label in LABELS.items()]
    yield markdown(["held-out pairs, test scans", *SCORES], lines)
    lines = []
    for arm, plain in PAIRS:
        changes = (paired_change(values(records, arm, score), values(records, plain, score)) for score in SCORES)
        lines.append([f"{LABELS[arm]} less {LABELS[plain]}", *(f"{mean} (p {p})" for mean, p in changes)])
    yield markdown(["differences", *SCORES], lines)
    names = (*(f"divergence in layer {layer}" for layer in LAYERS), "agreement", "training")
    forms = (*(".3f" for _ in LAYERS), ".3f", ".1f")
    lines = [
        [label, *(spread(values(records, arm, name), form) for name, form in zip(names, forms, strict=True))]
        for arm, label in LABELS.items()
    ]
    heads = [*(f"divergence, layer {layer + 1} (nats)" for layer in LAYERS), "decides as the teacher", "training (s of one core)"]
    yield markdown(["test scenes", *heads], lines)


def figure(records: Sequence[Record]) -> Figure:
    """The group score over steps, and at the end over the divergence, a point a student."""
    drawn, (axes,) = panels(1, 2, (7.6, 3.4))
    for arm, label in LABELS.items():
        curves = [record["arms"][arm]["curve"] for record in having(records, what="training")]
        by_step = list(zip(*(curve["group"] for curve in curves), strict=True))
        band(axes[0], curves[0]["step"], by_step, color=COLOURS[arm], label=label)
        by_layer = [values(records, arm, f"divergence in layer {layer}") for layer in LAYERS]
        divergence = [sum(each) / len(each) for each in zip(*by_layer, strict=True)]
        axes[1].scatter(divergence, values(records, arm, "group"), color=COLOURS[arm], s=16, label=label)
    axes[0].set(xlabel="training steps", ylabel="group score, validation", ylim=(0, 1))
    axes[1].set(xlabel="divergence from the teacher, mean of the layers (nats)", ylabel="group score, test", ylim=(0, 1))
    axes[1].spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    return drawn


EXPERIMENT = Experiment(
    (Stage(search_cells, measure_search), Stage(training_cells, measure_training)), tables, {"distillation": figure}, effects
)
