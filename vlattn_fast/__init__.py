"""vlattn_fast: explain, train on and change the attention of vision-language models, without a map per head."""

# ruff: noqa: F403, F405 -- names of `interpret` are listed in its __all__, and below

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from vlattn_fast import scores
from vlattn_fast._ground.extras import warn_of_two_trees
from vlattn_fast.backends import reference
from vlattn_fast.backends.reference.attention_statistics import AttentionStatistics, LogitStatistics
from vlattn_fast.backends.reference.paged_attention_statistics import PagedAttentionStatistics
from vlattn_fast.ops.attention_divergence import attention_divergence
from vlattn_fast.ops.attention_map import attention_map
from vlattn_fast.ops.attention_reduce import attention_reduce
from vlattn_fast.ops.attention_statistics import attention_statistics
from vlattn_fast.ops.congruence_loss import congruence_loss
from vlattn_fast.ops.indexer_divergence import indexer_divergence
from vlattn_fast.ops.maxsim import maxsim
from vlattn_fast.ops.paged_attention_statistics import paged_attention_statistics
from vlattn_fast.ops.recurrent_step import recurrent_step
from vlattn_fast.ops.relevancy_attention import relevancy_attention
from vlattn_fast.ops.relevancy_residual import relevancy_residual
from vlattn_fast.ops.relevancy_step import relevancy_step
from vlattn_fast.ops.score_attention import score_attention
from vlattn_fast.ops.stacked_cross_attention import damsm_similarity, stacked_cross_attention
from vlattn_fast.ops.token_scores import text_raters, token_scores

if TYPE_CHECKING:
    from vlattn_fast import interpret as interpret  # not in __all__, and yet an attribute of the package
    from vlattn_fast import methods, models, nn, train
    from vlattn_fast.interpret import *

    __version__: str

# imported at first use, since they take long
_PACKAGES = "interpret", "methods", "models", "nn", "train"

__all__ = [
    "Action",
    "AttentionStatistics",
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
    "LogitStatistics",
    "Mlp",
    "PagedAttentionStatistics",
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
    "attention_divergence",
    "attention_map",
    "attention_reduce",
    "attention_statistics",
    "attribute_edges",
    "compare",
    "compare_prompts",
    "congruence_loss",
    "damsm_similarity",
    "evaluate",
    "explain",
    "explain_dataset",
    "explain_layers",
    "find_sinks",
    "indexer_divergence",
    "information_flow",
    "intervene",
    "intervene_each",
    "lens",
    "load_explanations",
    "logit_parts",
    "maxsim",
    "methods",
    "models",
    "nn",
    "paged_attention_statistics",
    "probe",
    "record_heads",
    "record_states",
    "recurrent_step",
    "reference",
    "register_adapter",
    "relevancy_attention",
    "relevancy_residual",
    "relevancy_step",
    "score_attention",
    "score_parts",
    "scores",
    "stacked_cross_attention",
    "text_raters",
    "token_grounding",
    "token_scores",
    "train",
]


warn_of_two_trees()


def __getattr__(name: str) -> Any:
    """Imports a package, or a function or class of `vlattn_fast.interpret`, at its first use; returns the installed version.

    Raises:
        AttributeError: if there is no such name.
    """
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:  # all that is not here is there
        globals()[name] = value = getattr(importlib.import_module(f"{__name__}.interpret"), name)
        return value
    if name == "__version__":
        try:
            return importlib.metadata.version(__name__)
        except importlib.metadata.PackageNotFoundError:  # a tree on sys.path that is not installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the public names."""
    return sorted({*__all__, *_PACKAGES, "__version__"})
