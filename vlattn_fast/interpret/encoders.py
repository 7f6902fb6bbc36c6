"""Records of encoders: images, texts, and the dual encoders that match them."""

from __future__ import annotations

from dataclasses import replace

from vlattn_fast.interpret.records import Family, Tower, alone

_CLIP_VISION = Tower("vision", "vision_model", "encoder.layers", "cls", "patches", branch="self_attn", prefix=1)
_CLIP_TEXT = Tower("text", "text_model", "encoder.layers", "eot", "clip_text", branch="self_attn")
_SIGLIP_VISION = replace(_CLIP_VISION, readout="pool", prefix=0, pooling="head.attention")
_SIGLIP_TEXT = replace(_CLIP_TEXT, readout="last", tokens="text")
_VIT = Tower("vision", "vit", "layers", "cls", "patches", branch="attention", prefix=1)
_DINOV2 = Tower("vision", "dinov2", "encoder.layer", "cls", "patches", branch="layer_scale1", prefix=1)
_BERT = Tower("text", "bert", "encoder.layer", "cls", "bert_text", branch="attention.output.dense", stream="attention")
_UNITER = Tower("joint", "uniter", "encoder.layer", "cls", "regions", branch="attention.output.dense", stream="attention")

ENCODERS: dict[str, Family] = {
    "CLIPModel": Family((_CLIP_VISION, _CLIP_TEXT), "pair"),
    "CLIPVisionModel": alone(_CLIP_VISION),
    "CLIPVisionModelWithProjection": Family((_CLIP_VISION,), "class"),
    "CLIPTextModel": alone(_CLIP_TEXT),
    "CLIPTextModelWithProjection": Family((_CLIP_TEXT,), "class"),
    "CLIPForImageClassification": Family((replace(_CLIP_VISION, readout="patch_mean"),), "class"),
    "SiglipModel": Family((_SIGLIP_VISION, _SIGLIP_TEXT), "pair"),
    "SiglipVisionModel": alone(_SIGLIP_VISION),
    "SiglipTextModel": alone(_SIGLIP_TEXT),
    "SiglipForImageClassification": Family((replace(_SIGLIP_VISION, readout="mean", pooling=None),), "class"),
    "ViTModel": alone(_VIT),
    "ViTForImageClassification": Family((_VIT,), "class"),
    "Dinov2Model": alone(_DINOV2),
    "Dinov2ForImageClassification": Family((_DINOV2,), "class"),
    "Dinov2WithRegistersModel": alone(_DINOV2),
    "Dinov2WithRegistersForImageClassification": Family((replace(_DINOV2, path="dinov2_with_registers"),), "class"),
    "BertModel": alone(_BERT),
    "BertForSequenceClassification": Family((_BERT,), "class"),
    "BertForNextSentencePrediction": Family((_BERT,), "class"),
    "UNITER": Family((_UNITER,), "class"),
}
