"""Heads with a known job: predictions of cuts on a planted circuit, and word times from rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import vlattn_fast as va
from vlattn_lab.experiments.known_heads import cuts, words
from vlattn_lab.experiments.planted_circuits.models import planted


def question(batch=3):
    circuit = planted("induction", 0.8, 0)
    samples = circuit.draw(batch, 0)

    def score(out):
        logits = out.logits[:, -1]
        return logits.gather(1, samples.answers.repeat(len(logits) // batch)[:, None])[:, 0]

    places = [(0, 0, "matched", "copied"), (0, 1, "others", "last"), (1, 0, "copied", "last"), (1, 2, "others", "last")]
    return cuts.Question(circuit.model, samples.inputs, samples.groups, places, score)


def test_sets_of_edges_are_cut_together():
    asked = question()
    sets = torch.tensor([[True, False, False, True], [False, False, True, False], [True, True, True, True]])
    found = asked.cut(sets)
    for chosen, fall in zip(sets, found, strict=True):
        edits = [
            va.Knockout(queries=asked.groups[to], keys=asked.groups[from_], layers=layer, heads=head)
            for (layer, head, from_, to), cut in zip(asked.places, chosen.tolist(), strict=True)
            if cut
        ]
        with torch.no_grad():
            whole = asked.score(asked.model(**asked.inputs))
            with va.intervene(asked.model, asked.inputs, edits):
                expected = (whole - asked.score(asked.model(**asked.inputs))).double().mean()
        assert float(fall) == pytest.approx(float(expected), abs=1e-4)
    assert found[2] > 1  # the planted edges are among them


def test_predictions_are_those_of_the_tables_and_are_compared_with_cuts():
    asked = question()
    mass = torch.tensor([[0.5, 0.2, 0.0, 0.0], [0.75, 0.0, 0.0, 0.0]])
    row = cuts.measured(cuts.Question(**{**vars(asked), "mass": mass}), 0)
    assert [one["by"] for one in row["predictions"]] == [*cuts.PREDICTIONS]
    first, *_, undone = (one["effects"] for one in row["predictions"])
    table = va.attribute_edges(asked.model, asked.inputs, asked.groups, target=asked.score)
    found = [next(e.effect for e in table if (e.layer, e.head, e.from_, e.to) == place) for place in asked.places]
    assert first == pytest.approx(found, rel=1e-3)
    assert undone == pytest.approx([found[0] / 0.5, found[1] / 0.8, found[2] / 0.25, found[3]], rel=1e-3)
    alone = asked.cut(torch.eye(4, dtype=torch.bool))
    assert row["true"] == pytest.approx(alone.tolist(), rel=1e-2, abs=1e-4)
    integrated = {one["by"]: one for one in row["predictions"]}
    assert integrated["integrated, n_steps=4"]["gap"] == pytest.approx(
        abs(sum(integrated["integrated, n_steps=4"]["effects"]) - row["all"]) / abs(row["all"]), rel=1e-2
    )
    assert all(-1 <= one[fact] <= 1 for one in row["predictions"] for fact in ("single", "sets"))
    assert cuts.place_of([0.1, 0.5, 0.3], 2) == 2


def test_rows_are_those_of_attention():
    query, key = torch.randn(5, 12), torch.randn(7, 12)
    rows = words.attention_rows(SimpleNamespace(num_heads=3, scaling=0.3), query, key)
    logits = torch.einsum("thd,mhd->htm", query.view(5, 3, 4), key.view(7, 3, 4)) * 0.3
    torch.testing.assert_close(rows, logits.softmax(-1), rtol=1e-5, atol=1e-6)


def test_a_path_takes_every_row_in_order():
    gain = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert words.warped(gain) == [0, 2, 3]
    best = max(
        (sum(float(gain[row, at]) for at, row in enumerate(rows)), rows)
        for rows in [(0, 0, 0, 0), (0, 0, 1, 2), (0, 1, 1, 2), (0, 1, 2, 2)]
    )
    assert best[1] == (0, 0, 1, 2)
    with_a_jump = torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.0, 5.0]])  # more rows than positions share some
    assert words.warped(with_a_jump)[0] == 0 and words.warped(with_a_jump)[2] == 1


def test_words_begin_where_their_rows_do():
    begins = [0, 20, 50, 70, 90]  # the first row is of the silence, the last one of the end
    rows = torch.full((2, 5, 110), 0.01)
    for row, (begin, end) in enumerate(zip(begins, [*begins[1:], 110], strict=True)):
        rows[:, row, begin:end] = 0.2
    found = words.starts(rows, [None, 0, 0, 1, None])
    assert found == {0: pytest.approx(0.4), 1: pytest.approx(1.4)}
    true = [("one", 0.42, 1.0), ("two", 1.46, 1.6), ("three", 1.46, 1.6)]
    assert words.within({**found, 2: 9.0}, true) == {"20 ms": 0.5, "50 ms": 0.5, "100 ms": 1.0, "median": 0.02, "words": 2}
