"""The formulas as the papers write them, with whole maps and plain autograd, on any device and floating dtype.

Use them to check a result, or to look up what an operator computes.

In: the arguments of a public call.
Out: its result.
Imports: scores, _ground.
"""

from vlattn_fast.backends.reference.attention_divergence import attention_divergence
from vlattn_fast.backends.reference.attention_map import attention_map
from vlattn_fast.backends.reference.attention_statistics import attention_statistics
from vlattn_fast.backends.reference.congruence_loss import congruence_loss
from vlattn_fast.backends.reference.indexer_divergence import indexer_divergence
from vlattn_fast.backends.reference.maxsim import maxsim
from vlattn_fast.backends.reference.paged_attention_statistics import paged_attention_statistics
from vlattn_fast.backends.reference.recurrent_step import recurrent_map, recurrent_step
from vlattn_fast.backends.reference.relevancy_attention import relevancy_attention, relevancy_step
from vlattn_fast.backends.reference.relevancy_residual import relevancy_residual
from vlattn_fast.backends.reference.score_attention import score_attention
from vlattn_fast.backends.reference.stacked_cross_attention import damsm_similarity, stacked_cross_attention
from vlattn_fast.backends.reference.token_scores import text_raters, token_scores

__all__ = [
    "attention_divergence",
    "attention_map",
    "attention_statistics",
    "congruence_loss",
    "damsm_similarity",
    "indexer_divergence",
    "maxsim",
    "paged_attention_statistics",
    "recurrent_map",
    "recurrent_step",
    "relevancy_attention",
    "relevancy_residual",
    "relevancy_step",
    "score_attention",
    "stacked_cross_attention",
    "text_raters",
    "token_scores",
]
