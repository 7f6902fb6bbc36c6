"""Scenario: BLIP-2 with a picture, whose tokens are a group, beside transformers' maps."""

from __future__ import annotations

from tests.helpers.serve.tiny import close, engine, sampling, with_tokenizer

# isort: split
import tempfile
from typing import Any

import numpy as np
import torch

PICTURE, PARTS = 511, 4  # the token that stands for a part of a picture, and their number


def main() -> None:
    from PIL import Image

    folder, model, processor = blip()
    llm = engine(folder, skip_tokenizer_init=False, max_num_batched_tokens=64)
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    ask = {"groups": "image|question|answer", "statistics": ["mass", "received"]}
    prompt = {"prompt": "w20 w21 w22 w23 w24", "multi_modal_data": {"image": picture}}
    (output,) = llm.generate([prompt], sampling(5, ask), use_tqdm=False)
    tokens, attention = list(output.outputs[0].token_ids), output.outputs[0].attention
    ids = torch.tensor([output.prompt_token_ids])
    assert ids[0, :PARTS].tolist() == [PICTURE] * PARTS and (ids[0, PARTS:] != PICTURE).all()
    whole = torch.cat([ids, torch.tensor([tokens[:-1]])], 1)
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = model(pixel_values=pixels, input_ids=whole, output_attentions=True).language_model_outputs
    maps = torch.stack(outputs.attentions)[:, 0]
    rows = maps[:, :, ids.shape[1] - 1 :].permute(2, 0, 1, 3)
    parts = (0, PARTS), (PARTS, ids.shape[1]), (ids.shape[1], None)
    close(attention.mass, torch.stack([rows[..., start:end].sum(-1) for start, end in parts], -1))
    close(attention.received, maps[..., : ids.shape[1]].sum(2))
    assert attention.mass[..., 0].std() > 0.03


def blip() -> tuple[str, Any, Any]:
    import transformers

    torch.manual_seed(0)
    few = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**few, image_size=24, patch_size=6).to_dict(),
        qformer_config=transformers.Blip2QFormerConfig(**few, vocab_size=64, encoder_hidden_size=32).to_dict(),
        text_config=transformers.OPTConfig(
            vocab_size=512, hidden_size=128, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=128
        ).to_dict(),
        num_query_tokens=PARTS,
        image_token_index=PICTURE,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data.mul_(6)
        if name == "language_projection.weight":
            weight.data.mul_(20)
    folder = with_tokenizer(tempfile.mkdtemp(), picture=PICTURE)
    model.save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 24, "width": 24})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.Blip2Processor(images, tokenizer, num_query_tokens=PARTS)
    processor.save_pretrained(folder)
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").float().eval()
    return folder, model, processor


if __name__ == "__main__":
    main()
