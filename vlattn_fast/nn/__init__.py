"""Modules on the operators."""

from vlattn_fast.nn.congruence_loss import CongruenceLoss, training_signal_annealing
from vlattn_fast.nn.score_attention import ScoreAttention

__all__ = ["CongruenceLoss", "ScoreAttention", "training_signal_annealing"]
