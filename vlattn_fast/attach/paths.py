"""Where a module lies: the lists of layers on its path."""

from __future__ import annotations

import re

_INDEX = re.compile(r"^(?:(.*)\.)?(\d+)(?:\.|$)")


def in_layers(path: str) -> bool:
    """Whether a module's path goes through a list of layers."""
    return _INDEX.match(path) is not None


def layers_of(path: str) -> str:
    """The innermost list of layers on a module's path: "encoder.layers" for "encoder.layers.3.attn". Else the path itself."""
    return split_path(path)[0]


def split_path(path: str) -> tuple[str, int]:
    numbered = _INDEX.match(path)
    return (path, 0) if numbered is None else (numbered[1] or "", int(numbered[2]))
