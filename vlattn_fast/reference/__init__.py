"""The formulas as the papers write them: whole maps, plain autograd, any device and floating dtype. The truth of the tests."""

from .relevancy_attention import relevancy_attention, relevancy_step
from .score_attention import score_attention

__all__ = ["relevancy_attention", "relevancy_step", "score_attention"]
