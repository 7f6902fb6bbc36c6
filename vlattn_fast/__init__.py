"""vlattn_fast: look inside, train on, and change the attention of vision-language models at FlashAttention cost."""

from . import reference, scores
from .ops.relevancy_attention import relevancy_attention, relevancy_residual, relevancy_step
from .ops.score_attention import score_attention

__all__ = ["reference", "relevancy_attention", "relevancy_residual", "relevancy_step", "score_attention", "scores"]
