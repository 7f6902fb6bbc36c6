"""Scenario: LLaVA or Qwen2-VL, as the command line says, with two pictures, as in `pictures`; vLLM imports torchvision."""

from __future__ import annotations

from tests.helpers.pictures import PICTURE, VISION, Model, check, saved_model
from tests.helpers.tiny import SIZES, with_tokenizer

# isort: split
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

VIDEO = 510
PROMPT = "w20 w21 <image> w22 <image> w23 w24"


def main() -> None:
    model = {"llava": llava, "qwen2_vl": qwen2_vl}[sys.argv[1]]()
    for ranks in (1, 2):
        check(model, ranks)


def llava() -> Model:
    """Two pictures, with words before, between and behind them."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=24, patch_size=6).to_dict(),
        text_config=transformers.LlamaConfig(**SIZES).to_dict(),
        image_token_index=PICTURE,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.multi_modal_projector.linear_2.weight.data.mul_(20)
    folder = with_tokenizer(tempfile.mkdtemp(), image=PICTURE)
    size = {"height": 24, "width": 24}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"patch_size": 6, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = transformers.LlavaProcessor(images, tokenizer, **options)
    one = saved_model(model, processor, folder, PROMPT, ((24, 24), (30, 20)), 32)
    path = Path(folder, "model.safetensors")
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})  # the names of published checkpoints, which the engine expects
    return one


def qwen2_vl() -> Model:
    import transformers

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 128, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        vision_config=vision, text_config={**SIZES, "rope_parameters": rope}, image_token_id=PICTURE, video_token_id=VIDEO
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    model.model.visual.merger.mlp[2].weight.data.mul_(20)
    folder = with_tokenizer(tempfile.mkdtemp(), image=PICTURE, video=VIDEO)
    options = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 2048}}
    images = transformers.Qwen2VLImageProcessor(**options)
    videos = transformers.Qwen2VLVideoProcessor(**options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.Qwen2VLProcessor(images, tokenizer, videos)
    return saved_model(model, processor, folder, PROMPT, ((24, 24), (40, 24)), 9 + 15)


if __name__ == "__main__":
    main()
