"""Layers that share modules: each call is a layer of its own."""

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.stored_maps import Place, check, rows_of
from tests.helpers.interpret.tower_cases import METHODS, Block, Multihead, Stack, first_rows, sequences
from vlattn_fast.interpret import explain, explain_layers
from vlattn_fast.nn import capture_relevancy


class Looped(Stack):
    """Runs its blocks in turn, three in all."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(x)
        for number in range(3):
            x = self.blocks[number % len(self.blocks)](x, attention_mask.bool())
        return self.head(x[:, 0])


def with_attention(attend: nn.Module) -> Block:
    block = Block("torch", 32)
    block.attend = attend
    return block


def one_attention() -> list[nn.Module]:
    shared = Block("torch", 32).attend
    return [with_attention(shared) for _ in range(3)]


def one_inner_attention() -> list[nn.Module]:
    blocks = [with_attention(Multihead(32)) for _ in range(3)]
    for block in blocks[1:]:
        block.attend.inside = blocks[0].attend.inside
    return blocks


def one_again() -> list[nn.Module]:
    first, second = Block("torch", 32), Block("torch", 32)
    return [first, second, first]


SHARED = {
    "attention": one_attention,
    "attention within": one_inner_attention,
    "block": lambda: [Block("torch", 32)] * 3,
    "first and last": one_again,
    "one that runs again": lambda: [Block("torch", 32)],
    "two that run in turn": lambda: [Block("torch", 32) for _ in range(2)],
}


def looped(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Looped()
    model.blocks = nn.ModuleList(SHARED[kind]())
    return lively(model).eval()


def target(outputs: Tensor) -> Tensor:
    return -outputs[:, 1]


@pytest.mark.parametrize("kind", SHARED)
def test_each_call_is_a_layer(kind):
    model, inputs = looped(kind), sequences()
    place = Place("blocks", first_rows(7), inputs["attention_mask"])
    check(model, inputs, {"tower0": place}, target, METHODS, position="cls", target=target)
    assert explain_layers(model, inputs, per="layer", position="cls", target=target).relevancy["tower0"].shape == (3, 2, 7)
    with pytest.raises(ValueError, match=r"start_layer must be from -3 to 2"):
        explain(model, inputs, method=va.methods.Gradient(start_layer=3), position="cls", target=target)


@pytest.mark.parametrize("kind", ["attention", "attention within", "first and last"])
def test_rows_of_training(kind):
    model, inputs = looped(kind).double(), sequences()
    inputs["x"] = inputs["x"].double()
    want = rows_of(model, inputs, target, {"tower0": Place("blocks", first_rows(7), inputs["attention_mask"])})["tower0"]
    with capture_relevancy(model) as captured:
        score = target(model(**inputs)).sum()
    torch.testing.assert_close(captured.relevancy(score, position="cls"), want, rtol=1e-9, atol=1e-12)
