"""vlattn_fast: look inside, train on, and change the attention of vision-language models at FlashAttention cost."""

from . import lab, models, nn, reference, scores
from .explain import Explanation, explain
from .ops.attention_map import attention_map
from .ops.attention_statistics import AttentionStatistics, attention_statistics
from .ops.congruence import congruence_loss
from .ops.relevancy_attention import relevancy_attention, relevancy_residual, relevancy_step
from .ops.score_attention import score_attention
from .ops.stacked_cross_attention import damsm_similarity, stacked_cross_attention

__all__ = [
    "AttentionStatistics",
    "Explanation",
    "attention_map",
    "attention_statistics",
    "congruence_loss",
    "damsm_similarity",
    "explain",
    "lab",
    "models",
    "nn",
    "reference",
    "relevancy_attention",
    "relevancy_residual",
    "relevancy_step",
    "score_attention",
    "scores",
    "stacked_cross_attention",
]
