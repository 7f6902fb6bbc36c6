"""Parts for training loops: terms of the loss, and numbers and figures of attention, for Trainer and Lightning.

In: a model, and what is added to its loss or sent to a logger.
Out: context managers, each with a callback for transformers' Trainer and one for Lightning's.
Imports: interpret.explaining, nn, attach, ops, _ground.
"""

from vlattn_fast.train.attention_log import AttentionLog
from vlattn_fast.train.picture_log import PictureLog
from vlattn_fast.train.terms import CongruenceTerm, RelevancyTerm

__all__ = ["AttentionLog", "CongruenceTerm", "PictureLog", "RelevancyTerm"]
