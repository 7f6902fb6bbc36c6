"""A model whose tokens have no place in a picture says so, and why."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
import transformers

import vlattn_fast as va
from tests.helpers.interpret.cases import CASES
from tests.helpers.interpret.decoder_cases import blip2, idefics2, instructblip

PHOTO = np.full((32, 32, 3), 255, np.uint8)


def notes(figure) -> str:
    return " ".join(figure.get_supxlabel().split())


@pytest.mark.parametrize(
    ("make", "queries"),
    [(blip2, "Blip2QFormerModel"), (instructblip, "InstructBlipQFormerModel"), (idefics2, "Idefics2PerceiverResampler")],
)
def test_learnt_queries(make, queries, tmp_path):
    case = make()
    explanation = va.explain(case.model.eval(), case.inputs())
    why = (
        f"the image tokens are the learned queries of {queries}, each of which attends to the whole image: their numbers are in "
    )
    assert explanation.no_map.startswith(why + "explanation.relevancy['language']. For a map, explain a model whose image tokens")
    for draw in (explanation.plot, explanation.overlay, explanation.to_html):
        with pytest.raises(ValueError, match=f"without maps and boxes; got one, but {why[:60]}"):
            draw(PHOTO)
    assert notes(explanation.plot()) == f"No map: {explanation.no_map}."
    explanation.plot().savefig(tmp_path / "words.png")
    assert f"No map: {why}" in explanation.to_html()
    for one in (explanation[0], va.Explanation.load(explanation.save(tmp_path / "one.safetensors"))):
        assert one.no_map == explanation.no_map
    layers = va.explain_layers(case.model, case.inputs(), per="layer")
    assert layers.no_map == layers.at(0).no_map == explanation.no_map


def test_patches_of_a_spectrogram():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_length=64, num_mel_bins=32)
    model = transformers.ASTForAudioClassification(transformers.ASTConfig(**sizes)).eval()
    explanation = va.explain(model, {"input_values": torch.randn(1, 64, 32)}, target=1, position=0)
    assert explanation.no_map.startswith("the input is sound, whose tokens are stretches of time")
    assert notes(explanation.plot()) == f"No map: {explanation.no_map}."
    with pytest.raises(ValueError, match="without maps and boxes; got one, but the input is sound, "):
        explanation.plot(PHOTO)


def test_models_with_maps_and_models_of_words_have_no_such_sentence():
    for case in (CASES["clip"](), CASES["bert"]()):
        explanation = va.explain(case.model, case.inputs)
        assert explanation.no_map is None and notes(explanation.plot()) == ""
    with pytest.raises(ValueError, match=r"no token of text has a place .*patches=va.PatchGrid\(rows, columns\)"):
        va.Explanation({"text": torch.rand(1, 3)}).plot(PHOTO)
