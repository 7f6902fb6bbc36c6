"""From the image tokens of a decoder back into the vision tower behind its connector.

A connector makes an image token of one patch, or of a square of neighbouring ones. The relevancy of an image token is divided
equally among the patches it was made of, so that its sum stays. The backward pass then goes on through the vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.records.connector_maps import Connector
from vlattn_fast.interpret.records.image_grids import image_tokens
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


def check_pictures(config: Any, arguments: Mapping[str, Any]) -> None:
    """ValueError for prompts with videos, or without images, and for image tokens that are made of several layers' patches."""
    name = "vision_feature_layer"
    layers = getattr(config, name, None) if arguments.get(name) is None else arguments[name]
    if isinstance(layers, (list, tuple)) and len(layers) > 1:
        raise ValueError(
            f"through_connector must be off where image tokens are made of several layers' patches; got {name} {list(layers)}"
        )
    if arguments.get("pixel_values_videos") is not None:
        raise ValueError("through_connector must be off for videos; got 'pixel_values_videos'")
    if arguments.get("pixel_values") is None:
        raise ValueError("inputs must contain 'pixel_values' where through_connector is set; got none")


def connect(vision: TowerTrace, language: TowerTrace, connector: Connector, config: Any, arguments: Mapping[str, Any]) -> None:
    """Let the relevancy of `language`'s image tokens go on into `vision`, which runs before it."""

    def below(like: Tensor) -> Tensor:
        leaving = vision.carriers.leaving()
        fed = connector(config, arguments, vision.shape, int(image_tokens(config, arguments).sum())).tokens
        real, places = fed >= 0, image_tokens(config, arguments).flatten().nonzero()[:, 0]
        tokens = fed[real].to(leaving.device)
        shares = 1 / tokens.bincount(minlength=len(places)).clamp(min=1).to(leaving)
        brought = leaving.new_zeros(len(places)).index_add(0, tokens, leaving.flatten()[real.to(leaving.device)]) * shares
        return torch.zeros_like(like).flatten().index_copy(0, places.to(like.device), brought.to(like)).view_as(like)

    language.carriers.below = below
