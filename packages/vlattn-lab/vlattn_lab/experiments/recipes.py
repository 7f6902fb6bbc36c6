"""Do edits of attention keep a captioner from naming digits that are not there, and what do they cost?

Two captioners: the transformer of `vlattn_lab.hybrid`, which has patches and words in one sequence and is trained once a seed,
and the shipped `CLIPMapper`, which looks at the image by cross-attention, on other scenes each seed. Each answers without edits
and with each recipe of `vlattn_lab.recipes`; the same scenes are also shown faint, where the models make more mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.provenance import fingerprint
from vlattn_fast.measuring.records import having, markdown, spread
from vlattn_lab import recipes
from vlattn_lab.experiments.experiment import Cell, Effect, Experiment, Record, Settings, Stage, effects_of, less, paired_change
from vlattn_lab.hybrid import IMAGE, PATCHES, WORDS, inputs, load
from vlattn_lab.mapper import LONGEST, load_captioner
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import Questions, are_true, digit_prompts
from vlattn_lab.texts import END, START, SceneProcessor
from vlattn_lab.train.hybrid import STEPS, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCENES = 100
KINDS = {"one sequence": "caption", "cross-attention": "which"}  # and what is asked
SHADES = {"clear": 1.0, "faint": 0.5}  # the ink of the scenes
WEIGHTS = (0.25, 0.5, 2.0, 4.0, 16.0)
NONE = "no edit"
SHARE = 0.25  # of the heads


@dataclass(frozen=True)
class Asked:
    """A model and its prompts. `said`: its answers' ids (B, T) without edits."""

    model: Any
    inputs: dict[str, Tensor]
    tower: recipes.Tower
    layers: Sequence[int]
    patches: Tensor  # bool (B, N), in the tower of the image
    generate: Callable[[], Tensor]
    said: Tensor

    def answers(self, edits: recipes.Edits) -> Tensor:
        with torch.no_grad(), va.intervene(self.model, self.inputs, edits) if edits else nullcontext():
            return self.generate()

    def heads(self, chosen: str) -> dict[int, list[int]]:
        """The most even heads, or as many of these layers drawn."""
        even = recipes.even_heads(self.model, self.inputs, self.said.tolist(), SHARE)
        if chosen == "even":
            return even
        order = torch.randperm(4 * len(self.layers), generator=torch.Generator().manual_seed(0)).tolist()
        drawn = order[: sum(map(len, even.values()))]
        return {layer: some for n, layer in enumerate(self.layers) if (some := sorted(i % 4 for i in drawn if i // 4 == n))}


def _evidence(alpha: float, asked: Asked) -> recipes.Edits:
    found = recipes.evidence(asked.model, asked.inputs, asked.said.tolist())
    return recipes.raise_evidence(found, asked.patches, alpha, asked.tower)


RECIPES: dict[str, Callable[[Asked], recipes.Edits]] = {
    NONE: lambda asked: [],
    **{f"image × {w:g}": partial(lambda w, asked: recipes.raise_image(w, asked.layers, asked.tower), w) for w in WEIGHTS},
    "text cut from even heads": lambda asked: recipes.cut_even_heads(asked.heads("even"), asked.tower),
    "text cut from drawn heads": lambda asked: recipes.cut_even_heads(asked.heads("drawn"), asked.tower),
    **{f"evidence × e^{alpha:g}": partial(_evidence, alpha) for alpha in (1.0, 3.0)},
    "sink cut": lambda asked: recipes.cut_sinks(asked.model, asked.inputs, asked.patches.shape[1], asked.tower),
}


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"seed": seed, "kind": kind, "shade": shade} for seed in range(settings.seeds) for kind in KINDS for shade in SHADES]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    scenes = digit_prompts(4 if settings.smoke else SCENES, seed=cell["seed"], kind=KINDS[cell["kind"]])
    asked = prompts(cell, scenes, settings)
    texts, edited = {}, {}
    for name, recipe in RECIPES.items():
        edits = recipe(asked)
        edited[name] = bool(edits)
        texts[name] = SceneProcessor().decode(asked.answers(edits) if edits else asked.said)
    before = torch.tensor(are_true(scenes, texts[NONE]))
    rows = {}
    for name, said in texts.items():
        true, named = torch.tensor(are_true(scenes, said)), digits_named(said, scenes)
        rows[name] = {**named, "true": share(true), "mended": share(true[~before]), "broken": share(~true[before])}
    return {"weights": fingerprint(asked.model), "edited": edited, "recipes": rows}


def prompts(cell: Cell, scenes: Questions, settings: Settings) -> Asked:
    images, count = scenes.images * SHADES[cell["shade"]], len(scenes)
    how: dict[str, Any]
    tower: recipes.Tower
    layers: tuple[int, ...]
    if cell["kind"] == "one sequence":
        model: Any = trained(cell["seed"], settings)
        given = inputs(images, torch.full((count, 1), START))
        how = {"max_new_tokens": WORDS, "min_new_tokens": WORDS, "do_sample": False, "suppress_tokens": [IMAGE]}
        tower, layers, before = None, (0, 1, 2, 3), given["input_ids"].shape[1]
        patches = given["input_ids"] == IMAGE
    else:
        model, processor = load_captioner()
        given, how = dict(processor(images, scenes.questions)), {"max_new_tokens": LONGEST, "stop_token": END}
        tower, layers, before = ("text", "vision"), (2, 3, 4), 0
        patches = (torch.arange(1 + PATCHES) > 0).expand(count, -1)  # after CLS

    def generate() -> Tensor:
        made: Tensor = model.generate(**given, **how)[:, before:]
        return made

    with torch.no_grad():
        said = generate()
    length = int((said != END).all(0).cumprod(0).sum())  # tokens before the first end
    return Asked(model, given, tower, layers, patches, generate, said[:, : max(1, length)])


def trained(seed: int, settings: Settings) -> Any:
    if settings.models is not None:
        return load("transformer", Path(settings.models) / str(seed))
    return train("transformer", 2 if settings.smoke else STEPS, seed=seed, log_every=0)


def digits_named(said: Sequence[str], scenes: Questions) -> dict[str, float]:
    """How many digits an answer names that are in the scene, each once, and that are not."""
    right = absent = 0
    for text, digits in zip(said, scenes.digits.tolist(), strict=True):
        named = [DIGIT_WORDS.index(word) for word in text.split() if word in DIGIT_WORDS]
        right += len({*named} & {*digits})
        absent += sum(digit not in digits for digit in named)
    return {"right": round(right / len(said), 4), "absent": round(absent / len(said), 4)}


def share(holds: Tensor) -> float | None:
    return round(float(holds.double().mean()), 4) if len(holds) else None


def _values(records: Sequence[Record], kind: str, shade: str, name: str, number: str) -> list[float]:
    values = [record["recipes"][name][number] for record in having(records, kind=kind, shade=shade)]
    return [value for value in values if value is not None]


def tables(records: Sequence[Record]) -> Iterator[str]:
    for kind in KINDS:
        for shade in SHADES:
            lines = []
            for name in RECIPES:
                absent, right, true = (_values(records, kind, shade, name, number) for number in ("absent", "right", "true"))
                base = _values(records, kind, shade, NONE, "absent"), _values(records, kind, shade, NONE, "true")
                changes = (
                    [("", ""), ("", "")]
                    if name == NONE
                    else [paired_change(a, b) for a, b in zip((absent, true), base, strict=True)]
                )
                ends = [
                    spread(values, ".2f") if values else "–"
                    for values in (_values(records, kind, shade, name, n) for n in ("mended", "broken"))
                ]
                lines.append(
                    [name, spread(absent, ".2f"), *changes[0], spread(right, ".2f"), spread(true, ".2f"), *changes[1], *ends]
                )
            head = ["absent digits", "change", "p", "right digits", "true answers", "change", "p", "mended", "broken"]
            yield markdown([f"{kind}, {shade}", *head], lines)


def effects(records: Sequence[Record]) -> list[Effect]:
    """Of edits on faint scenes, where there are absent digits to lose."""
    compared = {name: (name, NONE) for name in ("image × 0.5", "image × 4", "image × 16", "evidence × e^3", "sink cut")}
    compared["text cut from even heads, less drawn ones"] = "text cut from even heads", "text cut from drawn heads"
    found = []
    for kind in KINDS:
        for claim, (first, second) in compared.items():
            for number, measured in (("absent", "absent digits"), ("true", "true answers")):
                one, two = (_values(records, kind, "faint", name, number) for name in (first, second))
                found.append((f"{kind}: {claim}", measured, less(one, two)))
    return effects_of([one for one in found if any(one[2])])  # no edit, no effect


def figure(records: Sequence[Record]) -> Figure:
    """Digits that are there and that are not, and true answers, over the weight of the image."""
    drawn, lines = panels(2, 2, (7.4, 5.0), sharex=True)
    names = {1.0: NONE, **{weight: f"image × {weight:g}" for weight in WEIGHTS}}
    for axis, (kind, shade) in zip(lines.flat, ((kind, shade) for kind in KINDS for shade in SHADES), strict=True):
        for number, label in (("right", "right digits"), ("absent", "absent digits"), ("true", "true answers")):
            columns = [_values(records, kind, shade, names[weight], number) for weight in sorted(names)]
            axis.plot(sorted(names), [sum(values) / len(values) for values in columns], ".-", label=label)
        axis.set(title=f"{kind}, {shade}", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(names), [f"{weight:g}" for weight in sorted(names)])
        axis.spines[["top", "right"]].set_visible(False)
    for axis in lines[-1]:
        axis.set_xlabel("weight of the image")
    drawn.supylabel("per answer", fontsize="medium")
    drawn.legend(*lines[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return drawn


EXPERIMENT = Experiment((Stage(cells, measure),), tables, {"recipes": figure}, effects)
