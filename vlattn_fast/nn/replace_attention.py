"""Replaces the score function in the attention of an existing model, in place, with its projections unchanged.

transformers' models look up their attention function by the name in a module's config: a replaced module gets a copy of the
config that names our function. In models that write attention out by hand, the forward of the instance is replaced. The
parameters of a learned score become a part of the attention module, `attention_score`, so the model trains, moves and saves them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast import scores
from vlattn_fast._ground.checks import check_bool, check_choice
from vlattn_fast._ground.tensors import masks_of
from vlattn_fast.attach.handwritten import calls_interface, has_core, with_core
from vlattn_fast.attach.session import named, split_path, unwrapped
from vlattn_fast.attach.transformers_interface import CONFIG_NAME, REPLACED, RULE, causal_by_module
from vlattn_fast.nn.score_attention import ScoreFactory, make_score
from vlattn_fast.ops import BACKEND_NAMES
from vlattn_fast.ops.score_attention import score_attention

_NAME = "vlattn_score"
Held = nn.Module | scores.Score | str  # a module makes the score when it is called
Layers = int | Sequence[int] | Callable[[str], bool] | None


def replace_attention(
    model: nn.Module,
    *,
    score: str | ScoreFactory,
    layers: Layers = None,
    per_head: bool = False,
    score_options: dict[str, Any] | None = None,
    backend: str = "auto",
) -> ReplacedAttention:
    """Replaces the score function in the attention of `model`, in place.

    Returns a handle; `handle.restore()`, or the end of a `with` block, restores the model. The cost of a call is that of
    score_attention, which stores no map.

    Examples:
        >>> import vlattn_fast as va
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64))
        >>> with va.nn.replace_attention(model, score="additive", layers=-1) as replaced:
        ...     print(list(replaced.scores))
        ['encoder.layer.1.attention.self']

    "scaled_dot" keeps the outputs. A score with parameters gets new ones, initialised as in `ScoreAttention`, so the model needs
    training. To load them again, replace the attention of a new model with the same call, then use `load_state_dict`;
    from_pretrained leaves them out. Dropout of attention weights, masks, causality and grouped heads are those of the model.
    Replaced models can be explained, exported and compiled; compile after replacing.

    Args:
        model: a transformers model, or a wrapper around one, whose attention goes through transformers' interface (BERT, ViT,
            CLIP, T5, decoders, ...) or is that of LXMERT, ViLT, VisualBERT, FLAVA. Other attention of
            the same model stays unchanged: the handle's `scores` lists the replaced modules.
        score, per_head, score_options, backend: see `ScoreAttention`.
        layers: an index or several, counted in each list of layers, negative from the end; or a function of an attention module's
            path that returns whether to replace it, e.g. `lambda path: "visual_attention" in path`. Default: all.

    Returns:
        A handle with the fields `scores` (path of each replaced attention -> its score) and `restore()`.

    Raises:
        ValueError, TypeError: if the model has no such attention, or its attention is already replaced; if it lacks these layers.
    """
    check_bool(per_head=per_head)
    check_choice("backend", backend, BACKEND_NAMES)
    inner = unwrapped(model)
    attention = dict(attention_of(inner))
    if not attention:
        raise ValueError(
            "model must be a transformers model with attention by its interface, LXMERT, ViLT, VisualBERT or FLAVA; got "
            f"{type(inner).__name__}"
        )
    chosen = [path for path in attention if _is_chosen(path, attention, layers)]
    if not chosen:
        raise ValueError(f"layers must choose some of {', '.join(attention)}; got {layers!r}")
    for path in chosen:
        if hasattr(attention[path], REPLACED):
            raise ValueError(f"the attention of '{path}' is already replaced: restore it first, with its handle")
    made = {path: make_score(score, *sizes_of(path, attention[path]), per_head, score_options) for path in chosen}
    replaced: dict[str, nn.Module] = {}
    try:
        for path, each in made.items():
            _replace(attention[path], each, backend)
            replaced[path] = attention[path]
    except BaseException:
        for module in replaced.values():
            _restore(module)
        raise
    return ReplacedAttention(replaced)


class ReplacedAttention:
    """Holds the result of `replace_attention`: a context that restores the model on exit.

    Attributes:
        scores: path of each replaced attention -> its score, a module if the score has parameters.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self.scores: dict[str, nn.Module | str] = {path: getattr(module, REPLACED) for path, module in modules.items()}

    def restore(self) -> None:
        """Restores the model's attention, without the scores' parameters. A second call changes nothing."""
        for module in self._modules.values():
            _restore(module)
        self._modules = {}

    def __enter__(self) -> ReplacedAttention:
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"ReplacedAttention({list(self.scores)})"


# --- finding ---


def attention_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields path and module of each attention that can be replaced."""
    for path, module in model.named_modules():
        if has_core(type(module)) or (_sizes_of(module) and calls_configured_attention(module)):
            yield path, module


def calls_configured_attention(module: nn.Module) -> bool:
    """Returns whether the module calls transformers' interface for the attention that its config names. Other modules have heads,
    too: a mixer of Mamba, an indexer of keys."""
    forwards = (kind for kind in type(module).__mro__ if "forward" in vars(kind))  # a subclass may hand its call on
    return hasattr(getattr(module, "config", None), CONFIG_NAME) and any(map(calls_interface, forwards))


def _sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """Returns number and size of the heads of an attention module; None for other modules."""
    names = ("attention_head_size", "head_dim", "head_size", "qk_head_dim", "key_value_proj_dim")
    sizes = [getattr(module, name, None) for name in names]
    size = next((size for size in sizes if isinstance(size, int)), None)
    if size is None:
        return None
    counts = [getattr(module, name, None) for name in ("num_attention_heads", "num_heads")]
    counts.append(getattr(getattr(module, "config", None), "num_attention_heads", None))
    count = next((count for count in counts if isinstance(count, int)), None)
    return None if count is None else (count, size)


def sizes_of(path: str, module: nn.Module) -> tuple[int, int]:
    sizes = _sizes_of(module)
    if sizes is None:
        raise ValueError(f"{named(path, module)} does not tell the number and size of its heads; leave it out by layers=")
    return sizes


def _is_chosen(path: str, attention: dict[str, nn.Module], layers: Layers) -> bool:
    if layers is None:
        return True
    if callable(layers):
        return bool(layers(path))
    asked: list[Any] = list(layers) if isinstance(layers, Sequence) else [layers]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in asked):
        raise TypeError(f"layers must be None, an int, several, or a function of a path; got {layers!r}")
    name, index = split_path(path)
    count = 1 + max(i for n, i in map(split_path, attention) if n == name)
    for i in asked:
        if not -count <= i < count:
            raise ValueError(f"layers must be from {-count} to {count - 1} in '{name}'; got {i}")
    return index in [i % count for i in asked]


# --- replacing ---


def placed(module: nn.Module, score: nn.Module) -> nn.Module:
    """Returns the score with device, dtype and mode of an attention module."""
    like = next((each for each in module.parameters() if each.is_floating_point()), None)  # quantized weights are integers
    if like is None:
        raise TypeError(f"model must have floating-point parameters in its attention; got {type(module).__name__}")
    return score.to(like.device, like.dtype).train(module.training)


def _replace(module: nn.Module, score: nn.Module | str, backend: str) -> None:
    if isinstance(score, nn.Module):
        score = placed(module, score)
    setattr(module, REPLACED, score)
    module._attention_backend = backend  # type: ignore[assignment]
    if has_core(type(module)):
        attribute = "_old_forward" if "_old_forward" in vars(module) else "forward"  # accelerate's hooks call the former
        module._attention_forward = attribute, vars(module).get(attribute)  # type: ignore[assignment]
        setattr(module, attribute, functools.partial(_forward, module))
        return
    module._attention_registered = _Registered()  # type: ignore[assignment]
    config = module.config
    setattr(module, RULE, None)  # the model's config decides at each call
    module._attention_config = config
    changed = copy.copy(config)
    setattr(changed, CONFIG_NAME, _NAME)
    module.config = changed


def _restore(module: nn.Module) -> None:
    if hasattr(module, "_attention_forward"):
        attribute, before = module._attention_forward  # type: ignore[misc]
        delattr(module, attribute)
        if before is not None:
            setattr(module, attribute, before)
        delattr(module, "_attention_forward")
    else:
        module.config = module._attention_config
        delattr(module, "_attention_config")
        delattr(module, "_attention_registered")
        delattr(module, RULE)
    delattr(module, REPLACED)
    delattr(module, "_attention_backend")


class _Registered:
    """Registers our function with transformers, including in another process that loads a replaced module from a file."""

    def __init__(self) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_NAME, _by_interface)

    def __reduce__(self) -> tuple[type[_Registered], tuple[()]]:
        return _Registered, ()


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor]:
    """Runs the forward of a module that writes attention out by hand; a module-level function, so that pickle finds it."""
    return with_core(_by_hand, module, *args, **kwargs)


def _by_interface(module: nn.Module, *call: Any, **options: Any) -> tuple[Tensor, None]:
    """Implements transformers' attention interface, with the score of the module."""
    rule = getattr(module, RULE)
    if rule is None:
        rule = causal_by_module(module._attention_config)
    held, backend = getattr(module, REPLACED), str(module._attention_backend)
    return by_interface(module, *call, held=held, backend=backend, causal_by_module=rule, **options)


def by_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    held: Held,
    backend: str,
    causal_by_module: bool,
    **options: Any,
) -> tuple[Tensor, None]:
    """Implements transformers' attention interface, with the score that `held` is or makes; `causal_by_module`: see
    `masks_of`."""
    key_mask = None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:  # the mask of flash attention
        attention_mask, key_mask = None, attention_mask.bool()
    elif attention_mask is not None and not isinstance(attention_mask, Tensor):
        kind = type(attention_mask).__name__
        raise ValueError(f"a replaced score needs masks that are tensors; got a mask of {kind}: set_attn_implementation('sdpa')")
    masks = masks_of(module, query, key, attention_mask, causal_by_module=causal_by_module, **options)
    mask = masks["attn_mask"]
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        masks |= _as_groups(query, key, mask)
    masks |= {"key_mask": key_mask, "backend": backend}
    output = _attend(held, query, key, value, dropout if module.training else 0.0, scaling, **masks)
    return output.transpose(1, 2).contiguous(), None


def _as_groups(query: Tensor, key: Tensor, mask: Tensor) -> dict[str, Any]:
    """A learned mask, such as a position bias, as the bias of groups of one token each: score_attention has its gradient."""
    queries, keys = query.shape[2], key.shape[2]
    groups = {name: torch.arange(n, device=query.device) for name, n in (("query_groups", queries), ("key_groups", keys))}
    return {"attn_mask": None, **groups, "group_bias": mask.expand(*query.shape[:2], queries, keys)}


def _attend(
    held: Held, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, **options: Any
) -> Tensor:
    score = held() if isinstance(held, nn.Module) else held
    is_scaled = score == "scaled_dot" or isinstance(score, scores.ScaledDot)
    scale = scaling if is_scaled else None  # the model's factor belongs to the scaled dot product
    return score_attention(query, key, value, score=score, dropout_p=dropout, scale=scale, **options)


def _by_hand(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The core of a forward that is written out by hand, with the score of the module."""
    dropout = module.dropout.p if module.training else 0.0
    held, scale, backend = getattr(module, REPLACED), module.attention_head_size**-0.5, str(module._attention_backend)
    return _attend(held, query, key, value, dropout, scale, attn_mask=mask, backend=backend)
