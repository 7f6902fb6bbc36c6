"""Records of encoders and of single-stream models, every method, against the published rules on stored maps."""

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from tests.helpers.interpret.cases import lively, one_hot
from tests.helpers.interpret.encoder_cases import IMAGE, MADE, PATCHES, WORDS, Encoder, git, layoutlmv3, vilt, visual_bert
from tests.helpers.interpret.stored_maps import Place, assert_rows, check, rows_of
from vlattn_fast.interpret import explain


@pytest.fixture
def encoder(request: pytest.FixtureRequest) -> Encoder:
    torch.manual_seed(0)
    made = request.param()
    lively(made.model).eval()
    return made


def in_order(model: torch.nn.Module) -> torch.nn.Module:
    """ViLT draws all patches of an image in random order; in the model of the stored maps they come in theirs."""
    draw, forward, model = torch.multinomial, model.forward, copy.copy(model)
    ordered = lambda p, n, **k: torch.arange(len(p)) if len(p) == n and not k else draw(p, n, **k)  # noqa: E731
    model.forward = mock.patch.object(torch, "multinomial", ordered)(forward)
    return model


def names(made: Callable[[], Encoder]) -> str:
    return made.__name__


@pytest.mark.parametrize("encoder", MADE, indirect=True, ids=names)
def test_equals_published_rule(encoder):
    if "language" in encoder.places:  # GIT's vision tower is not explained, and takes its softmax in float32 by itself
        encoder.model.set_attn_implementation("literal")
    assert list(explain(encoder.model, encoder.inputs, target=encoder.target).relevancy) == list(encoder.places)
    check(encoder.model, encoder.inputs, encoder.places, encoder.score, stored=in_order, target=encoder.target)


@pytest.mark.parametrize("encoder", MADE, indirect=True, ids=names)
def test_images_and_words_are_cut_out_of_the_rows(encoder):
    got, facts = explain(encoder.model, encoder.inputs, target=encoder.target), encoder.facts
    if "words" in facts:
        assert got.token_ids == facts["words"]
        row, ids = got.without_self(list(got.relevancy)[-1]), encoder.inputs["input_ids"]
        row = row[:, IMAGE + ("joint" in got.relevancy) :] if facts.get("first", 99) < 3 else row[:, :WORDS]
        for b, words in enumerate(facts["words"]):
            first = ids[b].tolist().index(words[0], int(ids.shape[1] > len(words) and words != ids[b, : len(words)].tolist()))
            assert torch.equal(got.text[b, : len(words)], row[b, first : first + len(words)])
    if "image" in facts or "images" in facts:
        grids = facts.get("images", [facts["image"][1:]] * 2 if "image" in facts else None)
        assert [tuple(image.shape) for image in got.image] == grids
        row = got.without_self(next(iter(got.relevancy)))
        for image, patches in zip(got.image, row, strict=True):
            first = facts.get("first", row.shape[1] - PATCHES)
            assert torch.equal(image.flatten(), patches[first : first + image.numel()])
    else:
        assert got.image is None
    if "regions" in facts:
        assert torch.equal(got.regions, got.relevancy["joint"][:, WORDS:])
        assert tuple(got.regions.shape) == facts["regions"] and got.boxes is None


@pytest.mark.parametrize("encoder", [vilt], indirect=True, ids=names)
def test_patches_of_vilt_keep_their_places(encoder):
    """The model itself shuffles them, which changes no score."""
    torch.manual_seed(1)
    one = explain(encoder.model, encoder.inputs)
    torch.manual_seed(2)
    with torch.no_grad():
        torch.testing.assert_close(encoder.score(encoder.model(**encoder.inputs)), one.scores)
    other = explain(encoder.model, encoder.inputs)
    assert all(torch.equal(a, b) for a, b in zip(one.image, other.image, strict=True))
    assert "visual_embed" not in vars(encoder.model.vilt.embeddings)
    encoder.model.config.max_image_length = 7  # some of the patches are drawn, and nothing tells which
    some = explain(encoder.model, encoder.inputs)
    assert some.image is None and some.relevancy["joint"].shape == (2, WORDS + 1 + 7)
    assert some.token_ids == one.token_ids


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("encoder", [git], indirect=True, ids=names)
def test_answer_behind_the_patches(encoder, each):
    encoder.model.set_attn_implementation("literal")
    encoder.model.double()
    inputs = {**encoder.inputs, "pixel_values": encoder.inputs["pixel_values"].double()}
    answer = torch.tensor([[7, 30], [8, 12]])
    got = explain(encoder.model, inputs, answer=answer, per_token=each)
    longer = {"pixel_values": inputs["pixel_values"], "input_ids": torch.zeros(2, 11, dtype=torch.long)}
    longer["attention_mask"] = torch.tensor([[1] * 11, [1] * 8 + [0] * 3])
    for row, (end, tokens) in enumerate(((9, [7, 30]), (6, [8, 12]))):
        longer["input_ids"][row, :end] = inputs["input_ids"][row, :end]
        longer["input_ids"][row, end : end + 2] = torch.tensor(tokens)
        longer["input_ids"][row, end + 2 :] = inputs["input_ids"][row, end:]
    real = torch.cat([torch.ones(2, IMAGE, dtype=torch.long), longer["attention_mask"]], 1)
    batch = torch.arange(2)
    places = [torch.tensor([IMAGE + 8 + t, IMAGE + 5 + t]) for t in range(2)]

    def assert_row(row, read):
        """The row of these tokens' scores, read where each is predicted."""
        place = Place("git.encoder", sum(one_hot(places[t], IMAGE + 11) for t in read), real)
        score = lambda o: sum(o.logits.log_softmax(-1)[batch, places[t], answer[:, t]] for t in read)  # noqa: E731
        assert_rows(row, rows_of(encoder.model, longer, score, {"language": place})["language"], place)

    if each:
        for t in range(2):
            assert_row(got.relevancy["language"][:, t], [t])
        assert got.text.shape == (2, 2, 11)
    else:
        assert_row(got.relevancy["language"], [0, 1])
    assert got.token_ids == [longer["input_ids"][0].tolist(), longer["input_ids"][1, :8].tolist()]


@pytest.mark.parametrize("encoder", [visual_bert, layoutlmv3, git], indirect=True, ids=names)
def test_text_alone(encoder):
    image = ("visual_embeds", "visual_attention_mask", "pixel_values")
    got = explain(encoder.model, {name: value for name, value in encoder.inputs.items() if name not in image})
    assert next(iter(got.relevancy.values())).shape == (2, WORDS) and got.image is None and got.regions is None
    assert got.token_ids == encoder.facts["words"]


def test_a_caption_of_padding_alone_is_refused():
    """GIT's patches are real in each row, and its last patch predicts no word."""
    encoder = git()
    inputs = {**encoder.inputs, "attention_mask": encoder.inputs["attention_mask"].clone()}
    inputs["attention_mask"][1] = 0
    for arguments in ({}, {"position": "last", "target": lambda outputs: outputs.logits[:, -1, 3]}):
        with pytest.raises(
            ValueError, match="attention_mask must have a real token in each sample; got a sample with only padding"
        ):
            explain(encoder.model, inputs, **arguments)
