"""Checks of the inputs that the models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import readable


def check_ids(ids: Any, vocab_size: int | None) -> None:
    """input_ids are int64 or int32 (B, T), from 0 to below `vocab_size`. Values on a GPU are not checked: that would wait."""
    _check_is_tensor("input_ids", ids)
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.shape[1]:
        raise ValueError(f"input_ids must be int64 (B, T), T at least 1; got {ids.dtype} {tuple(ids.shape)}")
    if vocab_size is not None and ids.device.type == "cpu" and readable(ids) and ids.numel():
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids must be from 0 to {vocab_size - 1}; got {low} to {high}")


def check_length(name: str, length: int, most: int | None) -> None:
    """At most as many tokens as the text encoder has positions, if its config names their number."""
    if most is not None and length > most:
        raise ValueError(f"{name} must have at most {most} tokens, the positions of text; got {length}")


def check_states(name: str, x: Any, sizes: tuple[int | None, ...]) -> None:
    """Raises unless x is floating point of these sizes; None stands for any size."""
    _check_is_tensor(name, x)
    fits = x.ndim == len(sizes) and all(size in (None, is_) for size, is_ in zip(sizes, x.shape, strict=True))
    if not fits or not x.is_floating_point():
        shape = ", ".join("*" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name} must be floating point ({shape}); got {x.dtype} {tuple(x.shape)}")


def check_mask(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    """Raises unless the mask is bool or integers of this shape, or None."""
    if mask is None:
        return
    _check_is_tensor(name, mask)
    if mask.shape != shape or mask.is_floating_point():
        raise ValueError(f"{name} must be bool {tuple(shape)}; got {mask.dtype} {tuple(mask.shape)}")


def _check_is_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
