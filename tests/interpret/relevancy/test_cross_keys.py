"""Cross-attention to learnt keys beside those of a tower, and to as many keys as there are queries."""

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.linked_maps import METHODS, published, with_gradients
from tests.helpers.interpret.stored_maps import Kept, assert_rows
from vlattn_fast.interpret import explain
from vlattn_fast.nn import capture_relevancy

WIDTH = 16


class Attends(nn.Module):
    """`null`: a learnt state in front of those that are attended to."""

    def __init__(self, null: bool = False, **options: bool) -> None:
        super().__init__()
        self.norm, self.inside = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)
        self.null = nn.Parameter(torch.randn(1, 1, WIDTH)) if null else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x, residual = self.norm(x), x
        y = x if y is None else y
        if self.null is not None:
            y = torch.cat([self.null.expand(len(y), -1, -1), y], 1)
        return residual + self.inside(x, y, y, need_weights=False)[0]


class Layer(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.cross, self.own = Attends(**options), Attends()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.own(self.cross(x, y))


class Crossed(nn.Module):
    """Texts attend to pictures in each layer, first thing. `states`: what takes the place of the text's or picture's states, if
    anything; `layers` of the picture itself."""

    def __init__(self, layers: int, learnt: str = "", size: int = 0, **options: bool) -> None:
        super().__init__()
        self.learnt, self.states = learnt, nn.Parameter(torch.randn(1, size, WIDTH))
        self.text, self.image, self.head = nn.Linear(4, WIDTH), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.encoder = nn.ModuleList(Attends() for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(**options) for _ in range(2))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        y = torch.cat([self.cls.expand(len(image), -1, -1), self.image(image)], 1)
        x, states = self.text(text), self.states.expand(len(text), -1, -1)
        x, y = (states if self.learnt == "queries" else x), (states if self.learnt == "keys" else y)
        for layer in self.encoder:
            y = layer(y)
        for layer in self.decoder:
            x = layer(x, y)
        return self.head(x[:, 0])


def target(outputs: Tensor) -> Tensor:
    return -outputs[:, 1]


def made(*args, **options) -> nn.Module:
    torch.manual_seed(0)
    return lively(Crossed(*args, **options)).eval().double()


def stored(model: nn.Module, inputs: dict[str, Tensor], columns: slice) -> list[tuple[str, Tensor, Tensor | None]]:
    kept = Kept(model)
    with kept.watching():
        score = target(model(**inputs)).sum()
    layers = len(model.encoder)
    kinds = ["ii"] * layers + ["ti", "tt"] * 2
    maps = with_gradients(kinds, [stored for _, stored in kept.maps], score)
    return [(kind, *((a[..., columns], g[..., columns]) if kind == "ti" else (a, g))) for kind, a, g in maps]


def inputs_of(patches: int, words: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"image": (2, patches, 4), "text": (2, words, 4)}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


@pytest.mark.parametrize("learnt", ["", "keys", "queries"])
def test_as_many_keys_as_queries(learnt):
    """What tells a first cross-attention from self-attention is where the tensors are from."""
    model, inputs = made(0, learnt, 6), inputs_of(5, 6)
    maps = stored(model, inputs, slice(None))
    for method in METHODS:
        of_words, of_keys = published(method, maps, [0, 0])
        got = explain(model, inputs, position="cls", target=target, method=method).relevancy
        assert_rows(got["tower0"], of_words, what=method)
        assert_rows(got["context6"], of_keys, what=method)


OTHERS = {  # the options of cross-attention, and the columns of the picture's tokens
    "learnt key": ({"add_bias_kv": True}, slice(0, 6)),
    "both": ({"add_bias_kv": True, "add_zero_attn": True}, slice(0, 6)),
    "learnt state": ({"null": True}, slice(1, 7)),
}


@pytest.mark.filterwarnings("ignore:Tower 'tower1' attends to keys that are not its tokens")
@pytest.mark.parametrize("words", [4, 6, 7])  # as many as patches, or as keys, too
@pytest.mark.parametrize("kind", OTHERS)
def test_keys_beside_those_of_a_tower(kind, words):
    options, columns = OTHERS[kind]
    model, inputs = made(2, **options), inputs_of(5, words)
    maps = stored(model, inputs, columns)
    for method in ("gradient", "attention"):
        of_words, of_patches = published(method, maps, [0, 0])
        got = explain(model, inputs, position={"tower1": "cls"}, target=target, method=method).relevancy
        assert_rows(got["tower1"], of_words, what=method)
        assert_rows(got["tower0"], of_patches, what=method)
    with capture_relevancy(model) as captured:
        score = target(model(**inputs)).sum()
    got = captured.relevancy(score, position={"tower1": "cls"})
    assert_rows(got["tower0"], published("gradient", maps, [0, 0])[1])
