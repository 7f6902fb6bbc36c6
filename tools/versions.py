"""Runs tests with this Python and its packages, and stores their versions and what passed: benchmarks/results/versions.json.

    python -m tools.versions [PYTEST ...]    the whole suite, or what pytest's arguments name

`python -m tools.environments oldest` and `newest` do so with the lowest and the highest versions. A row replaces that of the same
versions and tests. The tables of docs/install.md and docs/developers/building.md are made of pyproject.toml and these rows.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tools.environments import TRITON_LOWEST
from vlattn_fast.measuring.provenance import versions
from vlattn_fast.measuring.records import markdown, write_records

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "versions.json"
PACKAGES = {"python": "Python", "torch": "torch", "transformers": "transformers", "triton": "Triton", "numpy": "NumPy"}
WHOLE = ("--numprocesses", "2", "--dist", "worksteal")


def main() -> int:
    report = ROOT / "build" / "versions.xml"
    report.parent.mkdir(exist_ok=True)
    arguments = sys.argv[1:] or WHOLE
    done = subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments], cwd=ROOT)
    row = {**installed(), "tests": " ".join(sys.argv[1:]) or "all", **counts(report)}
    row["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    identity = {*PACKAGES, "tests"}
    kept = [one for one in stored() if any(one[name] != row[name] for name in identity)]
    write_records(ROWS, [*kept, row])
    return done.returncode


def installed() -> dict[str, str | None]:
    """A Python without a GIL has a t."""
    found = versions(*[name for name in PACKAGES if name != "python"])
    return {**found, "python": f"{found['python']}{'t' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''}"}


def counts(report: Path) -> dict[str, int]:
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    total: dict[str, int] = {name: 0 for name in ("tests", "skipped", "failures", "errors")}
    for suite in suites:
        for name in total:
            total[name] += int(suite.get(name, 0))
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - total["skipped"] - failed, "skipped": total["skipped"], "failed": failed}


def stored() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(ROWS.read_text(encoding="utf-8"))
    return rows


def ordered(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


# --- the tables ---


def supported() -> dict[str, str]:
    """What pyproject.toml asks for, in words."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {"python": project["requires-python"], "triton": ">=" + re.sub(r"[^\d.]|\.\*", "", TRITON_LOWEST)}
    for one in (*project["dependencies"], *project["optional-dependencies"]["explain"]):
        if (parts := re.fullmatch(r"([\w-]+)(.*)", one)) and parts[1] in PACKAGES:
            asked[parts[1]] = parts[2]
    return {name: _words(asked[name]) for name in PACKAGES}


def _words(specifier: str) -> str:
    """ ">=5.18,<5.25" is 5.18 to 5.24."""
    bounds = dict(re.findall(r"(>=|<)([\d.]+)", specifier))
    if "<" in bounds:
        *above, last = ordered(bounds["<"])
        return f"{bounds['>=']} to {'.'.join(map(str, [*above, last - 1]))}"
    return f"{bounds['>=']} or newer" if bounds else "any"


def requirements() -> str:
    """What pip may install, and between which versions tests ran and passed."""
    rows = [row for row in stored() if not row["failed"]]
    lines = []
    for name, words in supported().items():
        tried = sorted({row[name].partition("+")[0] for row in rows if row[name]}, key=ordered)
        lines.append([PACKAGES[name], words, f"{tried[0]} to {tried[-1]}"])
    return markdown(["", "supported", "tests ran with"], lines, words=(0, 1, 2))


def runs() -> str:
    """Each run of tests, the newest versions first."""
    rows = sorted(stored(), key=lambda row: [ordered(row[name] or "0") for name in PACKAGES], reverse=True)
    head = [*PACKAGES.values(), "tests", "passed", "skipped", "failed", "day"]
    lines = [
        [*((row[name] or "none").partition("+")[0] for name in PACKAGES), _code(row["tests"])]
        + [*map(str, (row["passed"], row["skipped"], row["failed"], row["date"]))]
        for row in rows
    ]
    return markdown(head, lines, words=(0, 1, 2, 3, 4, 5, 9))


def _code(tests: str) -> str:
    return tests if tests == "all" else f"`{tests}`"


if __name__ == "__main__":
    sys.exit(main())
