"""Baselines, noise and occlusion in an image-to-text model of the caller's, character by character."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.image_to_text import GRID, ImageToText, OfOneDict, image_to_text, pictures

pytestmark = pytest.mark.usefixtures("published")

START, ANSWER = [[1], [1]], [[7, 3, 11], [4, 9, 5]]


def log_probabilities(model: ImageToText, images: Tensor) -> Tensor:
    """(B, T) of the tokens of the answer."""
    ids = torch.tensor([[*start, *answer] for start, answer in zip(START, ANSWER, strict=True)])
    return model.logits(images, ids)[:, :3].log_softmax(-1).gather(2, torch.tensor(ANSWER)[..., None])[..., 0]


@pytest.mark.parametrize("kind", [ImageToText, OfOneDict])
def test_pictures_beside_an_answer(kind: Any) -> None:
    model, images = image_to_text(kind), pictures().double()
    inputs: dict[str, Any] = {"images": images, "decoder_input_ids": torch.tensor(START)}
    inputs = inputs if kind is ImageToText else {"inputs": inputs}
    white = images.amax((1, 2, 3), keepdim=True)
    x = images.clone().requires_grad_()
    scores = log_probabilities(model, x)
    found = va.explain(model, inputs, answer=ANSWER, method=va.methods.InputGradient("white"))
    for token in range(3):
        (grad,) = torch.autograd.grad(scores[:, token].sum(), x, retain_graph=True)
        pixels = ((x - white) * grad).sum(1).detach()
        torch.testing.assert_close(found.relevancy["images"][:, token], pixels.flatten(1), rtol=1e-9, atol=1e-12)
    assert found.image.shape == (2, 3, *GRID) and not found.relevancy["decoder_input_ids"].any()
    occluded = va.explain(model, inputs, answer=ANSWER, method=va.methods.Occlusion(fill="white"))
    with torch.no_grad():
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                without = images.clone()
                area = (..., slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
                without[area] = white.expand_as(images)[area]
                drop = scores - log_probabilities(model, without)
                torch.testing.assert_close(occluded.image[:, :, row, column] / 16, drop, rtol=1e-9, atol=1e-12)
    integrated = va.explain(model, inputs, answer=ANSWER, method=va.methods.IntegratedGradients(3, "white"))
    gain = (scores - log_probabilities(model, white.expand_as(images))).detach()
    total = sum(row.sum(-1) for row in integrated.relevancy.values())
    by_hand = torch.zeros_like(total)
    for step in range(3):
        between = (white + (images - white) * (step + 0.5) / 3).requires_grad_()
        scores = log_probabilities(model, between)
        for token in range(3):
            (grad,) = torch.autograd.grad(scores[:, token].sum(), between, retain_graph=True)
            by_hand[:, token] += ((images - white) * grad).sum((1, 2, 3)) / 3
    torch.testing.assert_close(total, by_hand, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(integrated.gap, total - gain, rtol=1e-9, atol=1e-12)
    together = va.explain(model, inputs, answer=ANSWER, per_token=False, method=va.methods.SmoothGrad(2, baseline="white"))
    assert together.image.shape == (2, *GRID)
