"""Records of decoders: language models, and those that see images."""

from __future__ import annotations

from dataclasses import replace

from vlattn_fast.interpret.records import connector_maps, image_grids
from vlattn_fast.interpret.records.record import Family, Tower

_QUERIES = Tower("language", "model.language_model", "layers", "target", "image_text", branch="self_attn")
_DECODER = replace(_QUERIES, grid=image_grids.patches)
_QWEN = replace(_QUERIES, grid=image_grids.merged_frames)
_TILES = replace(_QUERIES, path="model.text_model", grid=image_grids.labelled)
_GEMMA = replace(_QUERIES, grid=image_grids.pooled, branch="post_attention_layernorm")
_LLAMA4 = replace(_QUERIES, path="language_model.model", grid=image_grids.separated)
_OVER_OPT = replace(_QUERIES, path="language_model.model.decoder")
_OVER_LLAMA = replace(_QUERIES, path="language_model.model")
_Q_FORMER = Family((_OVER_OPT,), "token", others=(Family((_OVER_LLAMA,), "token"),))  # over Flan-T5 towers are found
_STATES = Tower("vision", "model.vision_model", "", "mean", "image", branch="", grid=image_grids.tiled_states)

_TEXT = replace(_QUERIES, path="model", tokens="text")
_LLAMAS = ("Llama", "Llama4", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi")
_GEMMA_TEXT = replace(_TEXT, branch="post_attention_layernorm")
_GPT2 = replace(_TEXT, path="transformer", layers="h", branch="attn")
_OPT = replace(_TEXT, path="model.decoder")
_NEOX = replace(_TEXT, path="gpt_neox", branch="attention")

_VISION = Tower("vision", "model.vision_tower", "encoder.layers", "mean", "patches")
_PACKED = replace(_VISION, path="model.visual", layers="blocks")
_PIXTRAL = replace(_VISION, layers="transformer.layers")
_QWEN_VL = Family((_QWEN,), "token", vision=_PACKED, connector=connector_maps.packed)
_IDEFICS3 = Family((_TILES,), "token", vision=replace(_VISION, path="model.vision_model"))
_ANYRES = Family((replace(_QUERIES, grid=image_grids.anyres),), "token", vision=_VISION, connector=connector_maps.tiles)

DECODERS: dict[str, Family] = {
    # One token a patch, or a square of patches.
    "LlavaForConditionalGeneration": Family(
        (_DECODER,),
        "token",
        vision=_VISION,
        others=(
            Family((_DECODER,), "token", vision=_PIXTRAL, connector=connector_maps.in_one_row),
            Family((_DECODER,), "token"),  # over another vision tower
        ),
    ),
    "PaliGemmaForConditionalGeneration": Family((_DECODER,), "token", vision=_VISION, answer_type=1),  # 0 = sees both ways
    "Gemma3ForConditionalGeneration": Family((_GEMMA,), "token", vision=_VISION, answer_type=0),  # 1 = image
    "Mistral3ForConditionalGeneration": Family(
        (replace(_QUERIES, grid=image_grids.merged_sizes),), "token", vision=_PIXTRAL, connector=connector_maps.in_one_row
    ),
    "Qwen2VLForConditionalGeneration": _QWEN_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN_VL,
    "Qwen3VLForConditionalGeneration": Family((_QWEN,), "token"),  # its image tokens are made of several layers' patches
    # Tiles and thumbnails.
    "Idefics3ForConditionalGeneration": _IDEFICS3,
    "SmolVLMForConditionalGeneration": _IDEFICS3,
    "InternVLForConditionalGeneration": Family(
        (replace(_QUERIES, grid=image_grids.shuffled),), "token", vision=replace(_VISION, layers="encoder.layer")
    ),
    "LlavaNextForConditionalGeneration": _ANYRES,
    "LlavaOnevisionForConditionalGeneration": _ANYRES,
    "Llama4ForConditionalGeneration": Family((_LLAMA4,), "token"),
    # Queries that look at the whole image.
    "Blip2ForConditionalGeneration": _Q_FORMER,
    "InstructBlipForConditionalGeneration": _Q_FORMER,
    "Idefics2ForConditionalGeneration": Family((replace(_QUERIES, path="model.text_model"),), "token"),
    # Cross-attention to what the vision tower gives.
    "MllamaForConditionalGeneration": Family((replace(_QUERIES, tokens="image_text"), _STATES), "token", bimodal=True),
    # Text alone.
    **{f"{stem}ForCausalLM": Family((_TEXT,), "token") for stem in _LLAMAS},
    **{f"{stem}ForCausalLM": Family((_GEMMA_TEXT,), "token") for stem in ("Gemma2", "Gemma3")},
    "GPT2LMHeadModel": Family((_GPT2,), "token"),
    "OPTForCausalLM": Family((_OPT,), "token"),
    "GPTNeoXForCausalLM": Family((_NEOX,), "token"),
}
