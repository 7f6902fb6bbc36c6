"""A small LXMERT for DigitScenes: transformers' class, with a stream of words and one of regions that attend to one another.

It has the widths of the lab's UNITER, the same inputs under other names, and the same training (`train.lxmert`). No weights are
shipped.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from vlattn_lab.processor import POSITION_DIM, REGION_DIM, VOCABULARY, DigitProcessor
from vlattn_lab.uniter import CONFIG as SIZES
from vlattn_lab.weights import load_model

if TYPE_CHECKING:
    from transformers import LxmertForQuestionAnswering

WEIGHTS = "lxmert_digitscenes.safetensors"
CONFIG = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": SIZES.hidden_size,
    "num_attention_heads": SIZES.num_attention_heads,
    "intermediate_size": SIZES.intermediate_size,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": SIZES.max_position_embeddings,
    "initializer_range": SIZES.initializer_range,
    "l_layers": 1,
    "r_layers": 1,
    "x_layers": 2,
    "visual_feat_dim": REGION_DIM,
    "visual_pos_dim": POSITION_DIM,
    "num_qa_labels": 2,  # the caption is false, or true
}
_NAMES = {"region_features": "visual_feats", "region_positions": "visual_pos", "region_mask": "visual_attention_mask"}


class Matching(Protocol):
    """A model as the measures of `uniter` call it."""

    def __call__(self, **inputs: Tensor) -> Any: ...


def build(config: dict[str, Any]) -> LxmertForQuestionAnswering:
    """An LXMERT of these sizes with weights drawn at random; its two answers are whether a caption is false or true."""
    from transformers import LxmertConfig, LxmertForQuestionAnswering

    return LxmertForQuestionAnswering(LxmertConfig(**config))


def load_lxmert(directory: str | Path) -> tuple[LxmertForQuestionAnswering, DigitProcessor]:
    """The LXMERT whose weights `python -m vlattn_lab.train lxmert --output DIR` wrote, in eval mode, and its processor; `inputs`
    gives the processor's tensors LXMERT's names."""
    return load_model(directory, WEIGHTS, "lxmert", build), DigitProcessor()


def inputs(of_uniter: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keyword arguments of UNITER, as `Scenes.inputs` and the processor give them, under LXMERT's names."""
    return {_NAMES.get(name, name): value for name, value in of_uniter.items()}


def matching(model: LxmertForQuestionAnswering) -> Matching:
    """The model as a function of UNITER's inputs with UNITER's logits, for `matching_accuracy` and `winoground_scores`."""
    return lambda **of_uniter: SimpleNamespace(logits=model(**inputs(of_uniter)).question_answering_score)
