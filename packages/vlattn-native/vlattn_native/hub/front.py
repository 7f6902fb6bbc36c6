"""What the folder's module has: functions on tensors, `flash_attn_forward` for transformers, and `layers` for kernelize."""

from vlattn_native.hub import layers
from vlattn_native.hub.attention import flash_attn_forward, supports_flash_attn
from vlattn_native.hub.functions import (
    attention_map,
    attention_statistics,
    congruence_loss,
    relevancy_attention,
    relevancy_step,
    score_attention,
)

__all__ = [
    "attention_map",
    "attention_statistics",
    "congruence_loss",
    "flash_attn_forward",
    "layers",
    "relevancy_attention",
    "relevancy_step",
    "score_attention",
    "supports_flash_attn",
]
