"""Relevancy maps of whole models, and edits of their attention: `explain`, `evaluate`, `probe`, `intervene`,
`token_grounding`.

In: a model and an input.
Out: an `Explanation`, `LayerExplanation`, `SideBySide`, `Evaluation`, `ProbeReport`, `EdgeTable`, `FlowCurve`
    or `TokenGrounding`; a context with edits.
Imports: interpret.
"""

from vlattn_fast.interpret.adapters.actions import Action
from vlattn_fast.interpret.adapters.adapter import Adapter, Tower
from vlattn_fast.interpret.adapters.patch_grid import PatchGrid
from vlattn_fast.interpret.adapters.registry import ADAPTERS, register_adapter
from vlattn_fast.interpret.adapters.sound import Seconds
from vlattn_fast.interpret.dataset import Explanations, explain_dataset, load_explanations
from vlattn_fast.interpret.evaluating.evaluate import evaluate
from vlattn_fast.interpret.evaluating.evaluation import Evaluation
from vlattn_fast.interpret.evaluating.grounding_table import GroundingDetector, TokenGrounding
from vlattn_fast.interpret.evaluating.token_grounding import token_grounding
from vlattn_fast.interpret.explaining.explain import explain, explain_layers, find_sinks
from vlattn_fast.interpret.intervening.compare_prompts import PatchEffect, PromptComparison, compare_prompts
from vlattn_fast.interpret.intervening.edges import Edge, EdgeTable
from vlattn_fast.interpret.intervening.edits import Knockout, Mlp, Patch, Residual, ScaleHeads, Steer
from vlattn_fast.interpret.intervening.effects import attribute_edges, intervene_each
from vlattn_fast.interpret.intervening.flow import FlowCurve, information_flow
from vlattn_fast.interpret.intervening.intervene import intervene, record_heads, record_states
from vlattn_fast.interpret.intervening.lens import Lens, lens
from vlattn_fast.interpret.intervening.logit_parts import LogitParts, logit_parts
from vlattn_fast.interpret.intervening.records import HeadRecord, StateRecord
from vlattn_fast.interpret.intervening.score_parts import ScoreParts, score_parts
from vlattn_fast.interpret.probing import ProbeReport, probe
from vlattn_fast.interpret.result.by_layer import LayerExplanation
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.side_by_side import SideBySide, compare

__all__ = [
    "ADAPTERS",
    "Action",
    "Adapter",
    "Edge",
    "EdgeTable",
    "Evaluation",
    "Explanation",
    "Explanations",
    "FlowCurve",
    "GroundingDetector",
    "HeadRecord",
    "Knockout",
    "LayerExplanation",
    "Lens",
    "LogitParts",
    "Mlp",
    "Patch",
    "PatchEffect",
    "PatchGrid",
    "ProbeReport",
    "PromptComparison",
    "Residual",
    "ScaleHeads",
    "ScoreParts",
    "Seconds",
    "SideBySide",
    "StateRecord",
    "Steer",
    "TokenGrounding",
    "Tower",
    "attribute_edges",
    "compare",
    "compare_prompts",
    "evaluate",
    "explain",
    "explain_dataset",
    "explain_layers",
    "find_sinks",
    "information_flow",
    "intervene",
    "intervene_each",
    "lens",
    "load_explanations",
    "logit_parts",
    "probe",
    "record_heads",
    "record_states",
    "register_adapter",
    "score_parts",
    "token_grounding",
]
