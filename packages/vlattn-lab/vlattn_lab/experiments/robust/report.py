"""The records of the experiment as tables and a picture, and the settings that the sweep's records choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import grouped, having, markdown, spread
from vlattn_lab.experiments.experiment import Effect, Record, dots, effects_of, less, paired_change

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "before": "before",
    "none": "no loss on masks",
    "crop": "crop loss",
    "rollout": "rollout loss",
    "gradient": "relevancy loss",
    "held": "relevancy loss, held fixed",
}
POINTING = (
    *("in the digit", "in the shade", "hits", "held fixed in the digit", "held fixed in the shade"),
    *("rollout in the digit", "rollout in the shade"),
)
Setting = tuple[str, float, float]  # loss, weight, learning rate


def swept(records: Sequence[Record]) -> dict[Setting, list[dict[str, Any]]]:
    """The measurements of each setting, one a seed."""
    tried = [one for record in having(records, what="sweep") for one in record["tried"]]
    return grouped(tried, lambda one: (one["loss"], one["weight"], one["rate"]))


def chosen(records: Sequence[Record]) -> list[Setting]:
    """The setting of each loss with the highest mean validation accuracy without a shade; of equals the first."""
    means = {setting: sum(one["none"] for one in seed_rows) / len(seed_rows) for setting, seed_rows in swept(records).items()}
    return [
        max((setting for setting in means if setting[0] == loss), key=means.__getitem__) for loss in LABELS if loss != "before"
    ]


def values(records: Sequence[Record], loss: str, scenes: str, measured: str) -> list[float]:
    """One a seed; scenes: "shaded" or "clean", see `measure_training`."""
    return [one[measured] for record in having(records, what="training") for one in having(record[scenes], loss=loss)]


def tables(records: Sequence[Record]) -> Iterator[str]:
    best, seeds = chosen(records), [f"seed {record['seed']}" for record in having(records, what="sweep")]
    lines = []
    for setting, seed_rows in swept(records).items():
        loss, weight, rate = setting
        name = LABELS[loss] + (f", weight {weight:g}" if weight else "") + f", rate {rate:g}"
        cue_cells = [
            f"{sum(one[cue] for one in seed_rows) / len(seed_rows):.3f}" for cue in ("none", "inverted", "as in training")
        ]
        lines.append([name + (" (chosen)" if setting in best else ""), *(f"{one['none']:.3f}" for one in seed_rows), *cue_cells])
    head = [*(f"no shade, {seed}" for seed in seeds), "no shade", "inverted", "as in training"]
    yield markdown(["validation accuracy", *head], lines)

    names = {"none": "no shade", "inverted": "shade inverted", "as in training": "shade as in training"}
    lines = [[LABELS[loss], *(spread(values(records, loss, "shaded", cue)) for cue in names)] for loss in LABELS]
    yield markdown(["test accuracy", *names.values()], lines)

    lines = []
    compared = [("gradient", loss) for loss in LABELS if loss not in ("gradient", "held")]
    for pair in (*compared, ("held", "gradient"), ("held", "rollout"), ("held", "crop")):
        both = ([values(records, one, "shaded", cue) for one in pair] for cue in names)
        changes = (paired_change(ours, theirs) for ours, theirs in both)
        lines.append([" less ".join(LABELS[one] for one in pair), *(f"{change} (p {p})" for change, p in changes)])
    yield markdown(["test accuracy", *names.values()], lines)

    lines = [[LABELS[loss], *(spread(values(records, loss, "shaded", one)) for one in POINTING)] for loss in LABELS]
    yield markdown(["relevancy", *POINTING], lines)

    clean = {loss: values(records, loss, "clean", "none") for loss in LABELS}
    lines = [[LABELS[loss], spread(seed_rows)] for loss, seed_rows in clean.items()]
    change, p = paired_change(clean["held"], clean["gradient"])
    lines.append([f"{LABELS['held']} less {LABELS['gradient']}", f"{change} (p {p})"])
    yield markdown(["test accuracy, no shade, never a shade in training", "accuracy"], lines)


def effects(records: Sequence[Record]) -> list[Effect]:
    """The relevancy loss less the others, and its two forms."""
    compared = [
        ("gradient", "none", "shaded", ("none", "inverted", "as in training")),
        ("gradient", "crop", "shaded", ("none", "inverted")),
        ("gradient", "rollout", "shaded", ("none", "inverted")),
        ("held", "gradient", "shaded", ("none", "inverted", "as in training")),
        *((loss, "before", "clean", ("none",)) for loss in ("none", "crop", "gradient", "held")),
        ("held", "gradient", "clean", ("none",)),
    ]
    names = {"none": "no shade", "inverted": "shade inverted", "as in training": "shade as in training"}
    return effects_of(
        [
            (
                f"{LABELS[one]} less {LABELS[other]}",
                "never a shade" if scenes == "clean" else names[cue],
                less(values(records, one, scenes, cue), values(records, other, scenes, cue)),
            )
            for one, other, scenes, cues in compared
            for cue in cues
        ]
    )


def figure(records: Sequence[Record]) -> Figure:
    """The accuracy of each model, by where the shade lies."""
    drawn, (axes,) = panels(1, 3, (7.8, 3.8), sharey=True)
    titles = {"none": "no shade", "inverted": "shade inverted", "as in training": "shade as in training"}
    for axis, (cue, title) in zip(axes, titles.items(), strict=True):
        dots(axis, {label: values(records, loss, "shaded", cue) for loss, label in LABELS.items()}, "#0f766e")
        axis.axhline(1 / 4, color="#999999", linewidth=0.8, linestyle=":")  # chance
        axis.set(title=title, ylim=(-0.03, 1.03))
    axes[0].set_ylabel("accuracy")
    return drawn
