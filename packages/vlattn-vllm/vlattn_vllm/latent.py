"""Multi-head latent attention (MLA), as the operator takes it.

The cache has one latent and one rotated key a token, which all heads share. A head's logit is the product of its query, whose
first features are multiplied by the head's projection of latents to keys, with that latent and key: attention with one key head.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Absorbed:
    """Queries (tokens, heads, latent + rotated features). Only the rows that are read are computed.

    Args:
        query: (tokens, heads, features + rotated features).
        projection: (heads, features, latent features).
    """

    def __init__(self, query: Tensor, projection: Tensor) -> None:
        self.device = query.device
        self.shape = (*query.shape[:2], projection.shape[2] + query.shape[2] - projection.shape[1])
        self._query, self._projection = query, projection

    def __getitem__(self, rows: Tensor) -> Tensor:
        features = self._projection.shape[1]
        plain, rotated = self._query[rows].split([features, self._query.shape[2] - features], -1)
        return torch.cat([torch.einsum("nhp,hpl->nhl", plain, self._projection), rotated], -1)


def as_attention(layer: Any, query: Tensor, metadata: Any, lengths: list[int]) -> tuple[Any, Any, Any]:
    """(impl, query, metadata) of a layer, with the fields of attention with keys. lengths: of the requests of the batch."""
    impl, parts = layer.impl, (metadata.decode, metadata.prefill)
    reasons = {
        "attends to keys that an indexer chooses": getattr(impl, "is_sparse", False)
        or getattr(impl, "indexer", None) is not None,
        "attends within a window": getattr(layer, "sliding_window", None) is not None,
        "has no projection of latents as a tensor": not isinstance(getattr(layer, "W_UK_T", None), Tensor),
    }
    refused = next((f"{layer.layer_name} {reason}" for reason, holds in reasons.items() if holds), None)
    fields = {"refused": refused, "attn_type": "decoder", "scale": impl.scale, "logits_soft_cap": None, "sliding_window": -1}
    if refused:
        return SimpleNamespace(**fields), query, metadata
    decodes = [] if metadata.decode is None else metadata.decode.seq_lens[: metadata.num_decodes].tolist()
    counts = metadata.num_decodes, metadata.num_prefills
    tables = [part.block_table[:count] for part, count in zip(parts, counts, strict=True) if part]
    rows = SimpleNamespace(
        block_table=torch.cat(tables),
        query_start_loc=metadata.query_start_loc,
        seq_lens=torch.tensor([*decodes, *lengths[len(decodes) :]]),  # a prompt's has no field
        causal=metadata.causal,
    )
    return SimpleNamespace(**fields), Absorbed(query, layer.W_UK_T), rows
