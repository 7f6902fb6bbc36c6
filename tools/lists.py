"""Writes what follows from the code: exports, docs/api.md's entries, the site's navigation, the page of methods, the version.

    python -m tools.lists            # `make lists`: writes them
    python -m tools.lists --check    # names the files that would change, and writes nothing

Sources are read and not imported, so that what is being added need not run yet. A list keeps the order and the options that
somebody gave it; what is missing is added, and a page that is gone leaves the navigation. An operator without a page gets one to
fill in. An entry of docs/api.md goes by hand. The version is that of pyproject.toml.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tools.navigation import pages_of

ROOT = Path(__file__).parents[1]
WIDTH = 130
EXPORTING = ("", "interpret", "methods", "models", "nn", "scores", "train", "backends/reference")
# where a module's names have their entries in docs/api.md
SECTIONS = {
    "interpret": "Explanations",
    "scores": "Score functions",
    "nn": "Layers and losses",
    "train": "Trainers and training loops",
    "models": "Models",
}
# the section of the navigation, and its group, at whose end a new page of a folder stands
FOLDERS = {
    "guides": ("Guides",),
    "operators": ("Reference", "Operators"),
    "experiments": ("Evidence", "Experiments"),
    "": ("Reference",),
}
# files that repeat the version, and how; the site shows its copyright at the foot of each page
VERSIONED = "CITATION.cff", "conda/recipe.yaml", "mkdocs.yml"
NATIVE = "packages/vlattn-native/pyproject.toml"  # its version is the core's, on which it depends
VERSIONED += (NATIVE,) if (ROOT / NATIVE).exists() else ()
VERSION = re.compile(r'^( *version: "?|copyright: vlattn_fast |version = "|dependencies = \["vlattn_fast==)[\w.]+', re.M)
GENERATED = ("index.md", "report.md")  # pages that tools/pages makes whole
PAGE = """# {stem}

`{stem}` computes.

## What it computes

$$ y $$

## Call

| argument | what to pass |
| --- | --- |

## What you get

## When to use it

## Cost

On a GPU: not measured.

## Limits

[Choose a backend](../guides/choose_a_backend.md) says which backend runs.

## API

::: vlattn_fast.{stem}
"""


class Lists:
    """root: a checkout. The methods give texts of files, by their paths in it."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root

    def text(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8")

    def tree(self, name: str) -> ast.Module:
        return ast.parse(self.text(name))

    def files(self, folder: str) -> list[str]:
        """The modules of a folder, without those that are its own."""
        paths = sorted((self.root / folder).glob("*.py"))
        return [f"{folder}/{path.name}" for path in paths if not path.name.startswith("_")]

    def all(self) -> dict[str, str]:
        """Every file that has a list, as it should be."""
        texts = self.pages_of_operators()
        for part in EXPORTING:
            name = self.module(part)
            texts[name] = self.exports(part)
        texts["docs/api.md"] = self.api(texts)
        texts["mkdocs.yml"] = self.navigation(texts)
        texts["docs/methods.md"] = self.methods_page()
        for name in VERSIONED:
            texts[name] = VERSION.sub(rf"\g<1>{self.version()}", texts.get(name) or self.text(name))
        return texts

    def stale(self) -> list[str]:
        """The files that differ from what they should be."""
        return [name for name, text in self.all().items() if not (self.root / name).exists() or self.text(name) != text]

    def write(self) -> list[str]:
        texts = self.all()
        changed = self.stale()
        for name in changed:
            (self.root / name).write_text(texts[name], encoding="utf-8")
        return changed

    def version(self) -> str:
        return str(tomllib.loads(self.text("pyproject.toml"))["project"]["version"])

    # exports

    def module(self, part: str) -> str:
        plain = f"vlattn_fast/{part}.py"
        return plain if part and (self.root / plain).exists() else f"vlattn_fast/{part}/__init__.py".replace("//", "/")

    def operators(self) -> list[str]:
        """The public calls that a file of ops/ registers."""
        return [
            node.value.args[0].id
            for name in self.files("vlattn_fast/ops")
            for node in self.tree(name).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.targets[0]) == "OPERATOR"
            if isinstance(node.value.args[0], ast.Name)
        ]

    def named_classes(self, folder: str) -> Iterator[tuple[str, str, str, str]]:
        """Of each class with a name in a file of a folder: the file's module, the class, the name, the docstring's first line."""
        for file in self.files(folder):
            for kind in self.tree(file).body:
                for part in kind.body if isinstance(kind, ast.ClassDef) else []:
                    target = part.targets[0] if isinstance(part, ast.Assign) else getattr(part, "target", None)
                    value = getattr(part, "value", None)
                    if isinstance(target, ast.Name) and target.id == "name" and isinstance(value, ast.Constant) and value.value:
                        assert isinstance(kind, ast.ClassDef)
                        line = (ast.get_docstring(kind) or "").partition("\n")[0]
                        yield file.removesuffix(".py").replace("/", "."), kind.name, str(value.value), line

    def exports(self, part: str) -> str:
        """The imports of what is found in a folder, and `__all__`: what a module imports of the package, and its own names."""
        text = self.text(self.module(part))
        if part == "":
            text = with_imports(text, [(f"vlattn_fast.ops.{stem}", stem) for stem in self.operators()])
        elif part == "backends/reference":
            stems = [stem for stem in self.operators() if (self.root / f"vlattn_fast/{part}/{stem}.py").exists()]
            text = with_imports(text, [(f"vlattn_fast.backends.reference.{stem}", stem) for stem in stems])
        elif part == "scores":
            text = with_imports(text, [(module, kind) for module, kind, *_ in self.named_classes("vlattn_fast/scores")])
        elif part == "methods":
            found = self.named_classes("vlattn_fast/interpret/relevancy/methods")
            text = with_imports(text, [(module, kind) for module, kind, name, _ in found if ":" not in name])
        names = public_names(ast.parse(text))
        if "*" in names:  # of a module whose names the list repeats
            names = sorted({*names, *all_of(text)} - {"*"})
        return with_all(text, names)

    # pages

    def pages_of_operators(self) -> dict[str, str]:
        """A page to fill in for each operator that stands on none."""
        shown = {
            name
            for path in (self.root / "docs").rglob("*.md")
            for name in re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), re.M)
        }
        return {
            f"docs/operators/{stem}.md": PAGE.format(stem=stem) for stem in self.operators() if f"vlattn_fast.{stem}" not in shown
        }

    def api(self, texts: dict[str, str]) -> str:
        text = self.text("docs/api.md")
        at_top = set(all_of(texts[self.module("")]))
        scores = {kind for _, kind, *_ in self.named_classes("vlattn_fast/scores")}
        for part, section in SECTIONS.items():
            for name in all_of(texts[self.module(part)]):
                if name.isupper() and part == "interpret" or part == "scores" and name not in scores:
                    continue
                full = f"vlattn_fast.{name}" if part == "interpret" and name in at_top else f"vlattn_fast.{part}.{name}"
                if not re.search(rf"^::: vlattn_fast\.({part}\.)?{name}$", text, re.M):
                    options = "\n    options: {members: false}" if name[0].isupper() else ""
                    text = with_entry(text, section, f"::: {full}{options}\n")
        return text

    def navigation(self, texts: dict[str, str]) -> str:
        text = self.text("mkdocs.yml")
        docs = self.root / "docs"
        pages = {str(path.relative_to(docs)) for path in docs.rglob("*.md")} | {
            name.removeprefix("docs/") for name in texts if name.startswith("docs/")
        }
        listed = pages_of(text)
        for gone in {*listed} - pages - {*GENERATED}:
            text = re.sub(rf"^ +- .+: {re.escape(gone)}\n", "", text, flags=re.M)
        for page in sorted(pages - {*listed}):
            source = texts.get(f"docs/{page}") or self.text(f"docs/{page}")
            heading = next(line.removeprefix("# ") for line in source.splitlines() if line.startswith("# "))
            title = f'"{heading}"' if ":" in heading else heading
            text = with_page(text, FOLDERS[page.rpartition("/")[0]], f"- {title}: {page}\n")
        return text

    def methods_page(self) -> str:
        """The names of all methods and the first line of each class's docstring, in the order of `help(va.explain)`; a class of
        `va.methods` without an entry gets one."""
        found = list(self.named_classes("vlattn_fast/interpret/relevancy/methods"))
        lines = {method: line for _, _, method, line in found}
        in_order = sorted(lines, key=lambda method: (":" in method, method != "gradient"))
        table = "".join(f'| `"{method}"` | {lines[method]} |\n' for method in in_order)
        old = re.compile(r"(^\| `method` \| .+\n\| --- \| --- \|\n)(?:\|.+\n)*", re.M)
        text = old.sub(lambda head: head[1] + table, self.text("docs/methods.md"))
        for _, kind, method, _ in found:
            entry = f"::: vlattn_fast.methods.{kind}\n"
            if ":" not in method and entry not in text:
                text += f"\n## {method}\n\n{entry}    options: {{inherited_members: true, members: [__init__]}}\n"
        return text


def with_imports(text: str, found: list[tuple[str, str]]) -> str:
    """The text with an import of each name that it does not import: before the first line of its kind that sorts after it."""
    for module, name in found:
        if re.search(rf"^from {re.escape(module)} import .*\b{name}\b", text, re.M):
            continue
        lines = text.splitlines(keepends=True)
        package = module.rpartition(".")[0]
        beside = re.compile(rf"from {re.escape(package)}\.\w+ import ")
        others = [n for n, line in enumerate(lines) if beside.match(line)]
        assert others, f"no import of {package} beside which {name} could stand"
        line = f"from {module} import {name}\n"
        place = next((n for n in others if lines[n] > line), others[-1] + 1)
        text = "".join([*lines[:place], line, *lines[place:]])
    return text


def public_names(tree: ast.Module) -> list[str]:
    """Names that a module imports of the package, but for its ground and those "as" something, and names of its own."""
    names: set[str] = set()
    under = [node for one in tree.body if isinstance(one, ast.If) for node in one.body]
    for node in [*tree.body, *under]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vlattn_fast" and "._" not in node.module:
            names |= {alias.name for alias in node.names if alias.asname is None}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.add(node.targets[0].id)
    return sorted(name for name in names if not name.startswith("_"))


def with_all(text: str, names: list[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    line = f"__all__ = [{', '.join(quoted)}]\n"
    if len(line) > WIDTH + 1:
        line = "__all__ = [\n" + "".join(f"    {name},\n" for name in quoted) + "]\n"
    return re.sub(r"^__all__ = \[.*?\]\n", lambda _: line, text, count=1, flags=re.M | re.S)


def all_of(text: str) -> list[str]:
    (found,) = re.findall(r"^__all__ = (\[.*?\])\n", text, re.M | re.S)
    return list(ast.literal_eval(found))


def with_page(text: str, titles: tuple[str, ...], entry: str) -> str:
    """The configuration of the site with an entry at the end of a group of the navigation: `titles` lead to the group."""
    lines = text.splitlines(keepends=True)
    place, indent = lines.index("nav:\n"), 2
    for title in titles:
        place, indent = lines.index(f"{' ' * indent}- {title}:\n", place), indent + 4
    inside = f"{' ' * indent}"
    end = next((n for n in range(place + 1, len(lines)) if not lines[n].startswith(inside)), len(lines))
    return "".join([*lines[:end], f"{inside}{entry}", *lines[end:]])


def with_entry(text: str, section: str, entry: str) -> str:
    """The page with an entry at the end of a section."""
    parts = re.split(r"^(?=## )", text, flags=re.M)
    place = next(n for n, part in enumerate(parts) if part.startswith(f"## {section}\n"))
    last = place == len(parts) - 1
    parts[place] = parts[place].rstrip("\n") + f"\n\n{entry}" + ("" if last else "\n")
    return "".join(parts)


def main() -> None:
    lists = Lists()
    check = sys.argv[1:] == ["--check"]
    changed = lists.stale() if check else lists.write()
    for name in changed:
        print(f"{name} {'is not up to date: run make lists' if check else 'is written anew'}")
    sys.exit(1 if check and changed else 0)


if __name__ == "__main__":
    main()
