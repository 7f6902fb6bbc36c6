"""Adapters of decoders that take images, for which a derived adapter would lack a grid or the connector."""

from __future__ import annotations

from dataclasses import replace

from vlattn_fast.interpret.adapters import connector_maps, image_grids
from vlattn_fast.interpret.adapters.adapter import Adapter, Tower

_QUERIES = Tower("language", "model.language_model", "layers", "target", "image_text")
_DECODER = replace(_QUERIES, grid=image_grids.patches)
_QWEN = replace(_QUERIES, grid=image_grids.merged_frames)
_TILES = replace(_QUERIES, path="model.text_model", grid=image_grids.labelled)
_GEMMA = replace(_QUERIES, grid=image_grids.pooled)
_LLAMA4 = replace(_QUERIES, path="language_model.model", grid=image_grids.separated)
_STATES = Tower("vision", "model.vision_model", "", "mean", "image", grid=image_grids.tiled_states)

_VISION = Tower("vision", "model.vision_tower", "encoder.layers", "mean", "patches")
_PACKED = replace(_VISION, path="model.visual", layers="blocks")
_PIXTRAL = replace(_VISION, layers="transformer.layers")
_QWEN_VL = Adapter((_QWEN,), "token", vision=_PACKED, connector=connector_maps.packed)
_IDEFICS3 = Adapter((_TILES,), "token", vision=replace(_VISION, path="model.vision_model"))
_ANYRES = Adapter((replace(_QUERIES, grid=image_grids.anyres),), "token", vision=_VISION, connector=connector_maps.tiles)

DECODERS: dict[str, Adapter] = {
    # One token a patch, or a square of patches.
    "LlavaForConditionalGeneration": Adapter(
        (_DECODER,),
        "token",
        vision=_VISION,
        others=(
            Adapter((_DECODER,), "token", vision=_PIXTRAL, connector=connector_maps.in_one_row),
            Adapter((_DECODER,), "token"),  # over another vision tower
        ),
    ),
    "PaliGemmaForConditionalGeneration": Adapter(
        (_DECODER,), "token", vision=_VISION, answer_type=1
    ),  # 0 = attends in both directions
    "Gemma3ForConditionalGeneration": Adapter((_GEMMA,), "token", vision=_VISION, answer_type=0),  # 1 = image
    "Mistral3ForConditionalGeneration": Adapter(
        (replace(_QUERIES, grid=image_grids.merged_sizes),), "token", vision=_PIXTRAL, connector=connector_maps.in_one_row
    ),
    "Qwen2VLForConditionalGeneration": _QWEN_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN_VL,
    # Tiles and thumbnails.
    "Idefics3ForConditionalGeneration": _IDEFICS3,
    "SmolVLMForConditionalGeneration": _IDEFICS3,
    "InternVLForConditionalGeneration": Adapter(
        (replace(_QUERIES, grid=image_grids.shuffled),), "token", vision=replace(_VISION, layers="encoder.layer")
    ),
    "LlavaNextForConditionalGeneration": _ANYRES,
    "LlavaOnevisionForConditionalGeneration": _ANYRES,
    "Llama4ForConditionalGeneration": Adapter((_LLAMA4,), "token"),
    # Cross-attention to what the vision tower gives.
    "MllamaForConditionalGeneration": Adapter((replace(_QUERIES, tokens="image_text"), _STATES), "token", bimodal=True),
    # It would be derived. Models of a user's own borrow it.
    "LlamaForCausalLM": Adapter((replace(_QUERIES, path="model", tokens="text"),), "token"),
}
