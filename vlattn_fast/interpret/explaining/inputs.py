"""The inputs of one run: copies, and pairs of images and texts."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.attachments import add_pre_hook
from vlattn_fast.interpret.adapters.adapter import Adapter, indices, prompt_shape

Packs = Mapping[str, tuple[str, ...]]  # the names of the entries of each input that is a dict

# inputs that are chosen along with images and texts
_IMAGE_INPUTS = ("pixel_attention_mask", "spatial_shapes", "pixel_mask")
_TEXT_INPUTS = ("attention_mask", "position_ids", "token_type_ids")


def prepare_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    adapter: Adapter,
    target: Any,
    logit_positions: Tensor | None = None,
    all_logits: bool = False,
) -> tuple[dict[str, Any], list[int] | None]:
    """Keyword arguments for the model, and for scores of pairs the text that each row stands for.

    One image with T texts becomes T pairs, as in the notebook of Chefer et al.; a target picks the text of each image.
    `logit_positions`: those of a decoder's logits; None = the last real token. With `all_logits` it returns all.

    Raises:
        TypeError: `inputs` holds images or words that no processor made tensors of.
        ValueError: images and texts cannot be paired, or a target is out of range.
    """
    inputs, scoring = adapter.scoring.prepared(inputs, target), adapter.scoring
    accepted = inspect.signature(model.forward).parameters
    _check_values(inputs, adapter)
    # Tensors made under inference mode cannot be saved for a backward pass; a copy made outside of it can.
    arguments = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in inputs.items()}
    if hasattr(model, "config") and hasattr(model.config, "return_dict"):
        arguments["return_dict"] = True
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    if "use_cache" in accepted or (scoring.predicts and takes_any and hasattr(model, "config")):
        arguments["use_cache"] = False
    # Whether logits are counted as the prompt's tokens are.
    follows = (
        adapter.towers[0].kind.follows_ids if adapter.towers else logit_positions is not None or adapter.answers == "input_ids"
    )
    if scoring.predicts and not all_logits and not callable(target) and "logits_to_keep" in accepted and follows:
        _keep_logits(arguments, adapter, logit_positions)
    if not scoring.pairs or callable(target):
        return arguments, None
    for name in adapter.names:
        if not isinstance(inputs.get(name), Tensor):
            raise ValueError(f"inputs must contain '{name}' for the similarity of an image and a text; got {sorted(inputs)}")
    return _paired(arguments, target, *adapter.names)


def _keep_logits(arguments: dict[str, Any], adapter: Adapter, positions: Tensor | None) -> None:
    """Logits of the whole prompt are large, and only a few positions are needed."""
    shape = prompt_shape(arguments)
    arguments.pop("labels", None)
    positions = adapter.scoring.kind(arguments, shape).last_real() if positions is None else positions
    arguments["logits_to_keep"] = positions.unique()


def _check_values(inputs: Mapping[str, Any], adapter: Adapter) -> None:
    """TypeError or ValueError unless these inputs are tensors of a batch, and ask for no map and no cache."""
    images, texts = adapter.names
    for name in (images, texts, "attention_mask") if adapter.towers else ():
        value = whole = inputs.get(name)
        while isinstance(value, (list, tuple)) and value:  # images of several sizes
            value = value[0]
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"inputs must hold tensors; got {type(value).__name__} in '{name}'. The model's processor returns tensors with "
                "return_tensors='pt'"
            )
        if name != images and isinstance(whole, Tensor) and whole.ndim < 2:
            raise ValueError(f"inputs must hold '{name}' (B, N), even for one text; got {tuple(whole.shape)}")
    if inputs.get("output_attentions"):
        raise ValueError("inputs must not contain output_attentions, since no attention maps are stored; got True")
    if inputs.get("past_key_values") is not None:
        raise ValueError("inputs must give the whole sequence in one forward pass, without past_key_values; got a cache")


def check_inputs(model: nn.Module, inputs: Any) -> None:
    """TypeError unless `inputs` are a mapping, and ValueError if none of them has a name of the model's `forward`."""
    by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    names = [name for name, parameter in inspect.signature(model.forward).parameters.items() if parameter.kind in by_name]
    if not isinstance(inputs, Mapping):
        images = [name for name in names if name.startswith("pixel_values")] if getattr(inputs, "ndim", 0) == 4 else []
        way = f". Pass {{{(images or names)[0]!r}: ...}}" if names else ""
        raise TypeError(f"inputs must be a mapping of the model's keyword arguments; got {type(inputs).__name__}{way}")
    if names and not inputs.keys() & names:
        raise ValueError(f"inputs must have names of the model's forward ({', '.join(names)}); got {sorted(inputs)}")


def opened(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Packs]:
    """`inputs` with the entries of each dict of tensors instead of the dict, for a `forward` that takes one dict."""
    flat, packs = dict[str, Any](), dict[str, tuple[str, ...]]()
    for name, value in inputs.items():
        if not (isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())):
            value = {name: value}
        else:
            packs[name] = tuple(value)
        if both := sorted(map(str, flat.keys() & value.keys())):
            raise ValueError(f"inputs must have each name once, including the names in dicts; got {', '.join(both)} twice")
        flat |= value
    return flat, packs


def packed(arguments: Mapping[str, Any], packs: Packs) -> dict[str, Any]:
    """The inverse of `opened`."""
    inner = {entry for names in packs.values() for entry in names}
    dicts = {name: {entry: arguments[entry] for entry in names if entry in arguments} for name, names in packs.items()}
    return {**{name: value for name, value in arguments.items() if name not in inner}, **dicts}


@contextlib.contextmanager
def packing(model: nn.Module, packs: Packs) -> Iterator[None]:
    """A context in which the model also takes arguments that are `opened`, in this thread."""
    thread = threading.get_ident()

    def pack(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if threading.get_ident() != thread or all(name in kwargs for name in packs):
            return None  # called as ever
        return args, packed(kwargs, packs)

    remove = add_pre_hook(model, pack, prepend=True, with_kwargs=True) if packs else None
    try:
        yield
    finally:
        if remove is not None:
            remove()


def is_empty(arguments: Mapping[str, Any]) -> bool:
    """Whether the batch has no row."""
    names = ("input_ids", "inputs_embeds", "pixel_values", "text", "image")
    first = next((arguments[name] for name in names if arguments.get(name) is not None), None)
    return isinstance(first, Tensor) and first.shape[0] == 0


def with_one_row(model: nn.Module, arguments: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The arguments of an empty batch with one row of zeros (masks: of ones), and prompts without images, unless the model needs
    them. Most models cannot run an empty batch; a run over one row tells how many tokens each tower has."""
    pixels = inspect.signature(model.forward).parameters.get("pixel_values")
    needed = adapter.bimodal or (pixels is not None and pixels.default is inspect.Parameter.empty)
    prompts = not needed and any(tower.kind.image_ids for tower in adapter.towers)
    filled = {}
    for name, value in arguments.items():
        if prompts and (name.startswith("pixel_") or name in ("image_grid_thw", "video_grid_thw", "image_sizes")):
            continue
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == 0:
            filling = int(name.endswith("mask") or name == "spatial_shapes")
            if name == "input_ids" and isinstance(end := getattr(model, "eos_token_id", None), int):
                filling = end  # the model may look for it
            value = torch.full((1, *value.shape[1:]), filling, dtype=value.dtype, device=value.device)
        filled[name] = value
    return filled


def _paired(arguments: dict[str, Any], target: Any, image: str, text: str) -> tuple[dict[str, Any], list[int]]:
    images, texts = arguments[image].shape[0], arguments[text].shape[0]
    if target is not None:
        chosen = indices(target, images, texts, "texts")
        shown = list(range(images))
    elif images == texts or images == 1 or texts == 1:
        count = texts if images == 1 else images
        shown = list(range(count)) if images == count else [0] * count
        chosen = list(range(count)) if texts == count else [0] * count
    else:
        raise ValueError(
            f"inputs must be as many images as texts, one image, or one text, unless target pairs them; got {images} images and "
            f"{texts} texts"
        )
    for names, picked, size in (((image, *_IMAGE_INPUTS), shown, images), ((text, *_TEXT_INPUTS), chosen, texts)):
        if picked == list(range(size)):
            continue
        for name in names:
            if isinstance(arguments.get(name), Tensor) and arguments[name].shape[0] == size:
                arguments[name] = arguments[name][picked]
    return arguments, chosen
