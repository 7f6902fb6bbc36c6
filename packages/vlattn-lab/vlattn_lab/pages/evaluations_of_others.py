"""Files that `vlattn evaluate` wrote elsewhere, as sections of docs/guides/which_method.md.

A model that this project cannot run is measured by somebody who can.
"""

from __future__ import annotations

from pathlib import Path

from vlattn_fast import Evaluation
from vlattn_fast.measuring.records import markdown
from vlattn_lab.checkout import ROOT

FOLDER = ROOT / "benchmarks" / "results" / "evaluations"
NEEDED = ("model", "seed", "dtype", "device", "versions")


def evaluations_of_others(folder: Path = FOLDER) -> str:
    """A section for each file in `folder`, in the order of their names."""
    return "\n".join(map(section, sorted(folder.glob("*.json")))) or "No file yet.\n"


def section(path: Path) -> str:
    """A heading, how the file was measured, and a table: a line for each method, a column for each test and part."""
    evaluation = Evaluation.load(path)
    facts = evaluation.metadata
    if missing := [name for name in NEEDED if name not in facts]:
        raise ValueError(f"{path.name} must be a file of a present `vlattn evaluate`; it lacks {', '.join(missing)}")
    known = {(row["method"], row["test"], row["part"]): row for row in evaluation.table if row["value"] is not None}
    columns = list(dict.fromkeys((test, part) for _, test, part in known))
    lines = []
    for method in dict.fromkeys(method for method, *_ in known):
        rows = [known.get((method, *column)) for column in columns]
        lines.append([f"`{method}`", *("–" if row is None else f"{row['value']:.3f}" for row in rows)])
    named = f"`{facts['model']}`" + (f" ({facts['checkpoint']})" if "checkpoint" in facts else "")
    samples = max((row["samples"] for row in known.values()), default=0)
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items() if version is not None)
    said = f"{samples} samples of {facts.get('dataset', 'a data set')}, seed {facts['seed']}, {facts['dtype']} on "
    said += f"{facts['device']}; {versions}, commit {facts.get('commit', 'unknown')}."
    table = markdown(["method", *(f"{test}, {part}" for test, part in columns)], lines)
    return f"### {path.stem}: {named}\n\n{said}\n\n{table}\n"
