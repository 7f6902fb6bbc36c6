"""Weights of the lab's models: shipped in vlattn_fast/lab/data, or written to a directory by a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from vlattn_fast._ground.extras import extra

DATA = Path(__file__).parent / "data"


def load_weights(directory: str | Path, name: str, training: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the report's config, the tensors) of the file `name`; ValueError where a directory has none.

    Args:
        training: the training that writes the file, as in `python -m vlattn_fast.lab.train NAME`.
    """
    with extra("lab"):
        from safetensors.torch import load_file

    weights = Path(directory) / name
    for path in (weights, weights.with_suffix(".json")):
        if not path.is_file():
            raise ValueError(
                f"directory must hold {path.name}, written by python -m vlattn_fast.lab.train {training}; got {directory} without"
            )
    return json.loads(weights.with_suffix(".json").read_text())["config"], load_file(weights)
