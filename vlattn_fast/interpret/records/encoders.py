"""Records of encoders: images, texts, and the dual encoders that match them."""

from __future__ import annotations

from dataclasses import replace

from vlattn_fast.interpret.records.record import Family, Tower, alone

_CLIP_VISION = Tower("vision", "vision_model", "encoder.layers", "cls", "patches", branch="self_attn", prefix=1)
_CLIP_TEXT = Tower("text", "text_model", "encoder.layers", "eot", "clip_text", branch="self_attn")
_SIGLIP_VISION = replace(_CLIP_VISION, readout="pool", prefix=0, pooling="head.attention")
_SIGLIP_TEXT = replace(_CLIP_TEXT, readout="last", tokens="text")
_VIT = Tower("vision", "vit", "layers", "cls", "patches", branch="attention", prefix=1)
_DINOV2 = Tower("vision", "dinov2", "encoder.layer", "cls", "patches", branch="layer_scale1", prefix=1)
_DEIT = replace(_VIT, path="deit", prefix=2)  # CLS and the distillation token
_DINOV3 = Tower("vision", "", "model.layer", "cls", "patches", branch="layer_scale1", prefix=1)
_BERT = Tower("text", "bert", "encoder.layer", "cls", "bert_text", branch="attention.output.dense", stream="attention")
_UNITER = Tower("joint", "uniter", "encoder.layer", "cls", "regions", branch="attention.output.dense", stream="attention")
_ROBERTA = replace(_BERT, path="roberta")
_DISTILBERT = replace(_BERT, path="distilbert", layers="transformer.layer", branch="attention", stream="")
_MPNET = replace(_BERT, path="mpnet", branch="attention.attn.o")
_ALBERT = replace(_BERT, path="albert", layers="encoder.albert_layer_groups.*.albert_layers", branch="attention.dense")
_BERT_BESIDE_CLIP = replace(_BERT, path="text_model")
_SIGLIP2_VISION = replace(_SIGLIP_VISION, tokens="packed_patches")

# One stream of text and image
_VILT = Tower("joint", "vilt", "encoder.layer", "cls", "text_patches", branch="attention.output.dense", prefix=1)
_VISUAL_BERT = replace(_UNITER, path="visual_bert")
_LAYOUTLMV3 = replace(_BERT, name="joint", path="layoutlmv3", tokens="text_patches", prefix=1)
_FLAVA = Tower("joint", "multimodal_model", "encoder.layer", "cls", "patches_text", branch="attention.output.dense", prefix=2)
_GIT = Tower("language", "git.encoder", "layer", "target", "patches_text", "attention.output.dense", "attention", prefix=1)

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
    "DeiTModel": alone(_DEIT),
    "DeiTForImageClassification": Family((_DEIT,), "class"),
    "DeiTForImageClassificationWithTeacher": Family((_DEIT,), "class"),
    "DINOv3ViTModel": Family((_DINOV3,), "class"),
    "RobertaModel": alone(_ROBERTA),
    "RobertaForSequenceClassification": Family((_ROBERTA,), "class"),
    "XLMRobertaModel": alone(_ROBERTA),
    "XLMRobertaForSequenceClassification": Family((_ROBERTA,), "class"),
    "DistilBertModel": alone(_DISTILBERT),
    "DistilBertForSequenceClassification": Family((_DISTILBERT,), "class"),
    "ElectraModel": alone(_BERT),
    "ElectraForSequenceClassification": Family((replace(_BERT, path="electra"),), "class"),
    "AlbertModel": alone(_ALBERT),
    "AlbertForSequenceClassification": Family((_ALBERT,), "class"),
    "MPNetModel": alone(_MPNET),
    "MPNetForSequenceClassification": Family((_MPNET,), "class"),
    "ChineseCLIPModel": Family((_CLIP_VISION, _BERT_BESIDE_CLIP), "pair"),
    "AltCLIPModel": Family(
        (_CLIP_VISION, replace(_BERT_BESIDE_CLIP, path="text_model.roberta", layers="encoder.layers")), "pair"
    ),
    "MetaClip2Model": Family((_CLIP_VISION, _CLIP_TEXT), "pair"),
    "Siglip2Model": Family((_SIGLIP2_VISION, _SIGLIP_TEXT), "pair"),
    "Siglip2VisionModel": alone(_SIGLIP2_VISION),
    "CLIPSegModel": Family((_CLIP_VISION, _CLIP_TEXT), "pair"),
    "OwlViTModel": Family((_CLIP_VISION, _CLIP_TEXT), "pair"),
    "AlignModel": Family((_BERT_BESIDE_CLIP,), "pair"),  # its images go through convolutions
    "AlignTextModel": alone(_BERT),
    "BlipModel": Family((_CLIP_VISION, _BERT_BESIDE_CLIP), "pair"),
    "ViltModel": alone(_VILT),
    "ViltForQuestionAnswering": Family((_VILT,), "class"),
    "ViltForImageAndTextRetrieval": Family((_VILT,), "class"),
    "VisualBertModel": alone(_VISUAL_BERT),
    "VisualBertForVisualReasoning": Family((_VISUAL_BERT,), "class"),
    "VisualBertForQuestionAnswering": Family((replace(_VISUAL_BERT, readout="before_sep"),), "class"),
    "LayoutLMv3Model": alone(_LAYOUTLMV3),
    "LayoutLMv3ForSequenceClassification": Family((_LAYOUTLMV3,), "class"),
    "FlavaModel": Family((_FLAVA,), "class"),
    "GitForCausalLM": Family((_GIT,), "token"),
    "UNITER": Family((_UNITER,), "class"),
}
