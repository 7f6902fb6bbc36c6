"""A summary of the inputs that failed: how many, by reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_NAMED = 5  # ids of a line
# Parts of messages that differ between inputs which fail for one reason: quoted parts, paths, numbers.
_OWN = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S*[^\s,;.:)]|\d+(?:\.\d+)?")


def summary(failures: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A dict for each reason, the most frequent first: "error", "count", and the "ids" of the first five inputs. Messages that
    differ only in names and numbers are one reason, whose "error" has … there."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for failure in failures:
        groups.setdefault(_OWN.sub("…", failure["error"]), []).append(failure)
    lines = []
    for reason, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        error = group[0]["error"] if len({one["error"] for one in group}) == 1 else reason
        lines.append({"error": error, "count": len(group), "ids": [one["id"] for one in group[:_NAMED]]})
    return lines


def summary_lines(failures: Iterable[Mapping[str, Any]]) -> list[str]:
    """The summary as lines for a terminal."""
    lines = []
    for one in summary(failures):
        more = ", ..." if one["count"] > len(one["ids"]) else ""
        lines.append(f"failed {one['count']}: {one['error']} ({', '.join(one['ids'])}{more})")
    return lines
