"""The methods by their names: each class with a name in a file of this folder."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable
from textwrap import indent
from typing import Any, TypeVar

from vlattn_fast.interpret.relevancy import methods
from vlattn_fast.interpret.relevancy.method import Method

F = TypeVar("F", bound=Callable[..., object])


def methods_in_folder() -> dict[str, type[Method]]:
    """Methods and ablations by their names, "gradient" first: it is the default of `explain`."""
    by_name: dict[str, type[Method]] = {}
    for file in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        for kind in vars(importlib.import_module(file.name)).values():
            if isinstance(kind, type) and issubclass(kind, Method) and kind.name and kind.__module__ == file.name:
                if kind.name in by_name:
                    raise ValueError(f"each method must have a name of its own; got {kind.name!r} in {file.name} once more")
                by_name[kind.name] = kind
    return dict(sorted(by_name.items(), key=lambda item: item[0] != "gradient"))


_ALL = methods_in_folder()
METHODS = {name: kind for name, kind in _ALL.items() if ":" not in name}
ABLATIONS = {name: kind for name, kind in _ALL.items() if ":" in name}


def find_method(name: str) -> type[Method]:
    """The class of a method or an ablation; ValueError names the known ones."""
    by_name = {**METHODS, **ABLATIONS}
    if isinstance(name, str) and name in by_name:
        return by_name[name]
    bare = str(name).partition("(")[0]
    line = f". Options belong to an object: method=va.methods.{by_name[bare].__name__}(...)" if bare in METHODS else ""
    raise ValueError(f"method must be one of {', '.join(by_name)}; got {name!r}{line}")


def method_of(method: str | Method) -> Method:
    """A method by its name, with its defaults; by its label, such as "gradient(freeze=())"; or an object. TypeError if it is
    none."""
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method must be a name or an object, such as va.methods.{method.__name__}(); got the class")
    if isinstance(method, Method):
        return method
    name, opened, inside = str(method).partition("(")
    if not opened:
        return find_method(method)()
    try:
        call = ast.parse(f"f({inside}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        options = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        return find_method(method)()  # which raises
    if isinstance(freeze := options.get("freeze"), str):
        options["freeze"] = (freeze,)
    return with_options(name, **options)


def _value(node: ast.expr) -> Any:
    """The value of an option in a label, where texts have no quotes, and several have a plus between them."""
    if isinstance(node, ast.BinOp) and isinstance(node.left, ast.Name) and isinstance(node.right, ast.Name):
        return node.left.id, node.right.id
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def with_options(name: str, **options: Any) -> Method:
    """A method by its name, with options. ValueError for an option that its class does not have."""
    kind = find_method(name)
    names = kind.option_names()
    if unknown := [option for option in options if option not in names]:
        has = f"has {', '.join(names)}" if names else "has none"
        raise ValueError(f"{unknown[0]} must be an option of method {name!r}, which {has}; got {options[unknown[0]]!r}")
    return kind(**options)


def published(name: str, **options: Any) -> Method:
    """A method by its name in its published form, which freezes neither norms nor attention weights."""
    return with_options(name, **options, **({"freeze": ()} if "freeze" in find_method(name).option_names() else {}))


def first_lines() -> dict[str, str]:
    """By the name of each method, then of each ablation, the first line of its class's docstring."""
    return {name: (kind.__doc__ or "").partition("\n")[0] for name, kind in {**METHODS, **ABLATIONS}.items()}


def method_list() -> str:
    """`first_lines` as a list in Markdown."""
    return "\n".join(f'- "{name}": {line}' for name, line in first_lines().items())


def lists_methods(function: F) -> F:
    """The function, with `method_list` in place of its docstring's line "<methods>"; `docs/arguments.py` does so for the site."""
    if function.__doc__:
        function.__doc__ = function.__doc__.replace("    <methods>", indent(method_list(), "    "))
    return function
