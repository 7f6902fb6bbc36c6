"""The calls of every operator by which it is checked and timed, one file an operator.

The file of the operator `<stem>` is `<stem>.py` here. It has

- `examples(sizes)`: a call of every kind, of these sizes, for tests that ask the same of all calls;
- `verify(generator, sizes)`: calls in float64 for `vlattn verify` and `vlattn info`;
- `draw(dice, dtype)`: a random call for `vlattn verify --fuzz`;
- `host(sizes)`: the calls whose time on the host is measured, the plain one first, of which the random calls of
  `tools/cliffs.py` are made, too;
- if the sizes of those random calls have limits, `fit(sizes)`: the sizes within them;
- if those random calls have options of their own, `cliff(sizes, dice)`, which makes them.

Files with an underscore in front are shared.

In: sizes, and what draws random numbers.
Out: an `Example` for each call.
Imports: ops, backends, scores, _ground.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from vlattn_fast.checking.cases._example import Example, Sizes, Tensors
from vlattn_fast.ops import OPERATORS


def cases_of(operator: str) -> Any:
    """The file of the operator's calls."""
    return importlib.import_module(f"{__name__}.{operator}")


def examples(sizes: Sizes) -> Iterator[Example]:
    """A call of every kind of every operator."""
    for operator in OPERATORS:
        yield from cases_of(operator).examples(sizes)


__all__ = ["Example", "Sizes", "Tensors", "cases_of", "examples"]
