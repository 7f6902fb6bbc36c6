"""The run over DigitScenes, and what the page says of its stored rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

import vlattn_fast as va
import vlattn_lab as lab
from tests.helpers.small_models import lively
from vlattn_fast.interpret.evaluating.plan import named_methods as _named
from vlattn_fast.interpret.relevancy.methods.registry import published
from vlattn_fast.measuring.provenance import fingerprint
from vlattn_fast.models import CLIPMapper
from vlattn_lab import evaluation, tasks
from vlattn_lab.checkout import ROOT
from vlattn_lab.clip import CONFIG as CLIP_CONFIG
from vlattn_lab.clip import build_clip
from vlattn_lab.evaluation import TESTS
from vlattn_lab.mapper import CONFIG as MAPPER_CONFIG
from vlattn_lab.pages import evaluation_page
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.tasks import PLAIN
from vlattn_lab.texts import SceneProcessor

WEIGHTED = published("weighted").label


@pytest.fixture
def untrained(monkeypatch):
    """The models of the tasks with random weights (UNITER with its own), and two methods beside the rivals of CLIP."""
    clip = lively(build_clip(CLIP_CONFIG)).eval()
    models = {name: lively(CLIPMapper(clip.vision_model, clip.text_model, **c)).eval() for name, c in MAPPER_CONFIG.items()}
    # Captions with digits in their places, which random weights would not say.
    words = SceneProcessor(end=False).words(lab.digit_scenes(2).captions)["input_ids"][:, 1:]
    models["captions"].generate = lambda pixels, start, max_new_tokens: words[:, :max_new_tokens]
    models |= {"clip": clip, "matching": lab.load_uniter()[0]}
    for name, task in evaluation.TASKS.items():
        rivals = tuple(kind for kind in task.rivals if kind != "CAPTUM")
        changed = replace(task, load=lambda model=models[name]: model, methods=("gradient", "weighted"), frozen={}, rivals=rivals)
        monkeypatch.setitem(evaluation.TASKS, name, changed)


@pytest.mark.parametrize("name", list(evaluation.TASKS))
def test_the_run_writes_rows(name, untrained, tmp_path, capsys):
    out = tmp_path / "rows.json"
    evaluation.main([name, "--samples", "2", "--seeds", "2", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["command"] == f"python -m vlattn_lab.evaluation {name} --samples 2 --seeds 2"
    assert {"commit", "versions", "threads", "cpu_seconds", "facts", "accuracy_of_whole", "residual_shares"} <= set(report)
    assert ("accepted" in report) == (name == "matching")
    for_clip = {"gradient_last_layer", "legrad", "grad_eclip", "clip_surgery"} if name == "clip" else set()
    assert {row["method"] for row in report["rows"]} == {PLAIN, WEIGHTED} | for_clip
    samples = 8 if name == "captions" else 4  # two words a caption
    for row in report["rows"]:
        assert len(row["values"]) == 2 and row["samples"] + row["left_out"] == samples
        if row["method"] == PLAIN and row["test"] != "sanity" and row["value"] is not None:
            assert row["minus_gradient"] == 0 and row["value"] == pytest.approx(sum(row["values"]) / row["seeds"])
    # A skewed mean may lie outside of its percentiles: halves differ by rounding alone.
    assert all(0 <= row["p5"] <= row["p95"] <= 1 and 0 <= row["mean"] <= 1 for row in report["residual_shares"])
    printed = capsys.readouterr().out
    assert printed.count(f"| less `{PLAIN}` | positive | negative |") == 2 and printed.count(f"| less `{PLAIN}` | synergy |") == 1
    row = next(row for row in report["rows"] if row["method"] == WEIGHTED and row["test"] == "mass")
    assert f"| {row['value']:.3f} ± {row['sd']:.3f} |" in printed


def test_a_stored_file_gains_what_it_lacks(untrained, tmp_path, monkeypatch, capsys):
    """Rows that it has stay as they are; the others are those of a run of everything."""
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    asked = ["vqa", "--samples", "2", "--seeds", "2"]
    evaluation.main([*asked, "--out", str(whole)])
    every = json.loads(whole.read_text())
    report = json.loads(whole.read_text())
    kept = [row for row in report["rows"] if row["method"] == PLAIN and row["test"] in ("positive", "mass")]
    part.write_text(json.dumps({**report, "rows": [{**row, "values": [7.0, 8.0]} for row in kept]}))
    evaluation.main([*asked, "--add", "--out", str(part)])
    added = json.loads(part.read_text())
    known = {tuple(row[key] for key in ("method", "test", "part")) for row in kept}
    assert [row["method"] for row in added["rows"]] == [row["method"] for row in every["rows"]]
    for row, full in zip(added["rows"], every["rows"], strict=True):
        assert (row["test"], row["part"], row["samples"], row["left_out"]) == tuple(
            full[key] for key in ("test", "part", "samples", "left_out")
        )
        if (row["method"], row["test"], row["part"]) in known:
            assert row["values"] == [7.0, 8.0] and row["value"] == 7.5
        else:
            assert row["values"] == pytest.approx(full["values"], abs=1e-6)
            kin = row["test"] in ("positive", "mass")  # whose plain rule is the stored one
            less = None if full["minus_gradient"] is None else full["value"] - 7.5 if kin else full["minus_gradient"]
            assert row["minus_gradient"] == pytest.approx(less, abs=1e-6)
    (note,) = added["added"]
    assert note["commit"] == added["commit"] and "positive" not in note["tests"][PLAIN]
    assert note["tests"][WEIGHTED] == list(TESTS) and "synergy" in note["tests"][PLAIN]
    assert added["facts"]["methods"] == every["facts"]["methods"] and set(added["facts"]["tests"]) == set(TESTS)
    capsys.readouterr()
    for text, options, said in (
        ("{}", [], "--out must hold a stored run"),
        (json.dumps({**every, "weights": "others"}), [], "--add must be used with the weights of the stored run, others"),
        (whole.read_text(), ["--samples", "3"], "--add must be used with the command of the stored run"),
    ):
        part.write_text(text)
        with pytest.raises(SystemExit):
            evaluation.main([*asked, *options, "--add", "--out", str(part)])
        assert said in capsys.readouterr().err


def test_evaluate_knows_the_methods():
    for name, task in evaluation.TASKS.items():
        methods = evaluation.methods_of(task)
        assert list(_named(methods)) == list(methods)
        assert {"gradient", PLAIN, "weighted", WEIGHTED, "weighted(freeze=(), weighting=norm)", "gradcam", "random"} <= set(
            methods
        )
        assert ({"gradient_last_layer", "legrad", "grad_eclip", "clip_surgery"} <= set(methods)) == (name == "clip")


def test_a_caption_is_explained_word_by_word(monkeypatch):
    """Of captions with digits in their places; the truth is the digit that the word says."""
    scenes = lab.digit_scenes(6, seed=5)
    words = SceneProcessor(end=False).words(scenes.captions)["input_ids"][:, 1:]
    words[1, 0] = words[1, 1]  # "left left of a ..." says no digit
    words[2, 4] = SceneProcessor().words(["zero"])["input_ids"][0, 1]

    class Said:
        def generate(self, pixels, start, max_new_tokens):
            return words[:, :max_new_tokens]

    first, second = tasks.captioning(Said(), 6, 5)
    kept = [0, 2, 3, 4, 5]
    for (inputs, target, boxes), place in ((first, 0), (second, 4)):
        assert target == words[kept, place].tolist()
        assert torch.equal(inputs["input_ids"][:, 1:], words[kept, :place]) and inputs["attention_mask"].all()
        assert torch.equal(inputs["pixel_values"][:, 0], scenes.images[kept])
        for row, (index, box) in enumerate(zip(kept, boxes, strict=True)):
            said = SceneProcessor().convert_ids_to_tokens(target)[row]
            digits = [DIGIT_WORDS[digit] for digit in scenes.digits[index].tolist()]
            there = [corners / 32 for digit, corners in zip(digits, scenes.boxes[index], strict=True) if digit == said]
            assert torch.equal(box, torch.stack(there) if there else torch.zeros(0, 4))


def test_a_caption_is_found_among_those_of_its_item():
    """Captions that are the same have the same index."""
    inputs, target, boxes = next(tasks.retrieval(None, 60, 0, batch=60))
    ids = inputs["input_ids"]
    assert len(ids) == len(target) == len(boxes) == 60
    assert torch.equal(ids[target], ids) and all(index <= place for place, index in enumerate(target))
    assert len({tuple(row) for row in ids.tolist()}) == len(set(target)) < 60


def test_weights_by_contribution_are_halves_behind_a_norm():
    """LayerNorm(x + o) does not change with the length of x + o, so that g.x = -g.o: what docs/methods.md says."""
    model, _ = lab.load_uniter()
    model.double()
    inputs = {
        name: value.double() if value.is_floating_point() else value for name, value in lab.digit_scenes(8).inputs().items()
    }
    one, two = (
        va.explain(model, inputs, target=1, method=published("weighted", weighting=weighting)).relevancy["joint"]
        for weighting in ("contribution", "equal")
    )
    layers = model.config.num_hidden_layers
    assert float((one * 2**layers - two).abs().max()) < 1e-4 * float(two.abs().max())
    norm = va.explain(model, inputs, target=1, method=published("weighted", weighting="norm")).relevancy["joint"]
    assert float((norm * 2**layers - two).abs().max()) > 0.01 * float(two.abs().max())


def made(values):
    """A run with these values of the mass, by method."""
    table = [
        {"method": name, "test": "mass", "part": "image", "value": value, "samples": 3, "left_out": 1}
        for name, value in values.items()
    ]
    curve = {"method": "gradient", "part": "image", "steps": [0.0, 1.0]}
    curves = [{**curve, "test": "insertion", "mean": [0.1, 0.9]}, {**curve, "test": "positive", "mean": [values[PLAIN], 0.1]}]
    return va.Evaluation(table, curves)


def test_seeds_are_compared_pair_by_pair():
    """By hand: of means and differences those of the seeds that have them, with the deviation of a sample."""
    runs = [made({PLAIN: a, WEIGHTED: b}) for a, b in ((0.2, 0.5), (0.6, 0.7), (0.1, None))]
    plain, weighted = evaluation.over_seeds(runs)
    assert (plain["method"], plain["minus_gradient"], plain["minus_gradient_sd"], plain["seeds"]) == (PLAIN, 0.0, 0.0, 3)
    assert plain["value"] == pytest.approx(0.3) and plain["sd"] == pytest.approx(0.07**0.5)
    assert weighted["values"] == [0.5, 0.7, None] and (weighted["seeds"], weighted["samples"], weighted["left_out"]) == (2, 9, 3)
    assert (weighted["value"], weighted["sd"]) == pytest.approx((0.6, 0.02**0.5))
    assert (weighted["minus_gradient"], weighted["minus_gradient_sd"]) == pytest.approx((0.2, 0.02**0.5))  # of +0.3 and +0.1
    assert evaluation.whole(runs) == pytest.approx(0.3)
    assert evaluation.whole([*runs, va.Evaluation([])]) is None


def test_each_seed_has_scenes_of_its_own(monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda model, items, **options: (next(items), options["seed"]))
    for seed in (0, 3):
        (inputs, _, _), passed_on = evaluation.run(tasks.TASKS["matching"], None, 4, seed, {})
        assert passed_on == seed and torch.equal(inputs["input_ids"], lab.digit_scenes(4, seed=seed).input_ids)


def test_captions_are_accepted_without_each_of_their_words():
    model, processor = lab.load_uniter()
    scenes = lab.digit_scenes(40, seed=0)
    shares = []
    for left_out in (None, 0, 1, 2, 3, 4):
        captions = [" ".join(w for n, w in enumerate(caption.split()) if n != left_out) for caption in scenes.captions]
        with torch.no_grad():
            odds = tasks.log_odds(model(**processor(captions, scenes.images, scenes.boxes)))
        shares.append(float((odds > 0).double().mean()))
    found = evaluation.accepted(40, 1)
    assert [found["whole"], *found["without_word"]] == shares and shares[0] > 0.9 and 0 < sum(shares[1:]) < 2.5


def test_shares_of_the_residual_stream_are_those_of_their_layer(monkeypatch):
    """Weights that name the layer whose input the residual is."""
    model, entered = lab.load_clip()[0], {}
    for tower in (model.text_model, model.vision_model):
        for number, layer in enumerate(tower.encoder.layers, 1):
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, key=number: entered.update(
                    {(key, (args or [*kwargs.values()])[0].shape[1]): args[0]}
                ),
                with_kwargs=True,
            )

    def named(residual, branch, gradient, kind):
        (number,) = (key for (key, size), x in entered.items() if size == residual.shape[1] and torch.equal(x, residual))
        a = torch.full(residual.shape[:2], number / 10)
        return a, 1 - a

    monkeypatch.setattr(evaluation, "residual_weights", named)
    rows = evaluation.residual_shares(tasks.TASKS["clip"], model, 10)
    assert [(row["tower"], row["attention"]) for row in rows] == [*(("image", n) for n in (1, 2, 3)), ("text", 1), ("text", 2)]
    assert [round(10 * row["mean"]) for row in rows] == [row["attention"] for row in rows]


def test_residual_shares_of_linked_towers():
    """Each sum once, first to last, though relevancy passes towers that attend to one another twice."""
    rows = evaluation.residual_shares(tasks.TASKS["vqa"], tasks.TASKS["vqa"].load(), 2)
    assert [(row["tower"], row["attention"]) for row in rows] == [("image", 1 + n) for n in range(3)] + [
        ("text", 1 + n) for n in range(8)
    ]
    assert len({row["mean"] for row in rows}) == len(rows)


def test_tables_of_three_methods():
    """Values with their deviations, "–" without a value or record, and differences for weightings and ablations alone."""
    numbers = {
        (PLAIN, "positive"): (0.25, 0.0126, 0.0, 0.0),
        (PLAIN, "sanity"): (0.5, 0.25, 0.0, 0.0),
        ("gradient:no_aggregation", "positive"): (0.125, 0.5, -0.125, 0.0),
        ("gradient:no_aggregation", "sanity"): (None, None, None, None),
        ("weighted", "sanity"): (0.5, 0.25, 0.0, 0.0),  # not measured by the other test
    }
    keys = ("value", "sd", "minus_gradient", "minus_gradient_sd")
    rows = [
        {"method": method, "test": test, "part": "image", **dict(zip(keys, values, strict=True))}
        for (method, test), values in numbers.items()
    ]
    assert [table.splitlines()[2:] for table in evaluation.tables(rows)] == [
        [
            f"| `{PLAIN}` | 0.250 ± 0.013 | +0.500 ± 0.250 |",
            "| `gradient:no_aggregation` | 0.125 ± 0.500 | – |",
            "| `weighted` | – | +0.500 ± 0.250 |",
        ],
        ["| `gradient:no_aggregation` | -0.125 ± 0.000 |", "| `weighted` | – |"],
    ]


def test_the_page_has_the_stored_rows():
    """It has a table for every part with a value, with every row."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    named = set()
    for section in re.split(r"^## ", text, flags=re.M):
        found = re.search(r"`(benchmarks/results/evaluation-(\w+)\.json)`", section)
        if found is None:
            continue
        named.add(found[1])
        report = json.loads((ROOT / found[1]).read_text())
        for part in {row["part"] for row in report["rows"] if row["value"] is not None}:
            mark = f"<!-- table: evaluation: {found[2]} {part} -->"
            assert re.search(rf"^### (The )?{part}\n\n{mark}$", section, re.M | re.I), (found[1], part)
            shown = evaluation_page.evaluation(found[2], part)
            for row in report["rows"]:
                if row["part"] == part and row["value"] is not None:
                    assert f"| `{row['method']}` |" in shown and f"{row['value']:.3f} ± {row['sd']:.3f}" in shown, row
        if "residual_shares" in report:
            assert len(evaluation_page.residual_shares(found[2]).splitlines()) == 2 + len(report["residual_shares"])
        weights = fingerprint(evaluation.TASKS[found[2]].load())
        assert report["weights"] == weights, f"python -m vlattn_lab.evaluation {found[2]} measures the present weights anew"
        right, without = report["accuracy_of_whole"], report.get("accepted", {}).get("without_word", [])
        said = " ".join(section.split())
        assert ("all whole inputs" if right == 1.0 else f"{100 * right:.0f} % of the whole") in said
        assert not without or f"at most {100 * max(without):.0f} % of those without a word" in said
    assert named == {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks" / "results").glob("evaluation-*.json")}


def test_captions_are_accepted_by_their_odds():
    model, _ = lab.load_uniter()
    inputs, target, boxes = next(tasks.matching(model, 3, 0))
    with torch.no_grad():
        assert torch.equal(target(model(**inputs)), lab.matching_score(model, lab.digit_scenes(3, seed=0)))
    assert len(boxes) == 3 and all(part.shape == (2, 4) and part.max() <= 1 for part in boxes)


@pytest.mark.parametrize(("option", "value"), [("--seeds", "0"), ("--samples", "-1"), ("--out", "FOLDER")])
def test_wrong_options_end_the_run_at_its_start(option, value, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "TASKS", {"matching": None})
    with pytest.raises(SystemExit):
        evaluation.main([option, str(tmp_path) if value == "FOLDER" else value])
    assert f"error: {option} must be a" in capsys.readouterr().err
