"""`explain` against the published full-matrix procedure, every method on every family."""

from __future__ import annotations

import pytest
import torch

from vlattn_fast.explain import explain

METHODS = ("gradient", "weighted", "rollout", "attention", "gradcam")
CASES = ("clip", "siglip", "vit", "dinov2", "bert", "llava", "qwen2_5_vl")


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference as a share of the largest wanted value."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_equals_published_procedure(case, published, method):
    want = published(case, method)
    explanation = explain(case.model, case.inputs, method=method)
    assert list(explanation.relevancy) == list(case.towers)
    for tower, row in want.items():
        assert row.count_nonzero() > (0 if method == "gradcam" else row.numel() // 3)
        assert difference(explanation.relevancy[tower], row) < 1e-5


@pytest.mark.parametrize("method", ["gradient", "weighted", "rollout"])
@pytest.mark.parametrize("start_layer", [-1, 1])
@pytest.mark.parametrize("case", ["clip", "siglip", "bert", "llava"], indirect=True)
def test_start_layer(case, published, method, start_layer):
    want = published(case, method, start_layer)
    explanation = explain(case.model, case.inputs, method=method, start_layer=start_layer)
    for tower, row in want.items():
        assert difference(explanation.relevancy[tower], row) < 1e-5


@pytest.mark.parametrize("case", ["clip", "bert"], indirect=True)
def test_layers_matter(case):
    whole = explain(case.model, case.inputs)
    last = explain(case.model, case.inputs, start_layer=-1)
    for tower, row in whole.relevancy.items():
        assert difference(last.relevancy[tower], row) > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_double_precision(case, published, in_double, method):
    inputs = in_double(case)
    want = published(case, method, inputs=inputs, form="literal")
    explanation = explain(case.model, inputs, method=method)
    for tower, row in want.items():
        assert explanation.relevancy[tower].dtype == torch.float64
        assert difference(explanation.relevancy[tower], row) < 1e-12


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_scores_are_the_models(case):
    with torch.no_grad():
        want = case.score(case.model(**case.inputs), case.inputs)
    torch.testing.assert_close(explain(case.model, case.inputs).scores, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_image_and_text_are_cut_out_of_the_rows(case):
    explanation = explain(case.model, case.inputs)
    facts = case.facts
    if "images" in facts:
        assert [tuple(part.shape) for part in explanation.image] == facts["images"]
        first = explanation.relevancy["language"][0][case.inputs["input_ids"][0] == 55]
        assert torch.equal(explanation.image[0].flatten(), first)
    elif "image" in facts:
        assert tuple(explanation.image.shape) == facts["image"]
        row = next(iter(explanation.relevancy.values()))
        if "language" in explanation.relevancy:
            patches = row[case.inputs["input_ids"] == 55]
        else:
            patches = row[:, row.shape[1] - explanation.image[0].numel() :]
        assert torch.equal(explanation.image.flatten(), patches.flatten())
    else:
        assert explanation.image is None
    if "text" in facts:
        assert tuple(explanation.text.shape) == facts["text"]
        assert explanation.token_ids == facts["tokens"]
        row, ids = list(explanation.relevancy.values())[-1], case.inputs["input_ids"]
        for b, words in enumerate(explanation.token_ids):
            values = explanation.text[b, : len(words)].tolist()
            assert all((row[b][ids[b] == word] == value).any() for word, value in zip(words, values, strict=True))
            assert (explanation.text[b, len(words) :] == 0).all()
    else:
        assert explanation.text is None and explanation.tokens is None
