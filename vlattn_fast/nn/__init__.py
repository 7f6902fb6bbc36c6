"""Layers and losses on the operators, and on relevancy.

In: tensors, or a model whose attention is replaced or captured.
Out: modules and context managers.
Imports: interpret.explaining, interpret.relevancy, attach, ops, backends.reference, scores, _ground.
"""

from vlattn_fast.nn.attention_divergence import AttentionDivergence
from vlattn_fast.nn.capture_attention import AttentionCapture, capture_attention
from vlattn_fast.nn.capture_relevancy import RelevancyCapture, capture_relevancy
from vlattn_fast.nn.captured_layer import CapturedLayer, QueryKey
from vlattn_fast.nn.congruence_loss import CongruenceLoss, training_signal_annealing
from vlattn_fast.nn.flex_adapter import flex_adapter
from vlattn_fast.nn.matching_losses import DamsmLoss, ScanLoss
from vlattn_fast.nn.qk_clip import QKClip
from vlattn_fast.nn.register_attention import RegisteredAttention, register_attention
from vlattn_fast.nn.relevancy_loss import RelevancyLoss
from vlattn_fast.nn.replace_attention import ReplacedAttention, replace_attention
from vlattn_fast.nn.score_attention import ScoreAttention

__all__ = [
    "AttentionCapture",
    "AttentionDivergence",
    "CapturedLayer",
    "CongruenceLoss",
    "DamsmLoss",
    "QKClip",
    "QueryKey",
    "RegisteredAttention",
    "RelevancyCapture",
    "RelevancyLoss",
    "ReplacedAttention",
    "ScanLoss",
    "ScoreAttention",
    "capture_attention",
    "capture_relevancy",
    "flex_adapter",
    "register_attention",
    "replace_attention",
    "training_signal_annealing",
]
