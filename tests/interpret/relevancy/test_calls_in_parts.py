"""A layer that attends in several calls, each of which has some of the tokens, in front of layers whose tokens move."""

import torch
from torch import Tensor
from torch.nn import functional

from tests.helpers.interpret.stored_maps import BOUNDS
from tests.interpret.relevancy.test_moved_tokens import HEADS, MOVES, SIZE, Layer, Moving, inputs, made, target
from vlattn_fast.interpret import explain

PART = 4
OWN = (torch.arange(SIZE) // PART)[:, None] == torch.arange(SIZE) // PART


def attends_in_parts(layer: Layer, several: bool) -> None:
    """In several calls, or in one under the mask that says the same."""

    def attend(x: Tensor, _: Tensor) -> Tensor:
        parts = [f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (layer.q, layer.k, layer.v)]
        if several:
            calls = zip(*(part.split(PART, 2) for part in parts), strict=True)
            y = torch.cat([functional.scaled_dot_product_attention(*call) for call in calls], 2)
        else:
            y = functional.scaled_dot_product_attention(*parts, attn_mask=OWN)
        return layer.out(y.transpose(1, 2).flatten(2))

    layer.attend = attend


def test_tokens_that_move_behind_a_layer_in_parts():
    rows = []
    for several in (True, False):
        model = made(Moving, *MOVES["a flip that stays"]).double()
        attends_in_parts(model.layers[0], several)
        rows.append(explain(model, {"x": inputs()["x"].double()}, position=1, target=target).relevancy["tower0"])
    got, want = rows
    assert (got - want).abs().max() <= BOUNDS[torch.float64] * want.abs().max()
