"""The section of docs/experiments/real_tables.md on formulas that a model reads, from the stored rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlattn_fast.measuring.records import markdown
from vlattn_lab.real import rival
from vlattn_lab.real.formulas import FONTS
from vlattn_lab.real.reading import BESIDE, FIRST, FRACTIONS, GRID, OCCLUSION, OTHERS, PLAIN, Rule, glyphs, inside, near

Row = dict[str, Any]
Groups = Sequence[Sequence[float]]  # numbers of glyphs, by formula
HELD = {None: "", (): "nothing", ("norms",): "norms", ("norms", "attention"): "norms, attention"}
RIVALS = [rule for rule in BESIDE if rule.method == rival.PACKAGE]
SCORES = {"logit": "logit", "log_probability": "log-probability", "margin": "margin"}
TESTS = {"deletion": "low", "insertion": "high", "occlusion": "high"}

TEXT = """## Formulas that a model reads

The package `latex-ocr-junia` {version} has a model of 7.9 million parameters: its encoder reads an image of 16 x 64 patches, and
its decoder writes LaTeX, one character per token.

![The answer of the model, and the formula; a glyph is lit in the colour of its character](real-formula.jpg)

A seeded list has 200 formulas in three fonts of matplotlib's mathtext, whose parser gives the box of each glyph. Each symbol
occurs once in a formula, so a character of the answer corresponds to one glyph. A formula counts as read right if the answer
has each of its symbols once, and no other. Of the first {listed} formulas of the list {right} were read right: {fonts}.

The first, the middle and the last glyph of each source are explained, after the characters before: {count} glyphs of {measured}
formulas. The box of a glyph covers {area} of the image. *Pointing* is the share of the maps whose largest entry lies in the box
or at most one patch next to it, and *mass* the share of the positive part inside the box. *Held fixed* is the option `freeze`,
and each score the option `of` ([Methods](../methods.md)). Values are means ± standard errors over the {common} formulas that
all rules have, with the number of formulas in brackets if a score has fewer. *Formulas* counts those of a rule with the logit.
These measurements took {minutes:.0f} minutes on a machine with other work; {missing}.

{maps}

{beside}{margin}Differences from the same method with nothing held fixed, glyph by glyph, on all formulas that both have:

{differences}

{rivals}{scores}{tests}"""

BESIDE_TEXT = """\
*Less the blank image* means that the gradient is multiplied by the difference of the image and the image without ink
(`baseline=`), so that the map lies only on ink: the white of the paper and the black around it are 0. Without it a white pixel
counts, and ink, which is 0, does not.

"""

RIVAL_TEXT = """\
`lxt` {version}, by the authors of AttnLRP (ICML 2024), is layer-wise relevance propagation. The rules are its own: constant
denominators of LayerNorm, the identity rule for GELU, and gradients of queries and keys divided by four, of values by two. Its
file of rules is loaded without the package's `__init__`, which does not import with transformers 5, and its rules for attention
are put around torch's `scaled_dot_product_attention`. The map is the image times its gradient, as its README computes
relevancy.
{most}
Differences from `lxt`, less the blank image, glyph by glyph:

{table}

"""

MARGIN_TEXT = """\
The margin is the logit less the log-sum-exp of the other characters'. Its gradient is that of the log-probability times a
number, so it is measured only with `gradient`: maps of `weighted` and `input_gradient` would be those of the log-probability.

"""

SCORE_TEXT = """Differences of the log-probability from the logit:

{table}

"""

MOST_TEXT = """\
Less the blank image, its maps have {theirs:.2f} of their mass on the glyph, and those of `input_gradient` with norms and
attention weights held fixed {ours:.2f}.
"""

TEST_TEXT = """\
For {count} of these formulas the glyph in the middle was tested further, with the logit. A rule that was tested on fewer has
their number in brackets, and cannot be compared with the others. *Deletion* and *insertion* are the mean probability of the
character while the {fractions} % of the patches with the largest values become blank, or come back into a blank image.
*Occlusion* is Spearman's correlation with the fall of the logit when a square of 2 x 2 patches becomes blank, over the squares
with ink. Occlusion itself is the first line.

{table}

"""


UNTESTED = """Deletion, insertion and the correlation with occlusion have not been measured on formulas.

"""


def clustered(groups: Groups) -> tuple[float, float]:
    """The mean over all numbers, and its standard error where the groups are independent, and the numbers in a group are not."""
    count, total = sum(map(len, groups)), math.fsum(number for group in groups for number in group)
    mean, squares = total / count, 0.0
    for group in groups:
        squares += math.fsum(number - mean for number in group) ** 2
    several = len(groups) / (len(groups) - 1) if len(groups) > 1 else math.nan
    return mean, (several * squares) ** 0.5 / count


def shown(groups: Groups, measured: int, sign: str = "") -> str:
    """Mean ± standard error, and the number of groups where it is below `measured`; "" without a group."""
    if not groups:
        return ""
    mean, error = clustered(groups)
    return f"{mean:{sign}.3f} ± {error:.3f}" + (f" ({len(groups)})" if len(groups) < measured else "")


class Readings:
    """The rows of formulas, by task."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.formulas = [row for row in rows if row["task"] == "formula"]
        self.right = {row["number"]: row for row in self.formulas if row["right"]}
        self.maps: dict[Rule, dict[int, Row]] = {}
        for row in rows:
            if row["task"] == "formula maps":
                self.maps.setdefault(_rule(row), {})[row["number"]] = row
        self.tests: dict[Rule, dict[int, Row]] = {}
        for row in rows:
            for numbers in row["rules"] if row["task"] == "formula tests" else ():
                self.tests.setdefault(_rule(numbers), {})[row["number"]] = numbers

    def values(self, rule: Rule, name: str) -> list[list[float]]:
        """Numbers of the common formulas that it has, by formula."""
        return [row[name] for number, row in self.maps.get(rule, {}).items() if number in self.common]

    def differences(self, first: Rule, second: Rule, name: str) -> list[list[float]]:
        """The number by the second rule less that by the first, of each glyph that has both."""
        before, after = self.maps.get(first, {}), self.maps.get(second, {})
        return [
            [b - a for a, b in zip(before[number][name], after[number][name], strict=True)]
            for number in before
            if number in after
        ]

    @property
    def measured(self) -> set[int]:
        """The formulas with maps."""
        return set().union(*self.maps.values())

    @property
    def common(self) -> set[int]:
        """The formulas that all rules of FIRST with maps have."""
        return set.intersection(*(set(self.maps[rule]) for rule in FIRST if rule in self.maps))

    @property
    def scores(self) -> dict[str, str]:
        """SCORES without those that no rule was measured with."""
        return {score: title for score, title in SCORES.items() if any(rule.of == score for rule in self.maps)}

    def boxes(self, numbers: Collection[int]) -> list[list[Sequence[float]]]:
        """The boxes of the explained glyphs of some formulas."""
        formula_rows = [self.right[number]["boxes"] for number in sorted(numbers)]
        return [[boxes[symbol] for symbol in glyphs(boxes)] for boxes in formula_rows]


def _rule(row: Row) -> Rule:
    return Rule(row["method"], None if row["freeze"] is None else tuple(row["freeze"]), row["of"], row.get("baseline"))


def _named(rule: Rule) -> list[str]:
    """The method, and what is held fixed."""
    external = {rival.PACKAGE: f"{rival.PACKAGE} (external)", OCCLUSION.method: OCCLUSION.method}
    held = HELD[rule.freeze] if rule.baseline is None else f"{HELD[rule.freeze]}; less the blank image".removeprefix("; ")
    return [external.get(rule.method, f"`{rule.method}`"), held]


def _maps(readings: Readings) -> str:
    def cells(rules: Sequence[Rule]) -> list[str]:
        return [shown(readings.values(rule, name), len(readings.common)) for rule in rules for name in ("pointing", "mass")]

    lines, titles = [], readings.scores
    for rule in FIRST:  # a line has all scores of a method
        numbers = cells([rule if score == "logit" else replace(rule, of=score) for score in titles])
        if any(numbers):
            lines.append([*_named(rule), str(len(readings.maps.get(rule, {}))), *numbers])
    boxes = readings.boxes(readings.common)
    chance = [shown([[of(box) for box in group] for group in boxes], 0) for of in (_near, _area)]
    lines.append(["a map without content", "", "", *chance, *[""] * (2 * len(titles) - 2)])
    head = [f"{title}: {name}" for title in titles.values() for name in ("pointing", "mass")]
    return markdown(["method", "held fixed", "formulas", *head], lines, (0, 1))


def _near(box: Sequence[float]) -> float:
    return float(near(box).double().mean())


def _area(box: Sequence[float]) -> float:
    return float(inside(box).sum()) / (GRID[0] * GRID[1])


def _differences(readings: Readings) -> str:
    lines = []
    for rule in [*FIRST, *OTHERS]:
        if rule.freeze and rule.baseline is None and readings.maps.get(rule):
            plain = Rule(rule.method, PLAIN, rule.of)
            cells = [shown(readings.differences(plain, rule, name), len(readings.common), "+") for name in ("pointing", "mass")]
            if any(cells):
                lines.append([f"`{rule.method}`", SCORES[str(rule.of)], HELD[rule.freeze], *cells])
    return markdown(["method", "score", "held fixed", "pointing", "mass"], lines, (0, 1, 2))


def _rivals(readings: Readings, version: str | None) -> str:
    """The external rows, and by how much each rule is above them, of the glyphs that both have."""
    against = [rule for rule in RIVALS if rule in readings.maps]
    if not against:
        return ""
    lines = []
    for rule in FIRST:
        if rule != against[0] and rule in readings.maps:
            cells = [
                shown(readings.differences(against[0], rule, name), len(readings.common), "+") for name in ("pointing", "mass")
            ]
            lines.append([*_named(rule), *cells])
    ours, theirs = (readings.values(rule, "mass") for rule in (BESIDE[0], against[0]))
    most = MOST_TEXT.format(ours=clustered(ours)[0], theirs=clustered(theirs)[0]) if ours else ""
    return RIVAL_TEXT.format(
        version=version, most=most, table=markdown(["method", "held fixed", "pointing", "mass"], lines, (0, 1))
    )


def _scores(readings: Readings) -> str:
    lines = []
    for rule in FIRST:
        second = Rule(rule.method, rule.freeze, "log_probability")
        if readings.maps.get(second):
            cells = [shown(readings.differences(rule, second, name), len(readings.common), "+") for name in ("pointing", "mass")]
            lines.append([f"`{rule.method}`", HELD[rule.freeze], *cells])
    return SCORE_TEXT.format(table=markdown(["method", "held fixed", "pointing", "mass"], lines, (0, 1))) if lines else ""


def _tests(readings: Readings) -> str:
    lines, most = [], max(map(len, readings.tests.values()))
    for rule, formula_rows in readings.tests.items():
        values = [[[row[name]] for row in formula_rows.values() if row[name] is not None] for name in TESTS]
        lines.append([*_named(rule), *(shown(groups, most) for groups in values)])
    fractions = ", ".join(f"{share:.0%}".rstrip("%") for share in FRACTIONS)
    table = markdown(["method", "held fixed", *(f"{test} ({good})" for test, good in TESTS.items())], lines, (0, 1))
    return TEST_TEXT.format(count=most, fractions=fractions, table=table)


def section(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The section, "" without rows of formulas; `versions` are those of the packages."""
    readings = Readings(rows)
    if not readings.maps:
        return ""
    font_cells = []
    for font in FONTS:
        listed = [row for row in readings.formulas if row["font"] == font]
        font_cells.append(f"{sum(row['right'] for row in listed)} of {len(listed)} in {font}")
    boxes = readings.boxes(readings.measured)
    missing = sum(readings.maps.get(rule, {}).keys() != readings.right.keys() for rule in (*FIRST, *OTHERS))
    still = f"{missing} of the {len(FIRST) + len(OTHERS)} rules miss some formulas" if missing else "no rule misses one"
    return TEXT.format(
        version=versions.get("latex-ocr-junia"),
        listed=len(readings.formulas),
        right=len(readings.right),
        fonts=", ".join(font_cells),
        count=sum(map(len, boxes)),
        measured=len(boxes),
        area=f"{clustered([[*map(_area, group)] for group in boxes])[0]:.1%}".replace("%", " %"),
        minutes=math.fsum(row["seconds"] for row in rows if row["task"] == "formula time") / 60,
        common=len(readings.common),
        maps=_maps(readings),
        beside=BESIDE_TEXT if any(rule.baseline for rule in readings.maps) else "",
        rivals=_rivals(readings, versions.get(rival.PACKAGE)),
        missing=still,
        margin=MARGIN_TEXT if "margin" in readings.scores else "",
        differences=_differences(readings),
        scores=_scores(readings),
        tests=_tests(readings) if readings.tests else UNTESTED,
    )
