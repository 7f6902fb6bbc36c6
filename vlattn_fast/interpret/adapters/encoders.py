"""Adapters of encoders: images, texts, and the dual encoders that match them."""

from __future__ import annotations

from dataclasses import replace

from vlattn_fast.interpret.adapters.adapter import Adapter, Tower

_CLIP_VISION = Tower("vision", "vision_model", "encoder.layers", "cls", "patches", prefix=1)
_CLIP_TEXT = Tower("text", "text_model", "encoder.layers", "eot", "clip_text")
_SIGLIP_VISION = replace(_CLIP_VISION, position="pool", prefix=0, pooling="head.attention")
_SIGLIP_TEXT = replace(_CLIP_TEXT, position="last", tokens="text")
_VIT = Tower("vision", "vit", "layers", "cls", "patches", prefix=1)
_DINOV2 = Tower("vision", "dinov2", "encoder.layer", "cls", "patches", prefix=1)
_DINOV2_CLASSIFIED = replace(_DINOV2, position="cls_and_patch_mean")  # its head takes both, concatenated
_DEIT = replace(_VIT, path="deit", prefix=2)  # CLS and the distillation token
_DINOV3 = Tower("vision", "", "model.layer", "cls", "patches", prefix=1)
_BERT = Tower("text", "bert", "encoder.layer", "cls", "bert_text")
_UNITER = Tower("joint", "uniter", "encoder.layer", "cls", "regions")
_ROBERTA = replace(_BERT, path="roberta")
_DISTILBERT = replace(_BERT, path="distilbert", layers="transformer.layer")
_MPNET = replace(_BERT, path="mpnet")
_ALBERT = replace(_BERT, path="albert", layers="encoder.albert_layer_groups.*.albert_layers")
_BERT_WITH_CLIP = replace(_BERT, path="text_model")
_ALT_TEXT = replace(_BERT, path="text_model.roberta", layers="encoder.layers")
_SIGLIP2_VISION = replace(_SIGLIP_VISION, tokens="packed_patches")

# One stream of text and image
_VILT = Tower("joint", "vilt", "encoder.layer", "cls", "text_patches", prefix=1)
_VISUAL_BERT = replace(_UNITER, path="visual_bert")
_LAYOUTLMV3 = replace(_BERT, name="joint", path="layoutlmv3", tokens="text_patches", prefix=1)
_FLAVA = Tower("joint", "multimodal_model", "encoder.layer", "cls", "patches_text", prefix=2)
_GIT = Tower("language", "git.encoder", "layer", "target", "patches_text", prefix=1)

# The stem of a class, its tower, and the endings of the classes with a head; <stem>Model is only the tower.
_ONE_TOWER = [
    ("CLIPVision", _CLIP_VISION, "ModelWithProjection"),
    ("CLIPText", _CLIP_TEXT, "ModelWithProjection"),
    ("SiglipVision", _SIGLIP_VISION, ""),
    ("SiglipText", _SIGLIP_TEXT, ""),
    ("Siglip2Vision", _SIGLIP2_VISION, ""),
    ("AlignText", _BERT, ""),
    ("ViT", _VIT, "ForImageClassification"),
    ("DeiT", _DEIT, "ForImageClassification ForImageClassificationWithTeacher"),
    ("Dinov2", _DINOV2, ""),
    ("Dinov2WithRegisters", _DINOV2, ""),
    ("Bert", _BERT, "ForSequenceClassification ForNextSentencePrediction"),
    ("Roberta", _ROBERTA, "ForSequenceClassification"),
    ("XLMRoberta", _ROBERTA, "ForSequenceClassification"),
    ("DistilBert", _DISTILBERT, "ForSequenceClassification"),
    ("Electra", replace(_BERT, path="electra"), "ForSequenceClassification"),
    ("Albert", _ALBERT, "ForSequenceClassification"),
    ("MPNet", _MPNET, "ForSequenceClassification"),
    ("Vilt", _VILT, "ForQuestionAnswering ForImageAndTextRetrieval"),
    ("VisualBert", _VISUAL_BERT, "ForVisualReasoning"),
    ("LayoutLMv3", _LAYOUTLMV3, "ForSequenceClassification"),
]
_CLIPS = ("CLIPModel", "MetaClip2Model", "CLIPSegModel", "OwlViTModel")

ENCODERS: dict[str, Adapter] = {
    **{f"{stem}Model": Adapter((replace(tower, path=""),), "class") for stem, tower, _ in _ONE_TOWER},
    **{f"{stem}{head}": Adapter((tower,), "class") for stem, tower, heads in _ONE_TOWER for head in heads.split()},
    "Dinov2ForImageClassification": Adapter((_DINOV2_CLASSIFIED,), "class"),
    "Dinov2WithRegistersForImageClassification": Adapter((replace(_DINOV2_CLASSIFIED, path="dinov2_with_registers"),), "class"),
    "CLIPForImageClassification": Adapter((replace(_CLIP_VISION, position="patch_mean"),), "class"),
    "SiglipForImageClassification": Adapter((replace(_SIGLIP_VISION, position="mean", pooling=None),), "class"),
    "DINOv3ViTModel": Adapter((_DINOV3,), "class"),
    "VisualBertForQuestionAnswering": Adapter((replace(_VISUAL_BERT, position="before_sep"),), "class"),
    "FlavaModel": Adapter((_FLAVA,), "class"),
    "UNITER": Adapter((_UNITER,), "class"),
    "GitForCausalLM": Adapter((_GIT,), "token"),
    **dict.fromkeys(_CLIPS, Adapter((_CLIP_VISION, _CLIP_TEXT), "pair")),
    **dict.fromkeys(("ChineseCLIPModel", "BlipModel"), Adapter((_CLIP_VISION, _BERT_WITH_CLIP), "pair")),
    "AltCLIPModel": Adapter((_CLIP_VISION, _ALT_TEXT), "pair"),
    "SiglipModel": Adapter((_SIGLIP_VISION, _SIGLIP_TEXT), "pair"),
    "Siglip2Model": Adapter((_SIGLIP2_VISION, _SIGLIP_TEXT), "pair"),
    "AlignModel": Adapter((_BERT_WITH_CLIP,), "pair"),  # its images go through convolutions
}
