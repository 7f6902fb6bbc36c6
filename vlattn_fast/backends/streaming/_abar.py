"""One tile of Abar, the map A or relu(A * dA) reduced over the heads, for relevancy and attention maps."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, expand_heads
from vlattn_fast.backends.inputs import AttentionMapInputs, RelevancyStepInputs
from vlattn_fast.backends.streaming._scores import score_tile
from vlattn_fast.backends.streaming._tiles import Masks, Tiling, probabilities


class Abar:
    """Abar of a call, tile by tile. `vector`: that of a core score that sums over hidden units.

    rule "attention": A; "gradient": relu(A * dA), dA = grad_output @ value^T. row_normalize divides each row by its sum; a zero
    row stays zero. lse as in `probabilities`.
    """

    def __init__(
        self, inputs: AttentionMapInputs | RelevancyStepInputs, vector: Tensor | None, head_reduction: str = "mean"
    ) -> None:
        self.inputs, self.vector, self.head_reduction = inputs, vector, head_reduction
        num_heads = inputs.query.shape[1]
        self.key = expand_heads(inputs.key, num_heads)
        self.value = None if inputs.value is None else expand_heads(inputs.value, num_heads)
        self.masks = Masks(inputs.attn_mask, inputs.key_mask, inputs.is_causal)

    def tile(self, b: slice, i: slice) -> Tensor:
        """Rows i of the samples b, (b, i, M)."""
        inputs, key = self.inputs, self.key
        query, scale, head_reduction = inputs.query, inputs.scale, self.head_reduction
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        dtype = compute_dtype(query)
        abar: Tensor | None = None
        for h in Tiling(*shape).heads():
            q, k = query[b, h, i].to(dtype), key[b, h].to(dtype)
            if inputs.score == "dot":
                tile = (q * scale) @ k.mT
            else:
                vector = None if self.vector is None else self.vector[h].to(dtype)
                tile = score_tile(inputs.score, q, k, vector, inputs.parameter) * scale
            logits = self.masks.apply(tile, shape, b, h, i)
            tile = probabilities(logits, dtype, None if inputs.lse is None else inputs.lse[b, h, i].to(dtype))
            if inputs.rule == "gradient":
                assert self.value is not None and inputs.grad_output is not None
                tile = tile.mul_(inputs.grad_output[b, h, i].to(dtype) @ self.value[b, h].to(dtype).mT).clamp_min_(0.0)
            if head_reduction == "mean":
                tile = tile[:, 0] if tile.shape[1] == 1 else tile.sum(1)
                abar = tile if abar is None else abar.add_(tile)
            else:
                reduce, combine = (torch.amax, torch.maximum) if head_reduction == "max" else (torch.amin, torch.minimum)
                tile = reduce(tile, 1)
                abar = tile if abar is None else combine(abar, tile)
        if abar is None:  # no heads
            return query.new_zeros((b.stop - b.start, i.stop - i.start, key.shape[2]), dtype=dtype)
        if head_reduction == "mean" and not inputs.row_normalize:
            abar = abar.mul_(1.0 / shape[1])
        if inputs.row_normalize:
            total = abar.sum(-1, keepdim=True)
            abar = abar / torch.where(total == 0, 1.0, total)
        return abar
