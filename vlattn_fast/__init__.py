"""vlattn_fast: look inside, train on, and change the attention of vision-language models at FlashAttention cost."""

from vlattn_fast import lab, models, nn, reference, scores
from vlattn_fast.interpret import (
    Evaluation,
    Explanation,
    ProbeReport,
    PromptMaps,
    evaluate,
    explain,
    load_explanations,
    probe,
    prompt_maps,
)
from vlattn_fast.ops.attention_map import attention_map
from vlattn_fast.ops.attention_statistics import attention_statistics
from vlattn_fast.ops.congruence_loss import congruence_loss
from vlattn_fast.ops.relevancy_attention import relevancy_attention, relevancy_step
from vlattn_fast.ops.relevancy_residual import relevancy_residual
from vlattn_fast.ops.score_attention import score_attention
from vlattn_fast.ops.stacked_cross_attention import damsm_similarity, stacked_cross_attention
from vlattn_fast.reference.attention_statistics import AttentionStatistics

__all__ = [
    "AttentionStatistics",
    "Evaluation",
    "Explanation",
    "ProbeReport",
    "PromptMaps",
    "attention_map",
    "attention_statistics",
    "congruence_loss",
    "damsm_similarity",
    "evaluate",
    "explain",
    "lab",
    "load_explanations",
    "models",
    "nn",
    "probe",
    "prompt_maps",
    "reference",
    "relevancy_attention",
    "relevancy_residual",
    "relevancy_step",
    "score_attention",
    "scores",
    "stacked_cross_attention",
]
