"""`explain` against the published full-matrix procedure, every method on every family."""

import pytest
import torch

from vlattn_fast.interpret import explain

CASES = ("clip", "siglip", "vit", "dinov2", "bert", "llava", "qwen2_5_vl", "uniter")


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_equals_published_procedure(case):
    assert list(explain(case.model, case.inputs).relevancy) == list(case.towers)
    case.check(case.inputs)


@pytest.mark.parametrize("case", ["clip", "siglip", "bert", "llava"], indirect=True)
def test_start_layer(case):
    for start_layer in (-1, 1):
        case.check(case.inputs, ("gradient", "weighted", "rollout"), start_layer)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_scores_and_fields(case):
    """The scores are the model's, and image and text are cut out of the rows."""
    explanation = explain(case.model, case.inputs)
    with torch.no_grad():
        want = case.score(case.model(**case.inputs), case.inputs)
    torch.testing.assert_close(explanation.scores, want, rtol=1e-4, atol=1e-4)
    facts = case.facts
    if "images" in facts:
        assert [tuple(part.shape) for part in explanation.image] == facts["images"]
        first = explanation.relevancy["language"][0][case.inputs["input_ids"][0] == 55]
        assert torch.equal(explanation.image[0].flatten(), first)
    elif "image" in facts:
        assert tuple(explanation.image.shape) == facts["image"]
        row = explanation.without_self(next(iter(explanation.relevancy)))
        if "language" in explanation.relevancy:
            patches = row[case.inputs["input_ids"] == 55]
        else:
            patches = row[:, row.shape[1] - explanation.image[0].numel() :]
        assert torch.equal(explanation.image.flatten(), patches.flatten())
    else:
        assert explanation.image is None
    if "regions" in facts:
        assert tuple(explanation.regions.shape) == facts["regions"]
        assert torch.equal(explanation.regions, explanation.relevancy["joint"][:, -facts["regions"][1] :])
        assert torch.equal(explanation.boxes, case.inputs["region_positions"][..., :4])
    if "text" in facts:
        assert tuple(explanation.text.shape) == facts["text"]
        assert explanation.token_ids == facts["tokens"]
        ids = case.inputs["input_ids"]
        row = explanation.without_self(list(explanation.relevancy)[-1])[:, : ids.shape[1]]
        for b, words in enumerate(explanation.token_ids):
            values = explanation.text[b, : len(words)].tolist()
            assert all((row[b][ids[b] == word] == value).any() for word, value in zip(words, values, strict=True))
            assert (explanation.text[b, len(words) :] == 0).all()
    else:
        assert explanation.text is None and explanation.tokens is None


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_old_clip_takes_the_largest_id_as_end_of_text(case):
    want = explain(case.model, case.inputs)
    case.model.config.text_config.eos_token_id = case.model.text_model.eos_token_id = 2
    got = explain(case.model, case.inputs)
    torch.testing.assert_close(got.text, want.text)
    assert got.token_ids == want.token_ids


@pytest.mark.parametrize("case", ["llava"], indirect=True)
def test_several_images_in_a_prompt(case):
    ids = torch.randint(3, 50, (2, 40))
    ids[0, 1:17], ids[0, 18:34], ids[1, 5:21] = 55, 55, 55
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(3, 3, 24, 24)}
    got = explain(case.model, inputs)
    assert got.image.shape == (3, 4, 4) and got.image_samples == [0, 0, 1]
    row = got.relevancy["language"]
    for image, (b, start) in zip(got.image, ((0, 1), (0, 18), (1, 5)), strict=True):
        assert torch.equal(image.flatten(), row[b, start : start + 16])
    assert got.text.shape == (2, 24) and len(got.tokens[0]) == 8


@pytest.mark.parametrize("case", ["llava"], indirect=True)
def test_cls_token_of_the_vision_tower_in_the_prompt(case):
    case.model.config.vision_feature_select_strategy = "full"
    ids = torch.randint(3, 50, (1, 24))
    ids[0, 3:20] = 55
    got = explain(case.model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 24, 24)})
    assert torch.equal(got.image.flatten(), got.relevancy["language"][0, 4:20])
    ids[0, 19] = 7
    with pytest.raises(ValueError, match="do not add up|do not match"):
        explain(case.model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 24, 24)})
