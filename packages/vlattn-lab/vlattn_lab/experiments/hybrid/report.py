"""The records of the experiment as tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import having, markdown, spread
from vlattn_lab.experiments.experiment import Record, band, paired_change
from vlattn_lab.questions import digit_prompts
from vlattn_lab.scenes import CANVAS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("hybrid", "transformer")
LAST = "gradient, last layer"
CARRIED = ("gradient", "weighted", "rollout", "attention", LAST)
METHODS = (*CARRIED, "input_gradient", "integrated_gradients", "random")
TESTS = ("pointing", "mass", "insertion", "deletion")
COLOURS = ("#c2410c", "#e8a33d", "#0f766e", "#4456b5", "#7ec8be", "#9d5ca8", "#111111", "#9a9a9a")
SEED = 0  # of the picture


def of(records: Sequence[Record], kind: str) -> list[Record]:
    return sorted(having(records, kind=kind), key=lambda record: record["seed"])


def values(records: Sequence[Record], kind: str, method: str, test: str) -> list[float]:
    """One a seed."""
    return [row["value"] for record in of(records, kind) for row in having(record["table"], method=method, test=test)]


def curves(records: Sequence[Record], kind: str, method: str, test: str) -> list[dict[str, Any]]:
    """One a seed."""
    return [row for record in of(records, kind) for row in having(record["curves"], method=method, test=test)]


def tables(records: Sequence[Record]) -> Iterator[str]:
    lines = []
    for kind in KINDS:
        truth = [spread([record["truth"][name] for record in of(records, kind)]) for name in ("true", "other image")]
        whole = spread([curve["mean"][0] for curve in curves(records, kind, METHODS[0], "deletion")])
        lines.append([kind, *truth, whole])
    yield markdown(["captioner", "true captions", "true of another scene", "probability of the explained words"], lines)
    for test in TESTS:
        yield markdown([test, *KINDS, "hybrid less transformer", "p"], [_compared(records, method, test) for method in METHODS])


def _compared(records: Sequence[Record], method: str, test: str) -> list[str]:
    hybrid, transformer = (values(records, kind, method, test) for kind in KINDS)
    name = method if method == LAST else f"`{method}`"
    return [name, spread(hybrid), spread(transformer), *paired_change(hybrid, transformer)]


def curves_figure(records: Sequence[Record]) -> Figure:
    """The probability of the word over the share of patches put in or removed, the most relevant first; mean and deviation over
    the models."""
    drawn, lines = panels(len(KINDS), 2, (9.6, 3.2 * len(KINDS)), sharex=True, sharey=True)
    for kind, axes in zip(KINDS, lines, strict=True):
        for test, axis in zip(("insertion", "deletion"), axes, strict=True):
            for method, colour in zip(METHODS, COLOURS, strict=True):
                seed_curves = curves(records, kind, method, test)
                at_steps = [*zip(*(curve["mean"] for curve in seed_curves), strict=True)]
                style = ":" if method == "random" else "-"
                band(axis, seed_curves[0]["steps"], at_steps, color=colour, label=method, linestyle=style)
            axis.set(title=f"{kind}, {test}")
        axes[0].set_ylabel("probability of the word")
    lines[-1][0].set_xlabel("share of patches put in")
    lines[-1][1].set_xlabel("share of patches removed")
    drawn.legend(*lines[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawn


def maps_figure(records: Sequence[Record]) -> Figure:
    """Each method's map of the last word of both models' captions of one scene, over the scene's ink."""
    ink = 1 - digit_prompts(1, seed=SEED, kind="caption").images[0]
    rows = [(kind, record["shown"]) for kind in KINDS for record in having(records, kind=kind, seed=SEED)]
    names = list(rows[0][1]["maps"])
    drawn, lines = panels(len(rows), len(names), (1.7 * len(names), 2.1 * len(rows)))
    for (kind, seen), axes in zip(rows, lines, strict=True):
        for name, axis in zip(names, axes, strict=True):
            map_ = torch.tensor(seen["maps"][name])
            limit = float(map_.abs().max().clamp(min=1e-30))
            side = (0, CANVAS, CANVAS, 0)
            axis.imshow(ink.numpy(), cmap="gray", extent=side, vmin=0, vmax=1)
            axis.imshow(map_.numpy(), cmap="coolwarm", extent=side, vmin=-limit, vmax=limit, alpha=0.6)
            axis.set(xticks=[], yticks=[])
            axis.set_title(name.replace("_", " "), fontsize=9)
        axes[0].set_ylabel(kind)
        axes[0].set_xlabel(" ".join(seen["caption"]), fontsize=8, loc="left")
    return drawn
