"""Attention that a model writes out by hand, matmul, softmax, matmul, as calls of torch's scaled_dot_product_attention.

A mode of torch sees such a call, but no hand-written products. A class is known by its name (transformers
is not imported). Left out, since they are not softmax(scale * Q K^T + mask) V: GroundingDINO's bidirectional attention (two
softmaxes of one score matrix), deformable and disentangled attention, LiLT's joint scores, GroupViT's assignment.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from vlattn_fast._ground.tensors import joined
from vlattn_fast.attach.multihead import attend, heads, multihead_attention
from vlattn_fast.attach.transformers_interface import REPLACED

# (module, query, key, value (B, H, N, D), mask) -> output (B, H, N, D)
Core = Callable[[Any, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def replacements(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(module, "forward", function) for every module of `model` that computes attention by hand; for `overridden`.

    Each function has the arguments and, in eval mode, the result of the module's forward, with None instead of an attention
    map. It calls scaled_dot_product_attention once.

    Raises:
        ValueError: other code has replaced the forward of a module.
    """
    functions: dict[type[nn.Module], Any] = {}  # by class; None = it attends otherwise, or not
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in functions:
            is_torch = defining_class(kind) is nn.MultiheadAttention
            functions[kind] = multihead_attention if is_torch else None if _written(kind) is None else _by_name
        function = functions[kind]
        if function is None or hasattr(module, REPLACED):
            continue  # the operator of a replaced score is observed anyway
        # accelerate's hooks call the earlier forward.
        attribute = "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in vars(module) else "forward"
        before = vars(module).get(attribute)
        is_class_forward = attribute == "_old_forward" and getattr(before, "__func__", None) is type(module).forward
        if before is not None and not is_class_forward and getattr(before, "func", None) is not function:  # else by another run
            place = f"'{name}' ({kind.__name__})"
            raise ValueError(f"model must have the forward of its class in {place}; got one of its own, {before!r}")
        yield module, attribute, functools.partial(function, module)


def defining_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that defines `kind`'s forward."""
    return next(base for base in kind.__mro__ if "forward" in vars(base))


def _written(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The function of `_TRANSFORMERS` for the class that defines `kind`'s forward. None for a subclass with a forward of its own,
    and for a class that calls transformers' interface in this release."""
    owner = defining_class(kind)
    if owner.__module__.startswith("transformers.") and owner.__name__ in _TRANSFORMERS and not calls_interface(owner):
        return _TRANSFORMERS[owner.__name__]
    return None


def calls_interface(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class calls transformers' interface for the attention that a model's config names."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)  # a forward may be an object that is called
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def has_core(kind: type[nn.Module]) -> bool:
    """Whether a class has only query, key and value projections, so that `with_core` runs its forward."""
    return _written(kind) is _bert


def with_core(core: Core, module: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
    """The forward of a module that `has_core`, around `core`; torch.compile takes it."""
    names = ["attention_mask", "output_attentions"]
    if "context" in inspect.unwrap(type(module).forward).__code__.co_varnames:
        names.insert(0, "context")
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    _check_no_maps(module, named.pop("output_attentions", None))
    return _bert(module, hidden_states, **named, core=core)


# --- shared parts ---


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _by_name(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module of transformers with its function, which has the argument names of the class's forward."""
    bound = _signature(defining_class(type(module)).forward).bind(module, *args, **kwargs)
    named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    del named["self"]
    named.pop("kwargs", None)
    _check_no_maps(module, named.pop("output_attentions", None))
    if "cache" in named:  # its name in transformers from 5.24 on
        named["past_key_values"] = named.pop("cache")
    function = _written(type(module))
    assert function is not None  # `replacements` takes no other module
    return function(module, **named)


def _added(module: nn.Module, query: Tensor, *masks: Tensor | None) -> Tensor | None:
    """The sum of the masks that a module adds to its scores."""
    total: Tensor | None = None
    for mask in (mask for mask in masks if mask is not None):
        if not mask.is_floating_point():
            raise ValueError(
                f"model must give {type(module).__name__} float masks, since the module adds them to its scores; got {mask.dtype}"
            )
        total = joined(total, mask.to(query.device))
    return total


def _check_no_maps(module: nn.Module, output_attentions: Any) -> None:
    if output_attentions:
        raise ValueError(
            f"model must not ask for attention maps; got output_attentions={output_attentions!r} in {type(module).__name__}"
        )


def _keys_and_values(
    module: Any, key: nn.Module, value: nn.Module, size: int, states: Tensor, cache: Any, cross: bool
) -> tuple[Tensor, Tensor]:
    """Key and value (B, H, M, D) projected from `states` and joined with those in a transformers cache."""
    joint = hasattr(cache, "cross_attention_cache")  # an EncoderDecoderCache
    part = (cache.cross_attention_cache if cross else cache.self_attention_cache) if joint else cache
    if joint and cross and cache.is_updated.get(module.layer_idx):
        return part.layers[module.layer_idx].keys, part.layers[module.layer_idx].values
    keys, values = heads(key(states), size), heads(value(states), size)
    if part is not None:
        keys, values = part.update(keys, values, module.layer_idx)
        if joint and cross:
            cache.is_updated[module.layer_idx] = True
    return keys, values


# --- transformers ---


def _projected(
    module: Any, queries: Tensor, keys: Tensor, values: Tensor, *masks: Tensor | None, core: Core | None = None
) -> Tensor:
    """The attention (B, N, H * D) of a module with query, key and value projections."""
    size = module.attention_head_size
    query, key, value = heads(module.query(queries), size), heads(module.key(keys), size), heads(module.value(values), size)
    mask = _added(module, query, *masks)
    if core is not None:
        return core(module, query, key, value, mask).transpose(1, 2).flatten(2)
    return attend(query, key, value, mask)


def _bert(
    module: Any,
    hidden_states: Tensor,
    context: Tensor | None = None,
    attention_mask: Tensor | None = None,
    core: Core | None = None,
) -> tuple[Tensor]:
    context = hidden_states if context is None else context
    return (_projected(module, hidden_states, context, context, attention_mask, core=core),)


def _grounding(module: Any, queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
    return (module.out_proj(_projected(module, queries, keys, values, attention_mask)),)


def _mobilevit(module: Any, hidden_states: Tensor) -> Tensor:
    return _projected(module, hidden_states, hidden_states, hidden_states)


def _tvp(module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
    output = module.dense(_projected(module, hidden_states, hidden_states, hidden_states, attention_mask))
    return (module.layer_norm(output + hidden_states),)


def _layoutlm(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    rel_pos: Any = None,
    rel_2d_pos: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    bias = None
    if module.has_relative_attention_bias:  # else the module leaves out the spatial bias, too
        total = rel_pos + rel_2d_pos if module.has_spatial_attention_bias else rel_pos
        bias = total * module.attention_head_size**-0.5
    return _projected(module, hidden_states, hidden_states, hidden_states, bias, attention_mask), None


def _swin(module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
    """The batch holds the windows of every image in turn; the mask (windows, N, N) is that of one image."""
    size = hidden_states.shape[1]
    bias = module.relative_position_bias_table[module.relative_position_index.view(-1)]
    bias = bias.view(1, size, size, -1).permute(0, 3, 1, 2)
    if attention_mask is not None:
        images = hidden_states.shape[0] // attention_mask.shape[0]
        attention_mask = attention_mask[:, None].repeat(images, 1, 1, 1)
    return (_projected(module, hidden_states, hidden_states, hidden_states, bias, attention_mask),)


def _mpnet(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, **_: Any
) -> tuple[Tensor]:
    query, key, value = (heads(p(hidden_states), module.attention_head_size) for p in (module.q, module.k, module.v))
    return (module.o(attend(query, key, value, _added(module, query, position_bias, attention_mask))),)


def _perceiver(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    inputs: Tensor | None = None,
    inputs_mask: Tensor | None = None,
) -> tuple[Tensor]:
    hidden_states = module.layernorm1(hidden_states)
    states, mask = (hidden_states, attention_mask) if inputs is None else (module.layernorm2(inputs), inputs_mask)
    query = heads(module.query(hidden_states), module.qk_channels_per_head)
    key = heads(module.key(states), module.qk_channels_per_head)
    value = heads(module.value(states), module.v_channels_per_head)
    return (attend(query, key, value, _added(module, query, mask)),)


def _packed(module: Any, hidden_states: Tensor) -> Tensor:
    """The attention (B, N, H * D) of a module with one projection for query, key and value."""
    query, key, value = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attend(query, key, value, scale=module.scale)


def _blip_vision(module: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    return module.projection(_packed(module, hidden_states)), None


def _mgpstr(module: Any, hidden_states: Tensor) -> tuple[Tensor, None]:
    return module.proj(_packed(module, hidden_states)), None


def _timesformer(module: Any, hidden_states: Tensor) -> tuple[Tensor]:
    return (_packed(module, hidden_states),)


def _sam(module: Any, hidden_states: Tensor) -> tuple[Tensor, None]:
    """The relative positions' bias depends on the queries, so it has a gradient."""
    grid = hidden_states.shape[1:3]
    packed = module.qkv(hidden_states).flatten(1, 2).unflatten(-1, (3, module.num_attention_heads, -1))
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    bias = None
    if module.use_rel_pos:
        bias = module.get_decomposed_rel_pos(query.flatten(0, 1), module.rel_pos_h, module.rel_pos_w, grid, grid)
        bias = bias.reshape(*query.shape[:3], -1)
    output = attend(query, key, value, bias, scale=module.scale)
    return module.proj(output.unflatten(1, grid)), None


def _decoder(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """A BERT-like decoder layer attends to its own sequence, or to an encoder's."""
    cross = encoder_hidden_states is not None
    states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query = heads(module.query(hidden_states), module.attention_head_size)
    key, value = _keys_and_values(module, module.key, module.value, module.attention_head_size, states, past_key_values, cross)
    return attend(query, key, value, _added(module, query, attention_mask)), None


def _blip_text(
    module: Any, attention_mask: Tensor | None = None, encoder_attention_mask: Tensor | None = None, **named: Any
) -> tuple[Tensor, None]:
    mask = attention_mask if named.get("encoder_hidden_states") is None else encoder_attention_mask
    return _decoder(module, attention_mask=mask, **named)


def _tapas(module: Any, past_key_values: Any = None, **named: Any) -> tuple[Any, ...]:
    output, _ = _decoder(module, past_key_values=past_key_values, **named)
    return (output, past_key_values) if module.is_decoder else (output,)


def _bart(
    module: Any, hidden_states: Tensor, states: Tensor | None, mask: Tensor | None, past_key_values: Any, scale: float
) -> tuple[Tensor, None]:
    """An attention with projections q_proj, k_proj, v_proj and out_proj, to its own sequence or to `states`."""
    query, cross = heads(module.q_proj(hidden_states), module.head_dim), states is not None
    source = hidden_states if states is None else states
    key, value = _keys_and_values(module, module.k_proj, module.v_proj, module.head_dim, source, past_key_values, cross)
    return module.out_proj(attend(query, key, value, _added(module, query, mask), scale=scale)), None


def _groupvit(
    module: Any, hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    return _bart(module, hidden_states, encoder_hidden_states, attention_mask, None, module.scale)


def _trocr(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    return _bart(module, hidden_states, key_value_states, attention_mask, past_key_values, module.scaling)


# The functions have the argument names of the class's forward, except `output_attentions`, which is not supported.
_TRANSFORMERS: dict[str, Callable[..., Any]] = {
    "BlipAttention": _blip_vision,
    "BlipTextSelfAttention": _blip_text,
    "ClapAudioSelfAttention": _swin,
    "DeepseekOcr2SamVisionAttention": _sam,
    "DonutSwinSelfAttention": _swin,
    "FlavaSelfAttention": _bert,
    "GitSelfAttention": _decoder,
    "GotOcr2VisionAttention": _sam,
    "GroundingDinoMultiheadAttention": _grounding,
    "GroupViTAttention": _groupvit,
    "LayoutLMv3SelfAttention": _layoutlm,
    "LxmertAttention": _bert,
    "MMGroundingDinoMultiheadAttention": _grounding,
    "MPNetSelfAttention": _mpnet,
    "MaskFormerSwinSelfAttention": _swin,
    "MegatronBertSelfAttention": _decoder,
    "MgpstrAttention": _mgpstr,
    "MobileViTSelfAttention": _mobilevit,
    "OmDetTurboMultiheadAttention": _grounding,
    "PPFormulaNetVisionAttention": _sam,
    "PerceiverSelfAttention": _perceiver,
    "RemBertSelfAttention": _decoder,
    "SLANeXtVisionAttention": _sam,
    "SamHQVisionAttention": _sam,
    "SamVisionAttention": _sam,
    "TapasSelfAttention": _tapas,
    "TimesformerSelfAttention": _timesformer,
    "TrOCRAttention": _trocr,
    "TvpAttention": _tvp,
    "UnlimitedOcrSamVisionAttention": _sam,
    "ViltSelfAttention": _bert,
    "VisualBertSelfAttention": _bert,
    "ZoeDepthMultiheadAttention": _grounding,
}
