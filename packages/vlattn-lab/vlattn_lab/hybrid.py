"""Two small captioners of DigitScenes that differ in their language model alone: one is a hybrid of three layers with a gated
delta rule and one with attention, the other has attention in all four.

Both are transformers' LLaVA: the vision tower of the trained CLIP, a projector, and the text model of Qwen3.5. A caption stands
behind the image's tokens in one sequence.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlattn_lab.clip import CONFIG, PATCH
from vlattn_lab.questions import are_true, digit_prompts
from vlattn_lab.scenes import CANVAS
from vlattn_lab.texts import END, MOST_WORDS, PAD, START, TEXT_VOCABULARY, SceneProcessor
from vlattn_lab.weights import load_model

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

WEIGHTS = {"hybrid": "hybrid_digitscenes.safetensors", "transformer": "transformer_digitscenes.safetensors"}
PATCHES = (CANVAS // PATCH) ** 2
IMAGE = len(TEXT_VOCABULARY)  # the id that stands for a patch
WORDS = 5  # of a caption
# A layer with the delta rule has more parameters than one with attention. Four more units in each MLP of the transformer make up
# for it but for 12 parameters.
_LAYERS: dict[str, dict[str, Any]] = {
    "hybrid": {"layer_types": [*["linear_attention"] * 3, "full_attention"], "intermediate_size": 128},
    "transformer": {"layer_types": ["full_attention"] * 4, "intermediate_size": 132},
}
_HEADS = {
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
}


def config(kind: str) -> dict[str, Any]:
    """The sizes of a captioner, "hybrid" or "transformer"."""
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    sizes = {"vocab_size": IMAGE + 1, "hidden_size": 64, "num_hidden_layers": 4, "max_position_embeddings": PATCHES + MOST_WORDS}
    return {"text": {**sizes, **_HEADS, **_LAYERS[kind], **ids}, "vision": CONFIG["vision_config"]}


def build(config: dict[str, Any]) -> LlavaForConditionalGeneration:
    """A captioner of these sizes with weights drawn at random."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen3_5TextConfig

    text, vision = Qwen3_5TextConfig(**config["text"]), CLIPVisionConfig(**config["vision"])
    options: dict[str, Any] = {"image_token_id": IMAGE, "vision_feature_layer": -1, "tie_word_embeddings": False}
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, **options))
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            _remember(parameter)
    return model


@torch.no_grad()
def _remember(bias: Tensor) -> None:
    """First values of the gates as the authors of gated delta networks have them: softplus(bias) is from 0.001 to 0.1. With
    transformers' biases of 1 most heads forget a patch long before the words come."""
    steps = torch.exp(math.log(0.001) + torch.rand_like(bias) * math.log(100))
    bias.copy_(steps.expm1().log())


def load(kind: str, directory: str | Path) -> LlavaForConditionalGeneration:
    """The captioner whose weights `python -m vlattn_lab.train hybrid` (or transformer) left in a folder, in eval mode."""
    return load_model(directory, WEIGHTS[kind], kind, build)


def inputs(images: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """images (B, 32, 32) and words (B, T) with [START] -> the model's keyword arguments."""
    ids = torch.cat([torch.full((len(ids), PATCHES), IMAGE), ids], 1)
    return {"pixel_values": SceneProcessor().pixels(images), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def captions(model: LlavaForConditionalGeneration, images: Tensor) -> Tensor:
    """ids (B, 1 + WORDS): [START] and the words that the model holds for likeliest, one after the other."""
    ids = torch.full((len(images), 1), START)
    for _ in range(WORDS):
        logits = model(**inputs(images, ids), use_cache=False, logits_to_keep=1).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def caption_truth(model: LlavaForConditionalGeneration, *, count: int, seed: int) -> dict[str, float]:
    """Share of captions of `count` test scenes that are true of the scene, and of the scene before ("other image")."""
    asked = digit_prompts(count, seed=seed, kind="caption")
    said = SceneProcessor().decode(torch.cat([captions(model, part)[:, 1:] for part in asked.images.split(100)]))
    before = replace(asked, digits=asked.digits.roll(1, 0), boxes=asked.boxes.roll(1, 0))
    return {name: round(sum(are_true(of, said)) / count, 4) for name, of in (("true", asked), ("other image", before))}
