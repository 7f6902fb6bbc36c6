"""Candidates of launches: chosen by the estimate, compiled before they are timed, and only the fastest is checked."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers import programs
from tools.gpu import launches, production, tiles
from vlattn_fast.checking.tolerance import Errors

ROOT = Path(__file__).resolve().parents[2]
DOT = {"BLOCK_Q": 64, "BLOCK_KV": 64, "num_warps": 4, "num_stages": 2}
HOT = next(hot for hot in production.HOTTEST if hot.name == "score_attention forward dot D64")
WHOLE = next(hot for hot in production.HOTTEST if hot.kernel == "forward_whole")
# what Triton compiles a launch for, ahead and then as it is timed and checked; ends with 1 where something was not compiled ahead
COMPILED = """
import torch
from triton.runtime.jit import JITFunction
from tools.gpu import production, tiles
from vlattn_fast.checking import verify

empty = torch.empty
torch.randn = torch.rand = lambda *shape, generator=None, **options: empty(*shape, **options)  # no kernel runs: any numbers do

def note(kernel, *args, grid, warmup, **kwargs):
    if kernel.fn.__name__ in hot.kernels:
        seen.append(str(kernel.device_caches[90][-1](*args, **kwargs)[1]))

JITFunction.run = note
tiles.usage = None  # nothing is compiled here
by_name = {hot.name: number for number, hot in enumerate(production.HOTTEST)}
for name in ("score_attention backward_kv dot D128", "relevancy_attention step D64"):
    hot, seen = production.HOTTEST[by_name[name]], []
    with tiles.overridden(hot.key, None), tiles.for_a_gpu(90, hot.kernels):
        call, cases = tiles._calls(by_name[name])
        call()
        for case in cases:
            verify._run(case, case.in_dtype(torch.bfloat16), "triton")
    ahead, seen = set(seen), []
    production.call_of(hot.benchmark, "triton", "cpu", batch=32)()
    for case in production.causal_too(production.case_named(hot.operator, *hot.check)):
        verify._run(case, case.in_dtype(torch.bfloat16), "triton")
    assert len(set(seen)) > 1 and set(seen) == ahead, (hot.key, ahead, seen)
"""


@pytest.mark.slow
def test_what_is_timed_and_what_is_checked_is_compiled_ahead() -> None:
    done = programs.run(COMPILED)
    assert done.returncode == 0, done.stderr


def test_candidates_lie_near_the_present_tiles() -> None:
    """With fewer or more rows, warps and stages; no warps repeat rows of a product, and the present configuration comes first."""
    near = tiles.near(DOT, HOT)
    assert near[0] == DOT and len({tiles.label(config) for config in near}) == len(near) == 27
    assert {config["BLOCK_Q"] for config in near} == {64, 128} and {config["BLOCK_KV"] for config in near} == {32, 64, 128}
    assert all(config["BLOCK_Q"] >= 16 * config["num_warps"] for config in near)
    whole = {"BLOCK_Q": 64, "num_warps": 4, "num_stages": 2}  # a tile has all keys
    assert all(config.keys() == whole.keys() for config in tiles.near(whole, WHOLE))
    with_ahead = tiles.near({**DOT, "AHEAD": 1}, HOT)
    assert with_ahead[0]["AHEAD"] == 1 and {config["AHEAD"] for config in with_ahead[1:]} == {0}
    one_warp = {"BLOCK_Q": 16, "BLOCK_KV": 32, "num_warps": 1, "num_stages": 3}
    assert {config["num_warps"] for config in tiles.near(one_warp, HOT)} >= {1, 2}


def compiled(config: dict[str, int], registers: int = 128, spills: int = 0, shared: int = 50_000) -> dict[str, Any]:
    numbers = {"registers": registers, "spills": spills, "shared": shared, "warps": config["num_warps"]}
    return {"key": "k", "config": config, **numbers}


def test_the_estimate_orders_what_fits() -> None:
    three = {**DOT, "num_stages": 3}
    rows = [compiled(DOT, shared=150_000), compiled(three), compiled(DOT, shared=300_000), compiled(DOT, spills=400)]
    order = tiles.ranked(HOT, rows, 90)
    assert [row["programs"] for row in order] == [4, 1, 4] and order[0]["config"] == three and order[2]["spills"] == 400
    assert order[0]["estimate"] < order[1]["estimate"] < order[2]["estimate"]
    unknown = tiles.ranked(WHOLE, rows, 90)  # what spills least, then what has more warps on an SM
    assert [row["programs"] for row in unknown] == [4, 1, 4] and "estimate" not in unknown[0]


def planned(monkeypatch: pytest.MonkeyPatch, present: dict[str, int]) -> list[dict[str, Any]]:
    """The candidates where all configurations compile to the same."""
    checked: list[dict[str, int] | None] = []

    def compile_some(
        number: int, configs: list[dict[str, int] | None], architecture: int, as_checked: bool
    ) -> list[dict[str, Any]]:
        (checked if as_checked else []).extend(configs)
        return [compiled(present if config is None else config) for config in configs]

    pool = SimpleNamespace(
        submit=lambda task, *arguments: SimpleNamespace(result=lambda: task(*arguments)), shutdown=lambda: None
    )
    monkeypatch.setattr(tiles, "new_pool", lambda processes: pool)
    monkeypatch.setattr(tiles, "compile_some", compile_some)
    made = tiles.plan(production.HOTTEST.index(HOT), 90, 2)["candidates"]
    assert sorted(map(str, checked)) == sorted(str(row["config"]) for row in made)  # as they are checked, only these
    return made


def test_candidates_have_products_ahead_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for present in (DOT, {**DOT, "AHEAD": 1}):
        made = planned(monkeypatch, present)
        configs = [row["config"] for row in made]
        assert configs[0] == present and len(made) <= 1 + tiles.BEST + tiles.AHEAD
        assert {config.get("AHEAD", 0) for config in configs} == {0, 1}
        assert len({tiles.label({"AHEAD": 0, **config}) for config in configs}) == len(configs)


def test_candidates_are_kept_for_their_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiles, "PLANS", tmp_path / "tiles")
    assert tiles.kept(0, ["a", "3.6.0", 90]) is None
    tiles.keep(0, ["a", "3.6.0", 90], {"passed": True, "candidates": [compiled(DOT)]})
    kept = tiles.kept(0, ["a", "3.6.0", 90])
    assert kept is not None and kept["candidates"] == [compiled(DOT)]
    assert tiles.kept(0, ["b", "3.6.0", 90]) is None and tiles.kept(1, ["a", "3.6.0", 90]) is None


class Timed:
    """In place of a device: times by the tiles, the results of the check, and what was checked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: list[float], ratio: float = 0.5) -> None:
        self.checked: list[dict[str, int]] = []
        monkeypatch.setattr(production, "call_of", lambda *_: lambda: None)
        monkeypatch.setattr(launches, "launched", lambda call: [("_forward_kernel", lambda: None, None)])
        monkeypatch.setattr(launches, "in_turns", lambda every, device: [us / 1e6 for us in times[: len(every)]])
        monkeypatch.setattr(tiles, "checked", self.check)
        self.ratio = ratio

    def check(self, hot: production.Hot, config: dict[str, int], device: str) -> dict[str, Any]:
        self.checked.append(config)
        return {"passed": self.ratio <= 1, "ratio": self.ratio}


CANDIDATES = [compiled(DOT), compiled({**DOT, "num_stages": 3}, spills=8), compiled({**DOT, "BLOCK_KV": 32})]


@pytest.mark.parametrize("times, best", [([100.0, 90.0, 95.0], 1), ([100.0, 98.0, 99.0], 0), ([100.0, 120.0, 80.0], 2)])
def test_the_fastest_is_checked_if_it_saves_enough(monkeypatch: pytest.MonkeyPatch, times: list[float], best: int) -> None:
    timed = Timed(monkeypatch, times)
    item = {"item": HOT.name, "hot": production.HOTTEST.index(HOT), "candidates": CANDIDATES}
    row = tiles.tried(item, "cpu")
    rows = row.pop("candidates")
    won = CANDIDATES[best]["config"]
    assert (row["winner"], row["best_us"], row["present_us"]) == (won, times[best], times[0])
    assert row["changed"] is (best != 0) and timed.checked == ([won] if best else [])
    assert row["passed"] is (True if best else None)
    assert [one["us"] for one in rows] == times and [one["rank"] for one in rows] == [0, 1, 2]
    assert rows[1]["item"] == f"k: {tiles.label(CANDIDATES[1]['config'])}" and rows[1]["spills"] == 2  # words
    json.dumps([row, rows], allow_nan=False)


def test_a_candidate_that_does_not_fit_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    Timed(monkeypatch, [100.0, 50.0])
    failing = iter((None, RuntimeError("PassManager::run failed\nThe backend 'triton' failed."), None))

    def launched(call: Any) -> Any:
        if error := next(failing):
            raise error
        return [("_forward_kernel", lambda: None, None)]

    monkeypatch.setattr(launches, "launched", launched)
    item = {"item": HOT.name, "hot": production.HOTTEST.index(HOT), "candidates": CANDIDATES}
    row = tiles.tried(item, "cpu")
    assert row["winner"] == CANDIDATES[2]["config"] and "PassManager" in row["candidates"][1]["not_run"]
    assert not tiles.is_of_a_configuration(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_winner_that_gives_nan_has_a_row_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no infinity, which the ratio of such errors is."""
    wrong = Errors()
    wrong.mismatch = "NaN where the formula is finite"
    monkeypatch.setattr(tiles, "settle", lambda *_, **__: {"output": wrong})
    row = tiles.checked(HOT, DOT, "cpu")
    assert not row["passed"] and json.loads(json.dumps(row, allow_nan=False))["ratio"] > 1
