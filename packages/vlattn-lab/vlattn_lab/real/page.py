"""docs/experiments/real_tables.md, and the effects of docs/experiments/real.md, from the stored rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation
from vlattn_fast.measuring.records import markdown, mean_and_deviation, spread
from vlattn_lab.checkout import ROOT
from vlattn_lab.experiments.experiment import Effect, effects_of, less
from vlattn_lab.real.exact_page import by_method, sections
from vlattn_lab.real.photos import SOURCES
from vlattn_lab.real.reading import BOTH, PLAIN, Rule
from vlattn_lab.real.reading_page import Readings, clustered, section
from vlattn_lab.real.rival import PACKAGE
from vlattn_lab.real.text import BOX, OUTLIERS, SINKS, TEXT

PAGE = ROOT / "docs" / "experiments" / "real.md"
ROWS = ROOT / "benchmarks" / "results" / "real.json"
DIGITSCENES = {  # models with maps of one picture, and the rows of `va.evaluate`
    "DigitScenes' CLIP": "benchmarks/results/evaluation-clip.json",
    "DigitScenes' UNITER": "benchmarks/results/evaluation-matching.json",
}
TASKS = {"matching": "UNITER", "clip": "CLIP", "vqa": "questions", "captions": "captions"}  # with a file of rows each
COMPARED, SHARED = ("gradient", "rollout"), ("deletion", "insertion", "pointing", "mass")
POINTING = {  # the columns of its table, as rules of formulas; the defaults but for one
    "gradient": Rule("gradient", BOTH, "logit"),
    "gradient(freeze=())": Rule("gradient", PLAIN, "logit"),
    "weighted": Rule("weighted", BOTH, "logit"),
    "input_gradient": Rule("input_gradient", BOTH, "logit"),
    "rollout": Rule("rollout"),
}
LATER = ("formulas", "speech", "reactions")  # parts that go on where they were stopped
_WEIGHTED = "weighted(sinks=remove)", "weighted"
BETTER = {"deletion": "low", "insertion": "high", "pointing": "high", "mass": "high", "sanity": "near 0"}
Row = dict[str, Any]


def slug(name: str) -> str:
    return name.replace(" ", "-")


def mean(numbers: Sequence[float]) -> float:
    return mean_and_deviation(numbers)[0]


def spearman(one: Sequence[float], two: Sequence[float]) -> float:
    """Rank correlation; NaN where one side is constant."""
    value = rank_correlation(torch.tensor(one, dtype=torch.float64), torch.tensor(two, dtype=torch.float64))
    return math.nan if value is None else value


class Stored:
    """The rows and facts of a run, and the figures that the page takes of them."""

    def __init__(self, report: Row) -> None:
        self.facts = {name: fact for name, fact in report.items() if name != "rows"}
        self.rows: list[Row] = report["rows"]

    def of(self, task: str, **named: Any) -> list[Row]:
        return [row for row in self.rows if row["task"] == task and all(row[name] == value for name, value in named.items())]

    def methods(self, score: str) -> list[str]:
        return list(dict.fromkeys(row["method"] for row in self.of("evaluation", score=score)))

    def tests(self, score: str) -> list[str]:
        return [test for test in BETTER if test in self.of("evaluation", score=score)[0]]

    def value(self, score: str, method: str, test: str) -> float:
        """The mean over the photos that have a value: a map that is constant has no rank correlation."""
        values = [row[test] for row in self.of("evaluation", score=score, method=method)]
        return mean([value for value in values if value is not None])

    def heads(self, layers: slice = slice(None)) -> tuple[float, list[float]]:
        """Spearman's correlation of the heads' relevancy and their falls: of the means over photos, and of each photo."""
        flat = [[sum(row[name][layers], []) for name in ("relevancy", "fall")] for row in self.of("heads")]
        relevancy, fall = ([mean(numbers) for numbers in zip(*column, strict=True)] for column in zip(*flat, strict=True))
        return spearman(relevancy, fall), [spearman(*one) for one in flat]

    def without_heads(self, name: str) -> list[float]:
        """The mean over photos of a change without each head, or of its relevancy."""
        flat: list[list[float]] = [sum(row[name], []) for row in self.of("heads")]
        return [mean(numbers) for numbers in zip(*flat, strict=True)]

    def cut(self, tokens: str, name: str) -> list[float]:
        """By photo: what changes where no token reads some tokens, or the share of attention that these get."""
        return [row[name] for row in self.of("cut", tokens=tokens)]

    def words(self, sentence: str) -> dict[str, list[float]]:
        """The values of each word of a sentence by method; "left out" is the fall of the cosine without it."""
        return {row["method"]: row["values"] for row in self.of("words", sentence=sentence)}


def evaluation(stored: Stored, score: str) -> str:
    tests = stored.tests(score)
    lines = [[shown(method), *(f"{stored.value(score, method, test):.3f}" for test in tests)] for method in stored.methods(score)]
    return markdown(["method", *(f"{test} ({BETTER[test]})" for test in tests)], lines)


def shown(method: str) -> str:
    return {"random": "random maps", "left out": "fall without it"}.get(method, f"`{method}`")


def photos(stored: Stored) -> str:
    area = {row["photo"]: row["area"] for row in stored.of("photo")}
    return markdown(
        ["photo", "source", "inside the mask"],
        [[name, SOURCES[name], f"{area[name]:.0%}".replace("%", " %")] for name in SOURCES],
        (0, 1),
    )


Pair = tuple[str, str, float, float]  # model, test, value of "gradient", value of "rollout"


def pairs(stored: Stored) -> list[Pair]:
    """The two methods on DINOv2 and on the two models of DigitScenes that were measured likewise."""
    numbers = [("DINOv2-S", test, *(stored.value("class token", method, test) for method in COMPARED)) for test in SHARED]
    for model, file in DIGITSCENES.items():
        rows = json.loads((ROOT / file).read_text(encoding="utf-8"))["rows"]
        values = {(row["method"], row["test"]): row["value"] for row in rows if row["part"] == "image"}
        numbers += [(model, test, *(values[method, test] for method in COMPARED)) for test in SHARED]
    return numbers


def lead(pair: Pair) -> float:
    """By how much "gradient" is better than "rollout"."""
    _, test, gradient, rollout = pair
    return gradient - rollout if BETTER[test] == "high" else rollout - gradient


def compared(numbers: Sequence[Pair]) -> str:
    lines = [
        [model, test, BETTER[test], *(f"{value:.3f}" for value in values), "`gradient`" if lead(pair) > 0 else "`rollout`"]
        for pair in numbers
        for model, test, *values in [pair]
    ]
    return markdown(["model", "test", "good", *(f"`{method}`" for method in COMPARED), "better"], lines, (0, 1, 2, 5))


LABELS = {  # what the page calls tokens, by their stored names
    "most read": "most attention",
    "most read in layer 0": "most attention in layer 0",
    "most read patch": "patch with most attention",
}


def cuts(stored: Stored) -> str:
    lines = [
        [
            LABELS.get(tokens, tokens),
            *(spread(stored.cut(tokens, name), ".4f") for name in ("share", "change", "overlap", "fall")),
        ]
        for tokens in dict.fromkeys(row["tokens"] for row in stored.of("cut"))
    ]
    head = ["masked tokens", "share of attention", "change of the saliency", "overlap with the mask", "fall of the class token"]
    return markdown(head, lines)


def outliers(stored: Stored) -> str:
    """The section of tokens that are cut."""
    rows = stored.of("outliers")
    read = [[row["read"][layer] for row in rows] for layer in range(len(rows[0]["read"]))]
    return OUTLIERS.format(
        sizes=[min(row["size"] for row in rows), max(row["size"] for row in rows)],
        first=[min(read[0]), max(read[0])],
        later=max(map(max, read[1:])),
        cuts=cuts(stored),
    )


SINK_TOKENS, SINK_TESTS = ("class token", "most read patch"), ("deletion", "insertion", "pointing", "mass")


def sinks(stored: Stored) -> str:
    """The section of tokens that receive attention without content."""
    sizes = {token: stored.of("sink sizes", token=token) for token in SINK_TOKENS}
    count = len(sizes[SINK_TOKENS[0]][0]["read"])

    def cells(layer: int) -> list[str]:
        numbers = ((mean([float(row[name][layer]) for row in rows]), name) for rows in sizes.values() for name in _SIZES)
        return [f"{value:.1f}" if name == "read" else f"{value:.2f}" for value, name in numbers]

    head = [f"{LABELS.get(token, token)}: {name}" for token in SINK_TOKENS for name in ("attention", "values", "state", "found")]
    named = stored.of("sinks named")
    return SINKS.format(
        layers=mean([float(sum(row["named"])) for row in sizes["class token"]]),
        all=count,
        patches=sum(row["patches"] for row in named),
        sizes=markdown(["layer", *head], [[str(layer), *cells(layer)] for layer in range(count)], ()),
        maps=_sink_maps(stored),
        **_sentence_sinks(stored),
    )


_SIZES = ("read", "values", "states", "named")


def _sink_values(stored: Stored, score: str, method: str, mode: str, test: str) -> float:
    return mean([row[test] for row in stored.of("sinks", score=score, method=method, sinks=mode)])


def _sink_maps(stored: Stored) -> str:
    tests = [("class token", test) for test in SINK_TESTS] + [("saliency in a box", test) for test in SINK_TESTS[2:]]
    lines = [
        [shown(method), mode, *(f"{_sink_values(stored, score, method, mode, test):.3f}" for score, test in tests)]
        for method, mode in dict.fromkeys((row["method"], row["sinks"]) for row in stored.of("sinks"))
    ]
    names = [f"{test} ({BETTER[test]})" for _, test in tests[:4]] + [f"box: {test}" for _, test in tests[4:]]
    return markdown(["method", "sinks", *names], lines, (0, 1))


def _sentence_sinks(stored: Stored) -> Row:
    named = [(row, layer) for row in stored.of("sentence sinks", token="[CLS]") for layer in row["layers"]]
    ends = {f"cls_{name}": [row[f"{name}s"][layer] for row, layer in named] for name in ("share", "norm")}
    lines = []
    for sentence in dict.fromkeys(row["sentence"] for row in stored.of("sink words")):
        falls = stored.words(sentence)["left out"]
        for mode in ("keep", "remove"):
            rows = stored.of("sink words", sentence=sentence, sinks=mode)
            lines.append([f'"{sentence}"', mode, *(f"{spearman(row['values'], falls):+.2f}" for row in rows)])
    methods = [shown(row["method"]) for row in stored.of("sink words", sinks="keep")]
    table = markdown(["sentence", "sinks", *dict.fromkeys(methods)], lines, (0, 1))
    return {"sentences": table, **{name: [min(values), max(values)] for name, values in ends.items()}}


def heads(stored: Stored) -> str:
    """How well heads agree, and the head without which the saliency changes most."""
    changes, overlaps = stored.without_heads("change"), stored.without_heads("overlap")
    most, heads_a_layer = max(range(len(changes)), key=changes.__getitem__), len(stored.of("heads")[0]["change"][0])
    layer, head = divmod(most, heads_a_layer)
    mean_of_photos, each = stored.heads()
    values = {
        "relevancy and fall, rank correlation of means over the photos": mean_of_photos,
        "the same, of the photo in which it is smallest": min(each),
        "the same, of the first six layers": stored.heads(slice(6))[0],
        "the same, of the last six": stored.heads(slice(6, None))[0],
        "change of the saliency and fall, rank correlation": spearman(changes, stored.without_heads("fall")),
        "change of the saliency and relevancy, rank correlation": spearman(changes, stored.without_heads("relevancy")),
        f"overlap of the pixels above ½ without head {head} of layer {layer}": overlaps[most],
        "the smallest overlap without another head": min(overlaps[:most] + overlaps[most + 1 :]),
    }
    return markdown(["of 72 heads", "value"], [[name, f"{value:.2f}"] for name, value in values.items()])


def words(stored: Stored, sentence: str) -> str:
    """A line for each method: the share of each word in the sum of absolute values, and the correlation with the falls."""
    values = stored.words(sentence)
    (row, *_) = stored.of("words", sentence=sentence)
    falls, lines = values["left out"], []
    for method, word_values in values.items():
        total = math.fsum(map(abs, word_values))
        correlation = "" if method == "left out" else f"{spearman(word_values, falls):+.2f}"
        lines.append([shown(method), *(f"{value / total:.2f}" for value in word_values), correlation])
    title = f'"{sentence}" versus "{row["beside"]}", cosine {row["cosine"]:.3f}:\n\n'
    return title + markdown(["method", *row["words"], "Spearman with the falls"], lines)


def pointing() -> str:
    """A table of docs/guides/which_method.md: how often the largest entry of a map lies where it should; "–" = not measured."""
    stored = Stored(json.loads(ROWS.read_text(encoding="utf-8")))
    readings = Readings(stored.rows)
    by_label = {label: readings.values(rule, "pointing") for label, rule in POINTING.items()}
    lines: list[tuple[str, Row]] = [
        (f"latex-ocr, {len(readings.common)} formulas", {label: clustered(x)[0] for label, x in by_label.items() if x}),
        (f"DINOv2-S, {len(SOURCES)} photos", {label: stored.value("class token", label, "pointing") for label in POINTING}),
    ]
    for task, name, unit in (("sentence maps", "Whisper tiny.en", "sentences"), ("reaction maps", "RXNMapper", "reactions")):
        by_label = {label: [row["pointing"] for row in rows] for label, rows in by_method(stored.rows, task).items()}
        most = max(map(len, by_label.values()), default=0)
        values = {label: clustered(groups)[0] for label, groups in by_label.items() if len(groups) == most}
        if set(POINTING) <= set(values):  # a line of one method alone compares nothing
            lines.append((f"{name}, {most} {unit}", values))
    for task, name in TASKS.items():
        rows = json.loads((ROOT / f"benchmarks/results/evaluation-{task}.json").read_text(encoding="utf-8"))["rows"]
        values = {row["method"]: row["value"] for row in rows if (row["test"], row["part"]) == ("pointing", "image")}
        lines.append((f"DigitScenes, {name}", values))
    cells = [[f"{values[label]:.3f}" if label in values else "–" for label in POINTING] for _, values in lines]
    return markdown(["model", *map(shown, POINTING)], [[name, *row] for (name, _), row in zip(lines, cells, strict=True)])


def effects(stored: Stored) -> list[Effect]:
    """Of photos, formulas, sentences and reactions, each a sample."""
    found = []
    for test in SHARED:
        one, two = ([row[test] for row in stored.of("evaluation", score="class token", method=method)] for method in COMPARED)
        found.append(("DINOv2-S: `gradient` less `rollout`", test, less(one, two)))
    readings, held = Readings(stored.rows), Rule("gradient", BOTH, "logit")
    pairs_of_rules = {
        "formulas: `gradient`, norms and attention held fixed": (Rule("gradient", PLAIN, "logit"), held),
        "formulas: `gradient` less `rollout`": (Rule("rollout"), held),
        "formulas: `input_gradient` less `lxt`, less the blank image": (
            Rule(PACKAGE, None, "logit", "blank"),
            Rule("input_gradient", BOTH, "logit", "blank"),
        ),
    }
    for name, (first, second) in pairs_of_rules.items():
        for test in ("pointing", "mass"):
            found.append((name, test, [mean(glyphs) for glyphs in readings.differences(first, second, test)]))
    for task, name in (("sentence maps", "speech"), ("reaction maps", "reactions")):
        values = {
            label: {row["number"]: mean(row["pointing"]) for row in rows} for label, rows in by_method(stored.rows, task).items()
        }
        for claim, second, first in (
            ("`gradient` less `rollout`", "gradient", "rollout"),
            ("`weighted`, sinks removed", *_WEIGHTED),
        ):
            if {first, second} <= {*values}:
                both = sorted(values[first].keys() & values[second].keys())
                found.append((f"{name}: {claim}", "pointing", [values[second][n] - values[first][n] for n in both]))
    return effects_of(found)


def page() -> str:
    stored = Stored(json.loads(ROWS.read_text(encoding="utf-8")))
    score = "saliency in a box"  # its section stands where the part has been measured
    (conversion,) = stored.of("conversion")
    area = {row["photo"]: row["area"] for row in stored.of("photo")}
    sentences = list(dict.fromkeys(row["sentence"] for row in stored.of("words")))
    return TEXT.format(
        minutes=math.fsum(seconds for part, seconds in stored.facts["seconds"].items() if part not in LATER) / 60,
        device="; ".join(dict.fromkeys(stored.facts["device"].values())),
        versions=stored.facts["versions"],
        rows=ROWS.relative_to(ROOT),
        error=conversion["error"],
        photos=photos(stored),
        covered=max(area, key=area.__getitem__),
        share=f"{max(area.values()):.0%}".replace("%", " %"),
        token=evaluation(stored, "class token"),
        box=BOX.format(box=evaluation(stored, score)) if stored.of("evaluation", score=score) else "",
        compared=compared(pairs(stored)),
        heads=heads(stored),
        outliers=outliers(stored) if stored.of("outliers") else "",
        sinks=sinks(stored) if stored.of("sinks") else "",
        formulas=section(stored.rows, stored.facts["versions"]) + sections(stored.rows, stored.facts["versions"]),
        words="\n\n".join(words(stored, sentence) for sentence in sentences),
    )
