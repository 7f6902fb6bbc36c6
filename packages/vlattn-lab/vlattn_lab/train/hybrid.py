"""The training of the hybrid captioner and of its transformer, by the losses of `vlattn_lab.train.mapper` for captions.

The vision tower is CLIP's, trained before and frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlattn_lab.clip import load_clip
from vlattn_lab.hybrid import PATCHES, build, caption_truth, config
from vlattn_lab.questions import ask
from vlattn_lab.scenes import sample_scenes
from vlattn_lab.train.clip import noisy
from vlattn_lab.train.fit import check_steps, fit, seeded
from vlattn_lab.train.mapper import TrainingHeads, prompt_losses

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

STEPS = 400
SCENES = 32  # a step, with a caption each
LR = 3e-3
WEIGHTS = {"answer": 1.0, "centre": 5.0, "about": 5.0}


@dataclass(frozen=True)
class Output:
    """At the places of the words: logits (B, T, V), last_hidden_state (B, T, C)."""

    logits: Tensor
    last_hidden_state: Tensor


@dataclass(frozen=True)
class Words:
    """A captioner as `prompt_losses` calls a CLIPMapper, so that padding stands behind the words and states are at hand."""

    model: LlavaForConditionalGeneration

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, image_states: Tensor) -> Output:
        language: Any = self.model.model.language_model
        states = torch.cat([image_states, language.embed_tokens(input_ids)], 1)
        mask = torch.nn.functional.pad(attention_mask.long(), (PATCHES, 0), value=1)
        states = language(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state[:, PATCHES:]
        return Output(self.model.lm_head(states), states)


def train(kind: str, steps: int, *, seed: int = 0, log_every: int = 100) -> LlavaForConditionalGeneration:
    """A captioner "hybrid" or "transformer", trained for `steps` steps of SCENES scenes with AdamW, one learning-rate cycle; eval
    mode. Both kinds see the same scenes and captions."""
    check_steps(steps)
    generator = torch.Generator().manual_seed(seed)
    encoders, _ = load_clip()

    def make() -> tuple[LlavaForConditionalGeneration, TrainingHeads]:
        sizes = config(kind)
        return build(sizes), TrainingHeads(sizes["text"]["hidden_size"])

    model, heads = seeded(seed, make)
    tower: Any = model.model.vision_tower
    tower.load_state_dict(encoders.vision_model.state_dict())
    tower.requires_grad_(False)
    parameters = [parameter for part in (model, heads) for parameter in part.parameters() if parameter.requires_grad]

    fit(parameters, lambda: losses(model, heads, generator), WEIGHTS, steps, learning_rate=LR, log_every=log_every, warmup=0.1)
    return model.eval()


def losses(model: LlavaForConditionalGeneration, heads: TrainingHeads, generator: torch.Generator) -> dict[str, Tensor]:
    """Those of a step, of SCENES scenes that the generator draws."""
    scenes = sample_scenes(torch.zeros(SCENES, dtype=torch.int64), "train", None, generator)
    with torch.no_grad():
        tower: Any = model.model.vision_tower
        patches = tower(pixel_values=noisy(scenes.images, generator)).last_hidden_state[:, 1:]
    asked, samples = ask(scenes, ("caption",), prompts=True, generator=generator)
    states = model.model.multi_modal_projector(patches)
    return prompt_losses(Words(model), heads, asked, states[samples])  # type: ignore[arg-type]


def evaluate(model: LlavaForConditionalGeneration, *, count: int, seed: int = 0) -> dict[str, Any]:
    """`caption_truth` for all captions; the model writes of what pairs of digits it likes."""
    return {"caption_truth": caption_truth(model, count=count, seed=seed)}
