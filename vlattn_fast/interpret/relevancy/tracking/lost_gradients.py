"""Modules in which a gradient ends, as quantised ones: what goes through them is missing in a map."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def note_lost_gradient(paths: list[str], path: str, inputs: tuple[Any, ...], output: Any) -> None:
    """Appends `path` to `paths` where the module at `path` ends the gradient, and no module inside of it is known to do so."""
    if _ends_gradient(inputs, output) and not any(inner.startswith(f"{path}.") for inner in paths):
        paths.append(path)


def _ends_gradient(inputs: tuple[Any, ...], output: Any) -> bool:
    """Whether a gradient at the output of a module reaches none of the tokens that came in."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return False
    node = output.grad_fn
    if output.requires_grad and (node is None or not node.name().endswith("NotImplemented")):
        return False
    tokens = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad and x.shape[:-1] == output.shape[:-1]]
    return any(node is None or x.grad_fn is not node for x in tokens)  # the same node: a module that hands its input on
