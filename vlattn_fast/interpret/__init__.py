"""Relevancy maps of whole models: `explain`, `compare`, `evaluate`, `probe`, `prompt_maps`.

In: a model and an input.
Out: an `Explanation`, `SideBySide`, `Evaluation`, `ProbeReport` or `PromptMaps`.
Imports: interpret.
"""

from vlattn_fast.interpret.dataset import Explanations, load_explanations
from vlattn_fast.interpret.evaluating.evaluate import evaluate
from vlattn_fast.interpret.evaluating.evaluation import Evaluation
from vlattn_fast.interpret.explaining.explain import explain
from vlattn_fast.interpret.probing import ProbeReport, probe
from vlattn_fast.interpret.prompting.prompt_maps import PromptMaps, prompt_maps
from vlattn_fast.interpret.records.record import Family, Tower
from vlattn_fast.interpret.records.registry import FAMILIES, register_family
from vlattn_fast.interpret.result.by_layer import LayerExplanation
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.side_by_side import SideBySide, compare

__all__ = [
    "FAMILIES",
    "Evaluation",
    "Explanation",
    "Explanations",
    "Family",
    "LayerExplanation",
    "ProbeReport",
    "PromptMaps",
    "SideBySide",
    "Tower",
    "compare",
    "evaluate",
    "explain",
    "load_explanations",
    "probe",
    "prompt_maps",
    "register_family",
]
