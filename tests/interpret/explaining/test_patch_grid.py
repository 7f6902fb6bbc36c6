"""Pictures for models without an adapter: written by hand, of timm, of open_clip."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from vlattn_fast.interpret import ADAPTERS, Adapter, Tower, explain, register_adapter


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Classifier(nn.Module):
    """As timm's: its inputs are called x, and its output is one tensor."""

    def __init__(self, prefix: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.front = nn.Parameter(torch.randn(1, prefix, 16))
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(16, 5)

    def forward(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat([self.front.expand(len(x), -1, -1), patches], 1))[:, 0])


class TimmClassifier(Classifier):
    """The parts by which timm's classifiers are known; they read CLS, or a mean of the patches."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.patch_embed, self.num_classes, self.pooled, self.norm = self.patches, 5, pooled, nn.LayerNorm(16)

    def forward(self, x):
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        states = self.norm(self.blocks(torch.cat([self.front.expand(len(x), -1, -1), patches], 1)))
        return self.head(states[:, 1:].mean(1) if self.pooled else states[:, 0])


class Dual(nn.Module):
    """As open_clip's: pictures and texts, and features and a scale as outputs."""

    def __init__(self, prefix: int = 1) -> None:
        super().__init__()
        self.visual, self.words, self.text = Classifier(prefix), nn.Embedding(20, 16), nn.Sequential(Block(), Block())

    def forward(self, image, text):
        return self.visual(image), self.text(self.words(text))[:, -1, :5], torch.tensor(10.0)


def pixels(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("prefix", "size", "grid"), [(1, (32, 32), (4, 4)), (5, (48, 48), (6, 6)), (1, (32, 48), (4, 6))])
def test_the_grid_is_derived_from_the_picture(prefix, size, grid) -> None:
    model = lively(Classifier(prefix))
    explanation = explain(model, {"x": pixels(*size)}, position="cls", target=2)
    assert torch.equal(explanation.image, explanation.relevancy["tower0"][:, prefix:].reshape(2, *grid))
    assert explanation.image_samples == [0, 1] and explanation.target == [2, 2]
    shown = explanation.plot(np.ones((2, *size, 3))).axes[1].images[1].get_array()
    assert np.array_equal(shown, explanation.image[0])


@pytest.mark.parametrize("pooled", [True, False])
def test_a_classifier_of_timm_needs_no_arguments(pooled: bool) -> None:
    model, inputs = lively(TimmClassifier(pooled)), {"x": pixels()}
    rows = torch.tensor([0] + [1 / 16] * 16) if pooled else "cls"
    want, got = explain(model, inputs, position=rows), explain(model, inputs)
    assert torch.allclose(got.relevancy["tower0"], want.relevancy["tower0"], rtol=1e-5, atol=1e-6)
    assert got.target == want.target and got.image.shape == (2, 4, 4)


def test_one_tensor_is_the_logits() -> None:
    """Of a class, and without a target of the largest one."""
    model, inputs = lively(Classifier()), {"x": pixels()}
    logits = model(**inputs)
    assert explain(model, inputs, position="cls").target == logits.argmax(-1).tolist()
    by_index = explain(model, inputs, position="cls", target=[1, 3])
    torch.testing.assert_close(by_index.scores, logits.detach()[[0, 1], [1, 3]])
    by_call = explain(model, inputs, position="cls", target=lambda outputs: outputs[[0, 1], [1, 3]])
    assert torch.equal(by_index.relevancy["tower0"], by_call.relevancy["tower0"])


def test_grid_and_prefix_are_obeyed() -> None:
    model, inputs = lively(Classifier()), {"x": pixels(32, 48)}
    row = explain(model, inputs, position="cls").relevancy["tower0"]
    for rows, columns, prefix in ((2, 12, 1), (3, 8, 1), (4, 4, 9)):
        maps = explain(model, inputs, position="cls", patches=va.PatchGrid(rows, columns, prefix=prefix)).image
        assert torch.equal(maps, row[:, prefix:].reshape(2, rows, columns))
    tokens = lively(nn.Sequential(Block(), Block()))
    tokens.forward = lambda tokens: nn.Sequential.forward(self=tokens_of[0], input=tokens)  # inputs that are no picture
    tokens_of = [tokens]
    score = {"position": "cls", "target": lambda outputs: outputs[:, 0, 3]}
    assert explain(tokens, {"tokens": torch.randn(2, 18, 16)}, **score).image is None
    assert explain(tokens, {"tokens": torch.randn(2, 18, 16)}, **score, patches=va.PatchGrid(prefix=2)).image.shape == (2, 4, 4)


def test_a_tower_as_large_as_a_text_needs_its_grid() -> None:
    model = lively(Dual(prefix=0))
    inputs = {"image": pixels(), "text": torch.randint(20, (2, 16))}  # as many tokens as patches
    options = {
        "position": {"tower0": "cls", "tower1": "last"},
        "target": lambda outputs: outputs[2] * (outputs[0] * outputs[1]).sum(-1),
    }
    unplaced = explain(model, inputs, **options)
    assert unplaced.image is None
    with pytest.raises(ValueError, match=r"image must be None for an explanation without maps .* pass patches=va.PatchGrid"):
        unplaced.plot(np.ones((32, 32, 3)))
    with pytest.raises(ValueError, match="pass patches=va.PatchGrid"):
        unplaced.to_html(np.ones((32, 32, 3)))
    placed = explain(model, inputs, **options, patches=va.PatchGrid(4, 4, prefix=0))
    assert torch.equal(placed.image.flatten(1)[:, 1:], placed.relevancy["tower0"][:, 1:])  # a token's part in itself is left out
    beside_cls = explain(lively(Dual()), inputs, **options)  # the text's tower is that of its size, so the other is the picture's
    assert torch.equal(beside_cls.image, beside_cls.relevancy["tower0"][:, 1:].reshape(2, 4, 4))


def test_a_record_with_patches_of_a_model_with_other_inputs(monkeypatch) -> None:
    monkeypatch.setattr("vlattn_fast.interpret.adapters.registry.ADAPTERS", dict(ADAPTERS))
    register_adapter("Classifier", Adapter((Tower("vision", "", "blocks", "cls", "patches", prefix=1),), "class"))
    model = lively(Classifier())
    explanation = explain(model, {"x": pixels(32, 48)})
    assert torch.equal(explanation.image, explanation.relevancy["vision"][:, 1:].reshape(2, 4, 6))
    assert explain(model, {"x": pixels(32, 48)}, patches=va.PatchGrid(2, 12, prefix=1)).image.shape == (2, 2, 12)


def test_bad_grids() -> None:
    model, inputs = lively(Classifier()), {"x": pixels()}
    for sizes, error, words in (
        ({"rows": 4, "columns": 0}, ValueError, "columns must be at least 1; got 0"),
        ({"rows": 4.0, "columns": 4}, TypeError, "rows must be an int"),
        ({"rows": 4}, ValueError, "rows and columns must both be given, or neither; got 4 and None"),
        ({"prefix": -1}, ValueError, "prefix must be at least 0; got -1"),
        ({"prefix": None}, TypeError, "prefix must be an int"),
    ):
        with pytest.raises(error, match=words):
            va.PatchGrid(**sizes)
    with pytest.raises(TypeError, match=r"patches must be a va.PatchGrid\(rows, columns, prefix=0\); got"):
        explain(model, inputs, position="cls", patches=(4, 4))
    for grid, words in (
        (va.PatchGrid(4, 5), r"rows \* columns tokens; got PatchGrid\(rows=4, columns=5, prefix=0\) for 'tower0' of 17 tokens"),
        (va.PatchGrid(4, 4, prefix=2), r"prefix=2\) for 'tower0' of 17 tokens. prefix=1 would fit"),
        (va.PatchGrid(prefix=3), r"got PatchGrid\(rows=None, columns=None, prefix=3\) for 'tower0' of 17 tokens$"),
    ):
        with pytest.raises(ValueError, match=words):
            explain(model, inputs, position="cls", patches=grid)
    for read in (None, "cls"):
        with pytest.raises(TypeError, match=r"inputs must be a mapping .*; got Tensor. Pass \{'x': ...\}"):
            explain(model, pixels(), position=read)
