from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

import vlattn_lab as lab
from vlattn_lab import lxmert
from vlattn_lab.checkout import ROOT
from vlattn_lab.experiments import value
from vlattn_lab.experiments.run import main
from vlattn_lab.processor import RELATIONS


def test_everything_is_measured_once(tmp_path, capsys):
    out = tmp_path / "rows.json"
    main(["value", "--smoke", "--out", str(out), "--figures", str(tmp_path), "--seeds", "1", "--processes", "1"])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["arm"], row["model"]) for row in rows] == [("pretraining", "UNITER"), ("pretraining", "LXMERT")]
    for row, joined in zip(rows, (3 * 6, (3 + 3 + 2) * 6), strict=True):
        for state in value.STATES:
            assert {*value.PAIRS} <= row[state]["heads"].keys() & row[state]["whole"].keys() & row[state]["chosen"].keys()
            assert {f"linguistic_heads: {task}" for task in value.TASKS} <= row[state]["heads"].keys()
            assert {"fusion", *(f"linguistic: {task}" for task in value.TASKS)} <= row[state]["layers"].keys()
        assert len(row["without_head"]) == joined and row["trained"] != row["untrained"]
        linking, *pairs = (one["heads"] for one in row["without_pair"])
        assert linking[0] == row["trained"]["chosen"]["coreference"]
        assert not any(head in linking for pair in pairs for head in pair)
    assert "other captions" in rows[0] and "other captions" not in rows[1]
    shown = capsys.readouterr().out
    assert all(f"({number})" in shown for number in value.OBSERVATIONS)
    assert {path.stem for path in tmp_path.glob("*.png")} == {*value.EXPERIMENT.figures}


@pytest.mark.parametrize("name", value.ARCHITECTURES)
def test_a_head_is_left_out_and_comes_back(name):
    kind, model, scenes = value.ARCHITECTURES[name], value.fresh(name, 0), lab.digit_scenes(3, seed=1)
    join = kind.joins(model)["both", 1]
    score = lambda: lab.matching_score(kind.matching(model), scenes)  # noqa: E731
    before, seen = score(), []
    watch = join.dense.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with value.without_head(join, 4):
        without = score()
    watch.remove()
    for heads in seen:
        assert not heads[..., 64:80].any() and heads[..., :64].abs().min() > 0
    assert len(seen) == (1 if name == "UNITER" else 2), "across streams, both ways"
    assert not torch.equal(before, without) and torch.equal(before, score())


def test_every_attention_of_lxmert_is_joined_once():
    model = value.fresh("LXMERT", 0)
    joins = value.ARCHITECTURES["LXMERT"].joins(model)
    every = {module for path, module in model.named_modules() if path.endswith(("attention.output", "self_att.output"))}
    assert set(joins.values()) == every and len(joins) == 8


def test_what_cls_takes_is_what_attention_adds():
    """From text and image together, UNITER's heads add what their module joins; LXMERT's streams, what each module adds."""
    inputs = next(lab.probe_samples(5, seed=2))[0]
    model = value.fresh("UNITER", 0)
    dense = model.uniter.encoder.layer[1].attention.output.dense
    dense.weight.data.zero_()
    dense.weight.data[0] = 1.0  # norms of one number: text and image add up, or take from one another
    with value.watched([dense], "outputs") as seen:
        (text, image) = value.taken_by_uniter(model, inputs)[1]
    added = (seen[0][:, 0] - dense.bias)[:, 0].abs().mean().item()
    assert abs(text - image) - 1e-4 <= added <= text + image + 1e-4
    model = value.fresh("LXMERT", 0)
    layer = model.lxmert.encoder.x_layers[0]
    with value.watched([layer.visual_attention.output.dense], "outputs") as seen:
        _, image = value.taken_by_lxmert(model, inputs)[0]
    added = (seen[0][:, 0] - layer.visual_attention.output.dense.bias).norm(dim=-1).mean().item()
    assert image == pytest.approx(added, abs=1e-4)


@pytest.mark.parametrize("name", value.ARCHITECTURES)
def test_what_cls_takes_first_holds_nothing_of_the_image(name):
    """Other regions leave what it takes from the text as it is."""
    kind, model, inputs = value.ARCHITECTURES[name], value.fresh(name, 0), next(lab.probe_samples(5, seed=2))[0]
    text, image = kind.first_taken(model, inputs)
    other_text, other_image = kind.first_taken(model, {**inputs, "region_features": inputs["region_features"] ** 0.1})
    assert image == kind.taken(model, inputs)[0][1] != other_image
    if name == "LXMERT":  # in UNITER regions take a part of one softmax
        assert text == other_text != kind.taken(model, inputs)[0][0]


def test_what_silencing_a_head_costs():
    """The best head against the mean of the others that attend across, and the two best against random pairs."""
    heads = [("both", 0, 0, 0.9), ("both", 0, 1, 0.6), ("both", 1, 0, 0.8), ("text", 0, 1, 0.1)]
    without = [{"stream": stream, "layer": layer, "head": head, "digit": left} for stream, layer, head, left in heads]
    pairs = [{"digit": left} for left in (0.5, 0.8, 0.9)]
    record = {"digit": 0.95, "trained": {"chosen": {"coreference": [0, 1]}}, "without_head": without, "without_pair": pairs}
    assert value.lost_without_the_best(record) == pytest.approx((0.35, 0.1))
    assert value.lost_without_two(record) == pytest.approx((0.45, 0.1))


def test_other_captions_are_those_of_other_scenes():
    own = next(lab.probe_samples(4, seed=3, batch=4))[0]
    other = next(value.other_captions(4, 3))[0]
    assert torch.equal(other["input_ids"][1:], own["input_ids"][:-1]) and torch.equal(other["input_ids"][0], own["input_ids"][-1])
    assert torch.equal(other["region_features"], own["region_features"])


def test_changed_captions():
    """An inverted caption is false of its scene; an odd one has one other word, and two that no caption has together."""
    (inputs, labels), *_ = lab.probe_samples(50, seed=4, batch=50)
    words = lab.DigitProcessor().convert_ids_to_tokens
    for ids, label in zip(inputs["input_ids"], labels, strict=True):
        own, odd, inverted = (words(x) for x in (ids, *(label["variants"][task] for task in ("odd_word", "inverted"))))
        assert sum(one != two for one, two in zip(own, odd, strict=True)) == 1 and own[2:4] != odd[2:4]
        assert " ".join(odd[2:4]) not in RELATIONS
        assert (inverted[1], inverted[5]) == (own[5], own[1]) and inverted[2:5] == own[2:5]
    assert len({tuple(label["variants"]["odd_word"][2:4]) for label in labels}) > 4


def test_words_and_regions_are_weighed_by_their_number():
    even = {f"modality: {kind}": [[count / 11] * 6] for kind, count in value.TOKENS.items()}
    assert value.per_token({"trained": {"heads": even}}, "trained") == pytest.approx(1.0)


def test_the_best_head_is_chosen_on_other_scenes():
    record = {"trained": {"heads": {"coreference": [[0.9, 0.6], [0.5, 0.5]]}, "chosen": {"coreference": [0, 1]}}}
    assert value.best(record, "trained", "coreference") == 0.6


def test_lxmert_has_the_inputs_of_its_class():
    scenes = lab.digit_scenes(4, seed=1)
    model = value.fresh("LXMERT", 0)
    logits = lxmert.matching(model)(**scenes.inputs()).logits
    by_hand = model(
        input_ids=scenes.input_ids,
        visual_feats=scenes.inputs()["region_features"],
        visual_pos=scenes.inputs()["region_positions"],
    ).question_answering_score
    assert logits.shape == (4, 2) and torch.allclose(logits, by_hand, atol=1e-6)


def test_the_page_answers_each_observation_for_both_models():
    page = (ROOT / "docs" / "experiments" / "value.md").read_text(encoding="utf-8")
    answers = re.findall(r"^\| \((\w+)\) [^|]+ \| ([^|]+) \| ([^|]+) \|$", page, re.M)
    assert [number for number, *_ in answers] == [*value.OBSERVATIONS]
