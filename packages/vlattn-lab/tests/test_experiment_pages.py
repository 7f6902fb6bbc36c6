"""Pages of experiments have the tables of the stored rows, and their pictures."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("sklearn")

from vlattn_fast.measuring.provenance import fingerprint
from vlattn_lab.checkout import ROOT
from vlattn_lab.experiments import weighted_relevancy
from vlattn_lab.experiments.experiment import effects_of, effects_table, holm
from vlattn_lab.experiments.run import NAMES, experiment, main
from vlattn_lab.pages import claims
from vlattn_lab.tasks import TASKS
from vlattn_lab.weights import DATA

STORED = {path.stem.removeprefix("experiment-"): path for path in (ROOT / "benchmarks" / "results").glob("experiment-*.json")}
ACCURACY = {"dot": [1.0, 0.6, 0.2], "cosine": [0.5, 0.5, 0.6]}  # of three seeds


def test_every_experiment_has_rows_and_a_page():
    pages = {path.stem for path in (ROOT / "docs" / "experiments").glob("*.md")} - {"real", "real_tables", "tables"}  # of tools
    assert set(STORED) == pages <= set(NAMES)


@pytest.mark.parametrize("name", sorted(STORED))
def test_tables_and_pictures_are_those_of_the_rows(name):
    report, page = json.loads(STORED[name].read_text()), (ROOT / "docs" / "experiments" / f"{name}.md").read_text()
    assert not report["smoke"] and report["command"].split(" --models")[0] in page
    assert not [row["commit"] for row in report["rows"] if not re.fullmatch("[0-9a-f]{12,}", row["commit"])]
    loaded = experiment(name)
    if f"<!-- table: experiment: {name} -->" in (ROOT / "docs" / "experiments" / "tables.md").read_text():
        assert effects_table(loaded.effects(report["rows"])) in page
        assert len(re.findall(r"[^\s|]*\w[^\s|]*", page)) <= 1200, "a page is read in five minutes"
        assert report["effects"] == [json.loads(json.dumps(one._asdict())) for one in loaded.effects(report["rows"])]
    else:
        assert all(table in page for table in loaded.tables(report["rows"]))
    for picture in loaded.figures:
        assert f"({picture}.png)" in page and (ROOT / "docs" / "experiments" / f"{picture}.png").is_file()


def test_the_table_of_claims_is_that_of_the_rows():
    made = claims.tables()
    assert made in claims.README.read_text(encoding="utf-8"), "python -m vlattn_lab.pages.claims writes it"
    cells = [
        [cell.strip() for cell in line.split(" | ")] for line in re.findall(r"^\| (.+) \|$", made, re.M) if "---" not in line
    ]
    assert {len(line) for line in cells} == {8} and all(cell for line in cells for cell in line)
    said = {line[7] for line in cells if line[0] != "claim"}
    assert said <= {claims.REPRODUCED, claims.NOT, claims.UNTESTED, claims.UNCLAIMED}


def test_what_a_claim_is_called_follows_from_its_effect():
    up, down, weak = effects_of([("a", "x", [0.9, 1.0, 1.1]), ("b", "x", [-0.9, -1.0, -1.1]), ("c", "x", [0.1, -0.1, 0.2])])
    found = [claims.line_of(claims.Claim("it rises", one, "nothing"))[7] for one in (up, down, weak, "no rows")]
    assert found == [claims.REPRODUCED, claims.NOT, claims.NOT, claims.UNTESTED]
    rows = [
        {"task": "t", "arm": arm, "seed": seed, "trained": {"accuracy": value}}
        for arm, of in ACCURACY.items()
        for seed, value in enumerate(of)
    ]
    assert claims.chosen_by_others(rows, "t") == pytest.approx([-0.5, 0.1, -0.4])  # worked by hand


def test_the_figure_of_six_tasks_is_as_wide_as_a_page():
    rows = json.loads(STORED["scores"].read_text())["rows"]
    figure = experiment("scores").figures["scores"](rows)
    assert figure.get_size_inches()[0] < 10 and sum(axes.axison for axes in figure.axes) == 6


def test_weighted_relevancy_runs_on_trained_models(tmp_path, capsys):
    """The models of a seed's folder, of which UNITER here has other weights than the shipped one."""
    out, folder = tmp_path / "rows.json", tmp_path / "models" / "0"
    shutil.copytree(DATA, folder)
    file = folder / "uniter_digitscenes.safetensors"
    save_file({name: 0.9 * tensor for name, tensor in load_file(file).items()}, file)
    report = file.with_suffix(".json")
    report.write_text(report.read_text().replace('"steps": 3000', '"steps": 1'))
    main(["weighted_relevancy", "--smoke", "--seeds", "1", "--out", str(out), "--processes", "1", "--models", str(folder.parent)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["task"], row["seed"]) for row in rows] == [(task, 0) for task in TASKS]
    assert [row["steps"] for row in rows] == [1, 3600, 5000, 3000]
    assert [row["weights"] == fingerprint(TASKS[row["task"]].load()) for row in rows] == [False, True, True, True]
    rules = len(weighted_relevancy.RULES)
    assert all(len(row["values"]) == 1 + 2 * (1 + rules) for row in rows) and rules == 7
    for row in rows:
        places = {(share["form"], share["state"]) for share in row["shares"]}
        assert places == {(form, state) for form in weighted_relevancy.FORMS for state in ("trained", "untrained")}
    assert (tmp_path / "weighted_relevancy.png").is_file() and "| published | plain rule |" in capsys.readouterr().out


def test_effects_are_corrected_for_their_number():
    """Worked by hand: 4 x 0.005; then the larger of 3 x 0.01 and what is before; 2 x 0.03; and not below 0.06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    one, two = effects_of([("a", "x", [0.1, 0.2, 0.3]), ("b", "y", [0.1, -0.1, 0.0]), ("c", "one seed", [1.0])])[:2]
    half = 4.302653 * 0.1 / 3**0.5  # Student's t, two degrees of freedom
    assert (one.effect, one.low, one.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-6)
    assert (one.seeds, one.holm) == (3, pytest.approx(2 * one.p)) and two.holm == two.p == 1


def test_what_is_detectable_is_found_in_four_of_five():
    generator, [effect] = torch.Generator().manual_seed(0), effects_of([("a", "x", [-1.0, 0.0, 1.0, 2.0, -2.0])])
    size = effect.detectable / 2.5**0.5  # the deviation of these values
    drawn = torch.randn(20000, 5, generator=generator, dtype=torch.float64) + size
    found = (drawn.mean(1) / (drawn.std(1) / 5**0.5)).abs() > 2.776445  # 0.05 at four degrees of freedom
    assert float(found.double().mean()) == pytest.approx(0.8, abs=0.02)
