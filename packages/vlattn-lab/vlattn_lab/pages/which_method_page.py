"""The tables of docs/guides/which_method.md, from the stored rows."""

from __future__ import annotations

import json
from collections.abc import Iterator

from vlattn_fast.interpret.relevancy.methods import registry
from vlattn_fast.measuring.records import markdown
from vlattn_lab.checkout import ROOT

TASKS = {"matching": "UNITER", "clip": "CLIP", "vqa": "questions", "captions": "captions"}  # with a file of rows each
METHODS: tuple[str, ...] = ("gradient", "weighted", "input_gradient", "gradcam", "integrated_gradients", "glimpse", "rollout")
METHODS += ("attention", "occlusion", "random")
FORMS = ((), ("norms",), ("norms", "attention"))  # held fixed


def table(test: str) -> str:
    """A line for each method and what it holds fixed; a column for each model of DigitScenes, with mean and standard deviation
    over sets of scenes."""
    values: dict[tuple[str, str], str] = {}
    for task in TASKS:
        rows = json.loads((ROOT / f"benchmarks/results/evaluation-{task}.json").read_text(encoding="utf-8"))["rows"]
        chosen = (row for row in rows if (row["test"], row["part"]) == (test, "image") and row["value"] is not None)
        values |= {(row["method"], task): f"{row['value']:.3f} ± {row['sd']:.3f}" for row in chosen}
    lines = []
    for method in METHODS:
        for label, held in labels(method):
            cells = [values.get((label, task), "–") for task in TASKS]
            if {*cells} != {"–"}:
                lines.append([f"`{method}`", held, *cells])
    return markdown(["method", "held fixed", *TASKS.values()], lines, words=(0, 1))


def labels(method: str) -> Iterator[tuple[str, str]]:
    """The names of a method's forms in the stored rows, and what each holds fixed."""
    kind = registry.METHODS.get(method)
    if kind is None or not kind.needs_score:  # "random" is no method
        yield method, ""
        return
    for freeze in FORMS:
        is_default = bool(freeze) and freeze == kind.default_freeze
        yield kind(freeze=freeze).label, ", ".join(freeze) + (" (default)" if is_default else "")
