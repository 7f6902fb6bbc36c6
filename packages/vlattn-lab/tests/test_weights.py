"""The shipped weights reach what their report says."""

import json
from dataclasses import asdict

import pytest
import torch

from vlattn_lab import digit_scenes, load_uniter, matching_accuracy, matching_score, winoground_scores
from vlattn_lab.checkout import ROOT
from vlattn_lab.processor import DigitProcessor
from vlattn_lab.scenes import NEGATIVES
from vlattn_lab.train import run
from vlattn_lab.uniter import CONFIG, DATA, WEIGHTS


@pytest.fixture(scope="module")
def shipped():
    return load_uniter()[0]


def test_shipped_weights_are_small_and_their_report_is_theirs(shipped):
    weights = DATA / WEIGHTS
    report = json.loads(weights.with_suffix(".json").read_text())
    assert weights.stat().st_size <= 4_000_000
    assert report["config"] == asdict(shipped.config) == asdict(CONFIG)
    for measure in ("matching_accuracy", "winoground_scores"):
        assert report["test"][measure].keys() == {"all", "seen", "held_out"}
    steps, seed, threads = (report[name] for name in ("steps", "seed", "threads"))
    assert report["command"] == f"python -m vlattn_lab.train uniter --steps {steps} --seed {seed} --threads {threads}"
    assert report["cpu_seconds"] < 15 * 60


@pytest.mark.parametrize("pairs", ["all", "seen", "held_out"])
def test_stored_accuracies_are_reproduced_on_other_test_scenes(shipped, pairs):
    stored = json.loads((DATA / WEIGHTS).with_suffix(".json").read_text())["test"]
    accuracy = matching_accuracy(shipped, count=1000, seed=1, pairs=pairs)
    swapped = winoground_scores(shipped, count=1000, seed=1, pairs=pairs)
    # 1,000 fresh scenes against 5,000 stored ones: 0.015 is more than three standard errors at 0.98
    assert accuracy == pytest.approx(stored["matching_accuracy"][pairs], abs=0.015)
    assert swapped == pytest.approx(stored["winoground_scores"][pairs], abs=0.025)
    if pairs != "held_out":
        assert accuracy["digit"] >= 0.97 and accuracy["relation"] >= 0.95 and accuracy["order"] >= 0.95


def test_swapped_pair_scores_of_a_blind_model_are_zero(shipped):
    """Ties are not hits: a model that sees no image scores both images of a pair alike."""

    class Blind(torch.nn.Module):
        def forward(self, **inputs):
            masked = torch.zeros_like(inputs["region_mask"])
            return shipped(**{**inputs, "region_mask": masked})

    assert winoground_scores(Blind(), count=100) == {"text": 0.0, "image": 0.0, "group": 0.0}


def test_matching_score_follows_the_caption(shipped):
    scenes = digit_scenes(64, seed=2)
    swapped = digit_scenes(64, seed=2, negative="order")
    other = matching_score(shipped, scenes, input_ids=swapped.input_ids)
    assert (matching_score(shipped, scenes) > other).double().mean() > 0.9
    assert torch.equal(other, matching_score(shipped, swapped))


def test_a_caption_padded_to_a_longer_one_scores_as_alone(shipped):
    scenes, processor = digit_scenes(2, seed=3), DigitProcessor()
    longer = [scenes.captions[0], scenes.captions[1] + " of a"]
    together = shipped(**processor(longer, scenes.images, scenes.boxes)).logits[:1]
    torch.testing.assert_close(together, shipped(**scenes.inputs()).logits[:1], rtol=1e-4, atol=1e-4)


def test_a_directory_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match="directory"):
        load_uniter(tmp_path)


def test_every_seed_holds_and_the_page_has_their_rows():
    """Five trainings with the recipe as it is; the shipped weights are those of seed 0."""
    rows = json.loads((ROOT / "benchmarks/results/digitscenes-uniter-seeds.json").read_text())
    page = (ROOT / "docs/digitscenes.md").read_text(encoding="utf-8")
    assert [row["seed"] for row in rows] == list(range(5)) and len({row["commit"] for row in rows}) == 1
    steps = run.TRAININGS["uniter"].steps
    lowest = 1.0
    for row in rows:
        options = f"--steps {steps} --seed {row['seed']} --threads 1"
        assert row["command"] == f"python -m vlattn_lab.train uniter {options}" and row["seconds"] < 15 * 60
        accuracy, swapped = row["test"]["matching_accuracy"], row["test"]["winoground_scores"]
        lowest = min(lowest, *accuracy["all"].values())
        shares = [accuracy[pairs][kind] for pairs in ("all", "held_out") for kind in NEGATIVES] + [swapped["all"]["group"]]
        cells = " | ".join(f"{share:.1%}".replace("%", " %") for share in shares)
        assert f"\n| {row['seed']} | {cells} | {row['cpu_seconds']:.0f} s |\n" in page
    assert lowest >= 0.97 and f"is {lowest:.1%}.".replace("%", " %") in page and f"{steps:,} steps" in page
    report = json.loads((DATA / WEIGHTS).with_suffix(".json").read_text())
    assert {key: value for key, value in report.items() if key != "config"} == rows[0]
