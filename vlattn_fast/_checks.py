"""What every public call asks of its arguments. Each message names the argument, what is wanted and what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(x: Any) -> str:
    """A value as an error message shows it: tensors by dtype, shape and device."""
    if isinstance(x, Tensor):
        return f"a {x.dtype} tensor of shape {tuple(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r:.80}"


def check_tensor(name: str, x: Any, *, rank: int | None = None, shape: str = "") -> None:
    """`x` is a tensor, and of `rank` dimensions; `shape` is the legend the message shows."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {shape}; got {describe(x)}")
    if rank is not None and x.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions {shape}; got {describe(x)}")


def check_floating(**tensors: Tensor) -> None:
    """All share one device and one floating dtype; under autocast, which casts them, each may have its own."""
    first_name, first = next(iter(tensors.items()))
    if first.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{first_name} must be float16, bfloat16, float32 or float64; got {describe(first)}")
    mixed = torch.is_autocast_enabled(first.device.type)
    for name, x in tensors.items():
        if x.dtype != first.dtype and not (mixed and x.dtype in FLOAT_DTYPES):
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}; got {describe(x)}")
        check_device(name, x, first_name, first)
        if not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0:  # private: may go away
            _check_no_tangent(name, x)


def _check_no_tangent(name: str, x: Tensor) -> None:
    """Without this, torch would give an operator that has no forward-mode formula a tangent of zero, in silence."""
    if forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(
            f"{name} must not carry a forward-mode tangent (jvp): there is only reverse mode here; vlattn_fast.reference has both"
        )


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {describe(x)}")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not isinstance(value, (str, type(None))):
        raise TypeError(f"{name} must be one of {allowed}; got {describe(value)}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}")


def check_bool(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {describe(value)}")


def check_number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, open_high: bool = False) -> None:
    """A finite real number in [low, high] (or [low, high) with open_high)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number; got {describe(value)}")
    if not math.isfinite(value) or value < low or value > high or (open_high and value == high):
        raise ValueError(f"{name} must be a finite number in [{low}, {high}{')' if open_high else ']'}; got {value!r}")


def check_heads(query: Tensor, key: Tensor, enable_gqa: bool, *, key_name: str = "key") -> None:
    """Batch and head counts of query (B,H,N,D) and key (B,Hkv,M,D) fit."""
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"{key_name} must have query's batch size {query.shape[0]}; got {describe(key)}")
    if enable_gqa:
        if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
            raise ValueError(
                f"{key_name}'s number of heads must divide query's {query.shape[1]} under enable_gqa; got {describe(key)}"
            )
    elif key.shape[1] != query.shape[1]:
        raise ValueError(
            f"{key_name} must have query's {query.shape[1]} heads (enable_gqa=True allows fewer); got {describe(key)}"
        )


def check_head_dim(query: Tensor, key: Tensor) -> None:
    """query (B,H,N,D) and key (B,Hkv,M,D) have one head size."""
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have query's head size {query.shape[-1]}; got {describe(key)}")


def check_value(value: Tensor, key: Tensor) -> None:
    """value (B,Hkv,M,Dv) has key's batch, heads and length."""
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have key's batch, heads and length {tuple(key.shape[:3])} in its first three dimensions; "
            f"got {describe(value)}"
        )


def check_grad_output(grad_output: Tensor, query: Tensor, value: Tensor) -> None:
    """grad_output (B,H,N,Dv) is the gradient of the attention's output."""
    wanted = (*query.shape[:3], value.shape[3])
    if grad_output.shape != wanted:
        raise ValueError(f"grad_output must have the shape {wanted} of the attention's output; got {describe(grad_output)}")


def check_masks(query: Tensor, key: Tensor, attn_mask: Any, key_mask: Any, is_causal: Any) -> None:
    """attn_mask broadcasts to (B,H,N,M), bool or float; key_mask is bool (B,M)."""
    check_bool(is_causal=is_causal)
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask, shape="(broadcastable to B, H, N, M)")
        if attn_mask.dtype != torch.bool and attn_mask.dtype not in FLOAT_DTYPES:
            raise TypeError(f"attn_mask must be bool (True = may attend) or floating point (added); got {describe(attn_mask)}")
        check_device("attn_mask", attn_mask, "query", query)
        full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        given = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
        if attn_mask.dim() > 4 or any(g != 1 and g != f for g, f in zip(given, full, strict=True)):
            raise ValueError(f"attn_mask must broadcast to (B, H, N, M) = {full}; got {describe(attn_mask)}")
        if attn_mask.requires_grad:
            raise ValueError("attn_mask must not require a gradient: none is computed for it; pass attn_mask.detach()")
    if key_mask is not None:
        check_tensor("key_mask", key_mask, rank=2, shape="(B, M)")
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be bool (True = a real token); got {describe(key_mask)}")
        check_device("key_mask", key_mask, "query", query)
        if key_mask.shape[0] != key.shape[0] or key_mask.shape[1] != key.shape[2]:
            raise ValueError(f"key_mask must have shape (B, M) = {(key.shape[0], key.shape[2])}; got {describe(key_mask)}")
