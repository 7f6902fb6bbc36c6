"""Calls that `capture_attention` leaves out: runs of `explain`, of copies and of parts of a model, and attention part by part."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.nn.models import HEAD_DIM, HEADS, MODELS, WORDS, Joined, answer
from vlattn_fast.interpret import explain
from vlattn_fast.nn import capture_attention


def test_parts_of_a_model_alone_do_not_count() -> None:
    model, inputs = MODELS["CLIP, sdpa"]()
    pixels = inputs["pixel_values"]
    with capture_attention(model) as captured:
        model.get_image_features(pixel_values=pixels)
        with pytest.raises(ValueError, match="captured no forward pass"):
            assert captured.image
        handle = model.register_forward_pre_hook(lambda m, a: m.get_image_features(pixel_values=pixels) and None, prepend=True)
        model(**inputs)
        handle.remove()
        kept = captured.layer
        model.get_text_features(input_ids=inputs["input_ids"])
    assert captured.layer is kept and kept.image is not None and kept.image[0].shape == (2, HEADS, 17, HEAD_DIM)


def test_layers_that_attend_part_by_part_are_none() -> None:
    """A tower over two images, each by itself, in two layers of one stack: its four calls are no four layers."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            parts = (self.project(part)[:, None] for part in x.chunk(2, 1))
            return torch.cat([nn.functional.scaled_dot_product_attention(part, part, part)[:, 0] for part in parts], 1)

    model = nn.Sequential(Parts(), Parts())
    with capture_attention(model, modality={"input": "image"}), pytest.raises(ValueError, match="over all tokens of .* at once"):
        model(torch.randn(1, 6, 20))
    joined = Joined(joint=True)
    joined.project = nn.Sequential(model, nn.Linear(20, 32))
    with capture_attention(joined, modality={"features": "image"}, layers=0) as captured:
        joined(torch.randint(5, 90, (2, 4)), torch.randn(2, 6, 20))
    assert captured.layer.image is None and captured.query.shape == (2, 4, 10, 8)


@pytest.mark.parametrize("method", ["gradient", "attention"])
@pytest.mark.parametrize("name", ["CLIP, sdpa", "LXMERT", "UNITER"])
def test_explain_within_a_capture(name: str, method: str) -> None:
    """Its forward pass does not count. A capture that a hook makes of another model within `explain` sees that one."""
    model, inputs = MODELS[name]()
    want = explain(model, inputs, method=method).relevancy
    with capture_attention(model.eval()) as captured:
        for _ in range(2):
            got = explain(model, inputs, method=method).relevancy
            assert all(torch.equal(got[tower], row) for tower, row in want.items())
            model(**inputs)
            kept = captured.layer
        explain(model, inputs, method=method)
    assert captured.layer is kept

    def capture(*_: Any) -> None:
        with capture_attention(other) as within:
            other(**words)
        assert within.query.shape == (2, HEADS, WORDS, HEAD_DIM)
        seen.append(within)

    seen: list[Any] = []
    other, words = MODELS["Llama, eager"]()
    handle = model.register_forward_pre_hook(capture)
    explain(model, inputs, method=method)
    handle.remove()
    assert len(seen) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_within_a_capture(copied: Any) -> None:
    """They take the hooks along, which see nothing: neither within nor afterwards."""
    model, inputs = MODELS["CLIP, sdpa"]()
    with capture_attention(model.eval()) as captured:
        want = answer(model(**inputs))
        twin = copied(model)
        query = captured.text[0]
        assert torch.equal(answer(twin(**inputs)), want) and captured.text[0] is query
    assert torch.equal(answer(twin(**inputs)), want)
    with capture_attention(twin) as of_twin:
        twin(**inputs)
    assert torch.equal(of_twin.text[0], query)
