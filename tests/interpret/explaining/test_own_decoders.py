"""Encoder-decoders of a user's own, without a config: every token of an answer, against the published rules on stored maps."""

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.image_to_text import GRID, ImageToText, OfOneDict, OfOtherNames, image_to_text, pictures
from tests.helpers.interpret.linked_maps import METHODS, published, with_gradients
from tests.helpers.interpret.stored_maps import Kept, assert_rows
from vlattn_fast.interpret import ADAPTERS, Adapter, explain, register_adapter

pytestmark = pytest.mark.usefixtures("published")

START, ANSWERS = [[1], [1]], [[4, 5, 6], [7, 8]]
LATER = pytest.mark.filterwarnings("ignore:A part of the map belongs to later tokens")


def stored(model: ImageToText, picture: Tensor, ids: list[int]):
    """The logits (T, V), and the maps in the order in which they ran."""
    kept = Kept(model)
    with kept.watching():
        logits = model.logits(picture[None], torch.tensor([ids]))[0]
    kinds = ["ti" if "multihead" in path else "ii" if path.startswith("encoder") else "tt" for path, _ in kept.maps]
    assert kinds == ["ii", "ii", "tt", "ti", "tt", "ti"]
    return logits, kinds, [one for _, one in kept.maps]


@LATER
@pytest.mark.parametrize("method", [*METHODS, "rollout:one_hot"])
def test_each_token_of_an_answer(method):
    model, images = image_to_text(), pictures()
    got = explain(model, {"images": images, "decoder_input_ids": torch.tensor(START)}, answer=ANSWERS, method=method)
    assert got.token_ids == ANSWERS and got.scores.shape == (2, 3) and got.image.shape == (2, 3, *GRID)
    for row, answer in enumerate(ANSWERS):
        logits, kinds, maps = stored(model, images[row], [1, *answer])
        for number, token in enumerate(answer):
            score = logits[number].log_softmax(-1)[token]
            tt, ti = published(method, with_gradients(kinds, maps, score), [number])
            torch.testing.assert_close(got.scores[row, number], score.detach(), rtol=1e-9, atol=1e-10)
            assert_rows(got.relevancy["tower0"][row, number], ti[0])
            assert_rows(got.image[row, number].flatten(), ti[0])
            assert not got.relevancy["tower1"][row, number, tt.shape[1] :].any()
            if number:  # the start token sees itself alone
                assert_rows(got.relevancy["tower1"][row, number, : tt.shape[1]], tt[0])


@pytest.mark.parametrize("each", [True, False])
def test_one_dict_and_other_names(each):
    """A forward that takes one dict, and one whose only ids have another name, give what the plain one gives."""
    images, ids = pictures(), torch.tensor(START)
    want = explain(image_to_text(), {"images": images, "decoder_input_ids": ids}, answer=ANSWERS, per_token=each)
    inputs = {"inputs": {"images": images, "decoder_input_ids": ids}}
    for model, of_model in (
        (image_to_text(OfOneDict), inputs),
        (image_to_text(OfOtherNames), {"picture": images, "caption": ids}),
    ):
        got = explain(model, of_model, answer=ANSWERS, per_token=each)
        assert got.token_ids == want.token_ids and got.text_positions == want.text_positions
        for one, two in ((got.image, want.image), (got.text, want.text), (got.scores, want.scores)):
            assert torch.equal(one, two)
        assert not model._forward_pre_hooks and list(inputs) == ["inputs"] and len(inputs["inputs"]) == 2
        assert "<canvas" in got.to_html()
        photo = got.overlay(torch.rand(3, 8, 12), sample=1, word=1 if each else None)
        assert photo.size == (12, 8)


@pytest.mark.parametrize("kind", [ImageToText, OfOneDict])
def test_the_next_token(kind):
    """Without an answer: the token behind the last one, as the gradient finds the row."""
    model, images, ids = image_to_text(kind), pictures(), torch.tensor([[1, 4], [1, 7]])
    inputs = {"images": images, "decoder_input_ids": ids}
    got = explain(model, inputs if kind is ImageToText else {"inputs": inputs})
    best = model.logits(images, ids)[:, -1].argmax(-1)
    assert got.target == best.tolist() and got.position["tower1"].tolist() == [1, 1] and got.image.shape == (2, *GRID)
    plain = explain(image_to_text(), inputs, target=lambda o: o[:, 1].gather(1, best[:, None])[:, 0], position={"tower1": 1})
    for name, row in plain.relevancy.items():
        assert_rows(got.relevancy[name], row)
    by_pixel = explain(model, inputs if kind is ImageToText else {"inputs": inputs}, method="input_gradient").relevancy
    assert set(by_pixel) == {"images", "decoder_input_ids"}


def test_a_callable_target_takes_inputs_as_the_model_does():
    model, inputs = image_to_text(OfOneDict), {"images": pictures(), "decoder_input_ids": torch.tensor([[1, 4], [1, 7]])}
    scored = lambda o, given: o[:, 1].gather(1, given["inputs"]["decoder_input_ids"][:, 1:])[:, 0]  # noqa: E731
    got = explain(model, {"inputs": inputs}, target=scored, position={"tower1": 1})
    torch.testing.assert_close(got.scores, model(inputs)[[0, 1], 1, [4, 7]].detach())
    assert got.image.shape == (2, *GRID)


def test_edges_of_a_model_of_one_dict():
    inputs = {"images": pictures(), "decoder_input_ids": torch.tensor([[1, 4], [1, 7]])}
    effects = [
        va.attribute_edges(model, given, {"first": [(0, 1)], "second": [(1, 2)]}, tower="tower1", target=3)
        for model, given in ((image_to_text(), inputs), (image_to_text(OfOneDict), {"inputs": inputs}))
    ]
    assert repr(effects[0]) == repr(effects[1])


def test_two_inputs_of_ids():
    """Neither has the name of a decoder's input: the error says how to name it, and that works."""

    class Translator(ImageToText):
        def forward(self, picture, question, caption):
            return self.logits(picture, caption)

    model, images, ids = image_to_text(Translator), pictures(), torch.tensor(START)
    inputs = {"picture": images, "question": ids + 1, "caption": ids}
    line = r'register_adapter\("Translator", va.interpret.Adapter\(\(\), "token", answers="caption"\)\)'
    with pytest.raises(ValueError, match=rf"token ids \(B, N\) are \['question', 'caption'\].* or name it: va.{line}"):
        explain(model, inputs, answer=ANSWERS)
    register_adapter("Translator", Adapter((), "token", answers="caption"))
    try:
        got = explain(model, inputs, answer=ANSWERS)
    finally:
        del ADAPTERS["Translator"]
    want = explain(image_to_text(), {"images": images, "decoder_input_ids": ids}, answer=ANSWERS)
    for name, row in want.relevancy.items():
        assert torch.equal(got.relevancy[name], row)


def test_what_is_refused():
    images, ids = pictures(), torch.tensor(START)
    inputs = {"images": images, "decoder_input_ids": ids}
    with pytest.raises(ValueError, match=r"must contain 'decoder_input_ids' \(B, 1\), the token that texts begin with"):
        explain(image_to_text(), {"images": images}, answer=ANSWERS)
    names = r"tower0 \(encoder.layers: 6 tokens\), tower1 \(decoder.layers: 1 tokens\); got 'vision'"
    with pytest.raises(ValueError, match=f"position must name towers among {names}"):
        explain(image_to_text(), inputs, position={"vision": 0}, target=lambda o: o[:, 0, 3])
    with pytest.raises(ValueError, match="inputs must have each name once, including the names in dicts; got images twice"):
        explain(image_to_text(OfOneDict), {"inputs": inputs, "images": images}, answer=ANSWERS)

    class Pooled(ImageToText):
        def forward(self, images, decoder_input_ids):
            return super().forward(images, decoder_input_ids).mean(1)

    with pytest.raises(
        ValueError, match=r"model must return logits \(B, N, vocabulary\) if answer is given; got logits \(2, 30\)"
    ):
        explain(image_to_text(Pooled), inputs, answer=[4])
