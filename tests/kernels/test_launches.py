"""Launches name their arguments: of dozens of strides and sizes in a row a swapped one would be seen by nobody.

And kernels assign to no nested targets, which Triton 3.6 cannot compile, though its interpreter runs them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from vlattn_fast.kernels import __path__ as folders

FILES = [file for file in sorted(Path(folders[0]).glob("*.py")) if "@triton.jit" in file.read_text()]


def launches(source: str) -> list[ast.Call]:
    """kernel[grid](...)"""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]


def test_the_launches_are_found() -> None:
    assert sum(len(launches(file.read_text())) for file in FILES) >= 20


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_launches_name_their_arguments(file: Path) -> None:
    assert [node.lineno for node in launches(file.read_text()) if node.args] == []


def test_what_is_not_named_is_seen() -> None:
    (named, by_place) = launches("_kernel[grid](p_q=q, stride_qb=1, **call)\n_kernel[(n,)](q, stride_qb=1)\n")
    assert not named.args and len(by_place.args) == 1


def nested_targets(source: str) -> list[int]:
    """The lines of the functions with @triton.jit that assign to `(a, b), c`."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    kernels = (node for node in functions if "triton.jit" in map(ast.unparse, node.decorator_list))
    targets = (node.targets[0] for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.Assign))
    return [target.lineno for target in targets if any(isinstance(part, ast.Tuple) for part in getattr(target, "elts", ()))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_targets_are_flat(file: Path) -> None:
    assert nested_targets(file.read_text()) == []


def test_a_nested_target_is_seen() -> None:
    assert nested_targets("@triton.jit\ndef f(x, y):\n    a, b = y\n    (a, b), c = x\n") == [4]
    assert nested_targets("def f(x):\n    (a, b), c = x\n") == []  # runs in Python
