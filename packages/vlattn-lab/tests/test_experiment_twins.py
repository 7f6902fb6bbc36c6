"""Twins: maps by region, shares in the regions that decide, and how well they tell two models apart."""

from __future__ import annotations

import pytest
import torch

from vlattn_fast.models import UNITER
from vlattn_lab import twins
from vlattn_lab.experiments import twins as experiment
from vlattn_lab.grids import CELLS, grid_statements


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UNITER(twins.CONFIG).eval()


def test_shares_and_overlaps_are_of_the_regions_that_decide():
    deciding = torch.tensor([[True, False, True, False], [True, True, False, False], [True, False, False, False]])
    maps = torch.tensor([[3.0, 1.0, -2.0, 0.0], [1.0, 2.0, 1.0, 0.0], [-1.0, -3.0, -2.0, -4.0]])
    mass, iou = experiment.shares(maps, deciding)
    assert mass.tolist() == [0.75, 0.75, 0.25]  # nothing is positive: the share of chance
    assert iou.tolist() == [pytest.approx(1 / 3), 1.0, 1.0]


def test_the_area_counts_pairs_and_half_of_ties():
    pairs = [(a > b) + 0.5 * (a == b) for a in (3.0, 1.0, 2.0) for b in (1.0, 2.0)]
    assert experiment.above(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0])) == sum(pairs) / 6


def test_a_cut_region_is_one_that_the_model_does_not_get(model):
    grids = grid_statements(3, steps=2, cue="frame", told=True, seed=1)
    falls, without = experiment.cut(model, grids), experiment.removed(model, grids)
    assert falls.shape == without.shape == (3, CELLS + 1)
    inputs = grids.inputs()
    shorter = {name: torch.cat([x[:, :4], x[:, 5:]], 1) if name.startswith("region") else x for name, x in inputs.items()}
    with torch.no_grad():
        scores = [
            twins.colour_logits(model, twins.asked_states(model, some)).log_softmax(-1).gather(1, grids.label[:, None])[:, 0]
            for some in (inputs, shorter)
        ]
    torch.testing.assert_close(falls[:, 4], scores[0] - scores[1], rtol=0, atol=1e-5)
    empty = grids.objects[..., 0] < 0
    assert (without[:, :CELLS][empty] == 0).all() and (without[:, :CELLS][~empty] != 0).all()


def test_edges_of_a_region_are_its_first_order_cut(model):
    """By a numeric derivative of the weight of all that attends to it."""
    grids = grid_statements(2, steps=1, cue="frame", told=True, seed=2)
    inputs, edges = grids.inputs(), experiment.edges(model, grids)

    def score(bias, region):
        """bias: on the logits of a region's column, for all other tokens."""
        words = inputs["input_ids"].shape[1]
        column = torch.zeros(words + CELLS + 1, words + CELLS + 1, dtype=torch.float64)
        column[:, words + region] = bias
        column[words + region, words + region] = 0.0

        def attend(module, query, key, value, attention_mask, **options):
            mask = torch.where(attention_mask.bool(), 0.0, -torch.inf) if attention_mask.dtype == torch.bool else attention_mask
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.double() + column)
            return out.transpose(1, 2), None

        whole = UNITER(twins.CONFIG).double().eval()
        whole.load_state_dict(model.state_dict())
        for layer in whole.uniter.encoder.layer:
            layer.attention.self.attention_function = attend
        with torch.no_grad():
            states = twins.asked_states(whole, {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
            return twins.colour_logits(whole, states).log_softmax(-1).gather(1, grids.label[:, None])[:, 0]

    for region in (0, 7, CELLS):
        slope = (score(1e-4, region) - score(-1e-4, region)) / 2e-4
        torch.testing.assert_close(edges[:, region].double(), slope, rtol=1e-3, atol=1e-5)


def test_a_sum_of_a_function_of_words_and_one_of_images_is_found(model):
    grids = grid_statements(6, steps=1, cue="frame", seed=3)

    class Additive(torch.nn.Module):
        def forward(self, input_ids, attention_mask, region_features, **others):
            self.sum = input_ids.double().sum(1, keepdim=True).sin() * torch.arange(4) + region_features.double().sum((1, 2))[
                :, None
            ].cos() * torch.tensor([3.0, 0.0, -1.0, 2.0])
            return type("Output", (), {"last_hidden_state": torch.zeros(*input_ids.shape, 4)})

        def word_logits(self, states):
            logits = torch.full((len(states), 100), -9.0, dtype=torch.float64)
            logits[:, twins.COLOUR_IDS] = self.sum
            return logits

    additive = Additive()
    assert twins.additive_accuracy(additive, grids) == twins.colour_accuracy(additive, grids)
    assert 0 <= twins.additive_accuracy(model, grids) <= 1
