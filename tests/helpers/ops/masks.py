"""Masks of every kind, by the sizes (B, H, N, M) of a call."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


def visible(*shape: int) -> Tensor:
    """Most pairs; of the second query none."""
    seen = torch.rand(shape) < 0.7
    seen[..., 1 % shape[-2], :] = False
    return seen


def hidden(*shape: int) -> Tensor:
    return torch.randn(shape).masked_fill(~visible(*shape), -torch.inf)


def real_keys(batch: int, keys: int) -> Tensor:
    """Padding between the first sample's keys and after them; all keys of the second."""
    mask = (torch.arange(keys) % 3 != 1).repeat(batch, 1)
    mask[0, -2:] = mask[1] = False
    return mask


SHAPES = ("", "N1", "1M", "1NM", "B1N1", "H1M", "1HNM", "BHNM")  # that broadcast to (B, H, N, M)


def shaped(shape: str, **sizes: int) -> dict[str, Tensor]:
    size = [{**sizes, "1": 1}[letter] for letter in shape]
    return {"attn_mask": torch.randn(size) if len(shape) % 2 else torch.rand(size) < 0.7}


MASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "all": lambda B, H, N, M: {"attn_mask": hidden(N, M), "key_mask": real_keys(B, M), "is_causal": True},
    "all, bool": lambda B, H, N, M: {"attn_mask": visible(N, M), "key_mask": real_keys(B, M), "is_causal": True},
    "bool": lambda B, H, N, M: {"attn_mask": visible(B, 1, N, M)},
    "bool of each H": lambda B, H, N, M: {"attn_mask": torch.stack([visible(N, M).roll(h, 0) for h in range(H)])[None]},
    "float": lambda B, H, N, M: {"attn_mask": hidden(B, 1, N, M)},
    "bool, strided": lambda B, H, N, M: {"attn_mask": visible(N, 2 * M)[:, ::2]},
    "float, transposed": lambda B, H, N, M: {"attn_mask": hidden(M, N).mT},
    "float, expanded": lambda B, H, N, M: {"attn_mask": torch.randn(B, 1, 1, M).expand(B, 1, N, M)},
    "finite numbers over a row": lambda B, H, N, M: {"attn_mask": torch.where(visible(N, M), torch.randn(N, M), LOWEST)},
    "keys": lambda B, H, N, M: {"key_mask": real_keys(B, M)},
    "keys of each sample": lambda B, H, N, M: {"key_mask": torch.arange(M) % torch.tensor([[2], [3]]) == 0},
    "causal": lambda B, H, N, M: {"is_causal": True},
    "keys and causal": lambda B, H, N, M: {"key_mask": real_keys(B, M), "is_causal": True},
    "no pair": lambda B, H, N, M: {"attn_mask": torch.zeros(N, M, dtype=torch.bool)},
    **{f"shape {shape}": partial(shaped, shape) for shape in SHAPES},
}
COMMON = ("bool", "float", "finite numbers over a row", "keys", "causal", "keys and causal", "all", "all, bool")


def masks_of(name: str, n: int, m: int) -> dict[str, Any]:
    """For two samples and two heads."""
    return {} if name == "none" else MASKS[name](B=2, H=2, N=n, M=m)
