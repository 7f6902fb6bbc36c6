"""Who may import whom: a file imports from its own floor or from a floor below, and no two files import each other.

And no file is longer than one can read at a time.
"""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    ("_checks", "_tensors", "_series", "_extras", "_tolerance", "_roundings", "_native", "scores", "reference"),
    ("streaming", "sdpa", "cpu", "cuda", "kernels"),
    ("ops",),
    ("nn", "models", "interpret", "probe", "lab", "verify", "_fuzz", "_fuzz_cases"),
    ("benchmarks", "_demo", "_info"),
    ("cli", "__init__", "__main__"),
)
LONGEST = 450  # lines of a Python file outside kernels/
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def imports() -> dict[str, set[str]]:
    """Each module of the package with those that it imports, also inside functions and for type checkers."""
    folders = {
        "vlattn_fast": ROOT / "vlattn_fast",
        "vlattn_fast.kernels": ROOT / "kernels",
        "vlattn_fast.benchmarks": ROOT / "benchmarks",
    }
    files = {
        ".".join([package, *file.relative_to(folder).with_suffix("").parts]): file
        for package, folder in folders.items()
        for file in sorted(folder.rglob("*.py"))
        if not file.name.startswith("test_")
    }
    packages = {module.removesuffix(".__init__"): module for module in files if module.endswith(".__init__")}
    edges: dict[str, set[str]] = {}
    for module, file in files.items():
        edges[module] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module} imports relatively, line {node.lineno}"
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vlattn_fast"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                edges[module] |= {name if name in files or name in packages else str(node.module) for name in names}
            elif isinstance(node, ast.Import):
                edges[module] |= {alias.name for alias in node.names if alias.name.startswith("vlattn_fast.")}
    return {module: {packages.get(name, name) for name in names} - {module} for module, names in edges.items()}


def test_no_import_runs_upwards() -> None:
    upwards = [
        f"{module} imports {name}"
        for module, names in imports().items()
        for name in names
        if FLOOR[module.split(".")[1]] < FLOOR[name.split(".")[1]]
    ]
    assert not upwards, "\n".join(upwards)


def test_contributing_has_the_floors_in_their_order() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The tree")[1].split("Beside the package")[0]
    places = [row.split(" | ")[0] for row in tree.splitlines() if row.startswith("| `")]
    heights = [{FLOOR[name] for name in re.findall(r"`(?:vlattn_fast/)?(\w+)(?:/|\.py)`", place)} for place in places]
    assert all(len(of_row) == 1 for of_row in heights) and len(heights) > 10
    assert heights == sorted(heights, key=max, reverse=True)


def test_no_two_files_import_each_other() -> None:
    graphlib.TopologicalSorter(imports()).prepare()  # raises CycleError, which names the circle


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout")
def test_no_file_is_too_long() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in tracked if (ROOT / name).is_file()}
    assert "tests/test_floors.py" in lines
    too_long = {name: count for name, count in lines.items() if count > LONGEST and not name.startswith("kernels/")}
    assert not too_long
