"""token_grounding against the maps that the model itself returns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

import vlattn_fast as va
from tests.helpers.interpret import decoder_cases
from tests.helpers.interpret.small_models import made
from vlattn_fast.interpret.evaluating.token_grounding import map_numbers

ANSWERS = [[5, 6, 7], [8, 4]]


def captioner() -> tuple[Any, dict[str, Tensor]]:
    vision = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
    text = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=2)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text, decoder_start_token_id=1)
    model = VisionEncoderDecoderModel(config).double().eval()
    model.decoder.set_attn_implementation("eager")
    return model, {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}


def whisper() -> tuple[Any, dict[str, Tensor]]:
    small = made("whisper")
    small.model.set_attn_implementation("eager")
    return small.model, {"input_features": torch.cat([each["input_features"] for each in small.samples])}


@pytest.mark.parametrize("make", [captioner, whisper])
def test_an_encoder_decoder(make: Any) -> None:
    model, inputs = make()
    table = va.token_grounding(model, inputs, answer=ANSWERS)
    assert table.tokens == ANSWERS and len(table) == 5
    for sample, answer in enumerate(ANSWERS):
        own = {name: x[sample : sample + 1] for name, x in inputs.items()}
        ids = torch.tensor([[model.config.decoder_start_token_id, *answer]])
        with torch.no_grad():
            out = model(**own, decoder_input_ids=ids, output_attentions=True)
            silent = {name: torch.full_like(x, float(inputs[name].min()) if make is whisper else 0.0) for name, x in own.items()}
            blank = model(**silent, decoder_input_ids=ids).logits.log_softmax(-1)
        cross, itself = (torch.stack(x, 1)[0] for x in (out.cross_attentions, out.decoder_attentions))  # (L, H, N, M)
        logs = out.logits.log_softmax(-1)
        for n, token in enumerate(answer):
            found = {name: float(x[sample, n]) for name, x in table.numbers.items()}
            assert found["log_probability"] == pytest.approx(float(logs[0, n, token]))
            assert found["log_probability_blank"] == pytest.approx(float(blank[0, n, token]))
            assert found["gain"] == pytest.approx(float(logs[0, n, token] - blank[0, n, token]))
            assert found["entropy"] == pytest.approx(float(torch.special.entr(logs[0, n].exp()).sum()))
            entropy = torch.special.entr(cross[:, :, n]).sum(-1)
            torch.testing.assert_close(table.by_head["attention_entropy"][sample, n], entropy)
            assert found["attention_entropy"] == pytest.approx(float(entropy.mean()))
            assert found["share_question"] == pytest.approx(float(itself[:, :, n, 0].mean()))
            assert found["share_answer"] == pytest.approx(float(itself[:, :, n, 1 : n + 1].sum(-1).mean()))
            place, last = n + 1, len(answer)
            diagonal = itself[:, :, place, place]
            received = itself[:, :, place:, place].sum(-1) / (last - place + 1)
            torch.testing.assert_close(table.by_head["diagonal"][sample, n], diagonal)
            torch.testing.assert_close(table.by_head["received_less_diagonal"][sample, n], received - diagonal)


def test_numbers_of_maps_are_those_of_explain() -> None:
    model, inputs = captioner()
    table = va.token_grounding(model, inputs, answer=ANSWERS)
    image = va.explain(model, inputs, answer=ANSWERS).image
    for sample, answer in enumerate(ANSWERS):
        for n in range(len(answer)):
            wanted = map_numbers([image[sample, n]])
            assert [float(table.numbers[x][sample, n]) for x in ("compactness", "near_peak", "components")] == [*wanted]
    without = va.token_grounding(model, inputs, answer=ANSWERS, maps=False)
    assert "compactness" not in without.numbers and torch.equal(without.column("gain"), table.column("gain"))


def test_numbers_of_a_map_by_hand() -> None:
    one = torch.zeros(4, 5)
    one[1, 2] = 3.0
    assert map_numbers([one]) == (1.0, 1.0, 1.0)
    even = map_numbers([torch.ones(4, 5)])
    assert even == pytest.approx((0.0, 3 / 20, 1.0), abs=1e-12)  # the peak is in a corner
    two = torch.tensor([[4.0, 2.0, 0.0, 2.0], [0.0, -9.0, 0.0, 0.0]])
    assert map_numbers([two, torch.zeros(1, 1)])[1:] == (6 / 8, 2.0)  # two parts of at least half the peak
    assert all(x != x for x in map_numbers([-torch.ones(2, 2)]))


def test_layers_have_the_numbers_of_interventions() -> None:
    """The only layer of a mapper attends to the image, and comes after two layers of a text encoder."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4))
    text = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=20, bos_token_id=1, eos_token_id=2))
    model = va.models.CLIPMapper(vision, text, hidden_size=16, num_layers=1, num_heads=2, vocab_size=20).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 8, 8), "input_ids": torch.tensor([[1, 5]])}
    by_head = va.token_grounding(model, inputs, answer=[[6, 7]], maps=False).by_head
    entropy = by_head["attention_entropy"][0, 0]  # (L, H)
    assert entropy.isnan().all(-1).tolist() == [True, True, False] and by_head["diagonal"].shape[2] == 3
    with torch.no_grad(), va.intervene(model, inputs, va.ScaleHeads({2: [0]}, 0.0, tower=("text", "vision"))):
        model(**inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_with_image_tokens(side: str) -> None:
    """Prompts of two lengths, alone and in a batch that is padded."""
    case = decoder_cases.llava()
    model, answer = case.model.eval(), [5, 6, 7]
    table = va.token_grounding(model, case.inputs(side), answer=answer, maps=False)
    model.set_attn_implementation("eager")
    for sample, prompt in enumerate(case.prompts):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=case.images["pixel_values"][sample : sample + 1], output_attentions=True)
        maps, is_image, size = torch.stack(out.attentions, 1)[0], ids[0] == decoder_cases.IMAGE, len(prompt)  # (L, H, N, N)
        for n, token in enumerate(answer):
            row, own = maps[:, :, size - 1 + n], maps[:, :, size + n, size + n]
            image, before = row[..., is_image], row[..., size : size + n].sum(-1)
            wanted = {
                "share_image": image.sum(-1),
                "share_answer": before,
                "share_question": 1 - image.sum(-1) - before,
                "attention_entropy": torch.special.entr(image / image.sum(-1, keepdim=True)).sum(-1),
                "diagonal": own,
                "received_less_diagonal": maps[:, :, size + n :, size + n].mean(-1) - own,
            }
            for name, x in wanted.items():
                torch.testing.assert_close(table.by_head[name][sample, n].float(), x, rtol=1e-4, atol=1e-5, msg=name)
            log = float(out.logits[0, size - 1 + n].log_softmax(-1)[token])
            assert float(table.numbers["log_probability"][sample, n]) == pytest.approx(log, abs=1e-5)


def test_detectors(tmp_path: Path) -> None:
    """A detector of one number, and a fitted one that finds the number which tells; files give the same scores."""
    model, inputs = captioner()
    tables = [va.token_grounding(model, inputs, answer=[[n, n + 1, n + 2], [n, 3]], maps=False) for n in range(5, 13)]
    labels = [(table.column("gain") > 0).tolist() for table in tables]
    by_gain = tables[0].detector("gain")
    assert by_gain.auroc(tables, labels) == (1.0, 1.0, 1.0)
    assert tables[0].detector("entropy").score(tables[0]).tolist() == (-tables[0].column("entropy")).tolist()
    fitted = va.GroundingDetector.fit(tables, labels)
    value, low, high = fitted.auroc(tables, labels)
    assert low <= value <= high and value > 0.9
    read = va.GroundingDetector.load(fitted.save(tmp_path / "detector.json"))
    assert torch.equal(read.score(tables[3]), fitted.score(tables[3])) and read == fitted
    with pytest.raises(ValueError, match="one kind alone"):
        by_gain.auroc(tables, [[True] * len(table) for table in tables])
    with pytest.raises(ValueError, match="labels must have one for each token"):
        va.GroundingDetector.fit(tables, [[True]])
    with pytest.raises(ValueError, match="name must be one of .*'gain'"):
        tables[0].detector("compactness")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"path must be a file of GroundingDetector\.save"):
        va.GroundingDetector.load(tmp_path / "other.json")


def test_bad_input() -> None:
    model, inputs = captioner()
    with pytest.raises(ValueError, match="answer must be given"):
        va.token_grounding(model, inputs, answer=None)
    with pytest.raises(TypeError, match="maps must be True or False"):
        va.token_grounding(model, inputs, answer=ANSWERS, maps=1)
    with pytest.raises(ValueError, match="empty batch"):
        va.token_grounding(model, {"pixel_values": inputs["pixel_values"][:0]}, answer=torch.zeros(0, 2, dtype=torch.long))
