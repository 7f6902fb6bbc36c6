"""What Grad-CAM of attention cannot tell: maps of zeros, and weights of heads that a constant shifts."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va


class OneHead(nn.Module):
    """A layer of attention of one head, whose values have the constant `shift` added, and taken away behind it."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 18)])
        self.head, self.shift = nn.Linear(6, 3), shift

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.layers[0](x)[:, None].chunk(3, -1)
        output = nn.functional.scaled_dot_product_attention(query, key, value + self.shift) - self.shift
        return self.head(output[:, 0].mean(1))


def rows(shift: float, target: int) -> Any:
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return va.explain(OneHead(shift).double(), {"x": x}, target=target, method="gradcam", position={"tower0": "mean"})


def test_a_map_of_zeros_is_said() -> None:
    """With one head the sign of its weight decides between the map and zeros, and a constant decides the sign."""
    with pytest.warns(UserWarning, match="A map of 'gradcam' is all zeros: .* Pass another method, such as 'gradient'") as warned:
        zeros = [rows(shift, 0) for shift in (-50.0, 50.0)]
    assert len(warned) == 1
    assert torch.allclose(zeros[0].scores, zeros[1].scores)
    empty = [not one.relevancy["tower0"].any() for one in zeros]
    assert sorted(empty) == [False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows((-50.0, 50.0)[empty.index(False)], 0).relevancy["tower0"].all()
