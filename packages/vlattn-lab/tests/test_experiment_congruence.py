"""The experiment of the congruence losses: it runs, its parts are what they say, and the page shows the stored rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

import vlattn_fast as va
from vlattn_fast.benchmarks._published import published_loss
from vlattn_fast.measuring.records import having
from vlattn_fast.nn import CapturedLayer, CongruenceLoss
from vlattn_fast.nn.congruence_loss import SCHEDULES
from vlattn_lab import digit_scans, is_true, swapped_pairs
from vlattn_lab.experiments import congruence
from vlattn_lab.experiments import run as frame
from vlattn_lab.experiments.congruence import cost, report, training
from vlattn_lab.processor import DIGIT_WORDS, VOCABULARY
from vlattn_lab.scenes import held_out_captions


def test_everything_is_measured_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frame, "commit", lambda: "abc")
    large = cost.PROBLEMS["one layer of UNITER-base"]
    small = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64}
    problem = replace(large, config=replace(large.config, **small), batch=6, matched=4, text=8, image=10)
    monkeypatch.setitem(cost.PROBLEMS, "one layer of UNITER-base", problem)
    options = ["congruence", "--smoke", "--out", str(tmp_path / "rows.json"), "--figures", str(tmp_path), "--seeds", "1"]
    frame.main([*options, "--processes", "1"])
    stored = (tmp_path / "rows.json").read_text()
    rows = json.loads(stored)["rows"]
    trained = having(rows, what="training")
    assert [row["loss"] for row in trained] == ["untrained", "none", *report.LOSSES]
    assert trained[0]["curve"] == {} and all(row["curve"]["step"] == [2, 4] for row in trained[1:])
    assert all(0 <= row[pairs][score] <= 1 for row in trained for pairs in ("held_out", "seen") for score in report.SCORES)
    for seed in congruence.SEARCH_SEEDS:
        assert [row["loss"] for row in having(rows, what="search", seed=seed)] == ["none", *report.LOSSES]
    assert [row["scenes"] for row in having(rows, what="room")] == [168, 96] and having(rows, what="cost")
    assert {path.stem for path in tmp_path.glob("*.png")} == set(report.FIGURES)
    shown = capsys.readouterr().out
    assert all(table in shown for table in report.tables(rows))

    monkeypatch.setattr(congruence, "train", None)  # whoever measures anew fails
    monkeypatch.setattr(congruence, "measure_cost", None)
    frame.main([*options, "--processes", "1"])
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows


def test_all_arms_of_a_seed_start_alike_and_see_the_same():
    """A loss of weight 0 changes nothing; one with a weight does, from the second step on."""
    sizes = training.Sizes(scenes=24, steps=3, every=4, validation=8, test=8)
    key = "uniter.encoder.layer.1.attention.self.query.weight"

    def state(seed, loss, weight):
        return dict(training.train(seed, training.Setting(loss, weight, layer=1), sizes)[0].named_parameters())

    plain = state(3, "none", 0.0)
    for loss in report.LOSSES:
        silent = state(3, loss, 0.0)
        assert all(torch.equal(x, silent[name]) for name, x in plain.items())
        assert not torch.equal(plain[key], state(3, loss, 1.0)[key])
    assert not torch.equal(plain["uniter.pooler.dense.weight"], state(4, "none", 0.0)["uniter.pooler.dense.weight"])


@pytest.mark.parametrize("loss", report.LOSSES)
def test_each_part_of_a_setting_has_its_effect(loss):
    inputs, _, named = next(training.batches(24, torch.Generator().manual_seed(0)))
    model = training.new_model(0)

    def value(step, **options):
        setting = training.Setting(**{"loss": loss, "weight": 1.0, **options})
        return training.Regulariser(setting, 10)(model, inputs, named, step)[1].item()

    full = value(5)
    assert full > 0 and value(5, weight=0.5) == pytest.approx(full / 2)
    for schedule in SCHEDULES:
        assert value(5, schedule=schedule) == pytest.approx(full * va.nn.training_signal_annealing(5, 10, schedule))
    if loss in training.KINDS:
        sides = {direction: value(5, direction=direction) for direction in ("text", "image")}
        assert full == pytest.approx(sum(sides.values())) and len({full, *sides.values()}) == 3
        assert value(5, direction="alternate") == sides["text"] and value(4, direction="alternate") == sides["image"]
        assert value(5, layer=1) != full


def test_the_loss_on_relevancy_is_the_share_of_regions_that_are_not_named():
    inputs, _, named = next(training.batches(24, torch.Generator().manual_seed(0)))
    model, count = training.new_model(0), training.MATCHED
    assert (named.sum(1) == 2).all()
    output, loss = training.Regulariser(training.Setting("relevancy", 1.0), 10)(model, inputs, named, 0)
    loss.backward()
    assert model.uniter.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
    matched = {name: x[:count] for name, x in inputs.items()}
    row = va.explain(model.eval(), matched, target=[1] * count).relevancy["joint"][:, training.CAPTION :]
    torch.testing.assert_close(loss.detach(), ((row * ~named).sum(1) / row.sum(1)).mean())


@pytest.mark.parametrize("kind", training.KINDS)
def test_the_loss_reaches_words_and_regions_of_matched_pairs_alone(kind):
    scenes, _ = training.training_scenes(torch.tensor([1, 2, 3]), "fit", torch.Generator().manual_seed(0))
    with va.nn.capture_attention(training.new_model(0), layers=1) as captured:
        captured.model(**training.model_inputs(scenes))
    query, key = (x.detach().requires_grad_() for x in captured.layer.joint)
    training.congruence(CongruenceLoss(**training.KINDS[kind]), CapturedLayer(joint=(query, key)), 2).backward()
    for gradient in (query.grad, key.grad):
        reached = gradient.abs().sum((1, 3)) > 0  # (B, N)
        assert reached[:2, training.WORDS].all() and reached[:2, training.CAPTION :].all()
        assert not reached[2].any() and not reached[:, [0, training.CAPTION - 1]].any()


@pytest.mark.parametrize("direction", ["text", "image", "both"])
@pytest.mark.parametrize("kind", congruence.PUBLISHED)
def test_the_loop_that_is_measured_computes_the_same_loss(kind, direction):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(3, 2, 6 if name.startswith("text") else 9, 4, generator=generator, dtype=torch.float64)
        for name in ("text_query", "text_key", "image_query", "image_key")
    }
    tensors["text_mask"], tensors["image_mask"] = (torch.arange(n) < torch.tensor([[n], [3], [2]]) for n in (6, 9))
    expected = va.reference.congruence_loss(
        (tensors["text_query"], tensors["text_key"]),
        (tensors["image_query"], tensors["image_key"]),
        kind=kind,
        direction=direction,
        text_mask=tensors["text_mask"],
        image_mask=tensors["image_mask"],
        reduction="none",
    )
    torch.testing.assert_close(published_loss(tensors, kind, direction), expected, rtol=1e-10, atol=1e-12)


def test_scans_and_captions_are_kept_apart():
    test, parts = digit_scans("test")[0], {part: training._scans(part)[0] for part in ("fit", "validation")}

    def all_of(scans):
        return {scan.numpy().tobytes() for scan in scans}

    assert len(parts["fit"]) + len(parts["validation"]) == len(digit_scans("train")[0])
    assert not all_of(parts["fit"]) & all_of(parts["validation"]) and not all_of(parts["fit"]) & all_of(test)
    held_out = held_out_captions()
    for part in parts:
        scenes, other = training.training_scenes(torch.arange(4).repeat(50), part, torch.Generator().manual_seed(0))
        crops = scenes.inputs()["region_features"].flatten(0, 1).unflatten(-1, (8, 8))
        assert all_of(crops) <= all_of(parts[part])
        for ids in (scenes.input_ids, other):
            first, second = (ids[:, place] - VOCABULARY.index("zero") for place in (1, 5))
            assert not held_out[first, second, ids[:, 2] - VOCABULARY.index("left")].any()


def test_named_digits_stay_in_scenes_with_fewer():
    one, two = (training.fewer(side) for side in swapped_pairs(50, seed=3))
    assert one.digits.shape == (50, training.REGIONS) and torch.equal(one.digits, two.digits)
    for scenes, false in ((one, two), (two, one)):
        assert (scenes.named.sum(1) == 2).all()
        for row, digits in enumerate(scenes.digits.tolist()):
            named = {DIGIT_WORDS.index(word) for word in scenes.captions[row].split() if word in DIGIT_WORDS}
            assert named == {digit for digit, name in zip(digits, scenes.named[row].tolist(), strict=True) if name}
            assert is_true("", scenes.captions[row], scenes.digits[row], scenes.boxes[row])
            assert not is_true("", false.captions[row], scenes.digits[row], scenes.boxes[row])


def test_a_false_caption_is_of_the_same_scene():
    scenes, other = training.training_scenes(torch.arange(4).repeat(25), "fit", torch.Generator().manual_seed(0))
    for row, caption in enumerate(scenes.captions):
        digits, boxes = scenes.digits[row], scenes.boxes[row]
        said = " ".join(VOCABULARY[i] for i in other[row, training.WORDS])
        assert is_true("", caption, digits, boxes) and is_true("", said, digits, boxes) == (row % 4 == 0)
        words = sorted(said.split()) == sorted(caption.split())
        assert words == (row % 4 in (0, 3)), "an order caption has the words of the true one"


def test_a_batch_has_each_scene_three_times_and_a_training_the_same_scenes():
    drawn = training.batches(48, torch.Generator().manual_seed(0))
    (inputs, label, named), (second, *_), (third, *_) = (next(drawn) for _ in range(3))
    true, false, asked = inputs["input_ids"].split(training.MATCHED)
    assert label.tolist() == [1] * training.MATCHED + [0] * training.MATCHED and named.shape == (24, training.REGIONS)
    assert (true != false).any(1).all() and (asked == training.MASK_ID).sum(1).eq(2).all()
    assert torch.equal(torch.where(asked == training.MASK_ID, true, asked), true)
    for name in ("region_features", "region_positions"):
        one, two, three = inputs[name].split(training.MATCHED)
        assert torch.equal(one, two) and torch.equal(one, three) and not torch.equal(one[0], one[1])

    def places(*batches):
        return {x.numpy().tobytes() for batch in batches for x in batch["region_positions"][: training.MATCHED]}

    assert len(places(inputs, second)) == 48 and places(third) <= places(inputs, second)


@pytest.mark.parametrize("loss", training.KINDS)
def test_the_levels_of_each_factor_of_the_search_occur_equally_often(loss):
    tried = congruence.settings_of(loss)
    assert len(set(tried)) == len(tried) == 6
    for factor in ("weight", "layer", "direction"):
        counts = Counter(getattr(one, factor) for one in tried)
        assert len(counts) > 1 and len(set(counts.values())) == 1
        for level in counts:
            assert all(
                len({getattr(one, name) for one in tried if getattr(one, factor) == level}) > 1
                for name in ("schedule", "weight")
                if name != factor
            )
    assert {one.schedule for one in tried} == set(SCHEDULES)


def row_of(what, loss, seed, group, **options):
    setting = {"loss": loss, "weight": 1.0, "schedule": "const", "layer": 0, "direction": "both", **options}
    return {"what": what, **setting, "seed": seed, "validation" if what == "search" else "held_out": {"group": group}}


def test_the_best_over_the_most_seeds_is_chosen():
    def groups():
        return [row["validation"]["group"] for row in report.best(rows, "cacr")]

    rows = [
        row_of("search", "none", 100, 0.5),
        row_of("search", "cacr", 100, 0.9),
        row_of("search", "cacr", 100, 0.7, layer=1),
        row_of("search", "cacr", 100, 0.6, weight=2.0),
        row_of("search", "cacr", 100, 0.8, weight=9.0),
    ]
    assert groups() == [0.9, 0.8, 0.7, 0.6]
    rows += [row_of("search", "none", 101, 0.4), row_of("search", "cacr", 101, 0.1), row_of("search", "cacr", 101, 0.7, layer=1)]
    assert groups() == [0.7, 0.9, 0.8, 0.6]


def test_the_control_is_told_the_named_regions_and_nothing_else():
    """As the loss on relevancy is: 0 if all lies on them, and the states of the regions alone are asked."""
    inputs, _, named = next(training.batches(24, torch.Generator().manual_seed(0)))
    output = training.new_model(0)(**inputs)
    states = output.last_hidden_state.detach().clone().requires_grad_()
    loss = training.told(replace(output, last_hidden_state=states), named)
    assert 0 < loss < 1 and training.told(output, torch.ones_like(named)) == 0
    loss.backward()
    reached = states.grad.abs().sum((0, 2)) > 0
    assert reached.tolist() == [True] + 6 * [False] + training.REGIONS * [True]


def test_hard_negatives_are_the_likeliest_pairs_that_do_not_belong_together(monkeypatch):
    inputs, _, _ = next(training.batches(24, torch.Generator().manual_seed(0)))
    model, count = training.new_model(0), training.MATCHED
    asked = []
    found = training.log_odds
    monkeypatch.setattr(training, "log_odds", lambda model, pairs: asked.append(pairs) or found(model, pairs))
    loss = training.hard_negatives(model, model(**inputs), inputs)
    odds = torch.full((count, count), -torch.inf)
    for scene in range(count):
        for caption in range(count):
            if not torch.equal(inputs["input_ids"][scene], inputs["input_ids"][caption]):
                pair = {"input_ids": inputs["input_ids"][[caption]]}
                pair |= {name: inputs[name][[scene]] for name in ("region_features", "region_positions")}
                odds[scene, caption] = found(model, pair)
    assert torch.equal(asked[1]["input_ids"][:count], inputs["input_ids"][odds.argmax(1)])
    assert torch.equal(asked[1]["region_features"][count:], inputs["region_features"][odds.argmax(0)])
    true = torch.sigmoid(found(model, {name: x[:count] for name, x in inputs.items()}))
    likeliest = [torch.sigmoid(odds.amax(dim)) for dim in (0, 1)]
    want = sum((0.2 + one - true).clamp(min=0).mean() for one in likeliest) / 2
    torch.testing.assert_close(loss, want)


def test_the_effects_are_those_of_the_losses_that_were_trained():
    noise = (0.0, 0.01, -0.01, 0.005, -0.005)
    rows = [row_of("training", "none", seed, 0.5 + 0.1 * seed) for seed in range(5)]
    rows += [row_of("training", "cacr", seed, 0.6 + 0.1 * seed + noise[seed]) for seed in range(5)]
    (effect,) = report.effects(rows)
    assert effect.claim == "CACR less no loss" and effect.effect == pytest.approx(0.1) and effect.p < 1e-4
    rows += [
        row_of("training", loss, seed, gain * seed) for loss, gain in (("relevancy", 0.3), ("told", 0.1)) for seed in range(5)
    ]
    *_, last = report.effects(rows)
    assert last.claim.startswith("relevancy less told") and last.effect == pytest.approx(0.4)
