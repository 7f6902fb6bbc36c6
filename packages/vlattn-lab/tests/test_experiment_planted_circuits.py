"""The experiment on planted circuits: the models compute their algorithm, and its measures are right where they are known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import vlattn_fast as va
from vlattn_lab.experiments import planted_circuits
from vlattn_lab.experiments.flow.samples import PAIRS, draw
from vlattn_lab.experiments.planted_circuits import grounding, mib, models, removal
from vlattn_lab.experiments.run import main
from vlattn_lab.mapper import load_vqa


def logits_of(model, inputs):
    with torch.no_grad():
        logits = model(**inputs).logits
    return logits if logits.ndim == 2 else logits[:, -1]


def test_a_smoke_run_has_every_measure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planted_circuits, "GRADIENTS", ("gradient",))
    for module in (mib, planted_circuits):
        monkeypatch.setattr(module, "SHARES", (0.02, 1.0))
    out = tmp_path / "rows.json"
    main(["planted_circuits", "--smoke", "--seeds", "1", "--out", str(out), "--figures", str(tmp_path), "--processes", "1"])
    rows = json.loads(out.read_text())["rows"]
    planted, removed = (
        [row for row in rows if "circuit" in row and ("part" in row) == is_removed] for is_removed in (False, True)
    )
    assert [(row["circuit"], row["attention"]) for row in planted] == [
        (circuit, share) for circuit in models.CIRCUITS for share in planted_circuits.ATTENTION
    ]
    for row in planted:
        assert row["right"] == 1.0 and len(row["maps"]) == len(planted_circuits.methods()) + 1
        assert bool(row["synergy"]) == (row["circuit"] == "lookup")
        assert row["places"][mib.TRUE] == [2, 1], "true cuts name the planted edges first"
    for row in removed:
        assert (row["embedding"] is None) == (row["circuit"] == "lookup") and row["head"] > 0.4
    assert len(removed) == len(planted) and [row["task"] for row in rows if "part" in row and "task" in row] == ["vqa"]
    assert "| CPR |" in capsys.readouterr().out and (tmp_path / "planted_circuits.png").is_file()


@pytest.mark.parametrize("share", planted_circuits.ATTENTION)
def test_an_induction_head_copies_what_came_after_the_same_word(share):
    planted = models.planted("induction", share, seed=3)
    samples = planted.draw(128, 5)
    ids, groups = samples.inputs["input_ids"], samples.groups
    assert (torch.stack([*groups.values()]).sum(0) == 1).all() and (ids[:, -1:] == ids)[:, :-1].equal(groups["matched"][:, :-1])

    def said(tokens):
        return logits_of(planted.model, {"input_ids": tokens}).argmax(1)

    assert said(ids).equal(samples.answers)
    unused = torch.stack([torch.tensor([w for w in range(models.WORDS) if w not in row][:1]) for row in ids.tolist()])
    assert said(torch.where(groups["copied"], unused, ids)).equal(unused[:, 0])
    by_chance = said(torch.where(groups["matched"], unused, ids)) == samples.answers  # without a match, any word is said
    assert by_chance.double().mean() < 0.3
    others = groups["others"] & (ids != models.WORDS)  # all but [BOS]
    order = torch.where(others, torch.arange(ids.shape[1]), 0)
    turned = ids.clone()
    for row, places in enumerate(order.unbind()):
        places = places[places > 0]
        turned[row, places] = ids[row, places.flip(0)]
    assert said(turned).equal(samples.answers) and not turned.equal(ids)


@pytest.mark.parametrize("share", planted_circuits.ATTENTION)
def test_a_lookup_gives_the_digit_of_the_named_colour(share):
    planted = models.planted("lookup", share, seed=3)
    samples = planted.draw(128, 5)
    ids, features = samples.inputs["input_ids"], samples.inputs["visual_embeds"]
    assert (torch.stack([*samples.groups.values()]).sum(0) == 1).all()

    def said(**changed):
        return logits_of(planted.model, {**samples.inputs, **changed}).argmax(1)

    assert said().equal(samples.answers)
    region = samples.groups["region"][:, ids.shape[1] :]
    colours, digits = (part.argmax(2) for part in features.split((models.COLOURS, models.DIGITS), 2))
    assert digits[region].equal(samples.answers)
    next_colour = (colours[region] + 1) % models.COLOURS
    named = torch.where(samples.groups["word"][:, : ids.shape[1]], next_colour[:, None], ids)
    assert said(input_ids=named).equal(digits[colours == next_colour[:, None]])
    rolled = torch.cat([features[..., : models.COLOURS], features[..., models.COLOURS :].roll(1, 2)], 2)
    only = torch.where(region[..., None], rolled, features)
    assert said(visual_embeds=only).equal((samples.answers + 1) % models.DIGITS)
    others = torch.where(region[..., None], features, rolled)
    assert said(visual_embeds=others).equal(samples.answers)


def test_the_planted_heads_attend_as_they_should():
    for share in planted_circuits.ATTENTION:
        planted = models.planted("induction", share, seed=0)
        samples = planted.draw(16, 0)
        planted.model.set_attn_implementation("eager")
        with torch.no_grad():
            maps = [layer[:, 0] for layer in planted.model(**samples.inputs, output_attentions=True).attentions]
        before = maps[0].diagonal(-1, 1, 2)
        copied = (maps[1][:, -1] * samples.groups["copied"]).sum(1)
        for seen in (before[:, 5:], copied):  # the first tokens see few others
            assert (seen.mean() - share).abs() < 0.1 and seen.min() > share - 0.25


def test_measures_of_a_map_that_is_known():
    samples = models.planted("lookup", 0.8, seed=0).draw(4, 0)
    content, key, read = (samples.groups[name].double() for name in (samples.content, samples.key, samples.read))
    both = planted_circuits.measures_of_map(3 * content + key + 10 * read, samples)
    assert both == {"pointing": 1.0, "both": 1.0, "content": 0.75, "key": 0.25}
    one = planted_circuits.measures_of_map(content - key, samples)
    assert one == {"pointing": 1.0, "both": 0.0, "content": 1.0, "key": 0.0}
    assert planted_circuits.measures_of_map(-content, samples) == dict.fromkeys(planted_circuits.MEASURES, 0.0)


class Sum(mib.Circuits):
    """A game in place of a model: each edge that is kept adds its worth."""

    def mean(self, kept):
        return 5.0 + sum(self.worth[number] for number in kept)


def test_cpr_and_cmd_of_a_model_that_adds_up():
    game = Sum(None, {}, range(10), None, {}, None)
    game.worth = [4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0, -5.0]  # 4 in all
    (row,) = game.measured({"worth": torch.tensor(game.worth)})
    # int(share * 10) edges are kept: 0 up to a share of 0.05, then 1, 2, 5 and 10
    assert row["signed"] == [0.0] * 6 + [1.0, 1.75, 2.5, 1.0]
    # by size: -5, then 4, 3, 2 and the first of 1 and -1
    assert row["sized"] == [0.0] * 6 + [-1.25, -0.25, 1.25, 1.0]
    assert row["cpr"] == pytest.approx(0.05 * 0.5 + 0.1 * 1.375 + 0.3 * 2.125 + 0.5 * 1.75, abs=1e-4)
    distance = [1.0, 2.25, 1.25, 0.25, 0.0]  # |1 - f| from a share of 0.05 on
    widths = [0.05, 0.1, 0.3, 0.5]
    area = 0.049 + sum(w * (a + b) / 2 for w, a, b in zip(widths, distance[:-1], distance[1:], strict=True))
    assert row["cmd"] == pytest.approx(area, abs=1e-4)


def test_a_circuit_is_the_model_with_all_other_edges_cut():
    """One knockout after the other gives what one of all heads and groups gives."""
    planted = models.planted("lookup", 0.8, seed=0)
    samples = planted.draw(4, 0)
    asked = {"target": samples.answers.tolist()}
    edges = [("", edge) for edge in va.attribute_edges(planted.model, samples.inputs, samples.groups, **asked)]

    def score(outputs):
        return outputs.logits.gather(1, samples.answers[:, None])[:, 0]

    circuits = mib.Circuits(planted.model, samples.inputs, edges, lambda _: samples.groups, {"": None}, score)
    kept = [number for number in range(len(edges)) if number % 3]
    cuts = [
        va.Knockout(queries=samples.groups[e.to], keys=samples.groups[e.from_], layers=e.layer, heads=e.head)
        for number, (_, e) in enumerate(edges)
        if number not in kept
    ]
    with va.intervene(planted.model, samples.inputs, cuts), torch.no_grad():
        expected = score(planted.model(**samples.inputs)).double().mean()
    assert circuits.mean(kept) == pytest.approx(float(expected), rel=1e-4)
    assert circuits.faithfulness(range(len(edges))) == 1.0 and circuits.faithfulness([]) == 0.0
    none = [va.Knockout(queries=None, keys=None, heads=range(models.HEADS))]
    with va.intervene(planted.model, samples.inputs, none), torch.no_grad():
        assert circuits.mean([]) == pytest.approx(float(score(planted.model(**samples.inputs)).double().mean()), rel=1e-4)


def test_impossible_edges_of_a_decoder_are_left_out():
    samples = models.planted("induction", 0.8, seed=0).draw(4, 0)
    seen = {(a, b): mib.is_causal(samples.groups, va.Edge(0, 0, a, b)) for a in samples.groups for b in samples.groups}
    assert {pair for pair, is_seen in seen.items() if not is_seen} == {
        *(("last", name) for name in ("matched", "copied", "others")),
        ("copied", "matched"),
    }


def test_edges_with_norms_held_fixed_are_those_of_the_plain_ones():
    """Other effects of the same edges and heads; `attribute_edges` itself only takes the plain derivative."""
    model = load_vqa()[0]
    asked, _ = draw("vqa", model, 12, 4, 0, every=True)
    measured = mib.measures_on_scenes(model, asked, 0)
    half = mib.part(asked, slice(2))
    assert len(half.inputs["input_ids"]) == 2 and measured["edges"] > 600
    rows = {row["list"]: row for row in measured["areas"]}
    assert rows[mib.TRUE]["cpr"] > rows[mib.RANDOM]["cpr"] and rows[mib.FIRST_ORDER]["sized"] != rows[mib.HELD]["sized"]
    assert set(measured["ranks"]) == {"edges", "heads"}
    assert all(each[mib.FIRST_ORDER] != each[mib.HELD] for each in measured["ranks"].values())
    with pytest.raises(TypeError, match="freeze"):
        va.attribute_edges(model, half.inputs, half.groups("cross"), tower=PAIRS["cross"], freeze=("norms",))


def test_part_of_the_samples():
    samples = models.planted("induction", 0.8, seed=0).draw(6, 0)
    part = samples.part(slice(2, 5))
    assert torch.equal(part.answers, samples.answers[2:5]) and replace(part).content == samples.content
    assert all(torch.equal(part.groups[name], mask[2:5]) for name, mask in samples.groups.items())


@pytest.mark.parametrize(
    ("circuit", "of_keys", "of_queries"), [("induction", "head 0.0", "embedding"), ("lookup", "embedding", "head 0.0")]
)
def test_the_planted_part_makes_the_planted_head_look_there(circuit, of_keys, of_queries):
    planted = models.planted(circuit, 0.9, seed=3)
    samples = planted.draw(32, 5)
    content = {"content": samples.groups[samples.content]}
    options = {"heads": 0, "parts": "heads", "groups": content, "queries": samples.groups[samples.read]}
    table = va.score_parts(planted.model, samples.inputs, 1, **options)
    for push, part in ((table.push, of_keys), (table.query_push, of_queries)):
        largest = push["content"].mean(0)[0].topk(2)
        assert table.names[largest.indices[0]] == part and largest.values[0] > 50 * largest.values[1]
    logit = va.logit_parts(planted.model, samples.inputs, samples.answers)
    assert logit.names[logit.parts[:, :-1].mean(0).argmax()] == "head 1.0"
    assert logit.sources[1][:, 0].argmax(1).equal(samples.groups[samples.content].float().argmax(1))


@pytest.mark.parametrize("circuit", models.CIRCUITS)
def test_without_the_planted_part_its_attention_is_gone(circuit):
    """The attention that is measured is that of eager maps; removing a head is zeroing its part of the joined outputs."""
    planted = models.planted(circuit, 0.9, seed=3)
    samples = planted.draw(16, 5)
    layer = removal.of_planted(planted, samples)
    read, content = samples.groups[samples.read], samples.groups[samples.content]
    number = [*samples.groups].index(samples.content)
    plain = layer.masses()
    torch.testing.assert_close(plain.sum(1), torch.ones(models.HEADS, dtype=torch.float64), rtol=0, atol=1e-5)
    with va.intervene(planted.model, samples.inputs, layer.removed("head 0.0")):
        without = layer.masses()
    attention = planted.model.transformer.h[0].attn if planted.is_causal else planted.model.visual_bert.encoder.layer[0].attention
    projection = attention.c_proj if planted.is_causal else attention.output.dense
    mask = (torch.arange(models.WIDTH) >= models.HEAD_DIM).float()
    planted.model.set_attn_implementation("eager")
    for mass, hook in ((plain, lambda *_: None), (without, lambda _, args: (args[0] * mask,))):
        with projection.register_forward_pre_hook(hook), torch.no_grad():
            maps = planted.model(**samples.inputs, output_attentions=True).attentions[1]  # (B, H, N, N)
        of_content = (maps.transpose(1, 2)[read] * content[:, None]).sum(-1).double().mean(0)
        torch.testing.assert_close(mass[:, number], of_content, rtol=0, atol=1e-5)
    assert plain[0, number] > 0.8 and without[0, number] < 0.2


def test_a_push_of_a_trained_model_is_compared_with_removals():
    model = load_vqa()[0]
    asked, _ = draw("vqa", model, 12, 2, 0, every=True)
    layer = removal.of_scenes(model, asked)
    torch.testing.assert_close(layer.masses().sum(1), torch.ones(layer.heads, dtype=torch.float64), rtol=0, atol=1e-5)
    kinds = layer.correlations()
    assert set(kinds) == set(removal.KINDS) and all(0 < value <= 1 for value in kinds.values())


@pytest.mark.parametrize("name", ["induction", "lookup"])
def test_the_numbers_of_grounding_are_those_of_the_model(name):
    circuit = models.planted(name, 0.8, 0)
    samples = circuit.draw(6, 0)
    circuit.model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = circuit.model(**samples.inputs, output_attentions=True)
    reads = 0 if name == "lookup" else -1
    attention = whole.attentions[-1].mean(1)[:, reads]
    logits = whole.logits if name == "lookup" else whole.logits[:, -1]
    probability = logits.softmax(-1).gather(1, samples.answers[:, None])[:, 0]
    found = dict(grounding.cases(circuit, samples, 0))
    for case, (tables, labels) in found.items():
        assert labels == [[True, False]] * len(tables) and (len(tables) == 6 or case == "another"), case
    first = {key: torch.stack([table.numbers[key][0] for table in found["one wrong"][0]]) for key in tables[0].numbers}
    torch.testing.assert_close(first["log_probability"][:, 0].exp(), probability.double(), rtol=1e-4, atol=1e-6)
    share = (attention * grounding.looked_at(samples)).sum(1).double()
    torch.testing.assert_close(first["attention share"], share[:, None].expand(-1, 2), rtol=1e-4, atol=1e-6)  # of any answer
    assert (first["entropy"][:, 0] == first["entropy"][:, 1]).all()
    assert (first["compactness"][:, 0] > first["compactness"][:, 1]).all()


def test_what_is_put_in_place_of_a_scene_or_a_text():
    for name in ("induction", "lookup"):
        samples = models.planted(name, 0.8, 0).draw(5, 1)
        absent, empty = grounding.without_cause(samples), grounding.nothing(samples)
        other, noise = grounding.of_another(samples), grounding.noise(samples, torch.Generator().manual_seed(0))
        if name == "lookup":
            before, key = samples.inputs["visual_embeds"], "visual_embeds"
            changed = (absent[key] != before).any(-1)
            assert torch.equal(changed, samples.groups["region"][:, -changed.shape[1] :]) and not absent[key][changed].any()
            assert not empty[key].any() and torch.equal(other[key][1], before[0])
            assert noise[key].std() == pytest.approx(float(before.std()), rel=0.2)
        else:
            before, key = samples.inputs["input_ids"], "input_ids"
            assert torch.equal(absent[key] != before, samples.groups["matched"])
            assert (empty[key][:, :-1] == models.WORDS).all() and torch.equal(other[key][1, :-1], before[0, :-1])
            assert all(torch.equal(one[key][:, -1], before[:, -1]) for one in (absent, empty, other, noise))
            assert not (noise[key][:, 1:-1] == before[:, -1:]).any() and not (absent[key][:, 1:-1] == before[:, -1:]).any()
