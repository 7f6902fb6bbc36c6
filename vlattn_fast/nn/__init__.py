"""Modules on the operators."""

from .congruence import CongruenceLoss, training_signal_annealing
from .score_attention import ScoreAttention

__all__ = ["CongruenceLoss", "ScoreAttention", "training_signal_annealing"]
