"""The operators, and the one table of them.

A file here without an underscore in front holds public calls; each call that has backends is an `Operator` there
(vlattn_fast/dispatch/operator.py). `OPERATORS` has all of them by name, found in the files, in the order in which
vlattn_fast/backends/inputs.py has their inputs.

In: the arguments of a public call.
Out: its result, differentiable.
Imports: dispatch, kernels, backends, scores, _ground.
"""

import importlib
import pkgutil

from vlattn_fast.backends import inputs
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import BACKEND_NAMES


def _found() -> dict[str, Operator]:
    """Every `Operator` in the files of this folder, by its name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    operators = [x for module in modules for x in vars(module).values() if isinstance(x, Operator)]
    classes = list(vars(inputs))

    def rank(operator: Operator) -> int:
        name = f"{operator.stem.title().replace('_', '')}Inputs"
        return classes.index(name) if name in classes else len(classes)

    return {operator.stem: operator for operator in sorted(operators, key=rank)}


OPERATORS = _found()
importlib.import_module(f"{__name__}._relevancy_derivatives")  # of two operators

__all__ = ["BACKEND_NAMES", "OPERATORS"]
