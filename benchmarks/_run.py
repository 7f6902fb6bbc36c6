"""What is declared, how it is chosen by name, and a whole run: measured, printed, appended. Serves every door to it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from vlattn_fast.benchmarks._measure import RESULTS, Benchmark, Measurement, append, device_name, provenance, slug

MODULES = (
    "score_attention",
    "relevancy_attention",
    "attention_map",
    "attention_statistics",
    "congruence_loss",
    "stacked_cross_attention",
    "task_explain_clip",
    "task_explain_decoder",
    "task_cacr_training",
    "task_scan_similarity",
)
OURS = ("cuda", "triton", "streaming")


def declared() -> list[Benchmark]:
    modules = (importlib.import_module(f"{__package__}.{name}") for name in MODULES)
    return [benchmark for module in modules for benchmark in module.BENCHMARKS]


def choose(names: Sequence[str]) -> list[Benchmark]:
    """Those named: by file, file/what or in full; all by default. ValueError with the list for an unknown name."""
    everything = declared()
    for name in names:
        if not any(_answers(benchmark, name) for benchmark in everything):
            known = "\n  ".join([*MODULES, *(benchmark.name for benchmark in everything)])
            raise ValueError(f"there is no benchmark {name!r}; there are\n  {known}")
    return [benchmark for benchmark in everything if not names or any(_answers(benchmark, name) for name in names)]


def _answers(benchmark: Benchmark, name: str) -> bool:
    return f"{benchmark.name}/".startswith(f"{name}/")


def check_device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda; got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees none")
    return torch.device(name)


def run(
    names: Sequence[str] = (),
    *,
    device: str = "cpu",
    quick: bool = False,
    rounds: int | None = None,
    out: Path | None = None,
    compiled: bool = True,
    command: str = "",
) -> bool:
    """Measures, prints and adds to `out`, a JSON file or a folder for <device>.json; False where one of our backends failed."""
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    place, benchmarks = check_device(device), choose(names)
    folder = out or RESULTS
    path = folder if folder.suffix == ".json" else folder / f"{slug(place)}.json"
    print(f"{device_name(place)}, {torch.get_num_threads()} CPU threads; rows go to {path}", flush=True)
    passed, origin = True, {"device": device_name(place), **provenance(command)}
    for benchmark in benchmarks:
        rows = Measurement(benchmark, place, quick=quick, rounds=rounds, compiled=compiled).run()
        rows = [{**row, **origin} for row in rows]
        show(rows)
        append(rows, path)
        passed &= not any("not_run" in row and row["variant"] in OURS for row in rows)
        if place.type == "cuda":
            torch.cuda.empty_cache()
    return passed


def show(rows: Iterable[dict[str, Any]]) -> None:
    for n, row in enumerate(rows):
        if n == 0:
            sizes = ", ".join(f"{name} {size}" for name, size in row["sizes"].items())
            print(f"\n{row['benchmark']}  ({sizes}, {row['dtype']})")
            titles = ("p20 ms", "p50 ms", "p80 ms", "MiB", "error", "of bound", "of floor")
            print(f"  {'variant':28}" + "".join(f"{title:>10}" for title in titles))
        print(f"  {row['variant']:28}{_figures(row)}", flush=True)


def _figures(row: dict[str, Any]) -> str:
    if "not_run" in row:
        return f"  not run: {row['not_run']}"
    times = "".join(f"{row[f'p{n}_us'] / 1e3:10.3f}" for n in (20, 50, 80))
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    ratios = ("" if row[name] is None else f"{row[name]:.2f}" for name in ("ratio_to_bound", "ratio_to_floor"))
    return (times + "".join(f"{x:>10}" for x in (peak, error, *ratios))).rstrip()
