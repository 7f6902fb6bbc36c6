"""Maps of attention that you cannot change: `va.relevancy_step` behind torch's scaled_dot_product_attention.

For one forward pass, the script replaces SDPA by a function that also keeps the inputs and the output of each call, so the
model's code does not change. autograd then gives the gradients of the outputs, and the script goes from the last layer to the
first: r <- r + r @ Abar. Neither SDPA nor relevancy_step stores an attention map.
"""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import vlattn_fast as va

torch.manual_seed(0)
sdpa = nn.functional.scaled_dot_product_attention
calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []


class Layer(nn.Module):
    """A layer of a foreign model."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return x + self.out(attended.transpose(1, 2).flatten(2))


def recording_sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    output = sdpa(query, key, value, **options)
    calls.append((query, key, value, output))
    return output


model = nn.Sequential(*(Layer(64, 4) for _ in range(4)))
x = torch.randn(2, 50, 64)  # (B, N, C)
with patch.object(nn.functional, "scaled_dot_product_attention", recording_sdpa):
    score = model(x)[:, 0].square().sum()  # any score that depends on the attention
gradients = torch.autograd.grad(score, [output for *_, output in calls])

relevancy = torch.zeros(2, 1, 50)  # (B, T, N)
relevancy[:, 0, 0] = 1.0  # the row of token 0
with torch.no_grad():
    for (query, key, value, _), gradient in zip(reversed(calls), reversed(gradients), strict=True):
        relevancy = relevancy + va.relevancy_step(relevancy, query, key, value, gradient)

print(f"{len(calls)} calls of SDPA, {relevancy.shape[2]} tokens")
print(f"token 0 keeps {relevancy[0, 0, 0]:.3f}; the three tokens it draws on most:")
values, indices = relevancy[0, 0, 1:].topk(3)
for value, index in zip(values.tolist(), (indices + 1).tolist(), strict=True):
    print(f"  token {index:2}: {value:.4f}")
