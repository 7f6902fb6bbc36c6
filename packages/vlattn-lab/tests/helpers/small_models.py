"""Small random models with their inputs, attention in the precision of its inputs, and rows of `evaluate` by what they are of."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
VISION, TEXT = dict(SIZES, image_size=24, patch_size=6), dict(SIZES, vocab_size=60)


def lively(model: nn.Module) -> nn.Module:
    """Weights large enough that attention is uneven and its gradients count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.6 / parameter.shape[-1] ** 0.5))
            elif parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def clip() -> tuple[nn.Module, dict[str, Tensor]]:
    text = dict(TEXT, max_position_embeddings=12, bos_token_id=57, eos_token_id=58, pad_token_id=0)
    ids = torch.randint(1, 50, (3, 9))
    ids[:, 0], ids[0, 8], ids[1, 5], ids[2, 6] = 57, 58, 58, 58
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 7:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 24, 24)}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)), inputs


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(**dict(VISION, image_size=(24, 30)), num_labels=5)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 24, 30)}


def uniter() -> tuple[nn.Module, dict[str, Tensor]]:
    ids = torch.randint(5, 50, (3, 10))
    mask = torch.ones(3, 10, dtype=torch.bool)
    for row, length in enumerate((10, 6, 8)):
        ids[row, 0], ids[row, length - 1], ids[row, length:], mask[row, length:] = 2, 3, 0, False
    regions = torch.ones(3, 5, dtype=torch.bool)
    regions[0, 3:] = False
    features = {"region_features": torch.randn(3, 5, 10), "region_positions": torch.rand(3, 5, 7), "region_mask": regions}
    config = va.models.UNITERConfig(**dict(TEXT, vocab_size=50), max_position_embeddings=12, region_dim=10, position_dim=7)
    return va.models.UNITER(config), {"input_ids": ids, "attention_mask": mask, **features}


def made(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = {"clip": clip, "vit": vit, "uniter": uniter}[name]()
    return lively(model).eval(), inputs


def rows(evaluation: va.Evaluation) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(row["method"], row["test"], row["part"]): row for row in evaluation.table}


def literal_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention as the papers write it, in the inputs' precision (transformers' eager form takes the softmax in float32)."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2), weights


transformers.AttentionInterface.register("literal", literal_attention)
transformers.AttentionMaskInterface.register("literal", transformers.masking_utils.eager_mask)
