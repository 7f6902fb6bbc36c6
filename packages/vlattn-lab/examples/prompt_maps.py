"""Look into a diffusion model of diffusers: which part of the picture attended to which word of the prompt.

The pipeline has random weights and needs no download. For maps with a meaning, load
`StableDiffusionPipeline.from_pretrained(...)`. The calls stay the same.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

import vlattn_lab as lab

# A small Stable Diffusion: tokenizer of whole words, text encoder, UNet with cross-attention on two grids, decoder.
torch.manual_seed(0)
words = ["<s>", "</s>", "a", "and", "cat", "dog", "mat", "on", "red", "two"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
text_config = CLIPTextConfig(
    vocab_size=len(words),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
    bos_token_id=0,
    eos_token_id=1,
)
pipe = StableDiffusionPipeline(
    tokenizer=PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=16
    ),
    text_encoder=CLIPTextModel(text_config).eval(),
    unet=UNet2DConditionModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval(),
    vae=AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16),
        norm_num_groups=8,
    ).eval(),
    scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
)
pipe.set_progress_bar_config(disable=True)

# Two prompts, four steps with classifier-free guidance, pictures that are not square.
prompts = ["a cat on a red mat", "two dog and a cat"]
with lab.prompt_maps(pipe) as maps:
    pictures = pipe(prompts, height=64, width=96, num_inference_steps=4).images

print("Stable Diffusion, random weights")
print(f"  {maps.steps} steps, attention on the grids {maps.grids}")
cat = maps.word_map("cat", prompts, pipe.tokenizer)
for prompt, heat in zip(prompts, cat, strict=True):
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    print(f"  'cat' in {prompt!r}: {tuple(heat.shape)}, most at row {row}, column {column}")

# `explanation.plot(pictures)` draws every word over its picture; `explanation.save_html(...)` writes a page to point at words in.
explanation = maps.explanation(prompts, pipe.tokenizer)
for text, heats in zip(explanation.tokens, explanation.image, strict=True):
    shares = {word: f"{heat.mean():.1%}" for word, heat in zip(text, heats, strict=False)}
    print(f"  share of the picture's attention: {shares}")
