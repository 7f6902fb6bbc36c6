"""Pixels of a model without an adapter are summed over the patches that the model cuts the picture into."""

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.interpret.methods.test_embedding_methods import IDS, Sees


class Cuts(nn.Module):
    """A picture cut into patches of 4 x 4, by a convolution or by hand, a token before them, and words beside it."""

    def __init__(self, by: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by = by
        self.convolution, self.linear = nn.Conv2d(3, 8, 4, 4), nn.Linear(48, 8)
        self.first, self.words = nn.Parameter(torch.randn(1, 1, 8)), nn.Embedding(60, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        if self.by == "convolution":
            tokens = self.convolution(x).flatten(2).mT
        else:
            tokens = self.linear(nn.functional.unfold(x, 4, stride=4).mT)
        states = self.norm(torch.cat([self.first.expand(len(x), -1, -1), tokens], 1)).tanh().sum(1)
        return self.head(states if ids is None else states * self.words(ids).sum(1))


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("by", ["convolution", "hand"])
@pytest.mark.parametrize("method", ["input_gradient", "smoothgrad"])
def test_patches_that_the_model_cuts(method: str, by: str, ids: Tensor | None) -> None:
    model, x = Cuts(by).double(), torch.randn(2, 3, 8, 12, dtype=torch.float64)
    inputs = {"x": x} if ids is None else {"x": x, "ids": ids}
    found = va.explain(model, inputs, target=1, method=method)
    pixels = found.relevancy["x"].view(2, 8, 12)
    if by == "hand" and ids is not None:  # the first tokens may be those of the words
        assert torch.equal(found.image, pixels)
        return
    assert found.image.shape == (2, 2, 3)
    torch.testing.assert_close(found.image, pixels.view(2, 2, 4, 3, 4).sum((2, 4)))
    assert torch.equal(va.explain(model, inputs, target=1, method=method, patches=va.PatchGrid(8, 12)).image, pixels)
    occluded = va.explain(model, inputs, target=1, method="occlusion")
    assert occluded.image.shape == (2, 2, 3) and occluded.image.all()


def test_pixels_stay_where_no_patches_are_known() -> None:
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    assert va.explain(Sees().double(), {"x": x}, target=1, method="input_gradient").image.shape == (2, 8, 12)
