"""The readers by the names of what they read: `FUNCTIONS`, `CONVOLUTIONS` and `CLASSES` of each file of this folder."""

from __future__ import annotations

import importlib
import pkgutil

from vlattn_fast.attach import recurrences
from vlattn_fast.attach.recurrences.reading import Reader


def _in_folder(name: str) -> dict[str, Reader]:
    readers: dict[str, Reader] = {}
    for file in pkgutil.iter_modules(recurrences.__path__, f"{recurrences.__name__}."):
        if file.name != __name__:
            readers |= getattr(importlib.import_module(file.name), name, {})
    return readers


FUNCTIONS = _in_folder(
    "FUNCTIONS"
)  # recurrences, by their names in the file of the model's class, or as attributes of its modules
CONVOLUTIONS = _in_folder("CONVOLUTIONS")  # short ones, in front of a recurrence, or a layer's only mixer
CLASSES = _in_folder("CLASSES")  # modules whose forward is read, by the names of their classes
