"""The attention core of the package's models, under the interface of Hugging Face's attention functions."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, None]:
    """Computes torch's SDPA with the signature of Hugging Face's attention functions.

    query (B, H, N, D), key, value (B, H, M, D); attention_mask None or bool, broadcastable to (B, H, N, M), True = may be
    attended; without a mask, module.is_causal says whether later keys are masked. Returns (out (B, N, H, D), None).
    """
    causal = bool(module.is_causal) and attention_mask is None
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, causal, scale=scaling)
    return out.transpose(1, 2), None


class ProjectedAttention(nn.Module):
    """Computes multi-head attention before its output projection. Its core, `attention_function`, can be replaced."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, is_causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout, self.is_causal = dropout, is_causal
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.attention_function: AttentionFunction = sdpa_attention

    def forward(self, hidden_states: Tensor, context: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden_states (B, N, C), context (B, M, C), attention_mask None or bool (B, 1, N or 1, M) -> (B, N, C)."""
        query, key, value = (
            linear(states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for linear, states in ((self.query, hidden_states), (self.key, context), (self.value, context))
        )
        dropout = self.dropout if self.training else 0.0
        out, _ = self.attention_function(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout)
        return out.flatten(2)
