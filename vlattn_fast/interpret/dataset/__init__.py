"""Explanations of many inputs: `vlattn explain --dataset`, and `load_explanations`."""

from vlattn_fast.interpret.dataset.stored import Explanations, load_explanations

__all__ = ["Explanations", "load_explanations"]
