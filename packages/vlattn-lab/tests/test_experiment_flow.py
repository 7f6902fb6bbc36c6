"""The experiment of information flow: it runs, and its parts are what they say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

import vlattn_fast as va
import vlattn_lab as lab
from vlattn_lab.experiments import flow
from vlattn_lab.experiments import run as frame
from vlattn_lab.experiments.flow import edges, failures, maps, samples
from vlattn_lab.processor import DIGIT_WORDS


@pytest.fixture(scope="module", params=list(flow.STEPS))
def asked(request):
    model = (lab.load_vqa if request.param == "vqa" else lab.load_captioner)()[0]
    return model, *samples.draw(request.param, model, 12, 3, 0)


def test_everything_is_measured_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frame, "commit", lambda: "abc")
    out = tmp_path / "rows.json"
    frame.main(["flow", "--smoke", "--out", str(out), "--figures", str(tmp_path), "--seeds", "1", "--processes", "1"])
    rows = json.loads(out.read_text())["rows"]
    assert [row["task"] for row in rows] == list(flow.STEPS)[:1]
    for row in rows:
        assert [one["edge"] for one in row["flow"]] == list(edges.FLOWS)
        assert [(one["list"], one["edges"]) for one in row["cuts"]] == [(n, k) for n in edges.LISTS for k in edges.CUT]
        assert len({len(values) for values in row["edges"].values()}) == 1 and len(row["heads"]["true"]) == 44
        assert all(-1 <= one["means"] <= 1 for one in row["correlations"])
        assert sum(one["count"] for one in row["by mass"]) > len(row["edges"]["true"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*edges.FLOWS, *edges.LISTS))
    assert (tmp_path / "flow.png").is_file()


def test_each_token_is_in_one_group(asked):
    model, drawn, accuracy = asked
    assert accuracy > 0.7 and drawn.read(model(**drawn.inputs).logits).shape[0] == 3
    real, places = drawn.inputs["attention_mask"], torch.arange(65)
    assert torch.equal(torch.stack([*drawn.text.values()]).sum(0), real.long())
    assert torch.equal(torch.stack([*drawn.image.values()]).sum(0), torch.ones(3, 65, dtype=torch.long))
    assert drawn.image["class"].nonzero()[:, 1].tolist() == [0, 0, 0]
    for name in ("answer", "asked"):
        assert all(4 <= int(mask.sum()) <= 9 and int(places[mask].diff().max()) <= 8 for mask in drawn.image[name])


def test_groups_of_patches_lie_in_the_boxes_of_their_digits():
    scenes = lab.digit_questions(20, seed=3, kind="what")
    digits = [
        torch.tensor([DIGIT_WORDS.index(text.split()[-1]) for text in texts]) for texts in (scenes.answers, scenes.questions)
    ]
    groups = samples.image_groups(scenes, *digits)
    for sample in range(20):
        for name, digit in zip(("answer", "asked"), digits, strict=True):
            (left, top, right, bottom) = scenes.boxes[sample][scenes.digits[sample] == digit[sample]][0].tolist()
            for place in (groups[name][sample].nonzero()[:, 0] - 1).tolist():
                assert left <= 4 * (place % 8) + 2 < right and top <= 4 * (place // 8) + 2 < bottom
        ink = scenes.images[sample].unfold(0, 4, 4).unfold(1, 4, 4).sum((2, 3)).flatten()
        assert float(ink[groups["empty"][sample, 1:]].mean()) < float(ink[groups["answer"][sample, 1:]].mean())


def test_effects_of_stored_maps_are_those_of_the_calls(asked):
    """First-order effects from maps, and the fall of the score where an edge of the last layer is cut a little."""
    model, drawn, _ = asked
    stored = maps.stored_maps(model, drawn)
    for pair, towers in samples.PAIRS.items():
        groups = drawn.groups(pair)
        table = va.attribute_edges(model, drawn.inputs, groups, tower=towers)
        for edge, effect in zip(table, table.effects, strict=True):
            call_map = stored[pair, edge.layer]
            attention, gradient = (x[:, edge.head] for x in (call_map.logits.softmax(-1), call_map.gradient))
            grad_logits = attention * (gradient - (attention * gradient).sum(-1, keepdim=True))
            expected = (grad_logits * groups[edge.to][:, :, None] * groups[edge.from_][:, None]).sum((1, 2))
            torch.testing.assert_close(effect, expected, rtol=1e-3, atol=2e-5)


def test_the_cut_of_a_map_is_exact_where_the_score_is_linear_behind_it():
    torch.manual_seed(0)
    logits, value, weights = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6), torch.randn(2, 3, 4, 6)
    logits[0, 1, 2, 3] = 20.0  # a saturated row
    to, from_ = torch.rand(2, 4) < 0.6, torch.tensor([[True, False, False, True, False], [True] * 5])
    stored = maps.Map(logits, weights @ value.mT, torch.zeros(2, 3))
    for head in range(3):
        behind, relevancy, mass = edges._of_map(stored, {"a": to, "b": from_}, va.Edge(0, head, "b", "a"))
        without = logits[:, head].masked_fill(to[:, :, None] & from_[:, None], -torch.inf).softmax(-1).nan_to_num()
        whole = logits[:, head].softmax(-1)
        fall = ((whole - without) @ value[:, head] * weights[:, head]).sum((1, 2))
        torch.testing.assert_close(behind.float(), fall, rtol=1e-4, atol=1e-5)
        pairs = to[:, :, None] & from_[:, None]
        torch.testing.assert_close(relevancy.float(), ((whole * stored.gradient[:, head]).relu() * pairs).sum((1, 2)))
        torch.testing.assert_close(mass[1], torch.tensor(1.0, dtype=torch.float64))


def test_each_sample_loses_its_edges(asked):
    model, drawn, _ = asked
    listed = [("cross", va.Edge(2, 1, "answer", "last")), ("text", va.Edge(2, 0, "words", "last"))]
    effects = edges.Effects(listed, *[torch.zeros(2, 3)] * 5, torch.ones(3))
    chosen = torch.tensor([[True, False, True], [False, True, True]])
    with va.intervene(model, drawn.inputs, edges._knockouts(drawn, effects, chosen)):
        together = edges._logits(model, drawn)
    for sample in range(3):
        inputs = {name: value[sample : sample + 1] for name, value in drawn.inputs.items()}
        alone = samples.Asked(inputs, *({n: m[[sample]] for n, m in groups.items()} for groups in (drawn.text, drawn.image)))
        cuts = [
            va.Knockout(queries=groups[e.to], keys=groups[e.from_], layers=e.layer, heads=e.head, tower=samples.PAIRS[pair])
            for (pair, e), is_cut in zip(listed, chosen[:, sample].tolist(), strict=True)
            for groups in [alone.groups(pair)]
            if is_cut
        ]
        with va.intervene(model, inputs, cuts):
            torch.testing.assert_close(together[[sample]], edges._logits(model, alone), rtol=1e-4, atol=1e-4)


def test_failures_are_counted_and_named():
    listed = [("text", va.Edge(0, 0, "start", "last")), ("cross", va.Edge(2, 1, "answer", "last"))]
    first_order, true = torch.tensor([[0.1, -0.2], [0.01, 0.3]]), torch.tensor([[0.2, 0.5], [2.0, 0.3]])
    mass = torch.tensor([[0.05, 0.3], [0.995, 0.4]])
    effects = edges.Effects(listed, first_order, true, 2 * true, first_order, mass, torch.ones(2))
    bins = {row["to"]: row for row in failures.by_mass(effects)}
    assert [bins[high]["count"] for high in failures.MASSES[1:]] == [1, 2, 0, 0, 1] and bins[0.9]["true"] is None
    assert (bins[0.5]["large"], bins[0.5]["wrong"]) == (2, 1) and bins[1.0]["true"] == pytest.approx(2.0)
    sources = {row["from"]: row for row in failures.by_source(effects)}
    assert sources["start"]["true"] == pytest.approx(0.35) and sources["answer"]["mass"] == pytest.approx(0.6975)
    miss = failures.largest_miss(effects)
    assert (miss["pair"], miss["from"], miss["true"], miss["mass"]) == ("cross", "answer", 2.0, 0.995)
    same = failures.correlations(replace(effects, first_order=true), (true, -true))
    assert [row["means"] for row in same if row["of"] == "heads"] == [0.0]  # two heads have no rank correlation


def test_a_model_that_answers_too_little_is_refused():
    model = lab.load_vqa()[0]
    with pytest.raises(ValueError, match="model must answer 13 of 12 scenes right"):
        samples.draw("vqa", model, 12, 13, 0)
