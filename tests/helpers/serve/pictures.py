"""Scenario: LLaVA with pictures, whose tokens are a group, beside transformers' maps."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch

from tests.helpers.serve.tiny import SIZES, close, engine, sampling, with_tokenizer

PICTURE = 511  # the token that stands for a picture
PARTS = 16  # of a picture of 24 x 24 in patches of 6 x 6


def main() -> None:
    folder, model, processor = llava()
    from PIL import Image

    llm = engine(folder, skip_tokenizer_init=False, limit_mm_per_prompt={"image": 2}, max_num_batched_tokens=64)
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)) for _ in range(2)]
    ask = {"groups": "image|question|answer", "statistics": ["mass", "received"]}
    one = {"prompt": "w20 w21 <image> w22 w23 w24", "multi_modal_data": {"image": pictures[0]}}
    two = {"prompt": "w20 <image> w21 <image> w22", "multi_modal_data": {"image": pictures}}
    for prompt, spans in ((one, [(2, 18)]), (two, [(1, 17), (18, 34)])):
        (output,) = llm.generate([prompt], sampling(5, ask), use_tqdm=False)
        tokens, attention = list(output.outputs[0].token_ids), output.outputs[0].attention
        images = prompt["multi_modal_data"]["image"]
        inputs = processor(images=images, text=prompt["prompt"], return_tensors="pt")
        ids = inputs["input_ids"]
        assert output.prompt_token_ids == ids[0].tolist()
        whole = torch.cat([ids, torch.tensor([tokens[:-1]])], 1)
        with torch.no_grad():
            maps = torch.stack(model(input_ids=whole, pixel_values=inputs["pixel_values"], output_attentions=True).attentions)[
                :, 0
            ]
        rows = maps[:, :, ids.shape[1] - 1 :].permute(2, 0, 1, 3)
        image = torch.zeros(whole.shape[1], dtype=torch.bool)
        for start, end in spans:
            image[start:end] = True
        answer = torch.arange(whole.shape[1]) >= ids.shape[1]
        close(attention.mass, torch.stack([rows[..., group].sum(-1) for group in (image, ~image & ~answer, answer)], -1))
        close(attention.received, maps[..., : ids.shape[1]].sum(2))
        assert attention.mass[..., 0].std() > 0.03


def llava() -> tuple[str, Any, Any]:
    import transformers

    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 6,
        "projection_dim": 32,
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**SIZES),
        image_token_index=PICTURE,
        image_seq_length=PARTS,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data.mul_(6)
    folder = with_tokenizer(tempfile.mkdtemp(), picture=PICTURE)
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=6,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").float().eval()
    return folder, model, processor


if __name__ == "__main__":
    main()
