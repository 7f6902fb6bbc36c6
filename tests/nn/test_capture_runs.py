"""Calls that `capture_attention` leaves out: runs of `explain`, of copies and of parts of a model, and attention part by part."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.decoder_cases import DECODERS
from tests.helpers.interpret.edited_maps import biased
from tests.helpers.nn.models import HEAD_DIM, HEADS, MODELS, WORDS, Joined
from tests.interpret.adapters.test_clip_mapper import IDS, inputs_of, mapper
from tests.nn.test_capture_attention import watched
from tests.nn.test_captured_layer import attention_of
from vlattn_fast.attach.session import overridden
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


def gpt2() -> tuple[nn.Module, dict[str, Tensor], Callable[[Tensor], Any], dict[str, Any]]:
    case = DECODERS["GPT2LMHeadModel"]()
    model, edited = lively(case.model).double().eval(), case.model.get_submodule("transformer.h")[-2].attn
    return model, case.inputs("right"), lambda bias: biased(model, lambda m, *_: bias if m is edited else 0.0), {}


def clip_mapper() -> tuple[nn.Module, dict[str, Tensor], Callable[[Tensor], Any], dict[str, Any]]:
    model: nn.Module = mapper()
    attention = model.get_submodule("layers.0.self_attention")

    def by_hand(bias: Tensor) -> Any:
        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, **_: Any) -> Any:
            scores = (query @ key.mT * scaling).masked_fill(~mask, -torch.inf) + bias
            return (scores.softmax(-1) @ value).transpose(1, 2), None

        return overridden([(attention, "attention_function", attend)])

    return model, inputs_of(IDS), by_hand, {"tower": ("text", "text")}


def test_a_capture_has_the_attention_of_an_edited_model() -> None:
    """Its queries and keys, and the edited edges in its mask, in whichever order the contexts are entered."""
    for model, inputs, by_hand, where in (gpt2(), clip_mapper()):
        size = inputs["input_ids"].shape[1]
        bias = torch.zeros(3 if where else 4, size, size, dtype=torch.float64)
        bias[1, 4:6, 1:4] = -torch.inf
        bias[:, 5:, 4:6] += math.log(3)
        edits = [va.Knockout(queries=(4, 6), keys=(1, 4), heads=1, layers=-2, **where)]
        edits += [va.Steer(queries=(5, size), keys=(4, 6), weight=3, layers=-2, **where)]
        captures = [capture_attention(model, layers=[-2, -1]) for _ in range(3)]
        with torch.no_grad():
            with by_hand(bias), captures[0]:
                model(**inputs)
            with va.intervene(model, inputs, edits), captures[1]:
                model(**inputs)
            with captures[2], va.intervene(model, inputs, edits):
                model(**inputs)
        for captured in captures[1:]:
            for layer, expected in zip(captured, captures[0], strict=True):
                torch.testing.assert_close(tuple(layer.text), tuple(expected.text), rtol=0, atol=1e-9)
            maps = [attention_of(each[0].text) for each in (captured, captures[0])]
            torch.testing.assert_close(*maps, rtol=0, atol=1e-9)


def test_runs_that_find_or_record_within_a_capture_do_not_count() -> None:
    model, inputs = MODELS["Llama, sdpa"]()
    with capture_attention(model.eval()) as captured:
        model(**inputs)
        kept = captured.layer
        edited = va.intervene(model, inputs, va.Residual(0, scale=0.5))
        va.record_heads(model, inputs)
        assert captured.layer is kept
        with edited:
            model(**inputs)
        assert captured.layer is not kept


def test_a_capture_of_an_edited_model_knows_its_two_streams() -> None:
    """The output of cross-attention has the kind of its queries."""
    model, inputs = MODELS["LXMERT"]()
    edit, captures = va.ScaleHeads({0: 0}, 0.0, tower="text"), [capture_attention(model.eval()) for _ in range(2)]
    seen = watched(model, "lxmert.encoder.x_layers.1.lang_self_att.self")
    with torch.no_grad():
        with va.intervene(model, inputs, edit), captures[0]:
            seen["query"].clear()
            model(**inputs)
        with captures[1], va.intervene(model, inputs, edit):
            model(**inputs)
    for captured in captures:
        assert torch.equal(captured.text[0], seen["query"][0]) and captured.text.attn_mask is not None
        assert captured.cross is not None
