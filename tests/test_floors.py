"""Who may import whom: each folder's docstring says what comes in, what goes out and which folders it imports.

Folders import one another without a circle, so each has a height. The heights follow from the imports, those by name included.
"""

import ast
import graphlib
import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.imports import Repository

HERE = Repository(Path(__file__).resolve().parents[1])
PACKAGES = {path.parent.name: Repository(path.parent) for path in sorted(HERE.root.glob("packages/*/pyproject.toml"))}
ALL = {"core": HERE, **PACKAGES}
# Each place of the repository with those that it may import: tests → tools → the package, which knows neither.
MAY_IMPORT: dict[str, set[str]] = {
    "tests": {"tools", "vlattn_fast"},
    "tools": {"vlattn_fast"},
    "vlattn_fast": set(),
    "examples": {"vlattn_fast"},
    "docs": set(),
    "setup": {"vlattn_fast"},  # the packages that it installs, by name
}
EMULATOR = "ptx"  # of the packages in packages/ the only one that tests of others import, if it is installed
# Who changes the path on which Python looks for modules, and why.
CHANGES_PATH = {
    "tests.gpu.conftest": "takes back what a session of `make gpu` adds",
    "tests.published.test_congruence_loss": "the authors' code is not installed",
    "tools.gpu.session": "`make gpu` installs nothing, and lays the package out in build/",
}
MOST_FLOORS = 7  # of interpret and attach together


def upwards(repository: Repository) -> list[str]:
    """Imports of one place out of another that it may not import."""
    return [
        f"{module} imports {name}"
        for module, names in repository.imports.items()
        for place in [module.partition(".")[0]]
        for name in sorted(names)
        if name.partition(".")[0] not in {place} | MAY_IMPORT.get(place, set())
    ]


@pytest.mark.slow
def test_no_place_imports_from_above() -> None:
    assert {module.partition(".")[0] for module in HERE.files} <= {*MAY_IMPORT}, "a new place gets its row"
    assert upwards(HERE) == []


def own_names(package: Repository) -> set[str]:
    """The import names of a package in packages/."""
    return {module.partition(".")[0] for module in package.files} - {"tests", "examples"}


def test_the_core_imports_no_package() -> None:
    """With packages/ deleted, all that is left works; tests of GPU kernels that are emulated are skipped."""
    theirs = {name for package in PACKAGES.values() for name in own_names(package)}
    assert {EMULATOR} <= theirs or not PACKAGES
    found = {module: {name.partition(".")[0] for name in names} & theirs for module, names in HERE.names.items()}
    found = {module: names for module, names in found.items() if names and not module.startswith("tools")}
    assert all(module.startswith("tests") and names == {EMULATOR} for module, names in found.items()), found


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_import_public_modules(name: str) -> None:
    """Those of CONTRIBUTING.md, and no other package's, but for tests that emulate kernels."""
    page = (HERE.root / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Packages outside the core")[1].split("\n## ")[0]
    public = set(re.findall(r"`(vlattn_fast[\w.]*)`", page))
    assert "vlattn_fast" in public
    package = PACKAGES[name]
    others = {each for one in PACKAGES.values() if one is not package for each in own_names(one)} | {"tools"}
    found = {(module.partition(".")[0], each.partition(".")[0]) for module, names in package.names.items() for each in names}
    assert not {(place, each) for place, each in found if each in others and (place, each) != ("tests", EMULATOR)}
    own = {each for module, names in package.names.items() if not module.startswith("tests") for each in names}
    modules = {module_of(each) for each in own if each.partition(".")[0] == "vlattn_fast"}
    exactly = {"vlattn_fast", "vlattn_fast.interpret"}  # only their names are public, not all that lies in their folders
    private = {each for each in modules if not any(f"{each}.".startswith(f"{one}.") for one in public - exactly)}
    assert private <= exactly, sorted(private)


def module_of(name: str) -> str:
    """The module or folder of the core that an imported name lies in."""
    while name not in HERE.files:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("name", ALL)
def test_no_two_files_import_each_other(name: str) -> None:
    graphlib.TopologicalSorter(ALL[name].imports).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", ALL)
def test_no_two_folders_import_each_other(name: str) -> None:
    graphlib.TopologicalSorter(ALL[name].folders).prepare()


WAYS = {
    "at the top": "import {0}",
    "in a function": "def f():\n    try:\n        pass\n    finally:\n        from {0} import f",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {0} import T",
    "by name": 'import importlib\nimportlib.import_module("{0}")',
    "by a part of a name": 'from importlib import import_module\nimport_module(f"{0}.{{name}}")',
}


@pytest.mark.parametrize("way", WAYS)
def test_what_it_must_not_import_is_seen(way: str, tmp_path: Path) -> None:
    def write(file: str, *modules: str) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("import torch\n" + "\n".join(WAYS[way].format(module) for module in modules))

    write("tests/helpers/words.py", "tools.read.text", "vlattn_fast.ops")
    write("tools/read/text.py", "vlattn_fast.launch")
    write("vlattn_fast/launch.py")
    write("kernels/tiles.py")
    write("vlattn_fast/ops/call.py")
    right = Repository(tmp_path)
    assert upwards(right) == []
    graphlib.TopologicalSorter(right.imports).prepare()
    graphlib.TopologicalSorter(right.folders).prepare()

    write("kernels/tiles.py", "vlattn_fast.launch")
    write("vlattn_fast/launch.py", "vlattn_fast.kernels.tiles", "tools.write.page")
    write("tools/read/text.py", "vlattn_fast.launch", "tools.write.page")
    write("tools/write/form.py", "tools.read.letters")  # no circle of files
    write("tools/write/page.py")
    write("tools/read/letters.py", "tests.helpers.words")
    wrong = Repository(tmp_path)
    assert upwards(wrong) == ["tools.read.letters imports tests.helpers.words", "vlattn_fast.launch imports tools.write.page"]
    with pytest.raises(graphlib.CycleError, match="vlattn_fast.launch"):
        graphlib.TopologicalSorter(wrong.imports).prepare()
    with pytest.raises(graphlib.CycleError, match="'tools.(read|write)', 'tools.(read|write)', "):
        graphlib.TopologicalSorter({name: wrong.folders[name] for name in ("tools.read", "tools.write")}).prepare()


def changes_path(text: str) -> bool:
    """Whether Python code uses its list of folders, or pytest's way to add to it."""
    return any(
        node.attr == "syspath_prepend" or (node.attr == "path" and getattr(node.value, "id", "") == "sys")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
    )


def test_no_file_changes_where_python_looks() -> None:
    assert changes_path("import sys\nsys.path.append('x')") and not changes_path("import os\nos.path.exists('x')")
    texts = {module: file.read_text(encoding="utf-8") for module, file in HERE.files.items()}
    named = {module for module, text in texts.items() if re.search(r"sys\.path|syspath|setattr\(sys", text)}
    assert {module for module in named if changes_path(texts[module])} == {*CHANGES_PATH}


@cache
def folders() -> dict[str, set[str]]:
    """The package's folders without its name; "" for its own files."""
    ours = {name: names for name, names in HERE.folders.items() if name.partition(".")[0] == "vlattn_fast"}
    return {short(name): {short(below) for below in names} for name, names in ours.items()}


def short(name: str) -> str:
    return name.removeprefix("vlattn_fast").removeprefix(".")


def heights(edges: dict[str, set[str]]) -> dict[str, int]:
    floors: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(edges).static_order():
        floors[name] = 1 + max((floors[below] for below in edges[name]), default=0)
    return floors


def test_interpret_and_attach_have_few_floors() -> None:
    names = {name for name in folders() if name.split(".")[0] in ("interpret", "attach")}
    floors = heights({name: folders()[name] & names for name in names})
    assert max(floors.values()) <= MOST_FLOORS, floors


def rooms() -> list[tuple[str, str]]:
    """The folders of the package, and of those in packages/; parses nothing."""
    found = []
    for name, repository in ALL.items():
        own = {"vlattn_fast"} if name == "core" else own_names(repository)
        folders = {repository.folder_of(module) for module in repository.files if module.partition(".")[0] in own}
        files = {each: repository.files.get(each, Path("__init__.py")).name for each in folders - {"vlattn_fast"}}
        found += [(name, each) for each, file in sorted(files.items()) if file == "__init__.py"]
    return found


@pytest.mark.parametrize(("place", "folder"), rooms())
def test_a_folder_says_what_it_takes_and_gives_and_imports(place: str, folder: str) -> None:
    files = ALL[place].files
    assert folder in files, f"{folder} has no __init__.py"
    text = ast.get_docstring(ast.parse(files[folder].read_text(encoding="utf-8"))) or ""
    parts = dict(re.findall(r"^(In|Out|Imports): ((?:.|\n)+?)(?=^[A-Z]\w+: |\n\n|\Z)", text, re.M))
    assert set(parts) == {"In", "Out", "Imports"}, f"{folder}: {text}"
    named = set(re.findall(r"[\w.]+\w", parts["Imports"])) - {"nothing"}
    below = {short(name) if folder.startswith("vlattn_fast.") else name for name in ALL[place].folders[folder]}
    uncovered = {name for name in below if not any(name == n or name.startswith(f"{n}.") for n in named)}
    unused = {
        n for n in named if not any(name == n or name.startswith(f"{n}.") for name in below) and not n.startswith("vlattn_fast")
    }
    assert not uncovered and not unused, f"{folder} imports {sorted(below)}"


def test_contributing_has_the_floors_in_their_order() -> None:
    tree = (HERE.root / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The tree")[1].split("Outside the package")[0]
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


@cache
def trees() -> dict[str, ast.Module]:
    """The package's modules."""
    ours = {module: file for module, file in HERE.files.items() if module.startswith("vlattn_fast.")}
    return {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in ours.items()}


STAGES = r"vlattn_fast\.(ops\.[a-z]\w*|interpret\.explaining\.(explain|inputs|request))"  # of files whose functions are stages
LONGEST_STAGE = 25


def lengths(tree: ast.Module) -> dict[str, int]:
    """The lines of each function and method of a file, but for limits, which are lists."""
    owners = {"": tree.body} | {f"{each.name}.": each.body for each in tree.body if isinstance(each, ast.ClassDef)}
    functions = {owner + node.name: node for owner, body in owners.items() for node in body if isinstance(node, ast.FunctionDef)}
    functions = {name: each for name, each in functions.items() if not name.endswith("_limits")}
    bodies = {name: each.body[ast.get_docstring(each) is not None :] for name, each in functions.items()}
    return {name: (body[-1].end_lineno or 0) - body[0].lineno + 1 for name, body in bodies.items()}


@pytest.mark.slow
def test_the_stages_of_a_call_are_short() -> None:
    functions = 'def f():\n    """Text.\n    """\n    x = 1\n\n    return x\nclass A:\n    def f(): pass'
    assert lengths(ast.parse(functions)) == {"f": 3, "A.f": 1}
    found = {module: lengths(tree) for module, tree in trees().items() if re.fullmatch(STAGES, module)}
    assert found["vlattn_fast.ops.score_attention"]["score_attention"] > 1
    too_long = {module: {name: n for name, n in each.items() if n > LONGEST_STAGE} for module, each in found.items()}
    assert not any(too_long.values()), {module: each for module, each in too_long.items() if each}


SCREEN, LONGER = 60, 5  # lines of a Triton function without its docstring; how many functions have more
LONGEST_LOOP = 46  # with the loops in it


def of_triton(tree: ast.Module) -> ast.Module:
    """The functions of a file that Triton compiles."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return ast.Module([each for each in functions if any("triton.jit" in ast.unparse(one) for one in each.decorator_list)], [])


def longest_loop(tree: ast.Module) -> int:
    loops = [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While))]
    return max((int(node.end_lineno or 0) - node.body[0].lineno + 1 for node in loops), default=0)


def test_kernels_can_be_read_in_a_screen() -> None:
    kernel = '@triton.jit\ndef f():\n    """Text."""\n    for i in range(2):\n        while x:\n            y\n        z\n'
    planted = of_triton(ast.parse(kernel + "def g():\n    for i in range(2):\n        a\n\n\n\n        b"))
    assert (lengths(planted), longest_loop(planted)) == ({"f": 4}, 3)
    found = {module: of_triton(tree) for module, tree in trees().items() if module.startswith("vlattn_fast.kernels.")}
    longer = [f"{module}.{name}: {n}" for module, tree in found.items() for name, n in lengths(tree).items() if n > SCREEN]
    assert len(longer) <= LONGER, longer
    assert {module: n for module, tree in found.items() if (n := longest_loop(tree)) > LONGEST_LOOP} == {}


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
