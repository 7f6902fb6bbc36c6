"""Derived adapters: from the model, its config and the names that transformers gives its parts."""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any

from torch import nn

from vlattn_fast.interpret.adapters import derived_grids
from vlattn_fast.interpret.adapters.adapter import Adapter, Tower

_NUMBER = re.compile(r"\b\d+\b")
_IN_LAYERS = re.compile(r"(?:(.*)\.)?\d+(?:\.|$)")  # a path through a list of layers, the innermost one


def derive_adapter(model: nn.Module) -> Adapter:
    """The adapter of a model whose class has none; ValueError with the reason if nothing is derived."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, getattr(config, "text_config", None))):
        raise ValueError(f"{name} encodes its prompt with an encoder, so that its towers are found in a forward pass")
    if _gives(model, "logits_per_image") and all(hasattr(model, part) for part in ("vision_model", "text_model")):
        towers = _encoder(model, "vision", "vision_model", "last_patches"), _encoder(model, "text", "text_model", "text")
        return Adapter(towers, "pair")
    if all(hasattr(model, part) for part in _OF_CLIP):
        return _clip(model)
    if not generates(model) or "input_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} does not predict the next token, unlike the classes of transformers that generate")
    if drafts(model):
        raise ValueError(f"{name} predicts the tokens of its decoder's input, and not the next one")
    return Adapter((_language(model),), "token")


# Parts of CLIP as its authors and open_clip write it.
_OF_CLIP = ("visual", "encode_image", "encode_text", "logit_scale")


def _clip(model: Any) -> Adapter:
    """Towers of CLIP as its authors and open_clip write it: that of texts lies in the model itself, or in its part `text`."""
    text = model.text if isinstance(getattr(model, "text", None), nn.Module) else model
    pool = getattr(model, "text_pool_type", getattr(text, "pool_type", "argmax" if text is model else None))
    path = "transformer" if text is model else "text"
    towers = (
        _encoder(model, "vision", "visual", "last_patches"),
        _encoder(model, "text", path, "clip_text" if pool == "argmax" else "text"),
    )
    return Adapter(towers, "pair", names=("image", "text"))


# Parts of a classifier of timm, whose only output are the logits.
_OF_TIMM = ("patch_embed", "blocks", "num_classes")


def classifies(model: Any) -> bool:
    """Whether a class of transformers gives logits and does not generate, or a model has the parts of timm's: its towers are
    found in a forward pass."""
    if all(hasattr(model, part) for part in _OF_TIMM):
        return True
    if not hasattr(model, "can_generate") or model.can_generate():
        return False
    return _gives(model, "logits")


def _gives(model: Any, field: str) -> bool:
    """Whether the outputs of a class of transformers have a field of this name."""
    if not hasattr(model, "config"):
        return False
    forward = inspect.unwrap(model.forward)
    returned = inspect.signature(forward).return_annotation
    outputs = typing.get_args(returned) or (returned,)
    if isinstance(returned, str):
        outputs = tuple(getattr(forward, "__globals__", {}).get(name.strip()) for name in returned.split("|"))
    return any(field in getattr(kind, "__dataclass_fields__", ()) for kind in outputs)


def why_underived(model: nn.Module) -> str:
    """Why no adapter is derived."""
    try:
        return f"towers of {derive_adapter(model).score} scores are"
    except ValueError as error:
        return str(error)


def generates(model: nn.Module) -> bool:
    """Whether the model predicts the next token."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and bool(can_generate())


def drafts(model: Any) -> bool:
    """Whether the model predicts all tokens of its decoder's input at once, as by block diffusion."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder is not None and "decoder_input_ids" in inspect.signature(decoder.forward).parameters


def _language(model: Any) -> Tower:
    """The tower of the language model in a class of transformers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if decoder is model.get_output_embeddings():  # some call their head "decoder"
        decoder = model.base_model
    path = next((name for name, module in model.named_modules() if module is decoder), None)
    if path is None:
        raise ValueError(f"{type(model).__name__}.get_decoder() does not return a part of the model")
    first, *further = _lists_of_layers(decoder)
    inside = f"{path}." if path else ""
    takes_images, prompted = (isinstance(getattr(model.config, name, None), int) for name in ("image_token_id", "prompt_length"))
    return Tower(
        "language",
        path,
        first,
        "target",
        "image_text" if takes_images else "prompted_text" if prompted else "text",
        grid=derived_grids.derived if takes_images else None,
        further=tuple(f"{inside}{layers}" for layers in further),
    )


def _encoder(model: Any, name: str, path: str, tokens: str) -> Tower:
    """A tower of a dual encoder. timm's head that pools by the attention of one learned query is called `attn_pool`."""
    tower = model.get_submodule(path)
    first, *further = _lists_of_layers(tower)
    heads = {inside: head for inside, head in tower.named_modules() if inside.split(".")[-1] == "attn_pool"}
    queries = {inside: sum(x.numel() // x.shape[-1] for x in head.parameters(recurse=False)) for inside, head in heads.items()}
    pool = next((inside for inside, count in queries.items() if count == 1), None)
    row = "gradient" if pool is None else "pool"
    return Tower(name, path, first, row, tokens, pooling=pool, further=tuple(f"{path}.{layers}" for layers in further))


def _lists_of_layers(decoder: nn.Module) -> list[str]:
    """The lists of layers that attend, in their order; "*" stands for the layer's number if they are inside of layers themselves.
    If none attends, the longest list of layers."""
    attending = (_IN_LAYERS.match(name) for name, module in decoder.named_modules() if _attends(name, module))
    lists = {_NUMBER.sub("*", path[1] or ""): None for path in attending if path is not None}
    if not lists:
        others = {
            name: len(module) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList) and len(module)
        }
        if not others:
            raise ValueError(f"{type(decoder).__name__} has no list of layers")
        return [max(others, key=lambda name: (-name.count("."), others[name]))]
    outermost = min(layers.count(".") for layers in lists)  # deeper ones are other parts, such as a tower of images
    return [layers for layers in lists if layers.count(".") == outermost]


def _attends(name: str, module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList) and ("attn" in name or "ttention" in type(module).__name__)
