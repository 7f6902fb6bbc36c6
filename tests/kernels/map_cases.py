"""Sizes and masks that the tests of attention_map and attention_statistics share."""

from __future__ import annotations

import torch
from torch import Tensor

B, H, N, M = 2, 4, 6, 9


def bool_mask(n: int, m: int) -> Tensor:
    mask = torch.rand(B, 1, n, m) > 0.4
    mask[0, :, n // 2] = False  # a query without a visible key
    return mask


def float_mask(m: int) -> Tensor:
    """With -inf, and with the most negative finite value, which hides nothing."""
    mask = torch.randn(2, 1, m).masked_fill(torch.rand(2, 1, m) > 0.7, -torch.inf)
    return mask.masked_fill(torch.rand(2, 1, m) > 0.9, torch.finfo(torch.float32).min)


def key_mask(m: int) -> Tensor:
    mask = torch.rand(B, m) > 0.3
    mask[1] = False
    return mask
