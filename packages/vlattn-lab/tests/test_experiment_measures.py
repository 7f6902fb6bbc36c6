"""What the experiments measure, and on which scans: models that know the truth, or one half of it, get the scores they must.

The other tests of the experiments run them on models that have learnt nothing, of which any figure would be as good.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")

import vlattn_lab as lab
from vlattn_lab import digit_scans, held_out_captions, is_true
from vlattn_lab.experiments import scores, weighted_relevancy
from vlattn_lab.experiments.congruence import training
from vlattn_lab.experiments.experiment import Settings
from vlattn_lab.experiments.scores import answering, generation, matching, material
from vlattn_lab.experiments.scores.encoders import Pair
from vlattn_lab.processor import VOCABULARY
from vlattn_lab.texts import ANSWERS


def test_a_rule_is_compared_with_the_plain_one_of_its_form(monkeypatch):
    """By hand: the margin of each set is the area of negative less that of positive perturbation, and low is good in positive."""
    # positive and negative: the rival, the plain rule and weights, of two models
    areas = iter([(0.0, 0.0), (0.2, 0.6), (0.1, 0.7), (0.0, 0.0), (0.3, 0.6), (0.1, 0.9)])

    def run(task, model, samples, seed, methods, tests):
        rows = []
        for label in methods:
            positive, negative = next(areas)
            facts = {"method": label, "part": "image"}
            rows += [{**facts, "test": "positive", "value": positive}, {**facts, "test": "negative", "value": negative}]
            rows.append({**facts, "test": "pointing", "value": None})
        return SimpleNamespace(table=rows)

    monkeypatch.setattr(weighted_relevancy, "run", run)
    monkeypatch.setattr(weighted_relevancy, "FORMS", {"published": ()})
    rule = ("norm", "divided")
    sets = [weighted_relevancy._measured("vqa", None, 2, seed, [rule]) for seed in range(2)]
    assert list(sets[0]) == [weighted_relevancy.RIVAL, "published, plain", "published, norm, divided"]
    assert [part["published, plain"]["margin image"] for part in sets] == pytest.approx([0.4, 0.3])
    mean, deviation, p = weighted_relevancy.compared(sets, "published", rule, "margin image")
    assert (mean, deviation) == pytest.approx((0.35, 0.15 * 2**0.5)) and 0.2 < p < 0.3  # of +0.2 and +0.5
    assert weighted_relevancy.compared(sets, "published", rule, "positive image")[0] == pytest.approx(0.15)
    assert weighted_relevancy.compared(sets, "published", rule, "pointing image") is None
    assert sets[0]["published, plain"]["margin text"] is None


# --- congruence ---


@pytest.fixture
def oracle(monkeypatch):
    """A model that is told the scenes: its log odds are 1 for a caption that is true and -1 for one that is false, and, where
    `bias` is asked for, ten more for the second scenes of swapped pairs. What it has seen is in `seen`."""
    found = SimpleNamespace(bias=0.0, seen=[])

    def model_inputs(scenes, *, noise=None):
        found.seen.append(scenes)
        return {"input_ids": scenes.input_ids, "scenes": scenes, "number": len(found.seen)}

    def log_odds(model, inputs):
        captions = [" ".join(VOCABULARY[i] for i in row) for row in inputs["input_ids"][:, training.WORDS].tolist()]
        scenes = inputs["scenes"]
        true = [is_true("", *row) for row in zip(captions, scenes.digits, scenes.boxes, strict=True)]
        return 2.0 * torch.tensor(true) - 1 + found.bias * (inputs["number"] == 3)

    monkeypatch.setattr(training, "model_inputs", model_inputs)
    monkeypatch.setattr(training, "log_odds", log_odds)
    monkeypatch.setattr(training, "congruences", lambda model, inputs: (log_odds(model, inputs), {}))
    return found


def crops(scenes):
    return {crop.numpy().tobytes() for crop in scenes.inputs()["region_features"].flatten(0, 1)}


@pytest.mark.parametrize("split, pairs", [("test", "held_out"), ("test", "seen"), ("validation", "seen")])
def test_congruence_scores_of_who_knows_the_truth(oracle, split, pairs):
    right = dict.fromkeys(("digit", "relation", "order", "text", "image", "group"), 1.0)
    assert training.scores(None, 60, split, pairs) == right
    scans = {scan.numpy().tobytes() for scan in digit_scans(split)[0].flatten(1)}
    assert all(crops(scenes) <= scans for scenes in oracle.seen)
    held_out = held_out_captions()
    for scenes in oracle.seen:
        first, second = (scenes.input_ids[:, place] - VOCABULARY.index("zero") for place in (1, 5))
        assert (held_out[first, second, scenes.input_ids[:, 2] - VOCABULARY.index("left")] == (pairs == "held_out")).all()
    oracle.seen.clear()
    oracle.bias = 10.0  # of each image its own caption fits better still, but the second image fits every caption
    assert training.scores(None, 60, split, pairs) == right | {"image": 0.0, "group": 0.0}


# --- scores ---


def test_matching_of_who_knows_the_truth(monkeypatch):
    sizes = matching.SIZES._replace(tested=matching.GROUP, learn="fit", test="validation")
    scenes = matching.scenes_of(sizes.tested, 3, "validation")
    words, ids = matching.words_of(scenes), matching.text_ids(scenes.captions, matching.WORDS)

    class Knows:
        attend = None

        def __call__(self, images, captions):
            return lab.clip.caption_pixels(scenes, words)

        def pairs(self, images, captions, mask=None):
            return (captions == ids).all(1).float()

    weights = torch.zeros(sizes.tested, matching.WORDS, 4)
    for word, place in enumerate((matching.FIRST, matching.SECOND)):
        weights[torch.arange(sizes.tested), place, matching.said_regions(scenes)[:, word]] = 1.0
    monkeypatch.setattr(matching, "weights_and_relevancy", lambda attend, run: [(weights[:, None], weights[:, None])])
    found = matching.measure(Knows(), 3, sizes)
    perfect = ("recall_caption", "recall_image", "accuracy", "digit", "relation", "order", "share", "pointing", "agreement")
    assert {name: found[name] for name in perfect} == pytest.approx(dict.fromkeys(perfect, 1.0))
    assert 0.02 < found["recall_chance"] < 0.15 and found["auc_most"] == found["auc_least"] == 1.0


def test_answering_reads_the_last_step_at_the_digit_that_is_asked_for(monkeypatch):
    """Of a model that says yes to everything, and looks at the right digit in the last step alone."""
    sizes = answering.SIZES._replace(tested=60, learn="fit", test="validation")
    parts = {kind: answering.questions_of(60, 3, "validation", kind) for kind in answering.QUESTIONS}
    target = torch.cat([answering.aims(part) for part in parts.values()]).float()
    even = torch.full_like(target, 0.25)
    calls = [
        (each[:, None, None], each[:, None, None]) for each in (even, even, torch.where(target.any(1)[:, None], target, even))
    ]
    monkeypatch.setattr(answering, "weights_and_relevancy", lambda attend, run: calls)

    def says_yes(images, ids, mask=None):
        logits = torch.zeros(len(ids), len(ANSWERS))
        logits[:, ANSWERS.index("yes")] = 1.0
        return logits

    says_yes.attend, says_yes.see = None, answering.regions
    found = answering.measure(says_yes, 3, sizes)
    shares = {kind: part.answers.count("yes") / 60 for kind, part in parts.items()}
    assert {kind: found[kind] for kind in parts} == shares and found["accuracy"] == pytest.approx(sum(shares.values()) / 4)
    assert shares["what"] == 0.0 and 0.2 < shares["is"] < 0.8
    assert (found["share"], found["pointing"], found["share_step_1"], found["share_step_3"]) == (1.0, 1.0, 0.25, 1.0)


def test_pictures_are_judged_by_others_on_captions_that_are_held_out(monkeypatch):
    """The generator meets the encoders of its own seed alone; a wrong caption is false of the scene."""
    met = []
    monkeypatch.setattr(generation, "pair", lambda seed, sizes: met.append(seed) or Pair().eval())
    monkeypatch.setattr(generation, "fit", lambda *args, **options: None)
    sizes = generation.SIZES._replace(steps=1, tested=40, pair=generation.PairSizes(1, 1, 32))
    model, _ = generation.train("dot", 7, sizes, 1e-3)
    assert met == [7]
    judged = []
    precision = lambda judge, images, captions: judged.append(judge) or 0.0  # noqa: E731
    monkeypatch.setattr(generation, "precision", precision)
    pairs = {seed: Pair().eval() for seed in (7, 8)}
    monkeypatch.setattr(generation, "pair", lambda seed, sizes: pairs[seed])
    generation.measure(model, 7, sizes)
    judges = [judge is pairs[8] for judge in judged]
    assert judges[:2] == [True, False] and all(judges[2:]) and len(judges) > 10  # the areas, too

    captions, scenes = generation.held_out(7, 40), generation.captioned(40, 7, "test", "held_out")
    words = lab.clip.words_of(scenes)
    assert held_out_captions()[words[:, 0], words[:, 2], words[:, 1]].all()
    test = {scan.numpy().tobytes() for scan in digit_scans("test")[0].flatten(1)}
    assert crops(scenes) <= test and torch.equal(captions.digits, words[:, ::2])
    for row, wrong in enumerate(captions.wrong.tolist()):
        assert len(set(wrong)) == generation.WRONG
        assert not any(is_true("", scenes.captions[i], scenes.digits[row], scenes.boxes[row]) for i in wrong)


@pytest.mark.parametrize("task", ["matching", "answering"])
def test_rates_are_tried_without_the_test_scans(task, monkeypatch):
    drawn = set()
    for module in (lab.scenes, material):
        monkeypatch.setattr(module, "digit_scans", lambda split: drawn.add(split) or digit_scans(split))
    cell = {"task": task, "arm": "dot", "rate": 1e-3, "seed": 98765}  # of which nothing is kept from other tests
    scores.choose(cell, Settings(1, smoke=True))
    assert drawn == {"fit", "validation"}
