"""Relevancy maps of whole models: a model and an input in, an `Explanation` out."""

from vlattn_fast.interpret._explain import explain
from vlattn_fast.interpret.dataset import Explanations, load_explanations
from vlattn_fast.interpret.evaluation import Evaluation, evaluate
from vlattn_fast.interpret.explanation import Explanation
from vlattn_fast.interpret.families import FAMILIES, register_family
from vlattn_fast.interpret.probing import ProbeReport, probe
from vlattn_fast.interpret.prompts import PromptMaps, prompt_maps
from vlattn_fast.interpret.records import Family, Tower

__all__ = [
    "FAMILIES",
    "Evaluation",
    "Explanation",
    "Explanations",
    "Family",
    "ProbeReport",
    "PromptMaps",
    "Tower",
    "evaluate",
    "explain",
    "load_explanations",
    "probe",
    "prompt_maps",
    "register_family",
]
