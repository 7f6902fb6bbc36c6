"""A whole run: benchmarks measured, printed, stored."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vlattn_fast._ground.origin import device_name
from vlattn_fast.benchmarks._choice import choose
from vlattn_fast.benchmarks._formula import OURS
from vlattn_fast.benchmarks._measure import Measurement
from vlattn_fast.benchmarks._records import RESULTS, append, check_path, provenance, slug
from vlattn_fast.measuring.records import number

COLUMNS = """
p20, p50, p80: percentiles of the time of a call. host: p50 of the time until a call for a GPU returns.
MiB: what a call adds to memory at its peak.
error: the largest error over the largest magnitude, against the formula in float64.
of bound: p50 over that of the bound, marked *: plain SDPA, or a model without what is measured.
of limit: the least time that the machine's rates allow, over p50, and the rate that is reached first (_rates.py).
"""


def check_device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda; got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu if torch finds no GPU; got 'cuda'")
    return torch.device(name)


def run(
    names: Sequence[str] = (),
    *,
    device: str = "cpu",
    quick: bool = False,
    rounds: int | None = None,
    out: Path | None = None,
    compiled: bool = True,
    variants: Sequence[str] | None = None,
    command: str = "",
) -> bool:
    """Measures, prints and stores; returns False where a backend of this package failed.

    Records go to `out`, a JSON file or a folder for <device>.json, by default benchmarks/results. A quick run stores none by
    default, since its sizes differ from the report's. The progress goes to stderr. `variants`: only these, of benchmarks that
    have them.
    """
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    place = check_device(device)
    benchmarks = choose(names, place.type)
    folder = RESULTS if out is None and not quick else out
    path = folder if folder is None or folder.suffix == ".json" else folder / f"{slug(place)}.json"
    if path is not None:
        check_path(path)
    rows_go = "records are not stored (--out stores them)" if path is None else f"records go to {path}"
    print(f"{device_name(place)}, {torch.get_num_threads()} CPU threads; {rows_go}\n{COLUMNS}", flush=True)
    passed, seen, origin, start = True, set[str](), {"device": device_name(place), **provenance(command)}, time.perf_counter()
    for done, benchmark in enumerate(benchmarks):
        print(_progress(done, len(benchmarks), time.perf_counter() - start, benchmark.name), file=sys.stderr, flush=True)
        try:
            if benchmark.isolated is not None and place.type == "cpu" and not quick:
                records = benchmark.isolated(benchmark.name, variants, rounds=rounds)
            else:
                records = Measurement(benchmark, place, quick=quick, rounds=rounds, compiled=compiled, only=variants).run()
        except KeyboardInterrupt:
            kept = "" if path is None else f"; {path} keeps the others' records"
            left = " ".join(one.name for one in benchmarks[done:])
            print(f"\nstopped in {benchmark.name}{kept}. To go on, name what is left: {left}", file=sys.stderr, flush=True)
            raise
        records = [{**record, **origin} for record in records]
        show(records)
        seen |= {record["variant"] for record in records}
        if path is not None:
            append(records, path)
        passed &= not any("not_run" in record and record["variant"] in OURS for record in records)
        if place.type == "cuda":
            torch.cuda.empty_cache()
    if unknown := set(variants or ()) - seen:
        print(f"\nvariants must be of a benchmark; none of these has {', '.join(sorted(unknown))}", file=sys.stderr)
    print(f"\n{len(benchmarks)} benchmarks in {_clock(time.perf_counter() - start)}", file=sys.stderr, flush=True)
    return passed and not unknown


def _progress(done: int, count: int, elapsed: float, name: str) -> str:
    """The line in front of a benchmark; the mean time of finished benchmarks estimates the time left."""
    left = f", about {_clock(elapsed / done * (count - done))} left" if done else ""
    return f"\n[{done + 1} of {count}; {_clock(elapsed)} elapsed{left}] {name}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def show(records: Iterable[dict[str, Any]]) -> None:
    for n, record in enumerate(records):
        if n == 0:
            sizes = ", ".join(f"{name} {size}" for name, size in record["sizes"].items())
            print(f"\n{record['benchmark']}  ({sizes}, {record['dtype']})")
            titles = ("p20 ms", "p50 ms", "p80 ms", "host ms", "MiB", "error", "of bound")
            print(f"  {'variant':28}" + "".join(f"{title:>10}" for title in titles) + f"{'of limit':>19}")
        mark = " *" if record["is_bound"] else ""
        cells = [f"  not run: {record['not_run']}"] if "not_run" in record else [f"{one:>10}" for one in figures(record)]
        limit = f"{share_of_limit(record):>19}"
        print(f"  {record['variant'] + mark:28}{''.join(cells)}{limit}".rstrip(), flush=True)


def figures(record: dict[str, Any]) -> list[str]:
    """The numbers of a record with a time: milliseconds, the host's on a GPU, MiB, error, and p50 over that of the bound."""
    times = [f"{record[f'p{n}_us'] / 1e3:.3f}" for n in (20, 50, 80)]
    host, peak = record.get("host_p50_us"), record["peak_bytes"]
    host, peak = None if host is None else host / 1e3, None if peak is None else peak / 2**20
    return [
        *times,
        number(host, ".3f"),
        number(peak, ".1f"),
        number(record["error"], ".1e"),
        number(record["ratio_to_bound"], ".2f"),
    ]


def share_of_limit(record: dict[str, Any]) -> str:
    """As "43 % products"; empty in rows from before it was measured."""
    share = record.get("share_of_limit")
    return "" if share is None else f"{share:.0%} {record['limit']}".replace("%", " %")
