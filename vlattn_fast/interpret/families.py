"""Records of model families: what `explain` must know about a model.

A record says where a tower's layers are, which module in a layer calls the attention function, which row of the relevancy
matrix is read, and what the tokens stand for. Nothing is guessed: `explain` refuses a model without a record, and
`register_family` adds one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

ReadOut = Literal["cls", "eot", "last", "target", "mean", "patch_mean", "pool"]
Tokens = Literal["patches", "clip_text", "text", "bert_text", "image_text", "regions"]


@dataclass(frozen=True)
class Tower:
    """One stack of self-attention layers whose relevancy is read.

    Args:
        name: key in `Explanation.relevancy`.
        path: the tower inside the model, "" for the model itself.
        layers: the list of layers inside the tower, first to last.
        readout: the row that is read: "cls" token 0, "eot" CLIP's pooled end-of-text token, "last" the last position,
            "target" the position that predicts the target token, "mean" and "patch_mean" 1/N over all (patch) tokens,
            "pool" the row of an attention-pooling head.
        tokens: what the tokens are, which decides how `.image` and `.text` are cut: "patches", "clip_text", "text" (special
            ids as the config names them), "bert_text", "image_text" (text with image tokens in it) or "regions" (BERT's text,
            then image regions).
        branch: inside a layer, the module whose output o is added to the residual stream, y = x + o (method "weighted").
        stream: inside a layer, the module whose first input is x; "" for the layer itself.
        prefix: tokens before the patches (CLS); register tokens are added from the config.
        pooling: inside the tower, the module that calls the attention of the pooling head (readout "pool").
    """

    name: str
    path: str
    layers: str
    readout: ReadOut
    tokens: Tokens
    branch: str
    stream: str = ""
    prefix: int = 0
    pooling: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (("readout", ReadOut), ("tokens", Tokens)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {get_args(kind)}; got {getattr(self, name)!r}")
        if (self.readout == "pool") != (self.pooling is not None):
            raise ValueError(f"pooling must be set if, and only if, readout is 'pool'; got {self.pooling!r} and {self.readout!r}")


@dataclass(frozen=True)
class Family:
    """Towers of a model class and how its default score is read from the outputs.

    Args:
        towers: the towers to explain; other parts of the model run as they are.
        score: "pair" = `logits_per_image[i, i]`, "class" = `logits[b, class]`, "token" = `logits[b, position, token]`.
        bimodal: the towers attend to one another, and relevancy follows the rules for two modalities (Chefer et al. 2021,
            equations 5 to 11). The row of the first tower is read.
    """

    towers: tuple[Tower, ...]
    score: Literal["pair", "class", "token"]
    bimodal: bool = False


_CLIP_VISION = Tower("vision", "vision_model", "encoder.layers", "cls", "patches", branch="self_attn", prefix=1)
_CLIP_TEXT = Tower("text", "text_model", "encoder.layers", "eot", "clip_text", branch="self_attn")
_SIGLIP_VISION = replace(_CLIP_VISION, readout="pool", prefix=0, pooling="head.attention")
_SIGLIP_TEXT = replace(_CLIP_TEXT, readout="last", tokens="text")
_VIT = Tower("vision", "vit", "layers", "cls", "patches", branch="attention", prefix=1)
_DINOV2 = Tower("vision", "dinov2", "encoder.layer", "cls", "patches", branch="layer_scale1", prefix=1)
_BERT = Tower("text", "bert", "encoder.layer", "cls", "bert_text", branch="attention.output.dense", stream="attention")
_DECODER = Tower("language", "model.language_model", "layers", "target", "image_text", branch="self_attn")


_UNITER = Tower("joint", "uniter", "encoder.layer", "cls", "regions", branch="attention.output.dense", stream="attention")


def _alone(tower: Tower) -> Family:
    return Family((replace(tower, path=""),), "class")


FAMILIES: dict[str, Family] = {
    "CLIPModel": Family((_CLIP_VISION, _CLIP_TEXT), "pair"),
    "CLIPVisionModel": _alone(_CLIP_VISION),
    "CLIPVisionModelWithProjection": Family((_CLIP_VISION,), "class"),
    "CLIPTextModel": _alone(_CLIP_TEXT),
    "CLIPTextModelWithProjection": Family((_CLIP_TEXT,), "class"),
    "CLIPForImageClassification": Family((replace(_CLIP_VISION, readout="patch_mean"),), "class"),
    "SiglipModel": Family((_SIGLIP_VISION, _SIGLIP_TEXT), "pair"),
    "SiglipVisionModel": _alone(_SIGLIP_VISION),
    "SiglipTextModel": _alone(_SIGLIP_TEXT),
    "SiglipForImageClassification": Family((replace(_SIGLIP_VISION, readout="mean", pooling=None),), "class"),
    "ViTModel": _alone(_VIT),
    "ViTForImageClassification": Family((_VIT,), "class"),
    "Dinov2Model": _alone(_DINOV2),
    "Dinov2ForImageClassification": Family((_DINOV2,), "class"),
    "Dinov2WithRegistersModel": _alone(_DINOV2),
    "Dinov2WithRegistersForImageClassification": Family((replace(_DINOV2, path="dinov2_with_registers"),), "class"),
    "BertModel": _alone(_BERT),
    "BertForSequenceClassification": Family((_BERT,), "class"),
    "BertForNextSentencePrediction": Family((_BERT,), "class"),
    "LlavaForConditionalGeneration": Family((_DECODER,), "token"),
    "Qwen2VLForConditionalGeneration": Family((_DECODER,), "token"),
    "Qwen2_5_VLForConditionalGeneration": Family((_DECODER,), "token"),
    "LlamaForCausalLM": Family((replace(_DECODER, path="model", tokens="text"),), "token"),
    "Qwen2ForCausalLM": Family((replace(_DECODER, path="model", tokens="text"),), "token"),
    "UNITER": Family((_UNITER,), "class"),
}


def register_family(class_name: str, family: Family) -> None:
    """Make `explain` accept models whose class, or a base class, is called `class_name`."""
    if not isinstance(family, Family):
        raise TypeError(f"family must be a vlattn_fast.interpret.Family; got {type(family).__name__}")
    FAMILIES[class_name] = family


def find_family(model: nn.Module) -> Family | None:
    """The record of `model`'s class or its nearest base class."""
    for cls in type(model).__mro__:
        family = FAMILIES.get(cls.__name__)
        if family is not None:
            return family
    return None
