"""Tiny models of any class of transformers: its default config with small sizes, by the names of the sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tools.tiny_models.checkpoints import CHECKPOINTS

VOCABULARY, HEADS, HEAD, LAYERS = 99, 4, 16, 2
HIDDEN = HEADS * HEAD
# The first pattern that a key matches says the size. A size is never made larger, but for a vocabulary.
SIZES = [
    (r"(^|_)(num|n)_(hidden_)?layers?$|(encoder|decoder|hidden|mem)_(layers|blocks)$|^depths?$|_depth$|num_\w*layers$", LAYERS),
    (r"^d_head$", HEAD),
    (r"tokens_per_image$|^(sliding|attention)_window(_size)?$|^attention_chunk_size$|^index_topk$", 4),
    (r"^local_attention$", 8),  # on both sides together
    (r"^index_(topk_blocks|block_size|kpool)$", 2),
    (r"num_(nextn_predict|mtp)\w*|mtp_num\w*", 0),
    (r"^((q|kv|o|gate)_)?lora_rank$|_lora_rank$|_rank$", 8),
    (r"rotary_dim$", 8),
    (r"head_dim$|head_size$|kv_channels$|head_width$|^d_kv$|attention_head_dim|head_qk_dim", HEAD),
    (r"(key_value|kv)_heads$|multi_query_group_num|num_query_groups|num_kv_heads", 2),
    (r"heads?$|num_key_value_attention_heads|^n_heads?$", HEADS),
    (r"moe_\w*(intermediate|hidden)\w*|expert\w*(intermediate|ffn)\w*|shared_expert_intermediate_size", 16),
    (r"intermediate_size|ffn_dim|^d_ff$|n_inner|mlp_dim|inner_dim|ffn_hidden|mlp_hidden|dim_ff|ff_size|ffn_size", 4 * HIDDEN),
    (r"(routed|local|num|moe_num|n)_experts$|num_routed\w*|n_experts|moe_num_experts", 4),
    (r"experts_per_tok$|moe_top_?k|moe_k$|num_selected|experts_per_token|^top_k_experts$|^moe_router_topk$", 2),
    (r"(^|_)n(um)?_(expert_)?groups?$|topk_group$|n_shared_experts$", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"max_\w*position\w*|n_positions|n_ctx|max_sequence_length|max_seq_len\w*|max_target_positions|max_source_positions", 512),
    (r"(hidden|embed|embedding|projection|model|word_embed_proj)_(size|dim)$|^(d_model|n_embd|dim|width|emb_dim)$", HIDDEN),
    (r"out_hidden_size|vision_output_dim|projector_(input|output)_dim|text_hidden_size|proj_dim|out_dim|projection_size", HIDDEN),
    (r"adapter_in(put)?_(dim|size)", HIDDEN),
    (r"^(image_size|img_size|input_size)$", 32),
    (r"^patch_size$|^vision_patch_size$", 8),
    (r"^num_embeddings$", 16),
    (r"^base_channels$", 32),
    (r"num_(query_tokens|queries|latents|image_tokens)|resampler_n_latents|n_latents|latent_query_num", 4),
]
QUERY_HEADS = ("num_attention_heads", "n_head", "num_heads")
COUNTS = re.compile(r"^((num|n)_(hidden_)?layers?|n_layer|num_layers|depth|encoder_layers|decoder_layers|num_blocks)$")
IDS = re.compile(r"(token_id|token_index|_token|_ids?|token_ids)$")


def shrunk(values: Mapping[str, Any], ids: dict[int, int], fill: bool = False) -> dict[str, Any]:
    """A config's values with small sizes; `ids` are the tokens that had no place in the vocabulary, and their new ids. `fill`:
    sizes that are None are set as well."""
    kept = _kept_layers(values)
    total = _layers(values)
    small: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("out_features", "out_indices", "stage_names"):  # follow from the number of layers
            continue
        if not isinstance(key, str):  # names of labels
            small[key] = value
        elif "patch_to_query" in key and isinstance(value, Mapping):
            small[key] = {16: 4}
        elif _is_by_layer(value):
            by_layer = {int(index): each for index, each in value.items()}
            small[key] = {str(n): shrunk(by_layer[i], ids, fill) for n, i in enumerate(kept) if i in by_layer}
        elif isinstance(value, Mapping):
            small[key] = shrunk(value, ids, fill)
            if fill and key == "rope_parameters":
                small[key] = _filled_rope(small[key], values.get("layer_types") or ())
        elif IDS.search(key) and "vocab" not in key and isinstance(value, (int, list)) and not isinstance(value, bool):
            small[key] = _small_ids(value, ids)
        elif value is None:
            small[key] = _filled(key, ids) if fill else None
        elif isinstance(value, (bool, str, float)):
            small[key] = value
        elif re.search(r"vocab\w*size|^n_vocab|num_tokens$|^n_words$", key):
            small[key] = VOCABULARY
        elif COUNTS.match(key) and isinstance(value, int):
            small[key] = len(kept) if value == total else min(value, LAYERS)
        elif isinstance(value, int):
            small[key] = _size(key, value)
        elif isinstance(value, (list, tuple)):
            small[key] = _small_list(key, list(value), kept, total)
        else:
            small[key] = value
    heads, before = (next((v[k] for k in QUERY_HEADS if isinstance(v.get(k), int)), None) for v in (small, values))
    for key in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(values.get(key), int) and heads is not None:
            small[key] = heads if before == values[key] else min(2, values[key])
    parts = ("qk_nope_head_dim", "qk_rope_head_dim")
    for key in ("qk_head_dim", "head_dim"):
        if key in small and all(isinstance(small.get(part), int) for part in parts):
            if values[key] == values[parts[0]] + values[parts[1]]:
                small[key] = small[parts[0]] + small[parts[1]]
    return small


def _filled_rope(rope: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Rotary parameters with what checkpoints have and default configs lack."""
    if not rope and kinds:
        return {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in kinds}
    half = int(HEAD * rope.get("partial_rotary_factor", 1.0)) // 2
    return {"mrope_section": _sections([16, 24, 24], half), **rope}


def _is_by_layer(value: Any) -> bool:
    """Whether a value maps numbers of layers to their values."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(str(index).isdigit() and isinstance(each, Mapping) for index, each in value.items())


def _filled(key: str, ids: dict[int, int]) -> Any:
    if key == "pad_token_id":
        return 0
    if seen := re.search(r"(image|video)_token_(id|index)$", key):
        return _small_ids(10**6 + (seen[1] == "video"), ids)
    return _size(key, None)


def _size(key: str, value: int | None) -> int | None:
    size = next((size for pattern, size in SIZES if re.search(pattern, key)), value)
    return size if value is None or size is None else min(size, value)


def _layers(values: Mapping[str, Any]) -> int:
    return max((value for key, value in values.items() if COUNTS.match(str(key)) and isinstance(value, int)), default=0)


def _kept_layers(values: Mapping[str, Any]) -> list[int]:
    """Indices of layers of all kinds that lists with an entry a layer tell apart, at least LAYERS of them."""
    total = _layers(values)
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == total and total > 1]
    named = [v for key, v in values.items() if _names_layers(key, v, total)]
    kinds: dict[tuple[Any, ...], int] = {}
    for index in range(total):
        kinds.setdefault((*(str(v[index]) for v in lists), *(index in v for v in named)), index)
    kept = sorted([*kinds.values()][:4])
    for index in range(total):
        if len(kept) >= min(LAYERS, total):
            break
        kept = sorted({*kept, index})
    return kept


def _names_layers(key: Any, value: Any, total: int) -> bool:
    """Whether a value lists numbers of layers."""
    if not isinstance(value, (list, tuple)) or not value or not re.search(r"ind(ex|ic)|layer|block", str(key)):
        return False
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < total for v in value)


def _small_list(key: str, value: list[Any], kept: list[int], total: int) -> list[Any]:
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    is_per_layer = total > 1 and len(value) == total
    if whole and value and re.search(r"depths|hidden_sizes|heads", key):
        sizes = {"depths": 1, "heads": HEADS}
        size = next((size for name, size in sizes.items() if name in key), HIDDEN)
        return [size] * (len(kept) if is_per_layer else len(value))
    if is_per_layer:
        return [value[index] for index in kept]
    if whole and value and "section" in key:
        return _sections(value)
    if _names_layers(key, value, total) and total > len(kept):
        return [number for number, index in enumerate(kept) if index in value]
    if whole and "layer" in key and any(v < 0 for v in value):  # counted from the end
        return [max(v, -LAYERS) if v < 0 else min(v, LAYERS) for v in value]
    if "pinpoints" in key and value:
        least = min(min(pair) for pair in value)
        return [[32 * v // least for v in pair] for pair in value if max(pair) <= 2 * least]
    if whole and re.search(r"image_size|img_size|patch_size", key):
        return [min(v, 8 if "patch" in key else 32) for v in value]
    return value


def _sections(value: list[int], half: int = HEAD // 2) -> list[int]:
    """Parts of half a head, in the same shares."""
    parts = [max(1, v * half // sum(value)) for v in value]
    parts[-1] += half - sum(parts)
    return parts


def _small_ids(value: Any, ids: dict[int, int]) -> Any:
    if isinstance(value, list):
        return [_small_ids(each, ids) if isinstance(each, int) else each for each in value]
    if value < VOCABULARY - 30:
        return value
    return ids.setdefault(value, VOCABULARY - 1 - len(ids))


def merged(values: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `further`, config in config."""
    nested = {
        k: merged(values.get(k) or {}, v) if isinstance(v, Mapping) and k.endswith("_config") else v for k, v in further.items()
    }
    return {**values, **nested}


def small_model(model_class: Any, fill: bool = False, attention: str | None = None) -> nn.Module:
    """A random model in eval mode, with weights large enough that attention is uneven. `attention`: its implementation."""
    default = model_class.config_class()
    if fill and getattr(default, "vision_config", default) is None:
        default = model_class.config_class(vision_config={})
    values = shrunk(default.to_dict(), {}, fill)
    for name in (default.model_type, model_class.__name__):
        values = merged(values, CHECKPOINTS.get(name, {}))
    config = model_class.config_class.from_dict(values)
    if fill and not hasattr(config, "vision_start_token_id"):
        config.vision_start_token_id = VOCABULARY - 20  # as checkpoints have it
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    model = lively(model_class(config)).eval().to(torch.get_default_dtype())  # some make float32 tensors by name
    for part in model.modules():
        part_config: Any = getattr(part, "config", None)
        if hasattr(part_config, "_experts_implementation"):
            part_config._experts_implementation = "eager"  # others have no float64
    return model


def lively(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim > 1:
                inputs = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]  # of a convolution
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, inputs) ** 0.5)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            parameter.requires_grad_()  # some models freeze a tower, whose maps then have no gradient
    return model
