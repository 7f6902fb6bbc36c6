"""The readers by the names of functions and modules: `FUNCTIONS`, `CONVOLUTIONS`, `CLASSES`, `FORWARDS` of each file here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from vlattn_fast.attach import recurrences
from vlattn_fast.attach.recurrences.reading import Reader


def _in_folder(name: str) -> dict[str, Any]:
    readers: dict[str, Any] = {}
    for file in pkgutil.iter_modules(recurrences.__path__, f"{recurrences.__name__}."):
        if file.name != __name__:
            readers |= getattr(importlib.import_module(file.name), name, {})
    return readers


# Recurrences, by their names in the file of the model's class, or as attributes of its modules.
FUNCTIONS: dict[str, Reader] = _in_folder("FUNCTIONS")
CONVOLUTIONS: dict[str, Reader] = _in_folder("CONVOLUTIONS")  # short ones, before a recurrence, or a layer's only mixer
CLASSES: dict[str, Reader] = _in_folder("CLASSES")  # modules whose forward a reader describes, by the names of their classes
# Replacements of forwards that write a recurrence out, by the names of their classes: functions of the module, `handed`
# and the forward's arguments. `handed` makes, of a reader and a function, the function whose calls are read.
FORWARDS: dict[str, Callable[..., Any]] = _in_folder("FORWARDS")
