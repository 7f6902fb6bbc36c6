"""The weights of relevancy_residual with plain PyTorch, tile by tile: 16-bit rows are widened to float32 only in a tile."""

from __future__ import annotations

from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.inputs import ResidualWeightsInputs
from vlattn_fast.backends.reference.relevancy_residual import residual_weights
from vlattn_fast.backends.streaming._tiles import Tiling


def backward(inputs: ResidualWeightsInputs) -> tuple[Tensor, Tensor]:
    """Returns a and b (B, N), by which the backward pass multiplies the carriers' gradients."""
    residual, branch, grad, weighting, _ = inputs
    batch, tokens, features = residual.shape
    a, b = (residual.new_empty(batch, tokens, dtype=compute_dtype(residual)) for _ in range(2))
    for tile in Tiling.of(residual, batch, 1, tokens, features).query_tiles():
        a[tile], b[tile] = residual_weights(residual[tile], branch[tile], grad[tile], weighting)
    return a, b
