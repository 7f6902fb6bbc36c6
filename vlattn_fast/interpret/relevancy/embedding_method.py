"""Methods that take the gradient of a score at the embeddings that enter the towers, and ask nothing of the attention."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast.interpret.relevancy.embedding_trace import Embeddings
from vlattn_fast.interpret.relevancy.method import BackwardPass, Method
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


class EmbeddingMethod(Method):
    """A token counts by its embedding times the gradient there, combined over the features."""

    needs = "embeddings"
    reads_row = False
    kept: dict[TowerTrace, list[Embeddings]]  # several where an input is embedded several times

    def check_start_layer(self, start_layer: int) -> None:
        if start_layer != 0:
            raise ValueError(
                f"start_layer must be 0 for method {self.name!r}, which goes back to the embeddings; got {start_layer}"
            )

    def combine(self, products: Tensor, dim: int) -> Tensor:
        """Embedding times gradient, combined over the features: their sum."""
        return products.sum(dim)

    def carried(self, backward: BackwardPass) -> list[Tensor]:
        parts = [self.kept[tower] for tower in (*backward.towers, *backward.attended)]
        grads = iter(backward.gradients([part.passed for of_tower in parts for part in of_tower]))
        return [torch.stack([self.row_of(part, next(grads)) for part in of_tower]).sum(0) for of_tower in parts]

    def row_of(self, part: Embeddings, grad: Tensor | None) -> Tensor:
        """The row (B, 1, N) of embeddings, zero where the score does not depend on them."""
        values = part.values.detach()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return part.per_token(self.combine, values * (0.0 if grad is None else grad.to(values.dtype)))[:, None]
