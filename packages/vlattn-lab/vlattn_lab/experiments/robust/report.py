"""The records of the experiment as tables and a picture, and the settings that the sweep's records choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import grouped, having, markdown, spread
from vlattn_lab.experiments.experiment import Record, paired_change
from vlattn_lab.experiments.robust.training import CORNERS, SHADE, shown_scenes
from vlattn_lab.scenes import CANVAS, DIGIT

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


def figure(records: Sequence[Record]) -> Figure:
    """Test scenes, a line each: the scene, and the maps of each model of the first seed. The digit has a frame, the shade a
    dotted one."""
    from matplotlib.patches import Rectangle

    record = having(records, what="training")[0]
    plain = shown_scenes(record["seed"])
    drawn, lines = panels(len(plain.answer), 1 + len(LABELS), (11.8, 3.9))
    for place, line in enumerate(lines):
        answer = int(plain.answer[place])
        for axis, loss in zip(line, (None, *LABELS), strict=True):
            (left, top), (x, y) = plain.box[place, :2].tolist(), CORNERS[answer].tolist()
            frames = [((left, top), DIGIT, "#0a7d5e", "-")]
            if loss is None:
                ink = plain.shaded("as in training").images[place].numpy()
                axis.set_xlabel(f"answer {answer}", fontsize=9)
            else:
                ink = plain.images[place].numpy()
                frames.append(((x, y), SHADE, "#555555", ":"))
                (one,) = having(record["shaded"], loss=loss)
                map_ = torch.tensor(one["maps"][place])
                axis.imshow((map_ / map_.max().clamp(min=1e-30)).numpy(), cmap="YlOrRd", vmin=0, extent=(0, CANVAS, CANVAS, 0))
                axis.set_xlabel(f"says {one['says'][place]}", fontsize=9)
            axis.imshow(ink * 0, cmap="Greys_r", alpha=ink, extent=(0, CANVAS, CANVAS, 0))
            for corner, side, colour, style in frames:
                axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linestyle=style, linewidth=1.6))
            axis.set(xticks=[], yticks=[])
            if not place:
                axis.set_title("scene" if loss is None else LABELS[loss], fontsize=10)
    return drawn
