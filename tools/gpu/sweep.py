"""Sweeps tiles, warps and stages of the hottest launches: checks and times one configuration after another.

Tiles and warps near those of kernels/_configurations.py come first, then the stages of the three fastest. A configuration is
timed only where it keeps the tolerance rule, and replaces the present configuration where it saves SAVES of the time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

import torch

from tools.gpu import launches, production
from vlattn_fast.checking import verify
from vlattn_fast.checking.tolerance import settle
from vlattn_fast.kernels import _configurations

Config = dict[str, int]
Row = dict[str, Any]
WARPS, FASTEST = (4, 8), 3
LEAST_TILE, MOST_KEYS = 16, 128
SAVES = 0.03
FAILURES = ("OutOfResources", "CompilationError", "PTXASError")


def is_of_a_configuration(error: Exception) -> bool:
    """Whether it says that a configuration does not fit or does not compile, which is a result. The last is a fault of Triton."""
    return type(error).__name__ in FAILURES or "PassManager::run failed" in str(error)


def label(config: Config | None) -> str:
    return "as it is" if config is None else " ".join(f"{name}={x}" for name, x in config.items())


def candidates(default: Config, most: int, rows: Sequence[Row], stages: Sequence[int]) -> list[Config]:
    """The configurations to try next, from the rows of this launch; empty at the end."""
    known = [row["config"] for row in rows]
    tiles = [{"BLOCK_Q": size} for size in _about(default["BLOCK_Q"], most)]
    if "BLOCK_KV" in default:
        tiles = [{**tile, "BLOCK_KV": size} for tile in tiles for size in _about(default["BLOCK_KV"], MOST_KEYS)]
    first = [{**default, **tile, "num_warps": warps} for tile in tiles for warps in WARPS]
    if ahead := [config for config in first if config not in known]:
        return ahead
    fastest: list[Config] = []
    for row in sorted((row for row in rows if "us" in row), key=lambda row: row["us"]):
        without = {name: x for name, x in row["config"].items() if name != "num_stages"}
        if without not in fastest:
            fastest.append(without)
    second = [{**default, **without, "num_stages": count} for without in fastest[:FASTEST] for count in stages]
    return [config for config in second if config not in known]


def _about(size: int, most: int) -> list[int]:
    return [x for x in (size // 2, size, 2 * size) if LEAST_TILE <= x <= most]


def winner(default: Config, rows: Sequence[Row]) -> Config:
    """The fastest configuration; the default where none saves enough."""
    timed = {label(row["config"]): row for row in rows if "us" in row}
    if not timed:
        return default
    best, now = min(timed.values(), key=lambda row: row["us"]), timed.get(label(default))
    return best["config"] if now is None or best["us"] < (1 - SAVES) * now["us"] else default


class Recorder(dict[str, Config]):
    """Replaces `OVERRIDES`: gives `config` to launches whose facts begin with `prefix`, and records these facts."""

    def __init__(self, prefix: str, config: Config | None) -> None:
        self.prefix, self.config = prefix, config
        self.asked: dict[str, Config] = {}  # facts, and the configuration that the default rule gives

    def __bool__(self) -> bool:
        return True

    def get(self, key: str, default: Any = None) -> Any:
        if not f"{key} ".startswith(f"{self.prefix} "):
            return default
        self.asked[key] = dict(default)
        return dict(default) if self.config is None else self.config


class _Launch:
    """A hot launch: its problems, its call, and its compiled configurations."""

    def __init__(self, hot: production.Hot, device: str) -> None:
        self.hot, self.device = hot, device
        name, sizes = hot.check
        case = production.case_named(hot.operator, name, sizes)
        cases = production.causal_too(case)
        self.problems = [verify._Problem(each, torch.bfloat16, device, truth_on=device) for each in cases]
        self.call = production.call_of(hot.benchmark, "triton", device)


_now: list[_Launch] = []  # the launch that is swept


def tried(item: dict[str, Any], device: str) -> Row:
    """The row of one configuration; `config` None stands for the kernel's default."""
    hot, config = production.HOTTEST[item["hot"]], item["config"]
    if not _now or _now[0].hot is not hot:
        _now.clear()
        if device == "cuda":
            torch.cuda.empty_cache()
        _now.append(_Launch(hot, device))
    launch = _now[0]
    recorder = Recorder(hot.key, config)
    before, _configurations.OVERRIDES = _configurations.OVERRIDES, recorder
    try:
        row = _measured(launch, device)
    except Exception as error:
        if not is_of_a_configuration(error):
            raise
        row = {"passed": None, "not_run": f"{type(error).__name__}: {error}"[:300]}
    finally:
        _configurations.OVERRIDES = before
    if len(recorder.asked) > 1:
        raise RuntimeError(f"the case and the timed call must ask with the same facts; got {sorted(recorder.asked)}")
    ((key, default),) = recorder.asked.items()
    return {"launch": hot.name, "key": key, "config": default if config is None else config, "is_default": config is None, **row}


def _measured(launch: _Launch, device: str) -> Row:
    assert launch.call is not None, f"{launch.hot.benchmark} does not run on triton"
    enough = 1 if device == "cpu" else 4
    pools = [pool for each in launch.problems for pool in settle(each.runs("triton"), enough=lambda: enough).values()]
    worst = max(pools, key=lambda pool: pool.ratio())
    ratio = production.ratio_of(worst)
    if ratio > 1.0:
        return {"passed": False, "ratio": ratio, "problem": str(worst)}
    timed = [one for one in launches.launched(launch.call) if one[0] in launch.hot.kernels]
    us = launches.seconds([start for _, start, _ in timed], device) * 1e6
    facts = {name: [getattr(kernel, f"n_{name}", None) for _, _, kernel in timed] for name in ("regs", "spills")}
    return {"passed": True, "ratio": ratio, "us": round(us, 3), **facts}


def every_candidate(default: Config, most: int, stages: Sequence[int]) -> list[Config]:
    """All that `candidates` may ask for, whatever is fast."""
    first = [default, *candidates(default, most, [], stages)]
    all_of = [{**config, "num_stages": count} for config in first for count in stages]
    return [config for n, config in enumerate(all_of) if config not in all_of[:n]]


def compiled(item: dict[str, Any], device: str) -> Row:
    """Compiles a batch into Triton's cache on the disk, in processes side by side."""
    pool = new_pool(item["processes"])
    shares = [item["batch"][first :: item["processes"]] for first in range(item["processes"])]
    ahead = [pool.submit(compile_some, item["hot"], share, item["architecture"]) for share in shares if share]
    for one in ahead:
        one.exception()  # the launch of this configuration raises it again, and stores it
    pool.shutdown()
    return {"passed": True}


def new_pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=get_context("fork"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Ends this process with its parent: after a crash, pool processes would hold the output open, and run.py would wait."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def compile_some(hot: int, configs: Sequence[Config | None], architecture: int) -> list[Config]:
    """Compiles one launch in these configurations for a GPU, on CPU tensors: with the sizes and masks of the timed call, and with
    those of the check. All remaining launches of these calls do nothing. Returns the launch's own configuration for None.
    """
    chosen, defaults = production.HOTTEST[hot], []
    name, sizes = chosen.check
    cases = production.causal_too(production.case_named(chosen.operator, name, sizes))
    with for_a_gpu(architecture, chosen.kernels):
        # with so many heads no kernel divides a head's keys among programs, as on a device with the whole batch
        call = production.call_of(chosen.benchmark, "triton", "cpu", batch=16)
        assert call is not None
        for config in configs:
            recorder = Recorder(chosen.key, config)
            _configurations.OVERRIDES = recorder
            try:
                call()
                for case in cases:
                    verify._run(case, case.in_dtype(torch.bfloat16), "triton")
            except Exception as error:
                if not is_of_a_configuration(error):
                    raise
            if config is None:
                defaults += recorder.asked.values()
        _configurations.OVERRIDES = {}
    return defaults


@contextmanager
def for_a_gpu(architecture: int, kernels: Sequence[str] = ()) -> Iterator[None]:
    """Inside, launches of these kernels, by default of all, compile for a GPU of this architecture, and run nothing."""
    from triton.runtime.jit import JITFunction

    from tools.compiled.device import pretend
    from vlattn_fast.dispatch.call import OnCpu, run_gpu_kernels_on_cpu

    run_gpu_kernels_on_cpu(OnCpu(divmod(architecture, 10)))
    _configurations.TARGET = f"sm_{architecture}"
    pretend(architecture)
    run = JITFunction.run

    def only_compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if not kernels or self.fn.__name__ in kernels:
            run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = only_compiled
    try:
        yield
    finally:
        JITFunction.run = run
