"""Maps of single layers of towers that attend to one another, against the rows of stored maps."""

import pytest
import torch
from torch import Tensor

from tests.helpers.interpret.image_to_text import GRID, image_to_text, pictures
from tests.helpers.interpret.linked_maps import Maps, encoder_decoder_maps, with_gradients
from tests.interpret.explaining.test_own_decoders import stored
from tests.interpret.methods.test_ablations import lxmert
from tests.interpret.relevancy.test_linked import lxmert_maps, text_encoder_decoder
from vlattn_fast.interpret import LayerExplanation, explain_layers

pytestmark = pytest.mark.usefixtures("published")


def rows_of(maps: Maps, kind: str, positions: list[int], method: str) -> Tensor:
    """(L, H, B, M), the rows at `positions` of the maps of a kind."""
    made = [(a * g).clamp(min=0) if method == "gradient" else a for one, a, g in maps if one == kind]
    return torch.stack([one[torch.arange(len(positions)), :, positions].transpose(0, 1) for one in made]).detach()


def agrees(got: LayerExplanation, tower: str, want: Tensor) -> None:
    assert want.abs().amax((1, 2, 3)).min() > 1e-9  # no layer is zero throughout
    want = want if got.per == "head" else want.mean(1)
    torch.testing.assert_close(got.relevancy[tower], want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize("method", ["gradient", "attention"])
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_decoders_behind_an_encoder(kind, method, per):
    model, inputs = text_encoder_decoder(kind)
    inputs["decoder_input_ids"] = torch.randint(3, 60, (2, 5))
    outputs = model(**inputs, output_attentions=True)
    maps = encoder_decoder_maps(outputs, outputs.logits[:, 3, 7].sum())
    got = explain_layers(model, inputs, target=lambda o: o.logits[:, 3, 7], position={"tower1": 3}, method=method, per=per)
    assert got.layers == {"tower1": [0, 1], "tower0": [0, 1]} and list(got.relevancy) == ["tower1", "tower0"]
    for tower, pair in (("tower1", "tt"), ("tower0", "ti")):
        agrees(got, tower, rows_of(maps, pair, [3, 3], method))
    assert got.at(1).relevancy["tower0"].shape == (2, 9)
    last = explain_layers(
        model, inputs, target=lambda o: o.logits[:, 3, 7], position={"tower1": 3}, method=method, per=per, layers=[-1]
    )
    assert torch.equal(last.relevancy["tower0"], got.relevancy["tower0"][1:]) and last.layers["tower0"] == [1]


@pytest.mark.parametrize("method", ["gradient", "attention"])
def test_co_attention(method):
    """LXMERT: text and regions attend to one another in three layers, behind three of words alone."""
    model, inputs = lxmert()
    maps = lxmert_maps(model, inputs, lambda o: o.question_answering_score.max(-1).values.sum())
    if method == "gradient":  # the score comes from words: the last layer of the regions has no gradient
        maps = [(kind, a, torch.zeros_like(a) if g is None else g) for kind, a, g in maps]
    got = explain_layers(model, inputs, method=method, per="head")
    assert got.layers == {"text": [0, 1, 2, 3, 4, 5], "vision": [3, 4, 5]}
    agrees(got, "text", rows_of(maps, "tt", [0, 0], method))
    agrees(got, "vision", rows_of(maps, "ti", [0, 0], method))
    assert got.regions.shape == (3, 4, 2, 7) and list(got.at(0).relevancy) == ["text"]
    assert torch.equal(got.at(4).regions, got.relevancy["vision"][1].mean(0))
    both = explain_layers(model, inputs, method=method, per="head", position={"text": "cls", "vision": 2})
    assert both.layers == {"text": [0, 1, 2, 3, 4, 5], "vision": [0, 1, 2, 3, 4]}  # each by its maps to itself
    want = rows_of(maps, "ii", [2, 2], method)
    torch.testing.assert_close(both.relevancy["vision"], want, rtol=1e-8, atol=1e-12)
    assert torch.equal(both.relevancy["text"], got.relevancy["text"])


@pytest.mark.parametrize("per", ["layer", "head"])
def test_a_whole_answer_about_a_picture(per):
    model, images, answer = image_to_text(), pictures(1), [4, 5, 6]
    got = explain_layers(model, {"images": images, "decoder_input_ids": torch.tensor([[1]])}, answer=answer, per=per)
    logits, kinds, maps = stored(model, images[0], [1, *answer])
    scored = with_gradients(kinds, maps, logits[range(3), answer].sub(logits[:3].logsumexp(-1)).sum())
    for tower, pair in (("tower1", "tt"), ("tower0", "ti")):
        agrees(got, tower, sum(rows_of(scored, pair, [number], "gradient") for number in range(3)))
    sizes = (2,) if per == "layer" else (2, 4)
    assert got.image.shape == (*sizes, 1, *GRID) and got.text.shape == (*sizes, 1, 3) and got.token_ids == [answer]
    assert got.owners == {"image": "tower0", "text": "tower1"}
    assert "<table" in got.to_html() and got.plot() and len(got.to_pandas())


def test_a_decoder_that_attends_to_the_picture_alone():
    """Its tokens do not attend to one another: it has no map to itself, and the picture has all."""
    model = image_to_text()
    for layer in model.decoder.layers:
        layer._sa_block = lambda x, *rest, **options: torch.zeros_like(x)
    inputs = {"images": pictures(), "decoder_input_ids": torch.tensor([[1, 4], [1, 7]])}
    got = explain_layers(model, inputs, target=3, per="layer")
    assert got.layers == {"tower1": [], "tower0": [0, 1]}
    assert got.relevancy["tower1"].shape == (0, 2, 2) and got.at(0).image.shape == (2, *GRID)
