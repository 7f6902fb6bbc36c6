"""The small CLIP model of DigitScenes: its sizes, its shipped weights, how it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlattn_lab.processor import DIGIT_WORDS, RELATIONS
from vlattn_lab.questions import Questions
from vlattn_lab.scenes import CANVAS, CLEARANCE, NEGATIVES, Scenes, digit_scenes
from vlattn_lab.texts import END, MOST_WORDS, PAD, START, TEXT_VOCABULARY, SceneProcessor
from vlattn_lab.weights import DATA, load_model

if TYPE_CHECKING:
    from transformers import CLIPModel

WEIGHTS = "clip_digitscenes.safetensors"
PATCH = 4  # pixels, both sides: 8 x 8 patches, and a digit covers at least one of them
_TOWER = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "hidden_act": "gelu"}
_IDS = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
_TEXT = {"vocab_size": len(TEXT_VOCABULARY), "max_position_embeddings": MOST_WORDS, **_IDS}
_VISION = {"num_channels": 1, "image_size": CANVAS, "patch_size": PATCH}
CONFIG: dict[str, Any] = {
    "projection_dim": 64,
    "text_config": {**_TOWER, "num_hidden_layers": 2, **_TEXT},
    "vision_config": {**_TOWER, "num_hidden_layers": 3, **_VISION},
}
RETRIEVED = 100  # captions in a group of retrieval


def build_clip(config: dict[str, Any]) -> CLIPModel:
    """A CLIPModel of these sizes with weights drawn at random."""
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**config))


def load_clip(directory: str | Path = DATA) -> tuple[CLIPModel, SceneProcessor]:
    """The CLIP model (transformers' CLIPModel) trained on DigitScenes, in eval mode, and its processor. A directory holds the
    weights that `python -m vlattn_lab.train clip --output DIR` writes; the default holds the shipped weights."""
    return load_model(directory, WEIGHTS, "clip", build_clip), SceneProcessor()


def words_of(scenes: Scenes) -> Tensor:
    """int64 (B, 3): first digit, relation and second digit of each caption."""
    said = [caption.split() for caption in scenes.captions]
    words = [[DIGIT_WORDS.index(one[0]), RELATIONS.index(" ".join(one[1:3])), DIGIT_WORDS.index(one[4])] for one in said]
    return torch.tensor(words, dtype=torch.int64)


def caption_ids(words: Tensor) -> Tensor:
    """words (T, 3) -> input_ids (T, 7) of the captions that say them."""
    ids = {word: i for i, word in enumerate(TEXT_VOCABULARY)}
    digits = torch.tensor([ids[word] for word in DIGIT_WORDS])
    relations = torch.tensor([[ids[word] for word in relation.split()] for relation in RELATIONS])
    start, article, end = (torch.full((len(words), 1), i) for i in (START, ids["a"], END))
    return torch.cat([start, digits[words[:, :1]], relations[words[:, 1]], article, digits[words[:, 2:]], end], dim=1)


def caption_pixels(scenes: Scenes | Questions, words: Tensor) -> Tensor:
    """(B, T): by how many pixels each of T captions holds of each of B scenes; -inf where a digit it names is not there."""
    corners = torch.full((len(scenes), 10, 2), torch.nan)
    corners = corners.scatter(1, scenes.digits[..., None].expand(-1, -1, 2), scenes.boxes[..., :2])
    right, down = (corners[:, words[:, 2]] - corners[:, words[:, 0]]).unbind(-1)
    along = torch.stack([right, -right, down, -down], dim=-1)
    pixels = along.gather(2, words[None, :, 1, None].expand(len(scenes), -1, 1)).squeeze(2)
    return pixels.nan_to_num(nan=-torch.inf)


def embed_captions(model: CLIPModel, words: Tensor) -> Tensor:
    """Unit vectors (T, D) of captions that say words (T, 3)."""
    text = model.text_projection(model.text_model(input_ids=caption_ids(words)).pooler_output)
    return torch.nn.functional.normalize(text, dim=-1)


def embeddings(model: CLIPModel, scenes: Scenes, words: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (B, D) of the images and (T, D) of captions; the cosine of the two is their product."""
    image = model.visual_projection(model.vision_model(pixel_values=scenes.images[:, None]).pooler_output)
    return torch.nn.functional.normalize(image, dim=-1), embed_captions(model, words)


@torch.no_grad()
def retrieval(model: CLIPModel, *, count: int = 1000, seed: int = 0) -> dict[str, float]:
    """Test scenes and their captions are compared in groups of RETRIEVED. Counted is how often the most similar caption is the
    image's own caption, and how often this caption is true of the image (several may be); the same from captions to images."""
    hits: dict[str, list[Tensor]] = {"image_to_text": [], "image_to_true_text": [], "text_to_image": [], "text_to_true_image": []}
    for group in range(-(-count // RETRIEVED)):
        scenes = digit_scenes(min(RETRIEVED, count - group * RETRIEVED), seed=seed + group)
        words, each = words_of(scenes), torch.arange(len(scenes))
        image, text = embeddings(model, scenes, words)
        true = caption_pixels(scenes, words) >= CLEARANCE
        found_text, found_image = (image @ text.T).argmax(1), (text @ image.T).argmax(1)
        hits["image_to_text"].append((words[found_text] == words).all(1))  # any caption with the same words counts
        hits["image_to_true_text"].append(true[each, found_text])
        hits["text_to_image"].append(found_image == each)
        hits["text_to_true_image"].append(true[found_image, each])
    return {name: round(float(torch.cat(hit).double().mean()), 4) for name, hit in hits.items()}


@torch.no_grad()
def caption_accuracy(model: CLIPModel, *, count: int = 1000, seed: int = 0, pairs: str | None = None) -> dict[str, float]:
    """Share of test images that are closer to their true caption than to a false caption, for each kind of wrong caption;
    arguments as in `digit_scenes`. Chance is 1/2."""
    true = digit_scenes(count, seed=seed, pairs=pairs)
    image, said = embeddings(model, true, words_of(true))
    accuracy = {}
    for negative in NEGATIVES:
        false = digit_scenes(count, seed=seed, pairs=pairs, negative=negative)
        unsaid = embed_captions(model, words_of(false))
        accuracy[negative] = round(float(((image * (said - unsaid)).sum(1) > 0).double().mean()), 4)
    return accuracy
