"""Launches name their arguments: of dozens of strides and sizes in a row a swapped one would be seen by nobody.

And kernels assign to no nested targets, which Triton 3.6 cannot compile, though its interpreter runs them.
"""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.jit import KernelInterface

from tests.helpers.ops.backends import DEVICE
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Sizes
from vlattn_fast.kernels import __path__ as folders
from vlattn_fast.ops import OPERATORS

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


SMALL = Sizes(queries=8, keys=9, regions=4, words=5, features=16)


def names_in_loops(source: str) -> set[str]:
    """What the file's loops read, without those that Triton unrolls."""
    loops = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For) and "static" not in ast.unparse(node.iter)]
    return {node.id for loop in loops for part in loop.body for node in ast.walk(part) if isinstance(node, ast.Name)}


def test_tuples_in_a_tuple_have_a_constant_behind_them() -> None:
    """Or no loop reads the tuple: there Triton 3.6 forgets constants, such as strides of 1, of others. Nothing is launched."""
    held = set()

    def watched(kernel: Any, grid: Any) -> Callable[..., None]:
        def see(**named: Any) -> None:
            for name, value in named.items():
                if isinstance(value, tuple) and any(isinstance(one, tuple) for one in value):
                    held.add((inspect.getsourcefile(kernel.fn), name, value[-1] is None))

        return see

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", watched)
        for case in verify.cases(sizes=SMALL):
            tensors = case.in_dtype(torch.float32, DEVICE)
            if not OPERATORS[case.operator].refusals("triton", case.arguments(tensors)):
                verify._run(case, tensors, "triton")
    assert [(file, name) for file, name, behind in held if not behind and name in names_in_loops(Path(file).read_text())] == []
    assert {name for _, name, _ in held} == {"x", "qs", "ks", "grads", "attention", "own", "other", "indexer", "rows", "side"}
