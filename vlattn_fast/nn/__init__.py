"""Modules on the operators."""

from .congruence import CongruenceLoss, training_signal_annealing

__all__ = ["CongruenceLoss", "training_signal_annealing"]
