"""The former names of arguments, each with what you write now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.methods.registry import ABLATIONS, METHODS

_LONGEST = 40  # characters of a value that a message repeats


def check_names(function: str, unknown: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """TypeError if one of the `unknown` arguments of a call of `function` had this name before. `given` are all of the
    call."""
    for name in unknown:
        if name in _NOW:
            raise TypeError(f"{function}() has no parameter {name!r}; write {_NOW[name](given[name], given)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST and "\n" not in text else "..."


def _as(name: str) -> Callable[[Any, Mapping[str, Any]], str]:
    return lambda value, given: f"{name}={_shown(value)}"


def _option(option: str, default: str, name: str | None = None) -> Callable[[Any, Mapping[str, Any]], str]:
    """An option of the method's object: of the one that the call names if it has this option, else of `default`."""

    def written(value: Any, given: Mapping[str, Any]) -> str:
        asked = given.get("method")
        kind = type(asked) if isinstance(asked, Method) else {**METHODS, **ABLATIONS}.get(asked if isinstance(asked, str) else "")
        kind = kind if kind is not None and option in kind.option_names() else METHODS[default]
        return f"method=va.methods.{kind.__name__}({name or option}={_shown(value)})"

    return written


def _of_patches(value: Any, given: Mapping[str, Any]) -> str:
    grid, prefix = given.get("grid"), given.get("prefix")
    sizes = [_shown(size) for size in grid] if isinstance(grid, (tuple, list)) else []
    return f"patches=va.PatchGrid({', '.join([*sizes, *([] if prefix is None else [f'prefix={_shown(prefix)}'])])})"


def _of_layers(value: Any, given: Mapping[str, Any]) -> str:
    asked = {"per": "layer", **{name: given[name] for name in ("per", "layers", "heads") if given.get(name) is not None}}
    return f"va.explain_layers(model, inputs, {', '.join(f'{name}={_shown(value)}' for name, value in asked.items())})"


def _of_sinks(value: Any, given: Mapping[str, Any]) -> str:
    return "va.find_sinks(model, inputs)" if value == "report" else _option("sinks", "gradient")(value, given)


def _of_steps(value: Any, given: Mapping[str, Any]) -> str:
    kind = ("n_samples", "smoothgrad") if given.get("method") == "smoothgrad" else ("n_steps", "integrated_gradients")
    return _option(*kind)(value, given)


_NOW: dict[str, Callable[[Any, Mapping[str, Any]], str]] = {
    "read": _as("position"),
    "each": _as("per_token"),
    "tokenizer": _as("processor"),
    "grid": _of_patches,
    "prefix": _of_patches,
    "like": lambda value, given: f"va.register_adapter(type(model), like={_shown(value)}) once before the call",
    "sinks": _of_sinks,
    "per": _of_layers,
    "layers": _of_layers,
    "heads": _of_layers,
    "start_layer": _option("start_layer", "gradient"),
    "weighting": _option("weighting", "weighted"),
    "steps": _of_steps,
    "through_connector": _option("through_connector", "gradient"),
    "freeze": _option("freeze", "gradient"),
    "of": _option("of", "gradient"),
}
