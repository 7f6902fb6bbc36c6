"""Token activation maps, against a plain reading of the formula; the subtraction of earlier words; the rank Gaussian filter."""

import math

import numpy as np
import pytest
import torch

from tests.helpers.interpret.cases import CASES
from tests.helpers.interpret.decoder_cases import DECODERS, IMAGE
from vlattn_fast.interpret import Explanation, explain
from vlattn_fast.interpret.result.numbers.interference import rank_filtered, rest_of_map

ANSWER = [7, 12, 7, 30]


def plain(logits, ids, places, token, place, answer):
    """The row of one prompt (N) for a token, by loops: `places` are those of the prompt's words, `answer` the ids and predicting
    positions of its earlier words."""
    row = [max(float(logits[i, token]), 0.0) if i <= place else 0.0 for i in range(len(ids))]
    image = [i for i, one in enumerate(ids) if one == IMAGE]
    words = [(one, i) for one, i in [*((ids[i], i) for i in places), *answer] if one != token]
    if words and image:
        weights = [max(float(logits[i, token]), 0.0) for _, i in words]
        total = sum(weights) + 1e-8
        means = [
            sum(weight * max(float(logits[i, one]), 0.0) for weight, (one, _) in zip(weights, words, strict=True)) / total
            for i in image
        ]
        square = sum(mean**2 for mean in means)
        scale = sum(row[i] * mean for i, mean in zip(image, means, strict=True)) / square if square else 0.0
        for i, mean in zip(image, means, strict=True):
            row[i] = max(row[i] - scale * mean, 0.0)
    return row


def filtered(image: np.ndarray) -> np.ndarray:
    """The filter by loops, as the paper's figure and code have it."""
    padded, out = np.pad(image, 1, mode="reflect"), np.zeros_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            window = sorted(padded[y : y + 3, x : x + 3].flatten())
            mean = sum(window) / 9
            if mean <= 0:
                continue
            width = math.sqrt(sum((value - mean) ** 2 for value in window) / 9) / mean
            weights = [math.exp(-(rank**2) / (2 * width**2)) if width else float(rank == 0) for rank in range(-4, 5)]
            out[y, x] = sum(w * v for w, v in zip(weights, window, strict=True)) / sum(weights)
    return out


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"])
def test_each_word_of_an_answer(name, side):
    from tests.helpers.interpret.cases import lively

    torch.manual_seed(6)
    decoder = DECODERS[name]()
    model = lively(decoder.model).eval()
    inputs = decoder.inputs(side)
    got = explain(model, inputs, answer=ANSWER, method="tam")
    assert got.method == "tam" and got.scores.shape == (2, 4)
    torch.testing.assert_close(got.scores, explain(model, inputs, answer=ANSWER).scores)
    rows = got.relevancy["language"].double()
    for sample, prompt in enumerate(decoder.prompts):
        # The same prompt alone, without padding.
        single = {key: value[sample : sample + 1] for key, value in decoder.images.items() if len(value) == len(decoder.prompts)}
        if len(single) != len(decoder.images):
            single = {**inputs, "input_ids": None}
        ids = [*prompt, *ANSWER]
        alone = {key: value for key, value in single.items() if key not in ("input_ids", "attention_mask")}
        if "image_grid_thw" in inputs:  # patches of all images stand in one tensor
            sizes = inputs["image_grid_thw"].prod(-1).tolist()
            alone = {
                "pixel_values": inputs["pixel_values"].split(sizes)[sample],
                "image_grid_thw": inputs["image_grid_thw"][sample : sample + 1],
                "mm_token_type_ids": (torch.tensor([ids]) == IMAGE).int(),
            }
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), **alone).logits[0].double()
        pad = inputs["input_ids"].shape[1] - len(prompt) if side == "left" else 0
        places = [spot - pad for spot in got.text_positions[sample][: -len(ANSWER)]]
        assert len(places) > 1 and all(ids[spot] not in (0, 1, 2, IMAGE) for spot in places)
        for number, token in enumerate(ANSWER):
            place = len(prompt) - 1 + number
            answer = [(one, len(prompt) - 1 + i) for i, one in enumerate(ANSWER[:number])]
            want = torch.tensor(plain(logits, ids, places, token, place, answer))
            mine = rows[sample, number, pad : pad + len(ids)]
            assert want.max() > 0.1
            torch.testing.assert_close(mine, want.double(), rtol=1e-3, atol=1e-4)
            outside = rows[sample, number].clone()
            outside[pad : pad + len(ids)] = 0
            assert not outside.any()
            image = torch.tensor(ids) == IMAGE
            grid = got.image[sample][number]
            assert np.allclose(grid, filtered(mine[image].view(grid.shape).numpy()), rtol=1e-4, atol=1e-5)
            assert grid.abs().max() > 1e-3


@pytest.mark.parametrize("case", ["llava"], indirect=True)
def test_a_target_is_the_first_word_of_an_answer(case):
    got = explain(case.model, case.inputs, target=[7, 12], method="tam")
    answered = explain(case.model, case.inputs, answer=[[7], [12]], method="tam")
    count = got.relevancy["language"].shape[1]
    torch.testing.assert_close(got.relevancy["language"], answered.relevancy["language"][:, 0, :count], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.image, answered.image[:, 0], rtol=1e-4, atol=1e-5)
    assert got.target == [7, 12] and explain(case.model, case.inputs, method="tam").target is not None


@pytest.mark.parametrize("case", ["llava"], indirect=True)
def test_shorter_answers_end_in_zeros(case):
    got = explain(case.model, case.inputs, answer=[[7, 12, 9], [9]], method="tam")
    assert not got.relevancy["language"][1, 1:].any() and not got.image[1][1:].any()
    assert got.relevancy["language"][0].any(-1).all()
    pytest.importorskip("jinja2")
    assert "<canvas" in got.to_html()


def test_a_text_alone_has_its_activations():
    model = DECODERS["LlamaForCausalLM"]().model.eval()
    ids = torch.tensor([[1, 4, 9, 11]])
    got = explain(model, {"input_ids": ids}, target=5, method="tam")
    with torch.no_grad():
        torch.testing.assert_close(got.relevancy["language"], model(ids).logits[:, :, 5].clamp(min=0))


def test_the_rest_of_a_map_worked_by_hand():
    """I = (3 (2, 0) + 1 (0, 4)) / 4 = (1.5, 1); M.I = 8, I.I = 3.25; of (4, 2) there remain 4 - 1.5 * 8 / 3.25 and 0."""
    earlier, weights = torch.tensor([[2.0, 0.0], [0.0, 4.0]]).double(), torch.tensor([3.0, 1.0]).double()
    left = rest_of_map(torch.tensor([4.0, 2.0]).double(), earlier, weights)
    torch.testing.assert_close(left, torch.tensor([4 - 12 / 3.25, 0.0]).double(), rtol=1e-7, atol=1e-7)
    assert torch.equal(rest_of_map(torch.tensor([4.0, 2.0]), torch.zeros(2, 2), torch.ones(2)), torch.tensor([4.0, 2.0]))
    # A map in proportion to that of an earlier word leaves nothing.
    assert rest_of_map(torch.tensor([4.0, 2.0]), torch.tensor([[2.0, 1.0]]), torch.ones(1)).abs().max() < 1e-6


@pytest.mark.parametrize("case", ["llava", "qwen2_5_vl"], indirect=True)
def test_earlier_words_are_subtracted_from_any_map(case):
    got = explain(case.model, case.inputs, answer=ANSWER)
    left = got.subtract_earlier()
    assert left.relevancy is got.relevancy and left.answer == got.answer
    for sample in range(2):
        maps = got.image[sample].clamp(min=0).flatten(1)
        places = got.text_positions[sample][-4:]
        for number, token in enumerate(ANSWER):
            earlier = [before for before in range(number) if ANSWER[before] != token]
            want = maps[number]
            if earlier:
                want = rest_of_map(want, maps[earlier], got.relevancy["language"][sample, number, places][earlier].clamp(min=0))
            torch.testing.assert_close(left.image[sample][number].flatten(), want)
        assert not torch.equal(left.image[sample][1], got.image[sample][1].clamp(min=0))
    smooth = got.subtract_earlier(rank_filter=True)
    for sample in range(2):
        for number in range(4):
            want = filtered(left.image[sample][number].double().numpy())
            assert np.allclose(smooth.image[sample][number], want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", ["llava"], indirect=True)
def test_what_has_no_earlier_words_is_refused(case):
    with pytest.raises(ValueError, match="subtract_earlier needs an answer explained per token"):
        explain(case.model, case.inputs).subtract_earlier()
    with pytest.raises(ValueError, match="subtract_earlier needs an answer explained per token"):
        explain(case.model, case.inputs, answer=ANSWER, per_token=False).subtract_earlier()
    text = explain(DECODERS["LlamaForCausalLM"]().model.eval(), {"input_ids": torch.tensor([[1, 4, 9]])}, answer=[5, 6])
    with pytest.raises(ValueError, match="subtract_earlier needs maps of an image"):
        text.subtract_earlier()
    made = Explanation({"language": torch.ones(1, 2, 5)}, image=torch.ones(1, 2, 2, 2)[0], answer=[[3, 4]], image_samples=[0, 0])
    with pytest.raises(ValueError, match="subtract_earlier needs the text_positions"):
        made.subtract_earlier()
    with pytest.raises(TypeError, match="rank_filter must be"):
        explain(case.model, case.inputs, answer=ANSWER).subtract_earlier(rank_filter=1)


@pytest.mark.parametrize("shape", [(5, 7), (2, 2), (4, 3)])
def test_the_filter_is_that_of_the_paper(shape):
    maps = torch.rand(3, *shape, dtype=torch.float64) ** 3
    maps[1] *= torch.rand(shape) > 0.7  # windows of zeros
    maps[2] = 0.25  # numbers that are all equal
    for got, one in zip(rank_filtered(maps), maps, strict=True):
        assert np.allclose(got, filtered(one.numpy()), rtol=1e-10, atol=1e-14)


def test_the_filter_takes_an_outlier_out():
    """One 9 among ones: mean 17/9, deviation 8 sqrt(8)/9, so the width is 1.33; the largest rank weighs exp(-16 / 2 / 1.77)."""
    image = torch.ones(5, 5, dtype=torch.float64)
    image[2, 2] = 9.0
    got = rank_filtered(image)
    width = (8 * math.sqrt(8) / 9) / (17 / 9)
    weights = [math.exp(-(rank**2) / (2 * width**2)) for rank in range(-4, 5)]
    assert float(got[2, 2]) == pytest.approx((sum(weights) + 8 * weights[-1]) / sum(weights)) and got[2, 2] < 1.05
    assert got[0, 0] == 1.0
    assert not rank_filtered(-image).any()


def test_a_narrow_map_is_filtered():
    """Edges are repeated where a map of one line has nothing to mirror."""
    line = torch.tensor([[1.0, 2.0, 3.0, 2.0]], dtype=torch.float64)
    assert torch.equal(rank_filtered(line), rank_filtered(line.expand(3, 4))[1:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": lambda outputs: outputs.logits[:, -1, 3]},
            "target must be None, tokens or words, or answer be given with per_token=True",
        ),
        ({"answer": ANSWER, "per_token": False}, "explains one token; got a callable or per_token=False"),
    ],
)
def test_bad_options(options, message):
    case = CASES["llava"]()
    with pytest.raises(ValueError, match=message):
        explain(case.model.eval(), case.inputs, method="tam", **options)
