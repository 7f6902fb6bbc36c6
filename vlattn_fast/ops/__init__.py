"""The operators, and the one table of them.

A file here without an underscore in front holds public calls; each call that has backends is an `Operator` there
(vlattn_fast/dispatch/operator.py). `OPERATORS` has all of them by name, found in the files.

In: the arguments of a public call.
Out: its result, differentiable.
Imports: dispatch, backends, scores, _ground.
"""

import importlib
import pkgutil

from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import BACKEND_NAMES


FIRST = ("score_attention", "relevancy_attention", "attention_map")  # in stored rows and random calls; the others follow by name


def _found() -> dict[str, Operator]:
    """Every `Operator` in the files of this folder, by its name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    names = [*FIRST, *(name for name in names if name not in FIRST)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {x.stem: x for module in modules for x in vars(module).values() if isinstance(x, Operator)}


OPERATORS = _found()

__all__ = ["BACKEND_NAMES", "OPERATORS"]
