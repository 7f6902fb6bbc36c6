"""Models of transformers as published, with random weights, at sizes that a workload names; no weights are downloaded.

B batch, H heads, N tokens, D head_dim, C width. Random weights are uniform by fan-in, so that attention is uneven as in a trained
model. transformers is imported when a model is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlattn_fast._ground.extras import extra
from vlattn_fast.benchmarks._measure import Tensors
from vlattn_fast.benchmarks._workloads import Sizes

TARGET = 7  # the class or token that is explained


class Whole(NamedTuple):
    """A model of a workload, and the way its score is read."""

    make: Callable[[Sizes], nn.Module]
    inputs: Callable[[Sizes], Tensors]
    score: Callable[[Any], Tensor]  # the model's outputs -> the scores (B,)
    explained: Mapping[str, Any]  # the arguments with which va.explain takes the same score
    options: Mapping[str, Any]  # further arguments of the model
    embeddings: Sequence[str]  # paths of the modules at which gradients end
    read: Callable[[Sizes], dict[str, tuple[int, int]]]  # by tower, the tokens N of its (N, N) maps, and the token that is read
    eager: Any  # the implementation that stores whole maps, by name or by config; None = the model always stores them


def lively(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model at rest, with its weights drawn."""
    model = model.to(device, dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            width = (3 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-width, width, generator=generator)
    return model


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _words(*shape: int) -> Tensor:
    return torch.randint(3, 80, shape, generator=_generator())


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator())


def _transformers() -> Any:
    with extra("explain"):
        import transformers
    return transformers


def _tower(width: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """A tower's part of a config."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, inner, layers, heads), strict=True), **more)


# --- CLIP ---


def _clip_side(sizes: Sizes) -> int:
    return math.isqrt(sizes["N"] - 1)


def _clip(sizes: Sizes) -> nn.Module:
    t, h, special = _transformers(), sizes["H"], sizes["vocabulary"]
    vision = _tower(sizes["C"], 4 * sizes["C"], sizes["layers"], h)
    h = max(1, h * 3 // 4)
    c = h * sizes["D"]
    text = _tower(c, 4 * c, sizes["layers"] // 2, h, bos_token_id=special - 2, eos_token_id=special - 1, pad_token_id=0)
    config = t.CLIPConfig(
        vision_config=dict(vision, image_size=14 * _clip_side(sizes), patch_size=14, projection_dim=c),
        text_config=dict(text, vocab_size=special, max_position_embeddings=sizes["L"], projection_dim=c),
        projection_dim=c,
    )
    return t.CLIPModel(config)


def _clip_inputs(sizes: Sizes) -> Tensors:
    side, ids = 14 * _clip_side(sizes), _words(sizes["B"], sizes["L"])
    ids[:, -1] = sizes["vocabulary"] - 1
    return {"input_ids": ids, "pixel_values": _pixels(sizes["B"], 3, side, side)}


CLIP = Whole(
    _clip,
    _clip_inputs,
    lambda outputs: outputs.logits_per_image.diagonal(),
    {},
    {},
    ("vision_model.embeddings", "text_model.embeddings"),
    lambda sizes: {"vision": (_clip_side(sizes) ** 2 + 1, 0), "text": (sizes["L"], sizes["L"] - 1)},
    "eager",
)

# --- decoders ---

_DECODES = {"use_cache": False, "logits_to_keep": 1}


def _next_token(outputs: Any) -> Tensor:
    return outputs.logits[:, -1, TARGET]


def _last(sizes: Sizes) -> dict[str, tuple[int, int]]:
    return {"language": (sizes["N"], sizes["N"] - 1)}


def _side(sizes: Sizes) -> int:
    """Image tokens along a side: nine elevenths of a prompt are one square image."""
    return math.isqrt(sizes["N"] * 9 // 11)


def _prompt(sizes: Sizes, first: int) -> Tensor:
    """Words around the image tokens, which begin at `first`."""
    ids = _words(sizes["B"], sizes["N"])
    ids[:, first : first + _side(sizes) ** 2] = sizes["vocabulary"] - 1
    return ids


def _llava(sizes: Sizes) -> nn.Module:
    t, c, vocabulary = _transformers(), sizes["C"], sizes["vocabulary"]
    vision = _tower(c // 4, c, sizes["vision_layers"], max(1, c // 256), image_size=14 * _side(sizes), patch_size=14)
    text = _tower(c, c * 43 // 16, sizes["layers"], sizes["H"], head_dim=sizes["D"], vocab_size=vocabulary, pad_token_id=0)
    towers = {"vision_config": t.CLIPVisionConfig(**vision), "text_config": t.LlamaConfig(**text)}
    return t.LlavaForConditionalGeneration(t.LlavaConfig(**towers, image_token_index=vocabulary - 1, vision_feature_layer=-1))


def _llava_inputs(sizes: Sizes) -> Tensors:
    side = 14 * _side(sizes)
    ids = _prompt(sizes, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _pixels(sizes["B"], 3, side, side)}


_TEXT_EMBEDDINGS = ("model.language_model.embed_tokens",)
_EAGER_TEXT = {"text_config": "eager"}  # the vision tower is not explained
LLAVA = Whole(_llava, _llava_inputs, _next_token, {"target": TARGET}, _DECODES, _TEXT_EMBEDDINGS, _last, _EAGER_TEXT)


def _qwen(sizes: Sizes) -> nn.Module:
    t, c, size, special = _transformers(), sizes["C"], sizes["D"], sizes["vocabulary"]
    third = 3 * size // 16
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [size // 2 - 2 * third, third, third]}
    more = dict(vocab_size=special, rope_parameters=rope, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    text = _tower(c, c * 43 // 8, sizes["layers"], sizes["H"], num_key_value_heads=max(1, sizes["H"] // 8), **more)
    width = max(16, c * 5 // 128 * 16)
    depth = sizes["vision_layers"]
    vision: dict[str, Any] = dict(
        depth=depth, hidden_size=width, intermediate_size=width * 171 // 64, num_heads=max(1, width // 80)
    )
    vision |= dict(out_hidden_size=c, fullatt_block_indexes=[depth - 1])
    names = ("vision_start_token_id", "vision_end_token_id", "video_token_id", "image_token_id")
    ids = {name: special - 4 + number for number, name in enumerate(names)}
    return t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


def _qwen_inputs(sizes: Sizes) -> Tensors:
    ids, side = _prompt(sizes, 2), _side(sizes)
    ids[:, 1], ids[:, 2 + side**2] = sizes["vocabulary"] - 4, sizes["vocabulary"] - 3
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == sizes["vocabulary"] - 1).int(),
        "pixel_values": _pixels(len(ids) * (2 * side) ** 2, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]] * len(ids)),
    }


QWEN = Whole(_qwen, _qwen_inputs, _next_token, {"target": TARGET}, _DECODES, _TEXT_EMBEDDINGS, _last, _EAGER_TEXT)

# --- LXMERT ---


def _lxmert(sizes: Sizes) -> nn.Module:
    t, c, half = _transformers(), sizes["C"], (sizes["layers"] + 1) // 2
    layers = {"l_layers": sizes["layers"], "x_layers": half, "r_layers": half}
    shape = {"hidden_size": c, "intermediate_size": 4 * c, "num_attention_heads": sizes["H"], "vocab_size": sizes["vocabulary"]}
    return t.LxmertForQuestionAnswering(t.LxmertConfig(**shape, **layers))


def _lxmert_inputs(sizes: Sizes) -> Tensors:
    boxes = _pixels(sizes["B"], sizes["V"], 2048)
    places = torch.rand(sizes["B"], sizes["V"], 4, generator=_generator())
    return {"input_ids": _words(sizes["B"], sizes["L"]), "visual_feats": boxes, "visual_pos": places}


LXMERT = Whole(
    _lxmert,
    _lxmert_inputs,
    lambda outputs: outputs.question_answering_score[:, TARGET],
    {"target": TARGET},
    {},
    ("lxmert.embeddings", "lxmert.encoder.visn_fc"),
    lambda sizes: {"text": (sizes["L"], 0), "vision": (sizes["V"], 0)},
    None,
)
