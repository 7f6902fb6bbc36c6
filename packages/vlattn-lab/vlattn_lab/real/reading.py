"""A model that reads formulas: each character of its answer explained, and the maps compared with the glyph that it names.

The package latex-ocr-junia carries the model: a picture of 16 x 64 patches goes through four layers of an encoder, and a
decoder of four layers writes LaTeX, a character a token. Rows are plain numbers, names and lists.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_fast.interpret.relevancy.methods.registry import METHODS
from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation
from vlattn_lab.real import rival
from vlattn_lab.real.formulas import HEIGHT, PATCH, WIDTH, Drawing, Formula, draw, places
from vlattn_lab.weights import package

PACKAGE = "latex_ocr_junia"
GRID = (HEIGHT // PATCH, WIDTH // PATCH)
LONGEST = 128  # characters of an answer
BLOCK = 60  # formulas that are measured together, rule by rule of FIRST and then by the tests; all of them by OTHERS at the end
TESTED = 30  # formulas with tests beside pointing and mass
MINUTES = 60.0
WINDOW = 2  # patches along each side of what is taken out at once, for occlusion
FRACTIONS = (0.01, 0.02, 0.04, 0.08, 0.16)  # of the patches, taken out or put in
Row = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """A method of `va.methods` with its options, None = it has no such option; or the package of `rival`."""

    method: str
    freeze: tuple[str, ...] | None = None
    of: str | None = None
    baseline: str | None = None  # "blank" = the picture without ink

    def made(self, blank: Tensor) -> va.methods.Method:
        """The method; `blank`: the picture without ink."""
        kind = METHODS[self.method]
        options: Row = {} if self.freeze is None else {"freeze": self.freeze, "of": self.of}
        return kind(**options, **({} if self.baseline is None else {"baseline": {"images": blank}}))

    @property
    def facts(self) -> Row:
        facts = {"method": self.method, "freeze": None if self.freeze is None else [*self.freeze], "of": self.of}
        return facts if self.baseline is None else {**facts, "baseline": self.baseline}

    @property
    def key(self) -> str:
        """The name of its measurements in a file."""
        words = [self.method, "+".join(self.freeze or ()), self.of or ""]
        return " ".join(words if self.baseline is None else [*words, self.baseline])


PLAIN, NORMS, BOTH = FROZEN = ((), ("norms",), ("norms", "attention"))
GRADIENTS = ("gradient", "weighted", "input_gradient")
BESIDE = [  # what lies on the ink alone, and the external rows
    Rule("input_gradient", BOTH, "logit", "blank"),
    Rule(rival.PACKAGE, None, "logit", "blank"),
    Rule(rival.PACKAGE, None, "logit"),
]
FIRST = [
    *(Rule(method, freeze, "logit") for method in GRADIENTS for freeze in FROZEN),
    *(Rule("gradcam", freeze, "logit") for freeze in (PLAIN, NORMS)),
    Rule("attention"),
    Rule("rollout"),
    *BESIDE,
]
OTHERS = [
    *(Rule(method, freeze, "log_probability") for method in GRADIENTS for freeze in FROZEN),
    # the margin's gradient is that of the log-probability times a number, which changes no map of the other two
    *(Rule("gradient", freeze, "margin") for freeze in FROZEN),
]
OCCLUSION = Rule("occlusion", None, "logit")
COMPARED = [  # by deletion, insertion and occlusion
    OCCLUSION,
    *(Rule("gradient", freeze, "logit") for freeze in (PLAIN, BOTH)),
    Rule("weighted", NORMS, "logit"),
    Rule("input_gradient", BOTH, "logit"),
    Rule("attention"),
    Rule("rollout"),
]


class NextCharacter(nn.Module):
    """The logits (B, vocabulary) of the character that follows `characters` (B, T)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor, characters: Tensor) -> Tensor:
        return self.inner({"images": images, "decoder_input_ids": characters})[:, -1]


@dataclass(frozen=True)
class Reader:
    """The model, and the string of each token."""

    model: nn.Module
    names: Mapping[int, str]
    begin: int
    end: int

    @torch.no_grad()
    def answer(self, images: Tensor) -> list[int]:
        """The ids of the characters that the model writes, without those that begin and end."""
        options = {"bos_token_id": self.begin, "eos_token_id": self.end, "max_length": LONGEST, "beam_size": 1}
        (ids,) = self.model.generate(images=images, **options).tolist()  # type: ignore[operator]
        return ids[1 : ids.index(self.end)] if self.end in ids else ids[1:]

    @torch.no_grad()
    def logits(self, images: Tensor, ids: Sequence[int]) -> Tensor:
        """(B, T, vocabulary), of each character of an answer, from those in front of it."""
        characters = torch.tensor([[self.begin, *ids[:-1]]]).expand(len(images), -1)
        logits: Tensor = self.model({"images": images, "decoder_input_ids": characters})
        return logits


def load() -> Reader:
    """The model as its package loads it, but from the file's weights alone."""
    folder = package(PACKAGE) / "assets"
    config = import_module(f"{PACKAGE}.utils").load_model_config(folder / "model_config.json")
    tokens = import_module(f"{PACKAGE}.tokenizer").LatexTokenizer.load(folder / "tokenizer.json")
    model = import_module(f"{PACKAGE}.model").build_model(config)
    stored = torch.load(folder / "best.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(stored["model_state_dict"])
    names = {number: name for name, number in tokens.token_to_id.items()}
    return Reader(model.eval().requires_grad_(False), names, tokens.bos_id, tokens.eos_id)


# --- measures of a map (h, w) of patches ---


def inside(box: Sequence[float]) -> Tensor:
    """(h, w), the share of each patch that lies in a box x0, y0, x1, y1."""
    shares = []
    for size, low, high in ((GRID[0], box[1], box[3]), (GRID[1], box[0], box[2])):
        edges = torch.arange(size + 1, dtype=torch.float64) * PATCH
        shares.append((edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) / PATCH)
    return shares[0][:, None] * shares[1]


def near(box: Sequence[float]) -> Tensor:
    """bool (h, w), the patches whose centres lie in a box, or at most a patch from it."""
    ys, xs = ((torch.arange(size) + 0.5) * PATCH for size in GRID)
    in_rows, in_columns = (
        (low - PATCH <= at) & (at <= high + PATCH) for at, low, high in ((ys, box[1], box[3]), (xs, box[0], box[2]))
    )
    return in_rows[:, None] & in_columns


def pointing(values: Tensor, box: Sequence[float]) -> float:
    """1.0 where the largest entry lies near the box; 0.0 of a map without a positive entry."""
    return float(bool(values.max() > 0) and bool(near(box).flatten()[values.argmax()]))


def mass(values: Tensor, box: Sequence[float]) -> float:
    """The share of the positive part that lies in the box."""
    positive = values.double().clamp(min=0)
    total = float(positive.sum())
    return float((positive * inside(box)).sum()) / total if total > 0 else 0.0


def score_of(logits: Tensor, character: int, of: str) -> Tensor:
    """(B,), the number that is explained of logits (B, vocabulary)."""
    chosen = logits[:, character]
    if of == "logit":
        return chosen
    if of == "log_probability":
        return logits.log_softmax(-1)[:, character]
    others = torch.arange(logits.shape[1]) != character
    return chosen - logits[:, others].logsumexp(-1)


# --- maps ---


@dataclass(frozen=True)
class Reading:
    """A formula, its drawing, the model's answer, and the place of each glyph's character in it."""

    formula: Formula
    drawing: Drawing
    ids: Sequence[int]
    places: Mapping[str, int]

    @property
    def images(self) -> Tensor:
        return torch.tensor(self.drawing.picture)[None, None]

    @property
    def blank(self) -> Tensor:
        return torch.tensor(self.drawing.blank)[None, None]


def relevancy(reader: Reader, reading: Reading, symbol: str, rule: Rule) -> Tensor:
    """The map (h, w) of the character that names a glyph; of a method that gives one number a pixel, the sums of each patch."""
    place = reading.places[symbol]
    characters = torch.tensor([[reader.begin, *reading.ids[:place]]])
    if rule.method == rival.PACKAGE:
        images = reading.images.requires_grad_()
        with rival.rules():
            logits = NextCharacter(reader.model)(images, characters)
            (grad,) = torch.autograd.grad(score_of(logits, reading.ids[place], str(rule.of)).sum(), images)
        return patch_sums(grad * (images.detach() - (0 if rule.baseline is None else reading.blank)))
    method = rule.made(reading.blank)
    options: Row = {"position": {"tower1": -1}, "patches": va.PatchGrid(*GRID)} if method.needs == "attention" else {}
    inputs = {"images": reading.images, "characters": characters}
    explained = va.explain(NextCharacter(reader.model), inputs, target=reading.ids[place], method=method, **options)
    if "tower0" in explained.relevancy:
        return explained.relevancy["tower0"][0].view(GRID)
    return patch_sums(explained.relevancy["images"])


def patch_sums(pixels: Tensor) -> Tensor:
    """(h, w), the sums over the pixels of each patch."""
    return pixels.view(GRID[0], PATCH, GRID[1], PATCH).sum((1, 3))


def falls(reader: Reader, reading: Reading, symbol: str, of: str) -> tuple[Tensor, Tensor]:
    """Where windows of WINDOW x WINDOW patches have ink, bool (h / WINDOW, w / WINDOW); and how much the explained number of a
    symbol falls when each of them becomes blank, (windows with ink)."""
    side, place = WINDOW * PATCH, reading.places[symbol]
    ink = nn.functional.max_pool2d((reading.images - reading.blank).abs(), side)[0, 0] > 1e-3
    edited = reading.images.repeat(int(ink.sum()), 1, 1, 1)
    for one, (y, x) in zip(edited, (ink.nonzero() * side).tolist(), strict=True):
        one[..., y : y + side, x : x + side] = reading.blank[0, ..., y : y + side, x : x + side]
    ids = reading.ids[: place + 1]
    numbers = [score_of(reader.logits(some, ids)[:, -1], ids[-1], of) for some in (reading.images, *edited.split(8))]
    return ink, numbers[0] - torch.cat(numbers[1:])


def curves(reader: Reader, reading: Reading, symbol: str, values: Tensor) -> tuple[float, float]:
    """The mean probability of a character while the patches with the largest entries become blank, and while a blank picture gets
    them: deletion and insertion, over FRACTIONS."""
    ranks = values.flatten().argsort(descending=True, stable=True).argsort()
    masks = torch.stack([(ranks < round(share * len(ranks))).view(GRID) for share in FRACTIONS])
    large = masks.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    place = reading.places[symbol]
    means = []
    for before, after in ((reading.images, reading.blank), (reading.blank, reading.images)):
        logits = reader.logits(torch.where(large, after, before), reading.ids[: place + 1])
        means.append(float(logits[:, -1].softmax(-1)[:, reading.ids[place]].mean()))
    return means[0], means[1]


# --- rows ---


def glyphs(boxes: Mapping[str, Any]) -> list[str]:
    """The glyphs of a formula that are explained: the first of its source, the one in the middle, and the last."""
    symbols = [*boxes]
    return [symbols[0], symbols[len(symbols) // 2], symbols[-1]]


def read(reader: Reader, formula: Formula) -> Row:
    """The model's answer to a drawn formula, and the boxes of its glyphs."""
    drawing = draw(formula)
    ids = reader.answer(torch.tensor(drawing.picture)[None, None])
    answer = "".join(reader.names[number] for number in ids)
    return {
        **{"task": "formula", "number": formula.number, "kind": formula.kind, "font": formula.font, "source": formula.source},
        **{"answer": answer, "ids": ids, "right": places(formula.source, answer) is not None},
        "boxes": {symbol: [round(edge, 2) for edge in box] for symbol, box in drawing.boxes.items()},
    }


def reading_of(formula: Formula, row: Row) -> Reading:
    symbol_places = places(formula.source, row["answer"])
    assert symbol_places is not None
    return Reading(formula, draw(formula), row["ids"], symbol_places)


def map_row(reader: Reader, reading: Reading, rule: Rule) -> Row:
    """Pointing and mass of the maps of `glyphs`."""
    boxes = reading.drawing.boxes
    maps = {symbol: relevancy(reader, reading, symbol, rule) for symbol in glyphs(boxes)}
    return {
        **{"task": "formula maps", "number": reading.formula.number, **rule.facts},
        "pointing": [int(pointing(values, boxes[symbol])) for symbol, values in maps.items()],
        "mass": [round(mass(values, boxes[symbol]), 4) for symbol, values in maps.items()],
    }


def test_row(reader: Reader, reading: Reading, rules: Sequence[Rule]) -> Row:
    """The glyph in the middle of the source: deletion, insertion and the rank correlation with occlusion over the windows
    with ink, by each rule and by OCCLUSION itself."""
    boxes = reading.drawing.boxes
    symbol = glyphs(boxes)[1]
    ink, fallen = falls(reader, reading, symbol, "logit")
    coarse = torch.zeros(ink.shape).masked_scatter_(ink, fallen)
    occluded = coarse.repeat_interleave(WINDOW, 0).repeat_interleave(WINDOW, 1)
    measured = []
    for rule in rules:
        values = occluded if rule == OCCLUSION else relevancy(reader, reading, symbol, rule)
        deletion, insertion = curves(reader, reading, symbol, values)
        pooled = nn.functional.avg_pool2d(values[None], WINDOW)[0][ink]
        numbers = {
            **{"pointing": pointing(values, boxes[symbol]), "mass": round(mass(values, boxes[symbol]), 4)},
            **{"deletion": round(deletion, 4), "insertion": round(insertion, 4)},
            "occlusion": rank_correlation(pooled.double(), fallen.double()),
        }
        measured.append({**rule.facts, **numbers})
    return {"task": "formula tests", "number": reading.formula.number, "glyph": symbol, "rules": measured}


class Kept:
    """Rows in a file, a line for each measurement, which a stopped run leaves and the next one goes on from."""

    def __init__(self, path: Path, minutes: float = MINUTES) -> None:
        self.path, self.end = path, time.monotonic() + 60 * minutes
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: dict[str, Row] = {line["key"]: line["row"] for line in map(json.loads, lines)}
        self.seconds = sum(line["seconds"] for line in map(json.loads, lines))

    def get(self, key: str, measured: Callable[[], Row]) -> list[Row]:
        """The row under a key; where there is none, it is measured and written, or [] behind the end of the time."""
        if key in self.rows:
            return [self.rows[key]]
        began = time.monotonic()
        if began > self.end:
            return []
        self.rows[key] = measured()
        seconds = time.monotonic() - began
        self.seconds += seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "seconds": seconds, "row": self.rows[key]}) + "\n")
        print(f"{key}: {seconds:.1f} s", file=sys.stderr, flush=True)
        return [self.rows[key]]


def rows(reader: Reader, kept: Kept, listed: Sequence[Formula]) -> Iterator[Row]:
    """All rows that are kept or measured before the time is over, block by block of formulas; progress goes to stderr."""
    tested, every = 0, list[Reading]()
    for first in range(0, len(listed), BLOCK):
        readings = []
        for formula in listed[first : first + BLOCK]:
            for row in kept.get(f"formula {formula.number}", partial(read, reader, formula)):
                yield row
                if row["right"]:
                    readings.append(reading_of(formula, row))
        for rule in FIRST:
            yield from _of_rule(reader, kept, readings, rule)
        for reading in readings[: TESTED - tested]:
            for name, rules in (("tests", COMPARED), ("tests beside", BESIDE)):
                yield from kept.get(f"{name}: formula {reading.formula.number}", partial(test_row, reader, reading, rules))
            tested += 1
        every += readings
    for rule in OTHERS:
        yield from _of_rule(reader, kept, every, rule)
    yield {"task": "formula time", "seconds": round(kept.seconds, 1)}


def _of_rule(reader: Reader, kept: Kept, readings: Sequence[Reading], rule: Rule) -> Iterator[Row]:
    for reading in readings:
        yield from kept.get(f"{rule.key}: formula {reading.formula.number}", partial(map_row, reader, reading, rule))
