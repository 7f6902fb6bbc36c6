"""The section of docs/experiments/real.md on formulas that a model reads, from the stored rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tools.real.formulas import FONTS
from tools.real.reading import COMPARED, FIRST, FRACTIONS, GRID, OTHERS, PLAIN, Rule, glyphs, inside, near
from vlattn_fast.lab.records import markdown

Row = dict[str, Any]
Groups = Sequence[Sequence[float]]  # numbers of glyphs, by formula
HELD = {None: "", (): "nothing", ("norms",): "norms", ("norms", "attention"): "norms, attention"}
SCORES = {"logit": "logit", "log_probability": "log-probability", "margin": "margin"}
TESTS = {"deletion": "low", "insertion": "high", "occlusion": "high"}

TEXT = """## Formulas that a model reads

The package `latex-ocr-junia` {version} has a model of 7.9 million parameters: an encoder sees a picture of 16 x 64 patches, and a
decoder writes LaTeX, one character a token. Its metadata names no licence; nothing of it is in this repository.

Here the truth is exact. A seeded list has 200 formulas: powers, fractions, sums, roots and Greek letters, in three fonts of
matplotlib's mathtext, whose parser gives the box of each glyph. Each symbol stands once in a formula, so a character of the
answer names one glyph. Boxes are those of glyphs; bars and roots have none. A formula counts as read right if the answer has
each of its symbols once, and no other. Of the first {listed} formulas of the list {right} were read right: {fonts}.

Three glyphs of each formula are explained, the first, the middle and the last one of its source: {count} glyphs of {measured}
formulas. The decoder gets the characters in front of the explained one, and none after it. The box of a glyph covers {area} of
the picture. *Pointing* is the share of the maps whose largest entry lies in the box or at most one patch beside it, and *mass*
the share of the positive part inside the box. *Held fixed* is the option `freeze`, and each score the option `of`;
[the guide](../guides/explain_a_model.md) explains both. Values are means ± standard errors over formulas, with the number of
formulas in brackets where some are missing. These rows took {minutes:.0f} minutes on a machine with other work; {missing}.

{maps}

{margin}![The glyphs of a formula, and the map of each by two rules](real-formula.jpg)

Differences from the same method with nothing held fixed, glyph by glyph:

{differences}

{scores}{tests}"""

MARGIN_TEXT = """\
The margin is the logit less the log-sum-exp of the other characters'. Its gradient is that of the log-probability times a
number, so it is measured with `gradient` alone: maps of `weighted` and `input_gradient` would be those of the log-probability.

"""

SCORE_TEXT = """Differences of the log-probability from the logit:

{table}

"""

TEST_TEXT = """\
Of {count} of these formulas the glyph in the middle was tested further, with the logit. *Deletion* and *insertion* are the
mean probability of the character while the {fractions} % of the patches with the largest entries become blank, or come back
into a blank picture. *Occlusion* is Spearman's correlation with the fall of the logit when a square of 2 x 2 patches becomes
blank, over the squares with ink. Occlusion itself is the first line.

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
        return [row[name] for row in self.maps.get(rule, {}).values()]

    def differences(self, first: Rule, second: Rule, name: str) -> list[list[float]]:
        """The number by the second rule less that by the first, of each glyph that has both."""
        before, after = self.maps.get(first, {}), self.maps.get(second, {})
        return [
            [b - a for a, b in zip(before[number][name], after[number][name], strict=True)]
            for number in before
            if number in after
        ]

    @property
    def measured(self) -> int:
        """The number of formulas with maps."""
        return len(set().union(*self.maps.values()))

    @property
    def scores(self) -> dict[str, str]:
        """SCORES without those that no rule was measured with."""
        return {score: title for score, title in SCORES.items() if any(rule.of == score for rule in self.maps)}

    def boxes(self) -> list[list[Sequence[float]]]:
        """The boxes of the explained glyphs, by formula."""
        numbers = sorted(set().union(*self.maps.values()))
        return [[self.right[number]["boxes"][symbol] for symbol in glyphs(self.right[number]["boxes"])] for number in numbers]


def _rule(row: Row) -> Rule:
    return Rule(row["method"], None if row["freeze"] is None else tuple(row["freeze"]), row["of"])


def _maps(readings: Readings) -> str:
    def cells(rules: Sequence[Rule]) -> list[str]:
        return [shown(readings.values(rule, name), readings.measured) for rule in rules for name in ("pointing", "mass")]

    lines, titles = [], readings.scores
    for rule in FIRST:  # a line has all scores of a method
        numbers = cells([rule if score == "logit" else Rule(rule.method, rule.freeze, score) for score in titles])
        if any(numbers):
            lines.append([f"`{rule.method}`", HELD[rule.freeze], *numbers])
    boxes = readings.boxes()
    chance = [shown([[of(box) for box in group] for group in boxes], 0) for of in (_near, _area)]
    lines.append(["a map without content", "", *chance, *[""] * (2 * len(titles) - 2)])
    head = [f"{title}: {name}" for title in titles.values() for name in ("pointing", "mass")]
    return markdown(["method", "held fixed", *head], lines, (0, 1))


def _near(box: Sequence[float]) -> float:
    return float(near(box).double().mean())


def _area(box: Sequence[float]) -> float:
    return float(inside(box).sum()) / (GRID[0] * GRID[1])


def _differences(readings: Readings) -> str:
    lines = []
    for rule in [*FIRST, *OTHERS]:
        if rule.freeze and readings.maps.get(rule):
            plain = Rule(rule.method, PLAIN, rule.of)
            cells = [shown(readings.differences(plain, rule, name), readings.measured, "+") for name in ("pointing", "mass")]
            if any(cells):
                lines.append([f"`{rule.method}`", SCORES[str(rule.of)], HELD[rule.freeze], *cells])
    return markdown(["method", "score", "held fixed", "pointing", "mass"], lines, (0, 1, 2))


def _scores(readings: Readings) -> str:
    lines = []
    for rule in FIRST:
        second = Rule(rule.method, rule.freeze, "log_probability")
        if readings.maps.get(second):
            cells = [shown(readings.differences(rule, second, name), readings.measured, "+") for name in ("pointing", "mass")]
            lines.append([f"`{rule.method}`", HELD[rule.freeze], *cells])
    return SCORE_TEXT.format(table=markdown(["method", "held fixed", "pointing", "mass"], lines, (0, 1))) if lines else ""


def _tests(readings: Readings) -> str:
    lines = []
    for rule, numbers in readings.tests.items():
        values = [[[row[name]] for row in numbers.values() if row[name] is not None] for name in TESTS]
        lines.append(
            [f"`{rule.method}`" if rule in COMPARED else rule.method, HELD[rule.freeze], *(shown(groups, 0) for groups in values)]
        )
    count = len(next(iter(readings.tests.values())))
    fractions = ", ".join(f"{share:.0%}".rstrip("%") for share in FRACTIONS)
    table = markdown(["method", "held fixed", *(f"{test} ({good})" for test, good in TESTS.items())], lines, (0, 1))
    return TEST_TEXT.format(count=count, fractions=fractions, table=table)


def section(rows: Sequence[Row], version: str) -> str:
    """The section, "" without rows of formulas."""
    readings = Readings(rows)
    if not readings.maps:
        return ""
    of_font = []
    for font in FONTS:
        listed = [row for row in readings.formulas if row["font"] == font]
        of_font.append(f"{sum(row['right'] for row in listed)} of {len(listed)} in {font}")
    boxes = readings.boxes()
    missing = sum(len(readings.maps.get(rule, {})) < readings.measured for rule in (*FIRST, *OTHERS))
    still = f"{missing} of the {len(FIRST) + len(OTHERS)} rules have none or not all yet" if missing else "no rule misses one"
    return TEXT.format(
        version=version,
        listed=len(readings.formulas),
        right=len(readings.right),
        fonts=", ".join(of_font),
        count=sum(map(len, boxes)),
        measured=len(boxes),
        area=f"{clustered([[*map(_area, group)] for group in boxes])[0]:.1%}".replace("%", " %"),
        minutes=math.fsum(row["seconds"] for row in rows if row["task"] == "formula time") / 60,
        maps=_maps(readings),
        missing=still,
        margin=MARGIN_TEXT if "margin" in readings.scores else "",
        differences=_differences(readings),
        scores=_scores(readings),
        tests=_tests(readings) if readings.tests else UNTESTED,
    )
