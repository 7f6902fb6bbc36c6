"""The model families that `explain` has a record of, by class name; `register_family` adds one."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any

import torch
from torch import nn

from vlattn_fast.interpret.records.decoders import DECODERS
from vlattn_fast.interpret.records.derived import derive_family
from vlattn_fast.interpret.records.encoders import ENCODERS
from vlattn_fast.interpret.records.record import Family
from vlattn_fast.interpret.records.two_towers import LINKED

FAMILIES: dict[str, Family] = {**ENCODERS, **DECODERS, **LINKED}


def register_family(class_name: str, family: Family) -> None:
    """Make `explain` accept models whose class, or a base class, is called `class_name`."""
    if not isinstance(family, Family):
        raise TypeError(f"family must be a vlattn_fast.interpret.Family; got {type(family).__name__}")
    FAMILIES[class_name] = family


def find_family(model: nn.Module) -> Family | None:
    """The record of `model`'s class or its nearest base class, else one that is derived; None where nothing is."""
    listed = listed_family(model)
    if listed is not None:
        return listed
    try:
        return derive_family(model)
    except ValueError:
        return None


def listed_family(model: nn.Module) -> Family | None:
    """The listed record of `model`'s class or its nearest base class."""
    generates = getattr(model, "vocab_size", None) is not None
    for cls in type(model).__mro__:
        record = FAMILIES.get(cls.__name__)
        if record is not None and record.others:
            return next((one for one in (record, *record.others) if _fits(one, model)), None)
        if record is not None:
            return record.generating if record.generating is not None and generates else record
    return None


def rewrites_forward(model: nn.Module) -> bool:
    """Whether a class has another forward than the listed class that it is built on, whose record may not know its score."""
    listed: Any = next((cls for cls in type(model).__mro__ if cls.__name__ in FAMILIES), type(model))
    return inspect.unwrap(type(model).forward) is not inspect.unwrap(listed.forward)


def borrowed_family(model: nn.Module, like: str) -> Family:
    """The record of the class `like`, listed or derived, for a model that has the same towers.

    Raises:
        TypeError: `like` is no name.
        ValueError: no class of this name has a record, or `model` has not its towers.
    """
    if not isinstance(like, str):
        raise TypeError(f"like must be the name of a class with a record; got {type(like).__name__}")
    record = FAMILIES.get(like) or _derived_family(like)
    if record is None:
        near = ", ".join(map(repr, difflib.get_close_matches(like, FAMILIES, 3)))
        raise ValueError(f"like must be the name of a class with a record{near and f', as {near}'}; got {like!r}")
    fitting = next((one for one in (record, *record.others) if _fits(one, model)), None)
    if fitting is None:
        paths = ", ".join(f"'{tower.path}.{tower.layers}'".replace("'.", "'") for tower in record.towers)
        raise ValueError(f"like must name a class with the towers of {type(model).__name__}; got {like!r}, which has {paths}")
    return fitting


def _derived_family(class_name: str) -> Family | None:
    """The record that is derived for a class of transformers with its default config; None where there is none."""
    import transformers

    kind = getattr(transformers, class_name, None)
    config = getattr(kind, "config_class", None)
    if kind is None or config is None:
        return None
    try:
        with torch.device("meta"):
            return derive_family(kind(config()))
    except Exception:  # default configs of some classes make no model
        return None


def nearest_family(model: nn.Module) -> str | None:
    """The class with a listed record whose towers `model` has, and whose name is the nearest to that of its own class."""
    fitting = [name for name, record in FAMILIES.items() if any(_fits(one, model) for one in (record, *record.others))]
    return next(iter(difflib.get_close_matches(type(model).__name__, fitting, 1, 0.0)), None)


def _fits(record: Family, model: nn.Module) -> bool:
    """Whether the layers of each tower, and of the vision tower behind a connector, are in the model."""
    names = {name for name, _ in model.named_modules()}
    towers = [*record.towers, *([] if record.vision is None else [record.vision])]
    lists = (re.escape(f"{tower.path}.{tower.layers}".strip(".")).replace(r"\*", r"\d+") for tower in towers)
    return all(any(re.fullmatch(layers, name) for name in names) for layers in lists)
