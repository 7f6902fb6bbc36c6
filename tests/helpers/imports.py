"""What each Python file of a repository imports: deferred imports, those for type checkers and those by a name count, too."""

import ast
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

INSTALLED = {"kernels": "vlattn_fast.kernels", "benchmarks": "vlattn_fast.benchmarks"}  # a folder, and its name when installed
LEFT_OUT = {"build", "demo", "dist", "packages", "site", "typings"}  # what is made, links to folders, repositories of their own
# A module by its name, or the beginning of one in an f-string; not behind -m and -p in a command, for another process imports it.
BY_NAME = re.compile(r"""(?<!"-[mp]", )"((?:vlattn_\w+|ptx|tools|tests)(?:\.[a-z_0-9]+)+)\.?(?="|{)""")
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")  # of a statement


class Repository:
    """Modules have the names by which Python imports them; a folder's `__init__` has that of the folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def files(self) -> dict[str, Path]:
        """Each module with its file."""
        tops = [path for path in sorted(self.root.iterdir()) if path.name[0] != "." and path.name not in LEFT_OUT]
        tops = [path for path in tops if not (path / "pyvenv.cfg").exists()]
        files = [file for top in tops for file in (sorted(top.rglob("*.py")) if top.is_dir() else [top]) if file.suffix == ".py"]
        made = [file for file in files if "build" in file.relative_to(self.root).parts]  # `pip install` leaves it there
        return {self._name(file): file for file in files if file not in made}

    def _name(self, file: Path) -> str:
        top, *rest = file.relative_to(self.root).with_suffix("").parts
        return ".".join([INSTALLED.get(top, top), *rest]).removesuffix(".__init__")

    @cached_property
    def names(self) -> dict[str, set[str]]:
        """Each module with what it imports, as it stands there, of other packages, too."""
        texts = {module: file.read_text(encoding="utf-8") for module, file in self.files.items()}
        return {module: imported(ast.parse(text).body) | {*BY_NAME.findall(text)} for module, text in texts.items()}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Each module with the modules that it imports, and with the folders out of which it takes modules by name. The package
        itself is left out for its own modules: nothing in it is imported before it."""
        edges = {}
        for module, names in self.names.items():
            top = module.partition(".")[0]
            package = {top} if top.startswith("vlattn_") and top != module else set()
            edges[module] = {self._resolved(name) for name in names} - {module, ""} - package
        return edges

    @cached_property
    def folders(self) -> dict[str, set[str]]:
        """Each folder with those that its files import."""
        edges: dict[str, set[str]] = {self.folder_of(module): set() for module in self.files}
        for module, names in self.imports.items():
            edges[self.folder_of(module)] |= {self.folder_of(name) for name in names} - {self.folder_of(module)}
        return edges

    def folder_of(self, module: str) -> str:
        """The folder of a module. setup.py stands for itself."""
        file = self.files.get(module)
        alone = file is None or file.name == "__init__.py" or "." not in module
        return module if alone else module.rpartition(".")[0]

    @cached_property
    def _folders(self) -> set[str]:
        return {".".join(parts[:n]) for module in self.files if (parts := module.split(".")) for n in range(1, len(parts))}

    def _resolved(self, name: str) -> str:
        """The module or folder here that `name` lies in; "" for those of other packages."""
        while name and name not in self.files and name not in self._folders:
            name = name.rpartition(".")[0]
        return name


def imported(statements: Iterable[ast.AST]) -> set[str]:
    """What import statements name, also inside functions and for type checkers. Expressions have none, and are left out."""
    names: set[str] = set()
    for node in statements:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import, line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        for block in BLOCKS:
            names |= imported(getattr(node, block, ()))
    return names
