"""Adapters of models whose towers attend to one another: cross-attention of image and text, encoder-decoders, and policies."""

from __future__ import annotations

from dataclasses import replace

from vlattn_fast.interpret.adapters import actions, image_grids
from vlattn_fast.interpret.adapters.adapter import Adapter, Tower

_TEXT = Tower("text", "lxmert", "encoder.layer", "cls", "bert_text")
_REGIONS = Tower("vision", "lxmert", "encoder.r_layers", "cls", "boxes")
_LXMERT = Adapter((_TEXT, _REGIONS), "class", bimodal=True, logits="question_answering_score")

_QUERIES = Tower("queries", "model.decoder", "layers", "query", "queries")
_FEATURES = Tower("vision", "model.encoder", "layers", "mean", "features")
_DETR = Adapter((_QUERIES, _FEATURES), "query", bimodal=True)

# DaViT attends in windows and between channels, so no relevancy goes through it: the language model's part is explained.
_DECODED = Tower("language", "model.language_model.decoder", "layers", "target", "decoded")
_PROMPT = Tower("prompt", "model.language_model.encoder", "layers", "mean", "image_text", grid=image_grids.after_mean)
_FLORENCE = Adapter((_DECODED, _PROMPT), "token", bimodal=True, within="model.language_model", answers="decoder_input_ids")

# Its layers go on from the text encoder's states, token by token, and attend to the image's, which may have layers there, too.
_MAPPED = Tower("text", "text", "encoder.layers", "eot", "clip_text", further=("layers",))
_PATCHES = Tower("vision", "vision", "encoder.layers", "cls", "patches", prefix=1)
_TO_MAP = replace(_PATCHES, further=("image_layers",))
_MAPPER = Adapter((replace(_MAPPED, position="target", tokens="text"), _TO_MAP), "token", bimodal=True)

_BLIP_DECODER = Tower("text", "text_decoder.bert", "encoder.layer", "target", "text")
_BLIP_VISION = replace(_PATCHES, path="vision_model")

# The steps of the chunk attend to themselves and, layer by layer, to what the language model made of the images and the task.
_CHUNK = Tower("actions", "model.dit", "layers", "gradient", actions.Actions.name)
_PROMPT_OF_POLICY = Tower("language", "model.vlm", "language_model.layers", "mean", "image_text", grid=image_grids.cameras)
_POLICY = Adapter((_CHUNK, _PROMPT_OF_POLICY), actions.Velocity.name, bimodal=True)

# A prompt has one image: several would be keys of one call, while the vision tower has them one by one.
_BETWEEN = Tower("language", "model", "layers", "target", "text", further=("model.gated_cross_attn_layers",))
_IDEFICS = Adapter((_BETWEEN, replace(_PATCHES, path="model.vision_model")), "token", bimodal=True)

LINKED: dict[str, Adapter] = {
    "BlipForConditionalGeneration": Adapter((_BLIP_DECODER, _BLIP_VISION), "token", bimodal=True),
    "CLIPMapper": Adapter((_MAPPED, _TO_MAP), "class", bimodal=True, generating=_MAPPER),
    "LxmertForQuestionAnswering": _LXMERT,
    "LxmertForPreTraining": _LXMERT,
    "LxmertModel": replace(_LXMERT, towers=(replace(_TEXT, path=""), replace(_REGIONS, path=""))),
    "DetrForObjectDetection": _DETR,
    "ConditionalDetrForObjectDetection": replace(_DETR, background=False),
    "Florence2ForConditionalGeneration": _FLORENCE,
    "IdeficsForVisionText2Text": _IDEFICS,
    "PI0ForConditionalGeneration": _POLICY,
}
