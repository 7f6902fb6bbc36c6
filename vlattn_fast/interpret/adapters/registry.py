"""The classes of models that have an adapter, by name; `register_adapter` adds one."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from typing import Any

import torch
from torch import nn

from vlattn_fast._ground.checks import describe
from vlattn_fast.interpret.adapters.adapter import Adapter
from vlattn_fast.interpret.adapters.decoders import DECODERS
from vlattn_fast.interpret.adapters.derived import derive_adapter
from vlattn_fast.interpret.adapters.encoders import ENCODERS
from vlattn_fast.interpret.adapters.two_towers import LINKED

ADAPTERS: dict[str, Adapter] = {**ENCODERS, **DECODERS, **LINKED}
BORROWED: dict[str, str] = {}  # from the name of your class to the class whose adapter it borrows


def register_adapter(cls: type[nn.Module] | str, adapter: Adapter | None = None, *, like: str | None = None) -> None:
    """Makes `explain`, and everything that explains, accept models of your class.

    Give either `like`, if your class has the same towers as a class that has an adapter, or an adapter of your own. It costs no
    forward pass: the towers are checked when a model is explained.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> class MyCaptioner(torch.nn.Module): ...
        >>> va.register_adapter(MyCaptioner, like="LlavaForConditionalGeneration")

    Args:
        cls: your class, or its name. Classes are known by their names, so a class that you define anew keeps its adapter.
            Subclasses follow your class, unless a nearer base class has an adapter. If you register a class again, the last call
            counts.
        adapter: a `va.interpret.Adapter`: which towers the model has, which position is explained, and which score.
        like: the name of a class in `va.interpret.ADAPTERS`, or of one of transformers, such as
            "Qwen2_5_VLForConditionalGeneration" for a class that copies its parts.

    Raises:
        TypeError: `cls` is neither a subclass of `nn.Module` nor a name, `adapter` is not an `Adapter`, or `like` is not a name.
        ValueError: both or neither of `adapter` and `like` are given, or no class called `like` has an adapter. If a model's
            towers are not those of `like`, `explain` raises it.
    """
    if not isinstance(cls, str) and not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of torch.nn.Module, or its name; got {describe(cls)}")
    name = cls if isinstance(cls, str) else cls.__name__
    if (adapter is None) == (like is None):
        got = "neither" if adapter is None else "both"
        raise ValueError(f"register_adapter must be given either adapter or like; got {got}")
    if adapter is not None:
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapter must be a vlattn_fast.interpret.Adapter; got {describe(adapter)}")
        ADAPTERS[name] = adapter
        BORROWED.pop(name, None)
        return
    entry_of(like)
    if name == like:
        raise ValueError(f"like must name a class other than {name!r}; got the same")
    BORROWED[name] = str(like)


def find_adapter(model: nn.Module) -> Adapter | None:
    """The adapter of `model`'s class or its nearest base class, else one that is derived; None without either."""
    listed = listed_adapter(model)
    if listed is not None:
        return listed
    try:
        return derive_adapter(model)
    except ValueError:
        return None


def listed_adapter(model: nn.Module) -> Adapter | None:
    """The listed adapter of `model`'s class or its nearest base class."""
    generates = getattr(model, "vocab_size", None) is not None
    for cls in type(model).__mro__:
        if cls.__name__ in BORROWED:
            return _borrowed(model, BORROWED[cls.__name__])
        adapter = ADAPTERS.get(cls.__name__)
        if adapter is not None and adapter.others:
            return next((one for one in (adapter, *adapter.others) if _fits(one, model)), None)
        if adapter is not None:
            return adapter.generating if adapter.generating is not None and generates else adapter
    return None


def rewrites_forward(model: nn.Module) -> bool:
    """Whether a class overrides the forward of the listed class that it is built on, whose adapter may not know its score."""
    listed: Any = next((cls for cls in type(model).__mro__ if cls.__name__ in {**ADAPTERS, **BORROWED}), type(model))
    return inspect.unwrap(type(model).forward) is not inspect.unwrap(listed.forward)


def entry_of(like: Any) -> Adapter:
    """The adapter of the class called `like`, listed or derived. TypeError if it is not a name, ValueError if it has none."""
    if not isinstance(like, str):
        raise TypeError(f"like must be the name of a class with an adapter; got {type(like).__name__}")
    adapter = ADAPTERS.get(like) or _derived_adapter(like)
    if adapter is None:
        near = ", ".join(map(repr, difflib.get_close_matches(like, ADAPTERS, 3)))
        raise ValueError(f"like must be the name of a class with an adapter{near and f', such as {near}'}; got {like!r}")
    return adapter


def _borrowed(model: nn.Module, like: str) -> Adapter:
    """The adapter of the class `like` for a model that has the same towers; ValueError if it has others."""
    adapter = entry_of(like)
    fitting = next((one for one in (adapter, *adapter.others) if _fits(one, model)), None)
    if fitting is None:
        name = type(model).__name__
        paths = ", ".join(f"'{tower.path}.{tower.layers}'".replace("'.", "'") for tower in adapter.towers)
        raise ValueError(
            f"register_adapter({name}, like={like!r}) must name a class with the towers of {name}; {like} has {paths}. "
            "Name another class"
        )
    return fitting


@functools.cache
def _derived_adapter(class_name: str) -> Adapter | None:
    """The adapter that is derived for a class of transformers with its default config; None without one."""
    import transformers

    kind = getattr(transformers, class_name, None)
    config = getattr(kind, "config_class", None)
    if kind is None or config is None:
        return None
    try:
        with torch.device("meta"):
            return derive_adapter(kind(config()))
    except Exception:  # default configs of some classes make no model
        return None


def nearest_adapter(model: nn.Module) -> str | None:
    """The class with a listed adapter whose towers `model` has, and whose name is closest to that of its own class."""
    fitting = [name for name, adapter in ADAPTERS.items() if any(_fits(one, model) for one in (adapter, *adapter.others))]
    return next(iter(difflib.get_close_matches(type(model).__name__, fitting, 1, 0.0)), None)


def _fits(adapter: Adapter, model: nn.Module) -> bool:
    """Whether the layers of each tower, and of the vision tower before a connector, are in the model."""
    names = {name for name, _ in model.named_modules()}
    towers = [*adapter.towers, *([] if adapter.vision is None else [adapter.vision])]
    lists = (re.escape(f"{tower.path}.{tower.layers}".strip(".")).replace(r"\*", r"\d+") for tower in towers)
    return all(any(re.fullmatch(layers, name) for name in names) for layers in lists)
