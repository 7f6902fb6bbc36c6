"""Relevancy maps of whole models: a model and an input in, an `Explanation` out."""

from vlattn_fast.interpret._explain import explain
from vlattn_fast.interpret.dataset import Explanations, load_explanations
from vlattn_fast.interpret.explanation import Explanation
from vlattn_fast.interpret.families import FAMILIES, register_family
from vlattn_fast.interpret.records import Family, Tower

__all__ = ["FAMILIES", "Explanation", "Explanations", "Family", "Tower", "explain", "load_explanations", "register_family"]
