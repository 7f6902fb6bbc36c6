"""Scores of a model's tokens beside its fused attention, by the maps of the same model run eagerly."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import vlattn_fast as va

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def both(kind: Any, config: Any) -> tuple[Any, Any]:
    """The model with fused attention, and the same with maps."""
    torch.manual_seed(0)
    fused = kind._from_config(config, attn_implementation="sdpa").eval()
    eager = kind._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(fused.state_dict())
    return fused, eager


def captured(fused: Any, eager: Any, layer: int, **inputs: Tensor) -> tuple[Any, Tensor]:
    """The capture of a layer of the one, and the map of the other."""
    with torch.no_grad(), va.nn.capture_attention(fused, layers=layer) as seen:
        fused(**inputs)
        return seen, eager(**inputs, output_attentions=True).attentions[layer]


def test_clip_by_its_class_token() -> None:
    config = transformers.CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)
    fused, eager = both(transformers.CLIPVisionModel, config)
    seen, prob = captured(fused, eager, -2, pixel_values=torch.randn(2, 3, 32, 32))
    scores = seen.image.token_scores("visionzip")
    torch.testing.assert_close(scores[:, 1:], prob[:, :, 0, 1:].mean(1))
    dominant = prob[:, :, 0, 1:].sum(1).topk(5, 1).indices + 1
    assert torch.equal(scores.topk(6, 1).indices[:, 1:].sort().values, dominant.sort().values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_with_padding(side: str) -> None:
    """FastV reads the layer in front of the one that gets fewer tokens."""
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=50, initializer_range=0.3)
    fused, eager = both(transformers.LlamaForCausalLM, config)
    ids, real = torch.randint(0, 50, (2, 20)), torch.ones(2, 20, dtype=torch.int64)
    real[0, slice(0, 6) if side == "left" else slice(14, 20)] = 0
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": real}
    seen, prob = captured(fused, eager, 1, **inputs)
    last = torch.tensor([19 if side == "left" else 13, 19])
    want = prob.mean(1)[torch.arange(2), last]
    torch.testing.assert_close(seen.text.token_scores("fastv"), want)
    heavy = (prob * real[:, None, :, None]).sum(2)
    torch.testing.assert_close(seen.text.token_scores("h2o"), heavy)


def test_attention_that_does_more_is_refused() -> None:
    pair = va.nn.QueryKey((torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)))
    with pytest.raises(ValueError, match="token_scores needs a softmax of products"):
        pair.token_scores()
