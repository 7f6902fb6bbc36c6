"""A call whose keys are tokens of its own tower and of another one: both towers are one sequence."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import vlattn_fast as va
from tests.helpers.interpret.joint_maps import METHODS, beside, one_sequence
from tests.helpers.interpret.stored_maps import Kept, assert_rows

FIRST, SECOND, LAYERS = 5, 3, 2


class Layer(nn.Module):
    def __init__(self, own_first: bool) -> None:
        super().__init__()
        self.own_first = own_first
        self.project, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def heads(self, states):
        return self.project(states).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)

    def forward(self, states, further=None):
        query, key, value = self.heads(states)
        kept = key, value
        if further is not None:
            pairs = zip(kept, further, strict=True)
            key, value = (torch.cat(pair if self.own_first else pair[::-1], 2) for pair in pairs)
        output = functional.scaled_dot_product_attention(query, key, value)
        return states + self.out(output.transpose(1, 2).flatten(2)), kept


class Two(nn.Module):
    """Two towers; the second attends to its own tokens and to the keys of the first one's layers, or of its end."""

    def __init__(self, by_layer: bool, own_first: bool) -> None:
        super().__init__()
        self.by_layer = by_layer
        self.first, self.second = (nn.ModuleList(Layer(own_first) for _ in range(LAYERS)) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x, y):
        cache = []
        for layer in self.first:
            x, kept = layer(x)
            cache.append(kept)
        for layer, kept in zip(self.second, cache, strict=True):
            further = kept if self.by_layer else tuple(layer.heads(x)[1:])
            y, _ = layer(y, further)
        return self.head(y[:, 1])


def made(by_layer: bool, own_first: bool = True):
    torch.manual_seed(0)
    model = Two(by_layer, own_first).double()
    inputs = {"x": torch.randn(2, FIRST, 16).double(), "y": torch.randn(2, SECOND, 16).double()}
    return model, inputs


@pytest.mark.parametrize("by_layer, own_first", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("method", METHODS)
def test_methods_beside_stored_maps(method, by_layer, own_first):
    model, inputs = made(by_layer, own_first)
    kept = Kept(model)
    with kept.watching():
        score = model(**inputs)[:, 2]
    maps = [one for _, one in kept.maps]
    slopes = torch.autograd.grad(score.sum(), maps, allow_unused=True)
    pairs = [(one, torch.zeros_like(one) if slope is None else slope) for one, slope in zip(maps, slopes, strict=True)]
    if own_first:
        pairs[LAYERS:] = [tuple(one.roll(FIRST, -1) for one in pair) for pair in pairs[LAYERS:]]
    none = (None, None)
    first, second = pairs[:LAYERS], pairs[LAYERS:]
    order = zip(first, second, strict=True) if by_layer else [*((one, none) for one in first), *((none, one) for one in second)]
    layers = [tuple(beside(*parts, (FIRST, SECOND)) for parts in zip(*pair, strict=True)) for pair in order]
    want = one_sequence(method, layers, FIRST + 1, None, SECOND)
    asked = va.methods.Weighted(weighting="equal") if method == "weighted" else method
    got = va.explain(model, inputs, position={"tower1": 1}, target=lambda logits: logits[:, 2], method=asked)
    assert_rows(got.relevancy["tower1"], want[:, FIRST:], what=method)
    assert_rows(got.relevancy["tower0"], want[:, :FIRST], what=method)


def test_a_part_of_the_other_towers_keys_is_refused():
    model, inputs = made(True)
    forward = Layer.forward

    def crop(self, states, further=None):
        return forward(self, states, None if further is None else tuple(part[:, :, 1:] for part in further))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="7 keys"):
        patch.setattr(Layer, "forward", crop)
        va.explain(model, inputs, position={"tower1": 1}, target=lambda logits: logits[:, 2])
