"""Digests of the text that a launch gives Triton to compile: equal ones compile alike.

*source*: the kernel's text, with all that the text names in the package's kernels and without comments and docstrings, and the
constants and types of the arguments. It takes a millisecond, and no version of Triton changes it: so it says of a row stored
under another version than the installed one whether the row is out of date.
*text*: what Triton's first passes make of this. Other sources may have the same, as after a change of what constants leave out.
It takes a tenth of a second, and the version that compiles the row.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "vlattn_fast.kernels."
OPTIONS = ("num_warps", "num_ctas", "num_stages", "maxnreg", "enable_fp_fusion")


def launch_text(kernel: Any, arguments: dict[str, Any]) -> str:
    """kernel: a function of @triton.jit."""
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    runtime = {parameter.name for parameter in kernel.params} - constant  # else options of the compiler
    told = sorted(f"{name}: {argument_text(x, name in runtime)}" for name, x in arguments.items())
    return "\n".join((kernel_text(kernel.fn.__module__, kernel.fn.__name__), *told))


def argument_text(x: Any, runtime: bool = True) -> str:
    """The facts that Triton compiles a kernel for: whether a number is 1, a multiple of 16 or wide, and a tensor's dtype."""
    if isinstance(x, tuple):
        return f"({', '.join(argument_text(one, runtime) for one in x)})"
    if type(x).__name__ == "constexpr":
        return argument_text(x.value, False)
    if hasattr(x, "block_shape"):
        return f"boxes of {argument_text(x.base)} {tuple(x.block_shape)}"
    if hasattr(x, "data_ptr"):
        return f"{x.dtype}{'' if x.data_ptr() % 16 == 0 else ', not aligned'}"
    if runtime and type(x) is int:
        return "1" if x == 1 else f"{'int32' if -(1 << 31) <= x < 1 << 31 else 'int64'}{', by 16' if x % 16 == 0 else ''}"
    return type(x).__name__ if runtime and isinstance(x, (bool, float)) else repr(x)


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\n\n".join(texts).encode()).hexdigest()[:12]


@functools.cache
def kernel_text(module: str, name: str) -> str:
    texts: dict[tuple[str, str], str] = {}
    ahead = [(module, name)]
    while ahead:
        place = ahead.pop()
        statement = _statements(place[0]).get(place[1])
        if place in texts or statement is None:  # None: an argument, a local name, or Triton's
            continue
        if isinstance(statement, ast.FunctionDef) and not statement.decorator_list:  # of the host; a local name may be the same
            continue
        if isinstance(statement, ast.ImportFrom):
            texts[place] = ""
            if (statement.module or "").startswith(PACKAGE):
                ahead.append((str(statement.module), next(x.name for x in statement.names if place[1] in (x.asname, x.name))))
            continue
        texts[place] = ast.unparse(statement)
        ahead += [(place[0], node.id) for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return "\n".join(sorted(filter(None, texts.values())))


@functools.cache
def _statements(module: str) -> dict[str, ast.stmt]:
    """Those of a module, by the names that they define, without docstrings."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    statements: dict[str, ast.stmt] = {}
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        names = [node.id for target in targets if target is not None for node in ast.walk(target) if isinstance(node, ast.Name)]
        names += [alias.asname or alias.name for alias in statement.names] if isinstance(statement, ast.ImportFrom) else []
        names += [statement.name] if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) else []
        statements |= dict.fromkeys(names, statement)
    return statements


class _FirstText(Exception):
    """Ends the compilation behind the first passes."""


def first_text(run: Callable[..., Any], kernel: Any, arguments: dict[str, Any]) -> str:
    """run: `JITFunction.run`."""
    from triton.backends.nvidia.compiler import CUDABackend

    def stop(module: Any, metadata: Any, options: Any, capability: int) -> None:
        raise _FirstText(canonical(str(module), options))

    make_ttgir, CUDABackend.make_ttgir = CUDABackend.make_ttgir, staticmethod(stop)
    try:
        compiled = run(kernel, grid=(1,), warmup=True, **arguments)
        return canonical(compiled.asm["ttir"], compiled.metadata)  # compiled before
    except _FirstText as text:
        return str(text)
    finally:
        CUDABackend.make_ttgir = staticmethod(make_ttgir)


def canonical(ttir: str, options: Any) -> str:
    """Without names and places in the source."""
    lines = [line for line in ttir.splitlines() if not line.startswith("#loc")]
    text = re.sub(r" loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "", "\n".join(lines))
    names: dict[str, str] = {}
    text = re.sub(r"%[\w$.-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), text)
    return "\n".join((*(f"{name} {getattr(options, name, None)}" for name in OPTIONS), text))
