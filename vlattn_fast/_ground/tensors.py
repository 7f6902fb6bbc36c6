"""Helpers of all operators before and after the arithmetic: masks, strides, heads, dtypes."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.checks import autocasts, check_number, is_jit_traced, readable

_NOTHING: AbstractContextManager[None] = nullcontext()
EMULATED_MULTIPROCESSORS = 132  # those of an H100 or H200


def resolve_scale(scale: Any, default: float, name: str = "scale") -> float:
    """Returns `scale` as a float (0.0 included), or the default if it is None. Errors call it by the argument's name."""
    if scale is None:
        return default
    check_number(name, scale)
    return float(scale)


def scaled_dot_default(head_dim: int) -> float:
    """Returns 1/sqrt(D); 1 if D is 0, since every score is 0."""
    return 1.0 / math.sqrt(head_dim) if head_dim else 1.0


def cast_by_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Returns the tensors in autocast's dtype if autocast is on, except float64, like scaled_dot_product_attention."""
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Autocast off for tensors like `like`."""
    return torch.autocast(like.device.type, enabled=False) if autocasts(like) else _NOTHING


def cast_finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`. A finite value stays finite, at most the largest of `dtype`: a mask of -1e300 hides nothing, and -inf in a
    log-sum-exp means that the row sees no key."""
    narrow = x.to(dtype)
    if torch.finfo(x.dtype).max <= torch.finfo(dtype).max:
        return narrow
    lost = torch.isinf(narrow) & ~torch.isinf(x)  # not clamp, whose gradient at its bounds differs between versions of torch
    return torch.where(lost, narrow.sign() * torch.finfo(dtype).max, narrow)


def cast_float_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A float mask in `dtype`, for kernels that read one dtype; a bool mask unchanged. Only -inf masks."""
    if mask.dtype in (torch.bool, dtype):
        return mask
    return cast_finite(mask, dtype)


def masked_logits(
    score: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None, rows: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """The logits of rows of `score` (B, H, N, M): float masks and the `bias` of groups added, masked pairs -inf.

    attn_mask and bias are those of these rows, key_mask (B, M); rows (N, 1) or (B, 1, N, 1) are their numbers if the call is
    causal, else None. What is added is so in the wider of its dtype and the dtype of sums: in 16 bits a bias would lose digits,
    and finfo.min plus a negative score would be -inf, which masks.
    """
    added = [each for each in (bias, attn_mask) if each is not None and each.dtype != torch.bool]
    for each in added:
        dtype = torch.promote_types(compute_dtype(score), each.dtype)
        score = score.to(dtype) + each.to(dtype)
    # Inf or NaN plus -inf is NaN, but masked pairs must be -inf; on a CPU a sum that looks for NaN is cheaper than to fill them
    fills = not (added and score.device.type == "cpu" and readable(score)) or bool(score.sum().isnan())
    masked = [torch.isneginf(each) for each in added if fills]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        masked.append(~attn_mask)
    if key_mask is not None:
        masked.append(~key_mask[:, None, None])
    if rows is not None:
        masked.append(torch.arange(score.shape[-1], device=score.device) > rows)
    for pairs in masked:
        score = score.masked_fill(pairs, -torch.inf)
    return score


_HAS_AMX = torch.cpu._is_amx_tile_supported()
_TILE = 32 if _HAS_AMX else 1  # numbers of 16 bits that torch's products on this CPU read at once
# Multiplications that torch does faster in float32 than in 16 bits on a CPU: oneDNN takes 10 microseconds to begin. Without AMX
# torch does fewer itself.
_IN_FLOAT32 = range(0 if _HAS_AMX else 16**3 + 1, 2**16 + 1)


def reads_rows_alone(x: Tensor, factor: Tensor) -> bool:
    """Whether torch's products of `x` by this matrix read nothing beyond rows. In 16 bits on a CPU with AMX they read up to the
    next multiple of 32 numbers, into the next row or a gap, and multiply by 0: Inf and NaN there spoil the row
    (docs/developers/bugs.md)."""
    if _TILE == 1 or (x.dtype.itemsize != 2 and not autocasts(x)):
        return True
    return x.device.type != "cpu" or not any([size % _TILE for size in factor.shape[-2:]])


def product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b, forward and backward from only the rows: `reads_rows_alone`, or both padded with zeros."""
    if reads_rows_alone(a, b):
        return a @ b
    size, columns = b.shape[-2:]
    missing = -size % _TILE
    return (F.pad(a, (0, missing)) @ F.pad(b, (0, -columns % _TILE, 0, missing)))[..., :columns]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.mT + bias, weight (A, D) and bias (A), or weight (H, A, D) without a bias. It is the `product`, or in float32
    if that is faster."""
    if weight.dim() == 2:
        in_16_bits = x.dtype.itemsize == 2 and x.is_cpu and not torch.compiler.is_compiling()
        if in_16_bits and x.numel() * weight.shape[0] in _IN_FLOAT32 and not autocasts(x):
            return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
        if _TILE == 1 or reads_rows_alone(x, weight):
            return F.linear(x, weight, bias)
    y = product(x, weight.mT)
    return y if bias is None else y + bias


SHORT_PAIRS = 1 << 19  # pairs of a query and a key, over all heads and samples


def has_short_backward(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether attention will have a backward pass over at most SHORT_PAIRS pairs. Code of torch.jit.trace may have one."""
    has_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not (has_gradient or is_jit_traced()):
        return False
    batch, heads, queries = query.shape[:3]
    return batch * heads * queries * key.shape[2] <= SHORT_PAIRS


def unit_stride(x: Tensor) -> Tensor:
    """Returns `x`, copied if its last stride is not 1, which every kernel assumes."""
    return x if x.stride()[-1] == 1 or x.shape[-1] <= 1 else x.contiguous()


def unit_strides(*tensors: Tensor | None) -> tuple[Any, ...]:
    """`unit_stride` of the tensors that are not None."""
    return tuple([x if x is None or x.stride()[-1] == 1 else unit_stride(x) for x in tensors])


def rows_first(x: Tensor) -> Tensor:
    """`x` (B, H, N, D) laid out as (B, N, H, D), without a copy if it already is. Fake implementations promise this layout for
    every backend. SDPA has the same layout, so heads merge without a copy.
    """
    strides = _rows_first_strides(*x.shape[1:])
    return x if x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)


def empty_rows_first(like: Tensor, num_heads: int, length: int, size: int) -> Tensor:
    """An uninitialised (B, H, N, D) tensor in the layout of `rows_first`."""
    return like.new_empty_strided((like.shape[0], num_heads, length, size), _rows_first_strides(num_heads, length, size))


def _rows_first_strides(heads: int, length: int, size: int) -> tuple[int, ...]:
    return length * heads * size, size, heads * size, 1


def as_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` in the layout of `rows_first`, or in that of `x` (B, H, N, D) if `x` is contiguous.

    Autograd copies gradients whose strides differ from x's. Within `promised_layouts` the layout is always that of `rows_first`:
    an operator must return the strides that its fake declares.
    """
    return grad.contiguous() if x.is_contiguous() and not LAYOUTS.promised else rows_first(grad)


def empty_gradient(x: Tensor, num_heads: int | None = None) -> Tensor:
    """Uninitialised, in the layout of `as_gradient`; with more heads than `x` has, in float32, to be summed."""
    batch, heads, length, size = x.shape
    num_heads = heads if num_heads is None else num_heads
    shape, dtype = (batch, num_heads, length, size), x.dtype if num_heads == heads else torch.float32
    if x.is_contiguous() and not LAYOUTS.promised:
        return x.new_empty(shape, dtype=dtype)
    return x.new_empty_strided(shape, _rows_first_strides(num_heads, length, size), dtype=dtype)


@contextmanager
def promised_layouts() -> Iterator[None]:
    """A context around a registered operator: this thread's gradients have the layout that the fake implementation promises."""
    before, LAYOUTS.promised = LAYOUTS.promised, True
    try:
        yield
    finally:
        LAYOUTS.promised = before


class _Layouts(threading.local):
    promised = False


LAYOUTS = _Layouts()


def saved_for_the_last_time() -> bool:
    """Whether what was saved for this backward pass may be overwritten: no other pass will read it (retain_graph=True), and the
    operator is not a registered one, which promises to leave its inputs."""
    return not (LAYOUTS.promised or _keeps_graph())


_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def weigh_rows(carried: Tensor, weight: Tensor | None) -> Tensor:
    """`carried` (B, T, N) times a weight broadcastable to (B, N), if any."""
    return carried if weight is None else carried * weight[:, None]


def not_zero(divisor: Tensor) -> Tensor:
    """1 for a divisor of zero; NaN stays NaN."""
    return torch.where(divisor == 0, 1.0, divisor)


def over_sums(rows: Tensor) -> Tensor:
    """Each row over its sum; rows of zeros stay zeros."""
    return rows / not_zero(rows.sum(-1, keepdim=True))


def mask_padding(key_mask: Tensor | None, *tensors: Tensor | None, fill: float = 0.0) -> tuple[Any, ...]:
    """(B, Hkv, M, *) tensors with `fill` at padding, so that NaN or Inf there reaches no output and no gradient."""
    if key_mask is None:
        return tensors
    visible = key_mask[:, None, :, None]
    return tuple(None if x is None else torch.where(visible, x, fill) for x in tensors)


def blocks_of_keys(x: Tensor, size: int, fill: float) -> Tensor:
    """(..., M) in blocks of `size`, (..., M', size); `fill` behind the last key."""
    count = -(-x.shape[-1] // size)
    return F.pad(x, (0, count * size - x.shape[-1]), value=fill).unflatten(-1, (count, size))


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns (B, L, D) with zeros if mask (B, L) is False, so that NaN there reaches no output and no gradient."""
    return x if mask is None else torch.where(mask[..., None], x, 0.0)


def joined(first: Tensor | None, second: Tensor) -> Tensor:
    """Two masks as one: bool if both are bool."""
    if first is None:
        return second
    if first.dtype != torch.bool and second.dtype != torch.bool:
        return first + second
    if first.dtype == second.dtype:
        return first & second
    visible, added = (first, second) if first.dtype == torch.bool else (second, first)
    return torch.where(visible, added, -torch.inf)


# What models also hand to transformers' attention interface, and why it changes no attention here.
_HARMLESS = {
    "position_ids": "queries and keys have been turned by them, and masks tell packed sequences apart",
    "cache_position": "masks hold it",
    "use_cache": "the keys are those of the cache",
    "do_sample": "of generation",
    "logits_to_keep": "of the head",
    "num_items_in_batch": "of the loss",
    "output_hidden_states": "models collect them",
    "output_router_logits": "models collect them",
    "vision_feature_layer": "which of the collected ones",
    "image_sizes": "of the pixels",
    "image_num_crops": "of the pixels",
    "qformer_input_ids": "of the Q-Former",
    "qformer_attention_mask": "of the Q-Former",
    "deterministic": "of flash attention's backward pass",
    "max_length_q": "follows from where packed sequences begin",
    "max_length_k": "follows from where packed sequences begin",
}


def masks_of(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    *,
    causal_by_module: bool,
    are_first: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """attn_mask, is_causal and enable_gqa of a call of transformers' interface for SDPA; and softcap and sink for
    score_attention, if the call has them.

    A mask already contains causality and windows. Without a mask `is_causal` decides; if `is_causal` is None,
    `module.is_causal` decides if `causal_by_module` is set (SDPA's rule). Then several causal queries are the first of all tokens
    if `are_first`, else the last ones. An indexer's keys, `indices` (B, N, K) or `block_indices` (B, Hkv, N, K) with -1 for none,
    are a further mask.

    Raises:
        ValueError: an option that no attention operator supports; a window without a mask.
    """
    if output_attentions:
        raise ValueError(f"model must use va.explain for attention maps; got output_attentions=True in {type(module).__name__}")
    for name, option in options.items():
        if option is not None and name not in _HARMLESS:
            raise ValueError(
                f"model must not call attention with {name!r}, which no attention operator supports; got it from "
                f"{type(module).__name__}. Use the model's own attention, attn_implementation='eager'"
            )
    if attention_mask is None and sliding_window is not None and sliding_window < key.shape[2]:
        raise ValueError(
            f"model must pass the mask of a sliding window; got {type(module).__name__} with window {sliding_window} and no mask"
        )

    causal = attention_mask is None and query.shape[2] > 1
    if causal:
        causal = getattr(module, "is_causal", True) if is_causal is None and causal_by_module else bool(is_causal)
    more = [_chosen_keys(module, query, key, indices, block_indices), position_bias, _packed(query, cu_seq_lens_q, cu_seq_lens_k)]
    before = 0 if are_first else max(0, key.shape[2] - query.shape[2])
    if causal and (before or any(mask is not None for mask in more)):
        size = query.shape[2], key.shape[2]
        attention_mask, causal = torch.ones(size, dtype=torch.bool, device=query.device).tril(before), False
    for mask in (mask for mask in more if mask is not None):
        attention_mask = joined(attention_mask, mask)
    also = {name: option for name, option in (("softcap", softcap), ("sink", s_aux)) if option is not None}
    return {"attn_mask": attention_mask, "is_causal": causal, "enable_gqa": key.shape[1] != query.shape[1], **also}


def _chosen_keys(module: Any, query: Tensor, key: Tensor, indices: Tensor | None, blocks: Tensor | None) -> Tensor | None:
    """Returns the keys that an indexer has chosen, bool (B, 1 or H, N, M); None = all."""
    chosen = None
    if indices is not None:
        chosen = _scattered(indices[:, None], key.shape[2])
    if blocks is not None:
        size = module.indexer.block_size
        chosen_blocks = expand_heads(_scattered(blocks, -(-key.shape[2] // size)), query.shape[1])
        chosen = joined(chosen, chosen_blocks.repeat_interleave(size, -1)[..., : key.shape[2]])
    return chosen


def _packed(query: Tensor, of_queries: Tensor | None, of_keys: Tensor | None) -> Tensor | None:
    """Returns the keys of each query's own sequence, bool (N, M); None = all."""
    if of_queries is None or of_keys is None:
        return None
    queries, keys = (torch.arange(len(x) - 1, device=query.device).repeat_interleave(x.diff()) for x in (of_queries, of_keys))
    return queries[:, None] == keys


def _scattered(indices: Tensor, size: int) -> Tensor:
    """Returns bool (..., N, size), True at the indices (..., N, K); -1 = none."""
    indices = indices.long()
    marks = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device)
    return marks.scatter(-1, indices.where(indices >= 0, size), True)[..., :size]


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x.to(dtype); the comparison saves most of a microsecond if the dtype is right."""
    return x if x.dtype == dtype else x.to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pad_head_dim(*tensors: Tensor) -> list[Tensor]:
    """Returns (B, H, *, D) tensors padded with zeros to one D, with a last stride of 1, for torch's fused CPU kernel."""
    size = max(x.shape[3] for x in tensors)
    padded = [x if x.shape[3] == size else F.pad(x, (0, size - x.shape[3])) for x in tensors]
    return [x if x.stride(3) == 1 else x.contiguous() for x in padded]


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, Hkv, M, D) as (B, H, M, D) for grouped-query attention: query head h reads key head h // (H / Hkv)."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def fold_heads(grad: Tensor, num_key_heads: int) -> Tensor:
    """The gradient of expand_heads: the sum over the query heads that share a key head."""
    return grad if grad.shape[1] == num_key_heads else grad.unflatten(1, (num_key_heads, -1)).sum(2)


def unit_vectors(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / |x| and |x| along the last axis, both in the dtype of sums.

    Each vector is divided by its largest entry before the squares are summed, so that no norm overflows or underflows. A zero
    vector stays zero; with eps = 0 it gives NaN, like q . k / (|q| |k|).
    """
    x = x.to(compute_dtype(x))
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    divisor = torch.where(largest > 0, largest, 1.0) if eps > 0 else largest
    scaled = x / divisor
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    unit = scaled / (torch.where(norm > 0, norm, 1.0) if eps > 0 else norm)
    return unit, (divisor * norm).squeeze(-1)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Returns the number of a GPU's multiprocessors; a large GPU's number if kernels are interpreted or emulated on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else EMULATED_MULTIPROCESSORS


def as_outputs(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The outputs of an operator, laid out as its fake says."""
    return tuple([None if x is None else x.contiguous() for x in tensors])


def as_fake_outputs(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Returns the fake of `as_outputs`, with outputs like these tensors."""
    return tuple([None if x is None else x.new_empty(x.shape) for x in tensors])


def lse_is_lost(lse: Tensor) -> Tensor:
    """Rows whose log-sum-exp was rounded by more than 1/1024: |lse| >= 2^14 in float32, 2^43 in float64.

    P = exp(logit - lse) would be wrong by more than 0.1 %, and by all of log M where every key of a row has a mask of -1e9.
    """
    bound = 2.0**-9 / torch.finfo(lse.dtype).eps
    return torch.isfinite(lse) & (lse.abs() >= bound)
