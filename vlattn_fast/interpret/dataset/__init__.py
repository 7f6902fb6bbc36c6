"""Explanations of many inputs: `explain_dataset`, which `vlattn explain --dataset` calls, and `load_explanations`.

In: a model and a file or mappings of inputs, or a folder of explanations.
Out: a folder of explanations, or a lazy sequence of them.
Imports: interpret.explaining, interpret.relevancy, interpret.adapters, interpret.result, attach, _ground.
"""

from vlattn_fast.interpret.dataset.explain_all import explain_dataset
from vlattn_fast.interpret.dataset.stored import Explanations, load_explanations

__all__ = ["Explanations", "explain_dataset", "load_explanations"]
