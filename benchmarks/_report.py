"""benchmarks/REPORT.md and its plots, from the stored rows alone; the same rows give the same files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlattn_fast.benchmarks import _pictures
from vlattn_fast.benchmarks._choice import OURS, declared

Row = dict[str, Any]

COLUMNS = ("variant", "p20", "p50", "p80 (ms)", "peak MiB", "error", "of bound", "of floor", "calls")
RIVALS = ("reference", "reference compiled", "FlexAttention", "published", "maps stored, one backward")
SUMMARY = """The table compares our fastest backend with each rival: *2.00x* means that the rival takes twice as long.
*reference* is the formula in eager mode, *reference compiled* the formula under torch.compile, *published* the procedure as its
authors run it. *of bound* is our time over that of the bound: plain SDPA of the same shape, or a model without an explanation or
a loss. This ratio is below 1 where an operator does less work than SDPA, or is faster than torch's SDPA. *MiB* is the peak memory
that a call adds, and *of a rival at least* the smallest peak of a rival.
"""
SETTINGS = """The table has a column for each machine and setting: our time over that of the bound, and the time of the fastest
rival over ours.
"""
HOST = """The table has the time of Python and torch in a call of one short head, in microseconds above that of
F.scaled_dot_product_attention, with the goal in brackets. The columns of Triton leave launches out; in the columns of *cpu* the
kernels run on a few hundred numbers. `python -m vlattn_fast.benchmarks host` measures these times.
"""
INTRODUCTION = """## How it was measured

`make report` writes this page from the rows in `benchmarks/results/`, and `make bench` measures them. The newest row of each
variant is shown.

- Variants run in turns in one process; on a CPU each variant of `task_explain_models` has a process of its own. p20, p50 and p80
  are percentiles over single calls, and *calls* is their number. On a GPU, events time a call behind queued work that hides the
  host.
- *cuda*, *triton*, *sdpa* and *streaming* are backends of this package. *reference* is the formula with whole maps in eager mode.
  *published* is the procedure as its authors run it.
- *peak MiB*: the peak memory that one call adds, by torch's allocator on a GPU and by the process's resident set on a CPU.
- *error*: the largest error of any output or compared gradient over its largest magnitude, against the formula in float64 on a
  part of the batch.
- *of bound*: p50 over the p50 of the bound. The bound, the variant in italics, is a yardstick and not a limit.
- *of floor*: p50 over the least time that an H200's rates allow (`_measure.py`), on an H200 only.
- CPU rows have fewer batches and heads (SCAN: fewer pairs; whole models: less depth and width). Each table names its sizes.
"""


def write(results: Path, out: Path) -> list[Path]:
    """Writes the report and the pictures of each file of rows; returns the paths."""
    paths = [path for path in sorted(results.glob("*.json")) if not path.stem.startswith("evaluation-")]  # have no costs
    stored = {path.stem: json.loads(path.read_text()) for path in paths}
    files = {name: latest for name, rows in stored.items() if (latest := newest(rows))}
    out.parent.mkdir(parents=True, exist_ok=True)
    parts, written = ["# Measurements\n"], [out]
    for name, rows in files.items():
        settings = _by_setting(rows)
        first, *rest = settings
        parts.append(f"## {first}\n")
        parts.append(_summary(settings[first]))
        best = [row for row in _best(settings[first]) if not row["is_bound"] and not _is_scaling(row)]
        written.append(_pictures.draw_rivals(best, results / f"{name}.png", first))
        parts.append(f"![Median time over that of the bound]({os.path.relpath(written[-1], out.parent)})\n")
        if rest:
            parts.append(_settings(settings))
        if scaling := [row for row in settings[first] if _is_scaling(row)]:
            written.append(_pictures.draw_scaling(_best(scaling), results / f"{name}-scaling.png", first))
            parts.append(f"![Time and memory over the length]({os.path.relpath(written[-1], out.parent)})\n")
    parts.extend(_host([row for rows in stored.values() for row in rows if "host" in row]))
    out.write_text("\n".join([*parts, INTRODUCTION, *_tables([row for rows in files.values() for row in rows])]))
    return written


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each setting, benchmark, workload, dtype and variant, for the last sizes only."""
    latest: dict[Any, Row] = {}
    sizes = {}
    for row in rows:
        if "benchmark" in row:  # rows that tests store in the same folder have none
            latest[_key(row), row["variant"]] = row
            sizes[_key(row)] = row["sizes"]
    return [row for row in latest.values() if row["sizes"] == sizes[_key(row)]]


def _key(row: Row) -> tuple[str, ...]:
    return _setting(row), row["benchmark"], row["workload"], row["dtype"]


def _setting(row: Row) -> str:
    if _on_gpu(row):
        return str(row["device"])
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    return ", ".join(filter(None, (row["device"], row.get("instructions"), threads)))


def _by_setting(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each setting; the setting with most rows comes first, and the newest first among equals."""
    settings: dict[str, list[Row]] = {}
    for row in rows:
        settings.setdefault(_setting(row), []).append(row)
    return dict(sorted(settings.items(), key=lambda item: (len(item[1]), max(row["time"] for row in item[1])), reverse=True))


def _is_scaling(row: Row) -> bool:
    return str(row["benchmark"]).startswith("scaling/")


def _by_benchmark(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """The rows with a time, by variant; tables of operators and tasks only."""
    tables: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if "p50_us" in row:
            tables.setdefault(_key(row), {})[row["variant"]] = row
    return tables


def _fastest(variants: Mapping[str, Row], names: Iterable[str]) -> Row | None:
    return min((variants[name] for name in names if name in variants), key=lambda row: row["p50_us"], default=None)


def _best(rows: Sequence[Row]) -> list[Row]:
    """Our fastest backend of each benchmark, under the package's name, the rivals and the bound."""
    best = []
    for variants in _by_benchmark(rows).values():
        if ours := _fastest(variants, OURS):
            best.append({**ours, "variant": _pictures.BEST})
        best.extend(row for name, row in variants.items() if name in RIVALS or row["is_bound"])
    return best


def _summary(rows: Sequence[Row]) -> str:
    """Our best backend against each rival, a line a benchmark."""
    tables = {key: table for key, table in _by_benchmark(rows).items() if not key[1].startswith("scaling/")}
    rivals = [name for name in RIVALS if any(name in variants for variants in tables.values())]
    lines = [_line(("benchmark", "our best", "ms", *rivals, "of bound", "MiB", "of a rival at least"))]
    lines.append(_line(["---", "---", *["---:"] * (len(rivals) + 4)]))
    for key, variants in tables.items():
        ours = _fastest(variants, OURS)
        if ours is None:
            continue
        times = (f"{variants[name]['p50_us'] / ours['p50_us']:.2f}x" if name in variants else "" for name in rivals)
        peaks = [variants[name]["peak_bytes"] for name in rivals if name in variants and variants[name]["peak_bytes"]]
        memory = [f"{x / 2**20:.1f}" if x else "" for x in (ours["peak_bytes"], min(peaks, default=0))]
        of_bound = "" if ours["ratio_to_bound"] is None else f"{ours['ratio_to_bound']:.2f}"
        lines.append(_line((key[1], ours["variant"], f"{ours['p50_us'] / 1e3:.3f}", *times, of_bound, *memory)))
    return "\n".join([SUMMARY, *lines, ""])


def _settings(settings: Mapping[str, Sequence[Row]]) -> str:
    """Our time over the bound's on each machine in each setting, and how much longer the fastest rival takes."""
    tables = {name: {key[1:]: table for key, table in _by_benchmark(rows).items()} for name, rows in settings.items()}
    lines = [_line(("benchmark", *tables)), _line(["---", *["---:"] * len(tables)])]
    for key in next(iter(tables.values())):
        cells = []
        for table in tables.values():
            ours, rival = (_fastest(table.get(key, {}), names) for names in (OURS, RIVALS))
            bound = "" if ours is None or ours["ratio_to_bound"] is None else f"{ours['ratio_to_bound']:.2f}"
            cells.append(bound if ours is None or rival is None else f"{bound}, {rival['p50_us'] / ours['p50_us']:.2f}x")
        if all(cells):
            lines.append(_line((key[0], *cells)))
    return "\n".join([SETTINGS, *lines, ""])


def _host(rows: Sequence[Row]) -> list[str]:
    """The cost of a call beside its kernel: a line an operator, a column a backend and pass."""
    parts = []
    for setting, measured in _by_setting(rows).items():
        latest = {(row["host"], row["backend"], row["pass"]): row for row in measured}  # the newest row wins
        columns = list(dict.fromkeys(key[1:] for key in latest))
        lines = [_line(("call", *map(", ".join, columns))), _line(["---", *["---:"] * len(columns)])]
        for name in dict.fromkeys(key[0] for key in latest):
            lines.append(_line((name, *(_host_cell(latest.get((name, *column))) for column in columns))))
        origins = dict.fromkeys(_origin(row) for row in latest.values())
        parts.extend([f"## The host: {setting}\n", HOST, *lines, "", *origins, ""])
    return parts


def _host_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["host"] == "SDPA":
        return f"takes {row['p50_us']:.1f}"
    return f"{row['above_sdpa_us']:.1f}" + ("" if row["goal_us"] is None else f" ({row['goal_us']:.0f})")


def _tables(everything: Sequence[Row]) -> list[str]:
    parts = []
    names = list(dict.fromkeys([*(x.name for x in declared()), *(row["benchmark"] for row in everything)]))
    for kind, is_kind in (("GPU", _on_gpu), ("CPU", lambda row: not _on_gpu(row))):
        measured = {row["benchmark"] for row in everything if is_kind(row)}
        missing = [name for name in names if name not in measured]
        if len(missing) == len(names):
            parts.append(f"On a {kind}: not measured.\n")
        elif missing:
            parts.append(f"On a {kind} not measured: {', '.join(missing)}.\n")
    origins = list(dict.fromkeys(_origin(row) for row in everything))
    parts.extend(f"{n}. {origin}" for n, origin in enumerate(origins, 1))
    parts.append("")
    for name in names:
        tables: dict[tuple[str, ...], list[Row]] = {}
        for row in everything:
            if row["benchmark"] == name:
                tables.setdefault(_key(row), []).append(row)
        if tables:
            parts.append(f"### {name}\n")
            parts.extend(_table(rows, origins) for rows in tables.values())
    return parts


def _on_gpu(row: Row) -> bool:
    return not row["device"].startswith("CPU")


def _table(rows: Sequence[Row], origins: Sequence[str]) -> str:
    first = rows[0]
    sizes = ", ".join(f"{name} {size}" for name, size in first["sizes"].items())
    runs = sorted({origins.index(_origin(row)) + 1 for row in rows})
    about = f"{first['workload']}: {sizes}; {first['dtype']}; {_setting(first)}; run {', '.join(map(str, runs))}."
    lines = [about, "", _line(COLUMNS), _line(["---", *["---:"] * (len(COLUMNS) - 1)])]
    for row in rows:
        lines.append(_line([f"*{row['variant']}*" if row["is_bound"] else row["variant"], *_cells(row)]))
    return "\n".join([*lines, ""])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    if "not_run" in row:
        return [f"not run: {row['not_run']}".replace("|", "\\|"), *[""] * (len(COLUMNS) - 2)]
    peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20
    times = (f"{row[f'p{n}_us'] / 1e3:.3f}" for n in (20, 50, 80))
    figures = ((peak, ".1f"), (row["error"], ".1e"), (row["ratio_to_bound"], ".2f"), (row["ratio_to_floor"], ".2f"))
    return [*times, *("" if x is None else format(x, form) for x, form in figures), str(row["rounds"])]


def _origin(row: Row) -> str:
    versions = (f"{name} {version}" for name, version in row["versions"].items() if version)
    facts = (f"`{row['command']}`", f"commit {row['commit']}", *versions, row["time"])
    return f"{_setting(row)}: {', '.join(facts)}."
