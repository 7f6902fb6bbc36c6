"""The model families that `explain` has an entry for, by class name; `register_family` and `register_adapter` add one."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from typing import Any

import torch
from torch import nn

from vlattn_fast._ground.checks import describe
from vlattn_fast.interpret.records.decoders import DECODERS
from vlattn_fast.interpret.records.derived import derive_family
from vlattn_fast.interpret.records.encoders import ENCODERS
from vlattn_fast.interpret.records.record import Family
from vlattn_fast.interpret.records.two_towers import LINKED

FAMILIES: dict[str, Family] = {**ENCODERS, **DECODERS, **LINKED}
ADAPTED: dict[str, str] = {}  # by the name of a caller's class, the class whose entry it has


def register_family(class_name: str, family: Family) -> None:
    """Make `explain` accept models whose class, or a base class, is called `class_name`."""
    if not isinstance(family, Family):
        raise TypeError(f"family must be a vlattn_fast.interpret.Family; got {type(family).__name__}")
    FAMILIES[class_name] = family
    ADAPTED.pop(class_name, None)


def register_adapter(cls: type[nn.Module] | str, *, like: str) -> None:
    """Make `explain`, and all that explains, take models of your class as they take those of a class with the same towers.

    The class's subclasses follow it, unless a nearer base class has an entry of its own. If you register a class again, the last
    call counts; a class with an entry of its own has yours from then on.

    Args:
        cls: your class, or its name. Classes are known by their names, so a class that you define anew keeps its entry.
        like: the name of a class in `vlattn_fast.interpret.FAMILIES`, or of one of transformers, such as
            "Qwen2_5_VLForConditionalGeneration" for a class that copies its parts.

    Raises:
        TypeError: `cls` is neither a class of `nn.Module` nor a name, or `like` is not a name.
        ValueError: no class called `like` has an entry. A model whose towers are not those of `like` raises it when it is
            explained.

    Example:
        >>> class MyCaptioner(torch.nn.Module): ...
        >>> register_adapter(MyCaptioner, like="LlavaForConditionalGeneration")
    """
    if not isinstance(cls, str) and not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a class of torch.nn.Module, or its name; got {describe(cls)}")
    entry_of(like)
    name = cls if isinstance(cls, str) else cls.__name__
    if name == like:
        raise ValueError(f"like must name another class than {name!r}, which it is borrowed for; got the same")
    ADAPTED[name] = like


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
        if cls.__name__ in ADAPTED:
            return _borrowed(model, ADAPTED[cls.__name__])
        record = FAMILIES.get(cls.__name__)
        if record is not None and record.others:
            return next((one for one in (record, *record.others) if _fits(one, model)), None)
        if record is not None:
            return record.generating if record.generating is not None and generates else record
    return None


def rewrites_forward(model: nn.Module) -> bool:
    """Whether a class has another forward than the listed class that it is built on, whose record may not know its score."""
    listed: Any = next((cls for cls in type(model).__mro__ if cls.__name__ in {**FAMILIES, **ADAPTED}), type(model))
    return inspect.unwrap(type(model).forward) is not inspect.unwrap(listed.forward)


def entry_of(like: Any) -> Family:
    """The entry of the class called `like`, listed or derived. TypeError where it is no name, ValueError where it has none."""
    if not isinstance(like, str):
        raise TypeError(f"like must be the name of a class with an entry; got {type(like).__name__}")
    record = FAMILIES.get(like) or _derived_family(like)
    if record is None:
        near = ", ".join(map(repr, difflib.get_close_matches(like, FAMILIES, 3)))
        raise ValueError(f"like must be the name of a class with an entry{near and f', such as {near}'}; got {like!r}")
    return record


def _borrowed(model: nn.Module, like: str) -> Family:
    """The entry of the class `like` for a model that has the same towers; ValueError where it has not."""
    record = entry_of(like)
    fitting = next((one for one in (record, *record.others) if _fits(one, model)), None)
    if fitting is None:
        name = type(model).__name__
        paths = ", ".join(f"'{tower.path}.{tower.layers}'".replace("'.", "'") for tower in record.towers)
        raise ValueError(
            f"register_adapter({name}, like={like!r}) must name a class with the towers of {name}; {like} has {paths}. "
            "Register it with another"
        )
    return fitting


@functools.cache
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
