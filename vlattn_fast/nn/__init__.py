"""Modules on the operators."""

from vlattn_fast.nn.capture_attention import AttentionCapture, CapturedLayer, capture_attention
from vlattn_fast.nn.congruence_loss import CongruenceLoss, training_signal_annealing
from vlattn_fast.nn.matching_losses import DamsmLoss, ScanLoss
from vlattn_fast.nn.score_attention import ScoreAttention

__all__ = [
    "AttentionCapture",
    "CapturedLayer",
    "CongruenceLoss",
    "DamsmLoss",
    "ScanLoss",
    "ScoreAttention",
    "capture_attention",
    "training_signal_annealing",
]
