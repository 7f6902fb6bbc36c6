"""A sink that is planted in a trained model: one patch takes a given share of every query's attention, and gives it nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_fast.models import CLIPMapper

TOKEN = 1  # the patch in the upper left corner; [CLS] is token 0
SHARES = (0.0, 0.3, 0.6, 0.9)  # of each query's attention
VALUE = 0.05  # of the patch's values are left


class Planted(nn.Module):
    """Attention to states among which token TOKEN is the sink.

    Its logit is the log-sum-exp of the others plus log(share / (1 - share)), so it takes `share` of each row in each head. The
    output is divided by 1 - share: so the other tokens give what they gave without the sink.
    """

    def __init__(self, attention: nn.Module, names: tuple[str, str, str, str], heads: int, share: float, pair: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (attention.get_submodule(name) for name in names)
        self.heads, self.share, self.pair = heads, share, pair

    def forward(self, hidden_states: Tensor, context: Tensor | None = None, **_: Any) -> Any:
        states = hidden_states if context is None else context
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, x in ((self.query, hidden_states), (self.key, states), (self.value, states))
        )
        with torch.no_grad():  # maps of 65 tokens are small
            logits = query @ key.mT * query.shape[-1] ** -0.5
            others = logits.index_fill(-1, torch.tensor([TOKEN]), -torch.inf).logsumexp(-1)
            mask = torch.zeros_like(logits)
            mask[..., TOKEN] = others + math.log(self.share / (1 - self.share)) - logits[..., TOKEN]
        factor = torch.ones(value.shape[2], 1).index_fill(0, torch.tensor([TOKEN]), VALUE)
        out = F.scaled_dot_product_attention(query, key, value * factor, mask) / (1 - self.share)
        out = self.output(out.transpose(1, 2).flatten(2))
        return (out, None) if self.pair else out


def plant(model: nn.Module, share: float) -> None:
    """Plants the sink in every attention to patches: of the vision encoder, and of the text to the picture."""
    vision: Any = model.vision if isinstance(model, CLIPMapper) else model.vision_model
    for layer in vision.encoder.layers:
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        layer.self_attn = Planted(layer.self_attn, names, layer.self_attn.num_heads, share, pair=True)
    for layer in model.layers if isinstance(model, CLIPMapper) else ():
        cross: Any = layer.cross_attention
        layer.cross_attention = Planted(cross, ("query", "key", "value", "output"), cross.num_heads, share, pair=False)
