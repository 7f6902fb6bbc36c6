"""The pictures of the page: maps over their photos, and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import vlattn_fast as va
from vlattn_fast.interpret.result.figures.scale import RELEVANCY, colors, for_scale
from vlattn_lab.checkout import ROOT
from vlattn_lab.real import cuts
from vlattn_lab.real.measures import Row, Scene

DOCS = ROOT / "docs"
MASK, OUTSIDE = "saliency above ½", 0.25  # how bright the rest of the photo is


def save(figure: Figure, name: str, dpi: int = 100) -> None:
    """As a JPEG, since photos take several times as much as PNG."""
    figure.savefig(DOCS / name, dpi=dpi, bbox_inches="tight", pad_inches=0.03, pil_kwargs={"quality": 70, "optimize": True})


def tiles(lines: Sequence[Mapping[str, Any]], side: float) -> Figure:
    """Pictures by title, line by line; the first line shows the titles. Each is `side` inches wide."""
    figure = Figure(figsize=(side * len(lines[0]), side * len(lines)))
    axes = figure.subplots(len(lines), len(lines[0]), squeeze=False)
    for number, (line, row) in enumerate(zip(lines, axes, strict=True)):
        for (title, picture), axis in zip(line.items(), row, strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
            if not number:
                axis.set_title(title, fontsize=6.5 * side, pad=3)
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.03, hspace=0.03)
    return figure


def map_lines(lines: Sequence[Mapping[str, Any]], columns: int = 6, side: float = 1.16) -> Figure:
    """The pictures of each photo in lines of `columns`, so that they are large enough to see what they show; last the colours."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    each = -(-(len(lines[0]) + 1) // columns)  # lines of a photo
    figure = Figure(figsize=(side * columns, (side + 0.17) * each * len(lines)))
    axes = figure.subplots(each * len(lines), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, line in enumerate(lines):
        for (title, picture), axis in zip(line.items(), axes[number * each :].flat, strict=False):
            axis.imshow(picture)
            axis.set_title(title, fontsize=8, pad=3)
    place = axes[each - 1][-1].inset_axes((0.05, 0.5, 0.9, 0.1))
    shown = ScalarMappable(Normalize(-1, 1), for_scale(colors(RELEVANCY), -1))
    figure.colorbar(shown, cax=place, orientation="horizontal", ticks=(-1, 0, 1)).set_ticklabels(["\u2212most", "0", "most"])
    place.tick_params(labelsize=8)
    place.set_title("a map's colours", fontsize=8, pad=3)
    figure.subplots_adjust(0, 0, 1, 1 - 0.17 / figure.get_figheight(), wspace=0.03, hspace=0.17)
    return figure


def photo_line(scene: Scene, explanations: Mapping[str, Any], box: int = 0) -> dict[str, Any]:
    """The photo, with a frame around the box of `box` patches; what the saliency head finds; and the map of each method."""
    from PIL import ImageDraw

    photo = scene.photo.resize(scene.mask.shape[::-1])
    shown, grey = photo.copy(), photo.convert("L").convert("RGB")
    if box:
        patch = scene.mask.shape[0] // explanations["gradient"].image.shape[-1]
        top, left = (patch * first for first in scene.box)
        ImageDraw.Draw(shown).rectangle((left, top, left + box * patch, top + box * patch), outline="lime", width=4)
    masked = np.asarray(photo) * np.where(scene.mask.numpy(), 1, OUTSIDE)[..., None]
    maps = {method: explanation.overlay(grey) for method, explanation in explanations.items()}
    return {"photo": shown, MASK: masked.astype(np.uint8), **maps}


def cut_lines(model: Any, head: Any, scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """Each photo with the patches that are read most in red and those of the largest states in blue; the saliency as it is, and
    where tokens or a head are cut."""
    from PIL import ImageDraw

    inputs, (layer, number) = cuts.together(scenes), cuts.HEAD
    masks = {
        name: draws[0][0] for name, draws in cuts.chosen(cuts.read_most(model, inputs), cuts.state_sizes(model, inputs)).items()
    }
    edits: dict[str, Any] = {name: va.Knockout(keys=masks[name]) for name in ("most read", "largest state", "class token")}
    edits[f"head {number} of layer {layer}"] = va.ScaleHeads({layer: [number]}, 0.0)
    patch, saliency = model.config.patch_size, {MASK: cuts.run_of(model, head, inputs).saliency}
    for name, edit in edits.items():
        with va.intervene(model, inputs, edit):
            saliency[name] = cuts.run_of(model, head, inputs).saliency
    lines = []
    for place, scene in enumerate(scenes):
        photo = scene.photo.resize(scene.mask.shape[::-1])
        shown, columns = photo.copy(), scene.mask.shape[1] // patch
        for name, colour in (("largest state", "blue"), ("most read", "red")):
            for token in (masks[name][place, 1:].nonzero()[:, 0]).tolist():
                left, top = token % columns * patch, token // columns * patch
                ImageDraw.Draw(shown).rectangle((left, top, left + patch, top + patch), outline=colour, width=3)
        bright = {name: np.where(run_values[place].numpy() > 0.5, 1, OUTSIDE)[..., None] for name, run_values in saliency.items()}
        lines.append({"photo": shown, **{name: (np.asarray(photo) * part).astype(np.uint8) for name, part in bright.items()}})
    return lines


def draw_heads(rows: Sequence[Row]) -> Figure:
    """Each head's mean over the photos: its relevancy, and the fall of the score without it."""
    relevancy, fall = (np.mean([row[name] for row in rows], 0) for name in ("relevancy", "fall"))
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axis = figure.subplots()
    layers = np.repeat(np.arange(len(fall)), fall.shape[1])
    points = axis.scatter(relevancy.ravel(), fall.ravel(), c=layers, cmap="viridis", s=18)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.set(xlabel="relevancy of the head", ylabel="fall of the score without the head")
    figure.colorbar(points, label="layer")
    return figure
