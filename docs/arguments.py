"""Extension of mkdocstrings: splits an Args line that describes several arguments into one line for each, and lists the methods.

Docstrings save space with "text_mask, image_mask: ..." and "query: ... key: ...". The tables of the site show each argument with
its type and default. The line "<methods>" becomes the list that `help(va.explain)` shows, read from the sources.
"""

import ast
import re
from pathlib import Path
from typing import Any

import griffe

METHODS = Path(__file__).parent.parent / "vlattn_fast" / "interpret" / "relevancy" / "methods"
SECTION = re.compile(r"^Args:\n((?:    .*\n?|\n)*)", re.M)
ITEM = re.compile(r"^    (\w+(?:,\s+\w+)*):\s+(.*(?:\n {5,}.*)*)", re.M)


def split(docstring: str, names: set[str]) -> str:
    """The docstring with one line per argument; `names` are the arguments that may begin within a line."""
    inner = re.compile(rf"[.;,]?\s+(?:and )?((?:{'|'.join(sorted(names, key=len, reverse=True))})(?:, (?:\w+))*): ")

    def item(match: re.Match[str]) -> str:
        head, *rest = inner.split(match[2]) if names else [match[2]]
        parts = [(match[1], head), *zip(rest[::2], rest[1::2], strict=True)]
        if len(parts) == 1 and "," not in match[1]:
            return match[0]
        return "\n".join(f"    {name}: {' '.join(text.split())}" for heads, text in parts for name in re.split(r",\s+", heads))

    return SECTION.sub(lambda section: "Args:\n" + ITEM.sub(item, section[1]), docstring)


def method_list() -> str:
    """The lines of `vlattn_fast.interpret.relevancy.methods.registry.method_list`; the site is made without torch."""
    lines: dict[str, str] = {}
    for file in sorted(METHODS.glob("*.py")):
        for kind in ast.parse(file.read_text(encoding="utf-8")).body:
            for part in kind.body if isinstance(kind, ast.ClassDef) else []:
                if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "name":
                    lines[ast.literal_eval(part.value)] = (ast.get_docstring(kind) or "").partition("\n")[0]
    in_order = sorted(filter(None, lines), key=lambda name: (":" in name, name != "gradient"))
    return "\n".join(f'- "{name}": {lines[name]}' for name in in_order)


class OneLinePerArgument(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring:
            text = func.docstring.value.replace("<methods>", method_list())
            func.docstring.value = split(text, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring:
            made = cls.members.get("__init__")
            parameters = {p.name for p in made.parameters} if isinstance(made, griffe.Function) else set(cls.attributes)
            cls.docstring.value = split(cls.docstring.value, parameters)
