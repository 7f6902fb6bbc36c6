"""Who may import whom: each folder's docstring says what comes in, what goes out and which folders it imports.

Folders import one another without a circle, so each has a height. The heights follow from the imports, those by name included.
"""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from vlattn_fast.backends import inputs

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"vlattn_fast": "vlattn_fast", "vlattn_fast.kernels": "kernels", "vlattn_fast.benchmarks": "benchmarks"}
MOST_FLOORS = 6  # of interpret and attach together
LONGEST = 450  # lines of a Python file outside kernels/
BY_NAME = re.compile(r"vlattn_fast(?:\.[a-z_]+)+\.?")  # a module, or the beginning of one in an f-string


@cache
def files() -> dict[str, Path]:
    """Each module of the package; a folder's `__init__` under the folder's name."""
    return {
        ".".join([package, *file.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__"): file
        for package, folder in PACKAGES.items()
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not file.name.startswith("test_")
    }


@cache
def trees() -> dict[str, ast.Module]:
    return {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in files().items()}


def module_of(name: str) -> str:
    """The module that `name` lies in."""
    while name not in files():
        name = name.rpartition(".")[0]
    return name


def imported(tree: ast.Module) -> set[str]:
    """What a file imports, also inside functions, for type checkers, and by a name in a string."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import, line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and BY_NAME.fullmatch(node.value):
            names.add(node.value.rstrip("."))
    return {name for name in names if name.startswith("vlattn_fast.")}


@cache
def imports() -> dict[str, set[str]]:
    """Each module with those that it imports."""
    return {module: {module_of(name) for name in imported(tree)} - {module, "vlattn_fast"} for module, tree in trees().items()}


def folder_of(module: str) -> str:
    """The folder of a module, without the package's name; "" for the package's own modules."""
    package = module if files()[module].name == "__init__.py" else module.rpartition(".")[0]
    return package.removeprefix("vlattn_fast").removeprefix(".")


@cache
def folders() -> dict[str, set[str]]:
    """Each folder with those that its files import."""
    edges: dict[str, set[str]] = {folder_of(module): set() for module in files()}
    for module, names in imports().items():
        edges[folder_of(module)] |= {folder_of(name) for name in names} - {folder_of(module)}
    return edges


def heights(edges: dict[str, set[str]]) -> dict[str, int]:
    floors: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(edges).static_order():
        floors[name] = 1 + max((floors[below] for below in edges[name]), default=0)
    return floors


def test_no_two_files_import_each_other() -> None:
    graphlib.TopologicalSorter(imports()).prepare()  # raises CycleError, which names the circle


def test_no_two_folders_import_each_other() -> None:
    graphlib.TopologicalSorter(folders()).prepare()


def test_interpret_and_attach_have_few_floors() -> None:
    rooms = {name for name in folders() if name.split(".")[0] in ("interpret", "attach")}
    floors = heights({name: folders()[name] & rooms for name in rooms})
    assert max(floors.values()) <= MOST_FLOORS, floors


@pytest.mark.parametrize("folder", sorted({*map(folder_of, files())} - {""}))  # parses nothing
def test_a_folder_says_what_it_takes_and_gives_and_imports(folder: str) -> None:
    text = ast.get_docstring(trees()[f"vlattn_fast.{folder}"]) or ""
    parts = dict(re.findall(r"^(In|Out|Imports): ((?:.|\n)+?)(?=^[A-Z]\w+: |\n\n|\Z)", text, re.M))
    assert set(parts) == {"In", "Out", "Imports"}, f"{folder}: {text}"
    named = set(re.findall(r"[\w.]+\w", parts["Imports"])) - {"nothing"}
    uncovered = {name for name in folders()[folder] if not any(name == n or name.startswith(f"{n}.") for n in named)}
    unused = {n for n in named if not any(name == n or name.startswith(f"{n}.") for name in folders()[folder])}
    assert not uncovered and not unused, f"{folder} imports {sorted(folders()[folder])}"


def test_contributing_has_the_floors_in_their_order() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The tree")[1].split("Beside the package")[0]
    places = [row.split(" | ")[0] for row in tree.splitlines() if row.startswith("| `")]
    named = [re.findall(r"`(?:vlattn_fast/)?([\w/]+?)(?:/|\.py)`", place) for place in places]
    rows = {name.replace("/", "."): number for number, names in enumerate(named) for name in names}
    tops = {name.split(".")[0] for name in folders()} - {""}
    assert tops <= set(rows), tops - set(rows)
    upwards = [
        f"{name} imports {below}"
        for name, names in folders().items()
        for below in names
        if name in rows and below in rows and rows[below] < rows[name]
    ]
    assert not upwards, "\n".join(upwards)


ARGUMENTS = ("args", "arguments", "inputs", "rest", "tensors", "options")  # what holds the arguments of a call


def counted(tree: ast.Module) -> list[int]:
    """Lines where one of ARGUMENTS is indexed or cut by a number that stands there."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and (node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")) in ARGUMENTS
        and any(isinstance(number, ast.Constant) and isinstance(number.value, int) for number in ast.walk(node.slice))
    ]


def test_no_argument_is_taken_by_its_number() -> None:
    """From the schema to the launch arguments have names: see vlattn_fast/backends/inputs.py."""
    assert counted(ast.parse("args[2:5], ctx.inputs[-1], inputs.queries[0]")) == [1, 1]
    folders = ("vlattn_fast.ops", "vlattn_fast.backends", "vlattn_fast.kernels")
    found = {module: counted(tree) for module, tree in trees().items() if module.startswith(folders)}
    assert not any(found.values()), {module: lines for module, lines in found.items() if lines}


def misplaced(tree: ast.Module) -> list[str]:
    """Variables that pass, by position, a field of another name to the inputs of a backend."""
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := getattr(node.func, "id", "")).endswith("Inputs"):
            for argument, field in zip(node.args, getattr(getattr(inputs, called, None), "_fields", ()), strict=False):
                if isinstance(argument, ast.Starred):
                    break
                name = getattr(argument, "id", getattr(argument, "attr", field))  # constants have none
                if not field.startswith(name):
                    wrong.append(f"{argument.lineno}: {name} as {field}")
    return wrong


def test_positional_inputs_have_the_names_of_their_fields() -> None:
    assert misplaced(ast.parse("RelevancyStepInputs(relevancy, x.key, None, *rest)")) == ["1: key as query"]
    wrong = {module: misplaced(tree) for module, tree in trees().items()}
    assert not any(wrong.values()), {module: lines for module, lines in wrong.items() if lines}


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout")
def test_no_file_is_too_long() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in tracked if (ROOT / name).is_file()}
    assert "tests/test_floors.py" in lines
    too_long = {name: count for name, count in lines.items() if count > LONGEST and not name.startswith("kernels/")}
    assert not too_long
