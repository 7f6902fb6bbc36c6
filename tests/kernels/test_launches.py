"""Launches name their arguments: of dozens of strides and sizes in a row a swapped one would be seen by nobody."""

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
