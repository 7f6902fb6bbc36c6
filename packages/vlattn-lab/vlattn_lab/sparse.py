"""Sparse attention as DeepSeek-V3.2 trains it: an indexer scores all earlier tokens, and a query attends to those with the
largest scores. The indexer learns from the attention, and the attention never from the indexer's loss.

`with_indexers(model)` puts one into each attention layer of a model of transformers, which first attends densely (the warm-up).
With `indexer.keys = 8` each query attends to 8 keys. A training adds `indexer.loss` of each to the model's own loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import vlattn_fast as va

HEADS, SIZE = 4, 16  # of an indexer


class Indexer(nn.Module):
    """Scores (B, N, N) of keys for queries, sum_h w_h relu(q_h . k), from the attention's own queries and keys, detached."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(features, HEADS * SIZE), nn.Linear(features, SIZE)
        self.weights = nn.Linear(features, HEADS)
        self.keys: int | None = None  # that a query attends to; None = all
        self.loss = self.recall = torch.zeros(())  # of the last call

    def parts(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q' (B, Hi, N, Di), k' (B, N, Di) and w (B, Hi, N) from query and key (B, H, N, D)."""
        of_query, of_key = (x.detach().transpose(1, 2).flatten(2) for x in (query, key))
        weights = self.weights(of_query).mT * (HEADS * SIZE) ** -0.5
        return self.query(of_query).unflatten(2, (HEADS, SIZE)).transpose(1, 2), self.key(of_key), weights


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
    """An attention of transformers' interface. Padding lies behind the words, so that no word attends to it."""
    indexer: Indexer = module.indexer
    parts = indexer.parts(query, key)
    options: dict[str, Any] = {"is_causal": True, "scale": scaling}
    chosen = None if indexer.keys is None else top(scores(*parts), indexer.keys)
    seen = None if chosen is None else torch.zeros(query.shape[0], 1, *[query.shape[2]] * 2, dtype=torch.bool)
    if seen is not None and chosen is not None:
        seen.scatter_(3, chosen[:, None], True)
    out, lse = va.score_attention(query, key, value, attn_mask=seen, return_lse=True, **options)
    teacher = query.detach(), key.detach()
    rows = va.indexer_divergence(*teacher, *parts, teacher_lse=lse.detach(), topk_indices=chosen, **options)
    indexer.loss, indexer.recall = rows.mean(), recall(query, key, parts, scaling)
    return out.transpose(1, 2), None


def scores(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    """Those of an indexer, -inf for later tokens."""
    found = (weights[..., None] * (query @ key[:, None].mT).relu()).sum(1)
    return causal(found)


def causal(x: Tensor) -> Tensor:
    return x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)


def top(x: Tensor, keys: int) -> Tensor:
    return x.detach().topk(min(keys, x.shape[-1])).indices


@torch.no_grad()
def recall(query: Tensor, key: Tensor, parts: tuple[Tensor, Tensor, Tensor], scale: float, keys: int = 8) -> Tensor:
    """The share of the keys with the largest attention, mean of the heads, that the indexer has among its own, in the mean over
    queries with more than `keys` to choose from."""
    attention = causal(scale * query @ key.mT).softmax(-1).mean(1)
    true, own = (torch.zeros_like(attention).scatter(2, top(x, keys), 1.0) for x in (causal(attention), scores(*parts)))
    return (true * own)[:, keys:].sum(-1).mean() / keys


def with_indexers(model: Any) -> dict[str, Indexer]:
    """Gives each attention layer of the model's text decoder an indexer, and returns them by their layer's name."""
    from transformers import AttentionInterface

    AttentionInterface.register("indexed", attend)
    language, found = model.model.language_model, {}
    for name, module in language.named_modules():
        if hasattr(module, "k_proj"):
            module.indexer = found[name] = Indexer(module.config.num_attention_heads * module.head_dim)
    language.set_attn_implementation("indexed")
    return found
