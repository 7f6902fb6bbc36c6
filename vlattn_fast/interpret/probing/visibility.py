"""Which kinds of tokens a query sees under the masks of an attention call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.probing.layout import IMAGE, Layout

_NOTHING = -80.0  # a bias so far below the largest leaves a weight of 1e-35 at most
_ROWS = 256  # queries at a time, so that no whole map is in memory


def sees_both(masks: Mapping[str, Any], layout: Layout, groups: Tensor) -> Tensor:
    """bool (B, H or 1, N): image tokens that see a word and every image token of their sample.

    Under a causal mask the first patches see little but what comes before the image, so that any head would seem to look at the
    text there; and if the image comes first, no patch sees a word.
    """
    is_image = groups == IMAGE
    kinds = torch.stack([layout.words.to(groups.device), is_image], -1).float()  # (B, N, 2)
    parts = [_visible_counts(masks, rows, kinds) for rows in torch.arange(groups.shape[1], device=groups.device).split(_ROWS)]
    words, image = torch.cat(parts, 2).unbind(-1)  # (B, H or 1, N) each
    return is_image[:, None] & (words > 0) & (image == kinds[..., 1].sum(-1)[:, None, None])


def _visible_counts(masks: Mapping[str, Any], rows: Tensor, kinds: Tensor) -> Tensor:
    """(B, H or 1, rows, 2), how many keys of each kind these queries see."""
    visible = torch.ones(1, 1, len(rows), kinds.shape[1], dtype=torch.bool, device=rows.device)
    if masks.get("is_causal"):
        visible = rows[:, None] >= torch.arange(kinds.shape[1], device=rows.device)
    if (mask := masks.get("attn_mask")) is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
        mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
        visible = visible & (mask if mask.dtype == torch.bool else mask - mask.amax(-1, keepdim=True) > _NOTHING)
    if (padding := masks.get("key_mask")) is not None:
        visible = visible & padding[:, None, None]
    visible = visible.expand(len(kinds), -1, len(rows), kinds.shape[1]) if visible.ndim == 4 else visible
    return visible.float() @ kinds[:, None]
