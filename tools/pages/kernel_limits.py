"""Why some kernels have many bank conflicts, or use little of their sectors; docs/kernels.md shows it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ptx.counts import LEAST_USED, MOST_CONFLICTS, Row, conflicts, used


class Explanation(NamedTuple):
    what: str  # "conflicts" or "sectors"
    kernels: str  # a pattern, as the next
    calls: str
    reason: str


EXPLANATIONS: list[Explanation] = []


def _beyond(what: str, row: Row) -> bool:
    return conflicts(row) > MOST_CONFLICTS if what == "conflicts" else used(row) < LEAST_USED


def explained_by(row: Row) -> Iterator[tuple[str, Explanation | None]]:
    """What of a row is beyond the limits, with its explanation."""
    for what in ("conflicts", "sectors"):
        if _beyond(what, row):
            fits = (
                one
                for one in EXPLANATIONS
                if one.what == what and re.search(one.kernels, row["kernel"]) and re.search(one.calls, row["call"])
            )
            yield what, next(fits, None)


def _sectors(row: Row) -> float:
    """Those of the whole launch."""
    return row["sectors"][0] * row["grid"] / row["programs"]


def lines_beyond(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    of_calls: dict[tuple[str, str], float] = {}
    for row in rows:
        call = row["call"], row["architecture"]
        of_calls[call] = of_calls.get(call, 0) + _sectors(row)
    groups: dict[tuple[str, str, Explanation | None], list[Row]] = {}
    for row in rows:
        for what, explanation in explained_by(row):
            groups.setdefault((what, row["kernel"].split()[0], explanation), []).append(row)
    lines = [
        "| kernel | calls | architectures | conflicts | sectors | share | why |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for (what, kernel, explanation), members in sorted(groups.items(), key=lambda group: group[0][:2]):
        numbers = [max(map(conflicts, members)), min(map(used, members))]
        cells = [f"{number:.0%}" if what == name else "" for number, name in zip(numbers, ("conflicts", "sectors"), strict=True)]
        share = max(_sectors(row) / of_calls[row["call"], row["architecture"]] for row in members)
        calls = dict.fromkeys(row["call"].partition(" ")[2] for row in members)
        architectures = " ".join(sorted({row["architecture"] for row in members}))
        reason = explanation.reason if explanation else ""
        lines.append(f"| `{kernel}` | {', '.join(calls)} | {architectures} | {' | '.join(cells)} | {share:.0%} | {reason} |")
    return lines
