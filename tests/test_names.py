"""Names and sentences that CONTRIBUTING.md advises against ("Names and words") become fewer: names.json holds each file's count.

`python -m tests.test_names` stores the counts anew, after a file has lost some.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STORED = Path(__file__).with_name("names.json")
FOLDERS = ("vlattn_fast", "kernels", "benchmarks", "tools")
SENTENCE = re.compile(r"(?:^|[.!?:]\s+)((?:Of|What) \S+)")


def forbidden() -> set[str]:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    advice = re.search(r"^- Avoid names that say little: (.*?)\. ", page, re.M | re.S)
    assert advice is not None
    return set(re.findall(r"`(\w+)`", advice[1]))


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the name of all that a file names: variables, attributes, arguments, functions, classes and imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def texts(source: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The first line and the text of each docstring, and of comments on consecutive lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if (text := ast.get_docstring(node)) is not None:
                yield node.body[0].lineno, text
    comments: list[tuple[int, int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("#").strip()
            alone = token.line.lstrip().startswith("#")
            if comments and alone and comments[-1][1] == line - 1:
                comments[-1] = (comments[-1][0], line, f"{comments[-1][2]} {text}")
            else:
                comments.append((line, line if alone else -1, text))
    yield from ((first, text) for first, _, text in comments)


def hits(source: str, words: set[str]) -> list[str]:
    """What a file should not say, each with its line."""
    tree = ast.parse(source)
    said = [(line, name) for line, name in names(tree) if name in words]
    for line, text in texts(source, tree):
        for paragraph in re.split(r"\n\s*\n", text):
            said += [(line, f"{begin} ...") for begin in SENTENCE.findall(paragraph.strip())]
    return [f"{line}: {what}" for line, what in sorted(said)]


def all_hits() -> dict[str, list[str]]:
    words = forbidden()
    files = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if not path.is_symlink()}
    by_file = {str(path.relative_to(ROOT)): hits(path.read_text(encoding="utf-8"), words) for path in sorted(files)}
    return {file: said for file, said in by_file.items() if said}


def test_names_that_say_little_become_fewer() -> None:
    allowed, now = json.loads(STORED.read_text(encoding="utf-8")), all_hits()
    more = {file: said for file, said in now.items() if len(said) > allowed.get(file, 0)}
    assert not more, f"name what a thing holds, and begin with a noun:\n{json.dumps(more, indent=1)}"
    fewer = [file for file, count in allowed.items() if len(now.get(file, [])) < count]
    assert not fewer, f"python -m tests.test_names stores that these have fewer: {', '.join(fewer)}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("found = 1", ["1: found"]),
        ("def own(x, *, other=1): ...", ["1: other", "1: own"]),
        ("class A:\n    sent: int\n    def __init__(self): self.moved = 1", ["2: sent", "3: moved"]),
        ("for given, y in z: pass\n[far for far in x]", ["1: given", "2: far"]),
        ("import a as ready\nwith b as wanted: pass", ["1: ready", "2: wanted"]),
        ("def f():\n    '''Takes x. Of all\n    names.'''", ["2: Of all ..."]),
        ("# What is\n# here. Of two", ["1: Of two ...", "1: What is ..."]),
        ("x = 1  # of it. What comes", ["1: What comes ..."]),
        ("foundation = x.found + y.other  # x, of which What is", []),
        ("'''Of a\n\nWhat b'''", ["1: Of a ...", "1: What b ..."]),
    ],
)
def test_what_is_seen(source: str, said: list[str]) -> None:
    assert hits(source, forbidden()) == said


if __name__ == "__main__":
    STORED.write_text(json.dumps({file: len(said) for file, said in all_hits().items()}, indent=0) + "\n", encoding="utf-8")
