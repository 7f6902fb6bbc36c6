"""The published rules for one sequence whose tokens run in two towers: their maps beside one another are those of all tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

METHODS = ("gradient", "gradient:no_aggregation", "weighted", "rollout", "attention", "gradcam")


def beside(first: Tensor | None, second: Tensor | None, sizes: tuple[int, int]) -> Tensor:
    """A map (B, H, N, N) of N = N1 + N2 tokens, from that of the first N1 to one another, and of the others to all."""
    size, like = sum(sizes), first if first is not None else second
    assert like is not None
    rows = [like.new_zeros(*like.shape[:2], count, size) for count in sizes]
    if first is not None:
        rows[0] = functional.pad(first, (0, sizes[1]))
    if second is not None:
        rows[1] = second
    return torch.cat(rows, 2)


def one_sequence(
    method: str, layers: Sequence[tuple[Tensor, Tensor]], read: int | Tensor, real: Tensor | None = None, last: int = 0
) -> Tensor:
    """The row (B, N) of each method from the maps of all layers and their gradients, with weights of 1 for "weighted". The entry
    of the token that is read is zero. `real` (B, N), False = padding; `last`: how many tokens the second tower has."""
    batch, _, size, _ = layers[-1][0].shape
    row = torch.eye(size, dtype=layers[-1][0].dtype)[read].expand(batch, -1)
    at = row == 1
    if method in ("attention", "gradcam"):
        attention, gradient = layers[-1]
        if method == "attention":
            mean = attention.mean(1)
        else:
            gradient = gradient[:, :, size - last :]
            real = torch.ones(batch, size, dtype=torch.bool) if real is None else real
            kept = real[:, None, None].expand_as(gradient)
            weights = (gradient * kept).sum((2, 3)) / kept[:, 0].sum((1, 2))[:, None]
            mean = (weights[..., None, None] * attention).mean(1).relu()
        row = torch.einsum("bn,bnm->bm", row, mean)
    else:
        for attention, gradient in reversed(layers):
            if method == "rollout":  # a tower that does not attend here stays
                attends = attention.mean(1).sum(-1) > 0
                row = torch.where(attends, row / 2, row) + torch.einsum("bn,bnm->bm", row / 2, attention.mean(1))
                continue
            abar = (attention * gradient).relu().mean(1)
            if method == "weighted":
                abar = abar / abar.sum(-1, keepdim=True).masked_fill(abar.sum(-1, keepdim=True) == 0, 1)
            stays = attention.mean(1).sum(-1) == 0 if method == "gradient:no_aggregation" else torch.ones_like(row).bool()
            row = row * stays + torch.einsum("bn,bnm->bm", row, abar)
    return row.masked_fill(at, 0.0)
