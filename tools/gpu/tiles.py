"""Which tiles, warps and stages make a launch fast: times candidates by themselves, and checks the fastest.

    python -m tools.gpu.run tiles [--select REGEX]    make gpu PARTS=tiles

The candidates of a launch are its present configuration, the BEST of those near it by the estimate of tile_times.py, and the same
with products ahead where the kernel has them. All of them are compiled before one is timed, in processes side by side, or on
another machine (ahead.py): build/tiles/ has them with what the compiler said. They are timed in turns. Only the fastest is
compared with the formula, once, and only where it saves SAVES of the time. Then it goes to kernels/configurations.json.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from tools.compiled.table import programs, usage
from tools.compiled.tile_times import Config, Tile, cycles, label, repeats
from tools.gpu import launches, production
from tools.gpu.production import Hot
from tools.gpu.session import ROOT, sources
from vlattn_fast.benchmarks._launches import Launch
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example
from vlattn_fast.checking.tolerance import settle
from vlattn_fast.kernels import _configurations

Row = dict[str, Any]
PLANS = ROOT / "build" / "tiles"
BEST, AHEAD = 6, 3  # candidates beside the present configuration, and how many of them have products ahead, too
LEAST_TILE, MOST_KEYS = 16, 128
SAVES = 0.03
FAILURES = ("OutOfResources", "CompilationError", "PTXASError")


def is_of_a_configuration(error: Exception) -> bool:
    """Whether it says that a configuration does not fit or does not compile, which is a result. The last is a fault of Triton."""
    return type(error).__name__ in FAILURES or "PassManager::run failed" in str(error)


class Recorder(dict[str, Config]):
    """Replaces `OVERRIDES`: gives `config` to launches whose facts begin with `prefix`, and records these facts."""

    def __init__(self, prefix: str, config: Config | None) -> None:
        self.prefix, self.config = prefix, config
        self.asked: dict[str, Config] = {}  # facts, and the present configuration

    def __bool__(self) -> bool:
        return True

    def get(self, key: str, default: Any = None) -> Any:
        if not f"{key} ".startswith(f"{self.prefix} "):
            return default
        self.asked[key] = dict(default)
        return dict(default) if self.config is None else self.config


@contextmanager
def overridden(prefix: str, config: Config | None) -> Iterator[Recorder]:
    before, _configurations.OVERRIDES = _configurations.OVERRIDES, Recorder(prefix, config)
    try:
        yield _configurations.OVERRIDES
    finally:
        _configurations.OVERRIDES = before


# --- which candidates: compiled, and in the order of the estimate ---


def near(present: Config, hot: Hot) -> list[Config]:
    """The present configuration, and tiles of half and of twice its sides with each number of warps and stages. Warps that repeat
    rows of a product were never fast."""
    tiles = [{"BLOCK_Q": size} for size in _about(present["BLOCK_Q"], hot.most)]
    if "BLOCK_KV" in present:
        tiles = [{**tile, "BLOCK_KV": size} for tile in tiles for size in _about(present["BLOCK_KV"], MOST_KEYS)]
    warps, ahead = (4, 8) if present["num_warps"] >= 4 else (1, 2, 4), {"AHEAD": 0} if "AHEAD" in present else {}
    configs = [
        {**present, **tile, "num_warps": count, "num_stages": stages, **ahead}
        for tile in tiles
        for count in warps
        for stages in hot.stages
    ]
    most = repeats(hot.kernel, present)
    return [present, *(config for config in configs if config != present and repeats(hot.kernel, config) <= most)]


def _about(size: int, most: int) -> list[int]:
    return [x for x in (size // 2, size, 2 * size) if LEAST_TILE <= x <= max(most, size)]


def ranked(hot: Hot, compiled: Sequence[Row], architecture: int) -> list[Row]:
    """What compiled and fits, the best by the estimate first. Kernels that it does not know: what spills least, and then has most
    warps on an SM."""
    rows = []
    for row in compiled:
        held = programs(row, f"sm_{architecture}")
        tile = Tile(row["config"], held, row["spills"] // 4)
        if held and hot.has_estimate:
            rows.append({**row, "programs": held, "estimate": round(cycles(hot.kernel, hot.size, tile), 4)})
        elif held:
            rows.append({**row, "programs": held})
    return sorted(rows, key=lambda row: (row.get("estimate", 0.0), row["spills"], -row["programs"] * row["warps"]))


def plan(number: int, architecture: int, processes: int, most: int | None = None) -> Row:
    """The candidates of a hot launch: compiles what lies near its present configuration, at most `most` of it."""
    hot = production.HOTTEST[number]
    pool = new_pool(processes)

    def compiled(configs: Sequence[Config | None], as_checked: bool = False) -> list[Row]:
        shares = [configs[first::processes] for first in range(processes)]
        parts = [pool.submit(compile_some, number, share, architecture, as_checked) for share in shares if share]
        return ranked(hot, [row for part in parts for row in part.result()], architecture)

    (present,) = compiled([None])
    configs = near(present["config"], hot)[1:most]
    candidates = [present, *compiled(configs)[:BEST]]
    if hot.has_ahead and most is None:
        twins = [{**row["config"], "AHEAD": 1 - row["config"].get("AHEAD", 0)} for row in candidates[:AHEAD]]
        candidates += compiled([config for config in twins if config not in [row["config"] for row in candidates]])
    compiled([row["config"] for row in candidates], as_checked=True)  # any of them may win
    pool.shutdown()
    return {"candidates": candidates, "of": 1 + len(configs)}


def compiled(item: dict[str, Any], device: str) -> Row:
    return {"passed": True, **plan(item["hot"], item["architecture"], item["processes"], item.get("most"))}


def keep(number: int, of: list[Any], made: Row) -> None:
    """Stores the candidates of a launch, for later calls and other machines."""
    PLANS.mkdir(parents=True, exist_ok=True)
    _file(number).write_text(json.dumps({"made_of": of, "candidates": made["candidates"]}))


def kept(number: int, of: list[Any]) -> Row | None:
    """The stored candidates of a launch; None if there are none of these sources, this Triton and this architecture."""
    made = json.loads(_file(number).read_text()) if _file(number).exists() else {}
    return made if made.get("made_of") == of else None


def _file(number: int) -> Path:
    return PLANS / f"{re.sub(r'[^a-z0-9]+', '-', production.HOTTEST[number].name.lower())}.json"


def made_of(architecture: int) -> list[Any]:
    return [sources(), version("triton"), architecture]


def new_pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=get_context("fork"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Ends this process with its parent: after a crash, pool processes would hold the output open, and run.py would wait."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def compile_some(number: int, configs: Sequence[Config | None], architecture: int, as_checked: bool) -> list[Row]:
    """Compiles one launch in these configurations for a GPU, on CPU tensors: with the sizes and masks of the timed call or, as it
    is checked, with those of the check. None stands for the present configuration. A row for each that compiles."""
    hot, rows = production.HOTTEST[number], []
    with for_a_gpu(architecture):
        call, cases = _calls(number)
    checks = [functools.partial(verify._run, case, case.in_dtype(torch.bfloat16), "triton") for case in cases]
    for config in configs:
        seen: list[Row] = []
        with overridden(hot.key, config) as recorder, for_a_gpu(architecture, hot.kernels, seen.append):
            try:
                for run in checks if as_checked else [call]:
                    run()
            except Exception as error:
                if not is_of_a_configuration(error):
                    raise
                continue
        if len(recorder.asked) > 1:
            raise RuntimeError(f"the case and the timed call must ask with the same facts; got {sorted(recorder.asked)}")
        ((key, present),) = recorder.asked.items()
        rows.append({"key": key, "config": present if config is None else config, **seen[0]})
    return rows


@functools.lru_cache(maxsize=1)
def _calls(number: int) -> tuple[Callable[[], Any], list[Example]]:
    """The timed call, and the cases of the check. With so many heads no kernel divides a head's keys among programs, as on a
    device with the whole batch."""
    hot = production.HOTTEST[number]
    call = production.call_of(hot.benchmark, "triton", "cpu", batch=16)
    assert call is not None
    return call, production.causal_too(production.case_named(hot.operator, *hot.check))


@contextmanager
def for_a_gpu(architecture: int, kernels: Sequence[str] = (), see: Callable[[Row], Any] | None = None) -> Iterator[None]:
    """Inside, launches of these kernels, by default of all, compile for a GPU of this architecture, and run nothing. `see` gets
    what each takes of an SM."""
    from triton.runtime.jit import JITFunction

    from tools.compiled.device import pretend
    from vlattn_fast.dispatch.call import OnCpu, run_gpu_kernels_on_cpu

    run_gpu_kernels_on_cpu(OnCpu(divmod(architecture, 10)))
    _configurations.TARGET = f"sm_{architecture}"
    pretend(architecture)
    run = JITFunction.run

    def only_compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if not kernels or self.fn.__name__ in kernels:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            if see is not None and kernel is not None:
                see({**usage(kernel), "warps": kernel.metadata.num_warps})

    JITFunction.run = only_compiled
    try:
        yield
    finally:
        JITFunction.run = run


# --- their times, and the fastest ---


def tried(item: dict[str, Any], device: str) -> Row:
    """The row of a launch: its winner, and whether that is right. The times of its `candidates` have rows of their own."""
    hot, rows = production.HOTTEST[item["hot"]], [{**row, "rank": rank} for rank, row in enumerate(item["candidates"])]
    call = production.call_of(hot.benchmark, "triton", device)
    assert call is not None, f"{hot.benchmark} does not run on triton"
    timed: list[tuple[Row, list[Launch]]] = []
    for row in rows:
        try:
            with overridden(hot.key, row["config"]):
                launched = [one for one in launches.launched(call) if one[0] in hot.kernels]
        except Exception as error:
            if not is_of_a_configuration(error):
                raise
            row["not_run"] = f"{type(error).__name__}: {error}"[:300]
            continue
        timed.append((row, [launch for _, launch, _ in launched]))
    for (row, _), seconds in zip(timed, launches.in_turns([every for _, every in timed], device), strict=True):
        row |= {"us": round(seconds * 1e6, 3), "timed_by": launches.TIMED_BY[device]}
    best, key = winner(rows), rows[0]["key"]
    won = {"key": key, "winner": best["config"], "best_us": best["us"], "present_us": rows[0].get("us")}
    right = {"passed": None, "not_run": "the present one stays"} if best is rows[0] else checked(hot, best["config"], device)
    return {"launch": hot.name, "changed": best is not rows[0], **won, **right, "candidates": [_as_stored(row) for row in rows]}


def _as_stored(row: Row) -> Row:
    """As the rows of tiles that an H100 timed first, which tile_times.py reads: spills count words."""
    config, facts = row["config"], {name: x for name, x in row.items() if name not in ("key", "registers", "spills", "warps")}
    name = {"item": f"{row['key']}: {label(config)}", "passed": None, "is_default": row["rank"] == 0}
    return {**name, **facts, "regs": row["registers"], "spills": row["spills"] // 4}


def winner(rows: Sequence[Row]) -> Row:
    """The fastest; the present one, which is the first, unless another saves enough."""
    best = min((row for row in rows if "us" in row), key=lambda row: row["us"])
    now = rows[0].get("us")
    return best if now is None or best["us"] < (1 - SAVES) * now else rows[0]


def checked(hot: Hot, config: Config, device: str) -> Row:
    """Whether a configuration keeps the tolerance rule, causal and not."""
    cases = production.causal_too(production.case_named(hot.operator, *hot.check))
    problems = [verify._Problem(case, torch.bfloat16, device, truth_on=device) for case in cases]
    with overridden(hot.key, config):
        pools = [pool for each in problems for pool in settle(each.runs("triton"), enough=lambda: 1).values()]
    worst = max(pools, key=lambda pool: pool.ratio())
    ratio = production.ratio_of(worst)
    return {"passed": ratio <= 1.0, "ratio": ratio, "problem": "" if ratio <= 1.0 else str(worst)}
