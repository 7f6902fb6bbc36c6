"""The score `target="similarity"`: of two samples, texts or images, that an encoder without logits embeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.adapters.adapter import POSITION_RULES, Adapter, PositionRule
from vlattn_fast.interpret.adapters.tokens import Text

SIMILARITY = "similarity"
NAMED_POSITIONS: dict[str, PositionRule] = {
    "cls": POSITION_RULES["cls"],
    "last": POSITION_RULES["target"],
    "mean": POSITION_RULES["mean"],
}


@dataclass(frozen=True)
class Similarity:
    """A target: the cosine of each sample's embedding with that of its partner (0 and 1, 2 and 3, ...), which is held constant.

    Args:
        position: the states of the last layer that are the embedding: a name of `NAMED_POSITIONS`, an index, or weights (N,) or
            (B, N).
    """

    model: nn.Module
    adapter: Adapter
    position: Any

    def __call__(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        states = getattr(outputs, "last_hidden_state", None)
        if not isinstance(states, Tensor) or states.ndim != 3:
            raise ValueError(
                f"target='{SIMILARITY}' needs outputs with last_hidden_state (B, N, C); got those of {type(self.model).__name__}"
            )
        if len(states) % 2:
            raise ValueError(f"target='{SIMILARITY}' needs two texts or images, or pairs of them; got {len(states)}")
        embedded = nn.functional.normalize((self._weights(states, inputs).to(states) @ states)[:, 0], dim=-1)
        partner = embedded.detach().unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        return (embedded * partner).sum(-1)

    def _weights(self, states: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """(B, 1, N)"""
        batch, count = states.shape[0], states.shape[1]
        like = states.new_zeros(batch, 1, count)
        if isinstance(self.position, str):
            towers, shape = self.adapter.towers, (batch, count)
            tokens = towers[0].tokens_in(self.model, inputs, shape) if towers else Text(inputs, shape)
            return NAMED_POSITIONS[self.position].weights(tokens, like)
        if isinstance(self.position, int):
            if not -count <= self.position < count:
                raise ValueError(f"position must be from {-count} to {count - 1}; got {self.position}")
            return like.index_fill(2, torch.tensor([self.position % count], device=like.device), 1.0)
        return like + torch.as_tensor(self.position, dtype=like.dtype, device=like.device).reshape(-1, 1, count)
