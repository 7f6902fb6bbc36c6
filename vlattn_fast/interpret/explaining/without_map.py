"""Why an explanation has no map, though the model was given a picture or a sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlattn_fast.interpret.adapters.image_grids import only_picture
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace

_PICTURES = ("pixel_values", "pixel_values_videos", "image")
_SOUNDS = ("input_features", "input_values", "audio_values")  # spectrograms and waves
_SUMMARIES = ("qformer", "perceiver", "resampler")  # in names of classes whose learned queries look at a whole picture
_INSTEAD = "explain a model whose image tokens are patches, such as LLaVA"


def why_no_map(
    model: nn.Module, towers: Sequence[TowerTrace], inputs: Mapping[str, Any], fields: Mapping[str, Any]
) -> str | None:
    """A sentence for an explanation with these `fields`; None where it has a map or boxes, or the model saw words only."""
    if any(fields.get(name) is not None for name in ("image", "tower_images", "boxes")):
        return None
    names = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    if names.intersection(_SOUNDS):
        heard = towers[-1].name  # the encoder, to which the others attend; else the tower that has all tokens
        return (
            "the model hears a sound, whose tokens are stretches of time and have no place in a picture: read the numbers in "
            f"explanation.relevancy[{heard!r}], which stand in the order of time"
        )
    if not names.intersection(_PICTURES) and only_picture(inputs) is None:
        return None
    tower = next((tower for tower in towers if tower.entry is not None and tower.entry.kind.image_ids), None)
    if tower is None:
        which = ", ".join(tower.name for tower in towers if tower.entry is None) or ", ".join(t.name for t in towers)
        return (
            f"nothing says which tokens of {which} are patches of the picture, and how these lie: explain with "
            "patches=va.PatchGrid(rows, columns, prefix=0)"
        )
    parts = (type(part).__name__ for part in model.modules())
    queries = next((name for name in parts if any(word in name.lower() for word in _SUMMARIES)), None)
    if queries is not None:
        why = f"the image tokens are the learned queries of {queries}, each of which looks at the whole picture"
    else:
        why = "neither the config nor the inputs say where the image tokens lie in the picture"
    return f"{why}: their numbers are in explanation.relevancy[{tower.name!r}]. For a map, {_INSTEAD}"
