"""The measures of the models of DigitScenes, of models that know the truth, half of it, or nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

import vlattn_lab as lab
from vlattn_lab import clip as clip_module
from vlattn_lab import is_true, mapper
from vlattn_lab import uniter as uniter_module
from vlattn_lab.processor import VOCABULARY


@pytest.fixture
def told(monkeypatch):
    """Log odds of who is told the scenes, plus what `bias(scenes, input_ids)` adds."""

    def ask(bias):
        def score(model, scenes, *, input_ids=None):
            ids = scenes.input_ids if input_ids is None else input_ids
            captions = [" ".join(VOCABULARY[i] for i in row) for row in ids[:, 1:6].tolist()]
            true = [is_true("", *row) for row in zip(captions, scenes.digits, scenes.boxes, strict=True)]
            return 2.0 * torch.tensor(true) - 1 + bias(scenes, ids)

        monkeypatch.setattr(uniter_module, "matching_score", score)

    return ask


def test_matching_accuracy_is_over_true_and_false_captions(told):
    for bias, accuracy in ((0.0, 1.0), (5.0, 0.5), (-5.0, 0.5)):  # who knows, who always says yes, who always says no
        told(lambda scenes, ids, bias=bias: bias)
        assert lab.matching_accuracy(None, count=40) == dict.fromkeys(("digit", "relation", "order"), accuracy)


def test_text_and_image_scores_are_not_exchanged(told):
    """Winoground: the text score compares captions of one image, the image score images of one caption."""
    one, _ = lab.swapped_pairs(40)
    told(lambda scenes, ids: 0.0)
    assert lab.winoground_scores(None, count=40) == {"text": 1.0, "image": 1.0, "group": 1.0}
    told(lambda scenes, ids: 5.0 * torch.equal(scenes.images, one.images))  # likes the first image of each pair
    assert lab.winoground_scores(None, count=40) == {"text": 1.0, "image": 0.0, "group": 0.0}
    told(lambda scenes, ids: 5.0 * torch.equal(ids, one.input_ids))  # likes the first caption of each pair
    assert lab.winoground_scores(None, count=40) == {"text": 0.0, "image": 1.0, "group": 0.0}


def test_nan_is_not_counted_as_a_loss(told):
    one, two = lab.swapped_pairs(40)
    broken = two.input_ids
    told(lambda scenes, ids: torch.nan if torch.equal(scenes.images, one.images) and torch.equal(ids, broken) else 0.0)
    with pytest.raises(ValueError, match=r"scores that can be compared; got NaN for picture 0 with caption 1, at \[0, 1"):
        lab.winoground_scores(None, count=40)
    told(lambda scenes, ids: torch.nan)
    with pytest.raises(ValueError, match="scores that can be compared; got NaN for a true caption, at"):
        lab.matching_accuracy(None, count=40)


def test_retrieval_by_hand(monkeypatch):
    """Of drawn similarities of images to captions."""
    count = 60
    scenes = lab.digit_scenes(count, seed=4)
    words, row = clip_module.words_of(scenes), torch.arange(count)
    similar = torch.rand(count, count) + torch.rand(count, 1) + 0.5 * torch.eye(count)  # some images fit anything
    monkeypatch.setattr(clip_module, "embeddings", lambda model, scenes, words: (similar, torch.eye(count)))
    found = lab.retrieval(None, count=count, seed=4)
    own = clip_module.caption_pixels(scenes, words) >= clip_module.CLEARANCE
    to_text, to_image = similar.argmax(1), similar.argmax(0)
    same = torch.tensor([scenes.captions[i] == scenes.captions[j] for i, j in enumerate(to_text.tolist())])
    want = {
        "image_to_text": same,
        "image_to_true_text": own[row, to_text],
        "text_to_image": to_image == row,
        "text_to_true_image": own[to_image, row],
    }
    assert found == {name: round(float(hits.double().mean()), 4) for name, hits in want.items()}
    assert found["text_to_image"] != found["image_to_text"]


def test_blind_answers_are_learnt_from_training_questions(monkeypatch):
    drawn = []
    plain = mapper.digit_questions
    monkeypatch.setattr(mapper, "digit_questions", lambda n, **kw: drawn.append((n, kw.get("split", "test"))) or plain(n, **kw))
    mapper.blind_accuracy(count=8, learned=20)
    assert drawn == [(8, "test"), (20, "train")] * len(mapper.QUESTIONS)


def test_labels_of_probes_are_those_of_the_captions():
    scenes = lab.digit_scenes(40, seed=6)
    given = [
        row for inputs, labels in lab.probe_samples(40, seed=6, batch=7) for row in zip(inputs["input_ids"], labels, strict=True)
    ]
    assert len(given) == 40
    for (ids, label), caption, digits, boxes in zip(given, scenes.captions, scenes.digits, scenes.boxes, strict=True):
        said = [VOCABULARY[i] for i in ids.tolist()]
        names = [lab.processor.DIGIT_WORDS[digit] for digit in digits.tolist()]
        phrases = [(" ".join(said[start:end]), names[region], digit) for (start, end), region, digit in label["phrases"]]
        words = caption.split()
        assert phrases == [(words[0], words[0], words[0]), (f"a {words[4]}", words[4], words[4])]
        pairs = {name: (" ".join(said[slice(*one)]), " ".join(said[slice(*two)])) for one, two, name in label["word_relations"]}
        relation = " ".join(words[1:3])
        assert pairs["subject"] == (words[0], relation) and pairs["object"] == (relation, words[4])
        inverted, odd = ([VOCABULARY[i] for i in label["variants"][task]] for task in ("inverted", "odd_word"))
        assert inverted[1:6] == [words[4], *words[1:4], words[0]] and sum(a != b for a, b in zip(odd, said, strict=True)) == 1
        ((first, second, relation),) = label["relations"]
        assert is_true("", f"{names[first]} {relation} a {names[second]}", digits, boxes)
        assert label["sentence"] == {"first_digit": words[0]}
