"""Layers without a state, whose forward `kernels.kernelize` puts in place of that of a layer with the same arguments."""

from __future__ import annotations

from torch import Tensor, nn

from vlattn_native.hub import functions


class ScoreAttention(nn.Module):
    """Replaces a layer that calls torch's scaled_dot_product_attention."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        return functions.score_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)[0]


class RelevancyAttention(nn.Module):
    """The same with a carrier, whose gradient is the relevancy of the layer's input."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        carrier: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        return functions.relevancy_attention(query, key, value, carrier, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
