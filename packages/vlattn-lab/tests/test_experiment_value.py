from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("sklearn")

import vlattn_lab as lab
from vlattn_lab.checkout import ROOT
from vlattn_lab.experiments import value
from vlattn_lab.experiments.run import main


def test_everything_is_measured_once(tmp_path, capsys):
    out = tmp_path / "rows.json"
    main(["value", "--smoke", "--out", str(out), "--figures", str(tmp_path), "--seeds", "1", "--processes", "1"])
    (row,) = json.loads(out.read_text())["rows"]
    for model, heads_and_states in (("trained", True), ("untrained", True), ("other captions", False)):
        tests = {one["test"] for one in row[model]}
        assert {"modality", "cross_modal", "fusion"} <= tests
        assert ({"coreference", "relation", "linguistic"} <= tests) == heads_and_states
    assert len(row["without_head"]) == 18 and row["trained"] != row["untrained"]
    shown = capsys.readouterr().out
    assert all(f"({number})" in shown for number in ("i", "ii", "iii", "iv", "v")) and (tmp_path / "value.png").is_file()


def test_a_head_is_left_out_and_comes_back():
    model = value.fresh(0)
    scenes = lab.digit_scenes(3, seed=1)
    attention = model.uniter.encoder.layer[1].attention
    before = lab.matching_score(model, scenes)
    seen = []
    watch = attention.output.dense.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with value.without_head(model, 1, 4):
        without = lab.matching_score(model, scenes)
    watch.remove()
    assert torch.equal(seen[0][..., 64:80], torch.zeros(3, 11, 16)) and seen[0][..., :64].abs().min() > 0
    assert not torch.equal(before, without) and torch.equal(before, lab.matching_score(model, scenes))


def test_other_captions_are_those_of_other_scenes():
    own = next(lab.probe_samples(4, seed=3, batch=4))[0]
    other = next(value.other_captions(4, 3))[0]
    assert torch.equal(other["input_ids"][1:], own["input_ids"][:-1]) and torch.equal(other["input_ids"][0], own["input_ids"][-1])
    assert torch.equal(other["region_features"], own["region_features"])


def test_words_and_regions_are_weighed_by_their_number():
    even = [
        {"test": "modality", "kind": kind, "layer": 0, "head": 0, "value": count / 11} for kind, count in value.TOKENS.items()
    ]
    assert value.per_token({"trained": even}, "trained") == pytest.approx(1.0)


def test_the_page_says_which_observations_were_not_tested():
    """The paper's (iv) is about plots and (v) about heads; the probes read two numbers of each head, and states."""
    page = (ROOT / "docs" / "experiments" / "value.md").read_text(encoding="utf-8")
    asked = dict(re.findall(r"^\| \((\w+)\) [^|]+ \| (yes|no)\b", page, re.M))
    assert asked == {"i": "yes", "ii": "yes", "iii": "yes", "iv": "no", "v": "no"}
    results = re.findall(r"^- \*\*\((\w+)\) [^*]+: not tested\.\*\*", page, re.M)
    assert results == ["iv", "v"]
    assert "(v) attention heads also contain" in page and "from states after" in page
