"""The report of the benchmarks: which rows it shows, and its pictures."""

import json
import re
import struct
from pathlib import Path

import pytest

from tools.pages import report, report_pictures
from vlattn_fast.benchmarks import _choice, _records

DECLARED = _choice.declared()
ROOT = Path(__file__).parents[1]


def made_up(**changes):
    return {
        "benchmark": "attention_map/attention/clip",
        "workload": "CLIP",
        "sizes": {"B": 2, "N": 577},
        "dtype": "bfloat16",
        "variant": "triton",
        "is_bound": False,
        "p20_us": 1000.0,
        "p50_us": 1234.0,
        "p80_us": 1500.0,
        "host_p50_us": 20.0,
        "rounds": 50,
        "peak_bytes": 3 * 2**20,
        "memory_by": "",
        "error": 1.5e-3,
        "ratio_to_bound": 1.75,
        "share_of_limit": 0.4,
        "limit": "products",
        "device": "NVIDIA H200",
        "commit": "abc",
        "versions": {"torch": "2.13.0", "triton": None},
        "threads": 16,
        "command": "python -m vlattn_fast.benchmarks",
        "time": "2026-01-01T00:00:00Z",
        **changes,
    }


@pytest.mark.slow
def test_the_report_shows_the_newest_rows(tmp_path):
    pytest.importorskip("matplotlib")
    results, out = tmp_path / "results", tmp_path / "report.md"
    bound = made_up(variant="SDPA", is_bound=True, ratio_to_bound=1.0, error=None)
    failed = {key: x for key, x in made_up(variant="published").items() if not key.startswith(("p", "error", "ratio", "host"))}
    older = [made_up(variant="gone", sizes={"B": 1}), made_up(p50_us=9999.0)]
    rows = [*older, made_up(), bound, {**failed, "not_run": "out of memory"}]
    _records.append(rows, results / "h200.json")
    _records.append([{"part": "correctness", "passed": True}], results / "checks.json")
    _records.append([made_up(variant="reference compiled", p50_us=2468.0, peak_bytes=9 * 2**20)], results / "h200.json")
    report.write(results, out)
    text, plot = out.read_text(), (tmp_path / "report" / "h200.png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    # ours, its time, how much longer the one baseline takes, the time over the bound's, both peaks
    summary = text.split("## How it was measured")[0]
    assert "| attention_map/attention/clip | triton | 1.234 | 2.00x | 1.75 | 40 % products | 3.0 | 9.0 |" in summary
    assert "| triton | 1.000 | 1.234 | 1.500 | 0.020 | 3.0 | 1.5e-03 | 1.75 | 40 % products | 50 |" in text
    assert "| *SDPA* |" in text and "9.999" not in text and "gone" not in text
    assert "not run: out of memory" in text
    assert "On a CPU: not measured." in text and "On a GPU not measured: score_attention/" in text
    origin = "1. NVIDIA H200: `python -m vlattn_fast.benchmarks`, commit abc, torch 2.13.0, 2026-01-01T00:00:00Z."
    assert origin in text and "CLIP: B 2, N 577; bfloat16; NVIDIA H200; run 1." in text
    assert "](report/h200.png)" in text
    report.write(results, out)
    assert (out.read_text(), (tmp_path / "report" / "h200.png").read_bytes()) == (text, plot)


def size_of(png):
    """Width and height in pixels."""
    return struct.unpack(">II", png.read_bytes()[16:24])


@pytest.mark.slow
def test_the_pictures_have_a_panel_for_each_operator(tmp_path, monkeypatch):
    """Not one strip: as many panels as operators, a line for each benchmark of an operator, and a shape that a screen shows."""
    pytest.importorskip("matplotlib")
    panels = {}
    draw = report_pictures._draw_panel
    monkeypatch.setattr(report_pictures, "_draw_panel", lambda *x: (panels.update({x[1]: sorted(x[2])}), draw(*x)))
    rows = [
        made_up(benchmark=benchmark.name, sizes=benchmark.workload.full, dtype=dtype, variant=variant, ratio_to_bound=ratio)
        for benchmark in DECLARED
        for dtype, variant, ratio in (("float32", "triton", 2.0), ("float32", "published", 7.0))
    ]
    (tmp_path / "h200.json").write_text(json.dumps(rows))
    _, baselines = report.write(tmp_path, tmp_path / "report.md")
    assert panels.keys() == {*_choice.MODULES}
    for module, lines in panels.items():
        assert len(lines) == sum(benchmark.name.startswith(f"{module}/") for benchmark in DECLARED)
    width, height = size_of(baselines)
    assert 1000 <= width <= 1800 and 0.3 <= height / width <= 1.2


def test_settings_of_one_machine_stand_side_by_side(tmp_path):
    """Rows of one thread do not replace those of two; the first setting stored opens the report."""
    pytest.importorskip("matplotlib")
    cpu = {"device": "CPU: one", "variant": "cpu", "threads": 2, "instructions": "AVX512"}
    rows = [made_up(**cpu), made_up(**cpu | {"variant": "published", "p50_us": 2468.0})]
    rows += [{**row, "threads": 1, "ratio_to_bound": 1.5} for row in rows]
    (tmp_path / "cpu.json").write_text(json.dumps(rows))
    report.write(tmp_path, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "## CPU: one, AVX512, 2 threads" in text
    assert "| benchmark | CPU: one, AVX512, 2 threads | CPU: one, AVX512, 1 thread |" in text
    assert "| attention_map/attention/clip | 1.75, 2.00x | 1.50, 2.00x |" in text


def test_a_sentence_stands_under_the_rows_that_it_is_of(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [made_up(variant=name, note="its tiles were not stored") for name in ("triton", "triton, graph")]
    _records.append([*rows, made_up(variant="SDPA", is_bound=True)], tmp_path / "h200.json")
    report.write(tmp_path, tmp_path / "report.md")
    table = (tmp_path / "report.md").read_text().split("### attention_map")[1]
    assert table.endswith("50 |\n\ntriton, triton, graph: its tiles were not stored\n")


def test_the_times_of_an_h100_are_stored():
    stored = report.newest(json.loads((ROOT / "benchmarks/results/h100-80gb-hbm3.json").read_text()))
    rows = {(row["benchmark"], row["variant"]): row for row in stored}
    layers = [f"relevancy_attention/gradient, forward+backward/{name}" for name in ("llava", "clip")]
    llava, clip = (rows[layer, "triton"]["p50_us"] / rows[layer, "SDPA"]["p50_us"] for layer in layers)
    for page in ("README.md", "docs/costs.md"):
        said = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert f"takes {clip:.2f} times (CLIP) and {llava:.2f} times (LLaVA-7B) as long as" in said, page


def test_operators_have_medians_and_worst_ratios(tmp_path):
    """Worked by hand: a bound of 10 ms, two benchmarks, and the faster of two baselines."""
    times = {"a": {"cpu": 5, "published": 20, "reference": 40}, "b": {"cpu": 15, "streaming": 30, "published": 30}}
    rows = [
        made_up(benchmark=f"maxsim/{name}", device="CPU: one", variant=variant, p50_us=ms * 1e3, ratio_to_bound=ms / 10)
        for name, variants in times.items()
        for variant, ms in {**variants, "SDPA": 10}.items()
    ]
    (tmp_path / "cpu.json").write_text(json.dumps(rows))
    assert "| `maxsim` | 1.00 (1.50) | 3.00 (2.00) |" in report.operators(tmp_path)


@pytest.mark.slow
def test_the_report_of_the_stored_rows_shows_every_benchmark(tmp_path):
    pytest.importorskip("matplotlib")
    results, out = _records.HERE / "results", tmp_path / "report.md"
    written = report.write(results, out)
    text = out.read_text(encoding="utf-8")
    stored = [row for path in results.glob("*.json") for row in json.loads(path.read_text()) if isinstance(row, dict)]
    headings = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]
    assert sorted(headings) == sorted({row["benchmark"] for row in stored if "benchmark" in row})
    assert re.findall(r"\]\((.+?)\)", text) == [str(path.relative_to(tmp_path)) for path in written[1:]] and len(written) == 3


def test_the_report_without_a_row(tmp_path):
    report.write(tmp_path, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "On a GPU: not measured." in text and "On a CPU: not measured." in text
