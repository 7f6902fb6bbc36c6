"""benchmarks/REPORT.md and its plots, drawn from the stored rows and nothing else; the same rows give the same files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlattn_fast.benchmarks._run import declared

from vlattn_fast._extras import extra

Row = dict[str, Any]

COLUMNS = ("variant", "p20", "p50", "p80 (ms)", "peak MiB", "error", "of bound", "of floor", "calls")
INTRODUCTION = """# Measurements

Drawn by `make report` from the rows in `benchmarks/results/`; `make bench` measures. Of each variant the newest row is shown.

- Variants run in turns in one process; p20, p50 and p80 are of single calls; *calls* is how many. On a GPU a call is timed by
  events, behind a backlog that hides the host. *cuda*, *triton* and *streaming* are this package's backends; *reference* is the
  formula with whole maps in eager mode; *published* is the procedure as its authors run it.
- *peak MiB*: what one call adds at its peak. On a GPU it is torch's allocator, on a CPU the process's resident set.
- *error*: the largest error of any output or compared gradient, over its largest magnitude, against the formula in float64 on a
  part of the batch.
- *of bound*: p50 over that of the bound, the variant in italics. *of floor*: p50 over the least time that an H200's rates allow
  (`_measure.py`), on an H200 only.
- Sizes on a CPU are smaller in batch and heads (SCAN: pairs; whole models: depth and width); each table names its own.
"""


def write(results: Path, out: Path) -> list[Path]:
    """The report and one plot for each file of rows; the paths written."""
    stored = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    files = {name: found for name, rows in stored.items() if (found := newest(rows))}
    plots = [_plot(rows, results / f"{name}.png", name) for name, rows in files.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_text(files, {name: os.path.relpath(path, out.parent) for name, path in zip(files, plots, strict=True)}))
    return [out, *plots]


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each device, benchmark, workload, dtype and variant; other sizes than the last are left behind."""
    found: dict[Any, Row] = {}
    sizes = {}
    for row in rows:
        if "benchmark" in row:  # what tests store in the same folder has none
            found[_key(row), row["variant"]] = row
            sizes[_key(row)] = row["sizes"]
    return [row for row in found.values() if row["sizes"] == sizes[_key(row)]]


def _key(row: Row) -> tuple[str, ...]:
    return row["device"], row["benchmark"], row["workload"], row["dtype"]


def _text(files: dict[str, list[Row]], plots: dict[str, str]) -> str:
    everything = [row for rows in files.values() for row in rows]
    parts = [INTRODUCTION]
    for name, path in plots.items():
        parts.append(f"![Median time over that of the bound, {name}]({path})\n")
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
            parts.append(f"## {name}\n")
            parts.extend(_table(rows, origins) for rows in tables.values())
    return "\n".join(parts)


def _on_gpu(row: Row) -> bool:
    return not row["device"].startswith("CPU")


def _table(rows: Sequence[Row], origins: Sequence[str]) -> str:
    first = rows[0]
    sizes = ", ".join(f"{name} {size}" for name, size in first["sizes"].items())
    runs = sorted({origins.index(_origin(row)) + 1 for row in rows})
    about = f"{first['workload']}: {sizes}; {first['dtype']}; {first['device']}; run {', '.join(map(str, runs))}."
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
    others = ((peak, ".1f"), (row["error"], ".1e"), (row["ratio_to_bound"], ".2f"), (row["ratio_to_floor"], ".2f"))
    return [*times, *("" if x is None else format(x, form) for x, form in others), str(row["rounds"])]


def _origin(row: Row) -> str:
    versions = (f"{name} {version}" for name, version in row["versions"].items() if version)
    facts = (f"`{row['command']}`", f"commit {row['commit']}", *versions, f"CPU threads {row['threads']}", row["time"])
    return f"{row['device']}: {', '.join(facts)}."


def _plot(rows: Sequence[Row], path: Path, name: str) -> Path:
    """Bars from the bound's p50 to each variant's, one group a benchmark."""
    with extra("viz"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

    drawn = [row for row in rows if row.get("ratio_to_bound") and not row["is_bound"]]
    order = [x.name for x in declared()]
    drawn.sort(key=lambda row: order.index(row["benchmark"]) if row["benchmark"] in order else len(order))
    colors = {variant: f"C{n}" for n, variant in enumerate(sorted({row["variant"] for row in drawn}))}
    figure, axes = pyplot.subplots(figsize=(12, 2 + 0.17 * (len(drawn) + len({_key(row) for row in drawn}))))
    place, ticks, last = 0, [], None
    for row in drawn:
        if _key(row) != last:
            place, last = place + 1, _key(row)
            ticks.append((place, f"{row['benchmark']}, {row['dtype']}"))
        ratio = row["ratio_to_bound"]
        axes.barh(place, ratio - 1, left=1, height=0.9, color=colors[row["variant"]])
        axes.text(max(ratio, 1), place, f" {ratio:.2f}", va="center", fontsize=6)
        place += 1
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.set_ylim(place + 0.5, 0)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("median time over that of the bound (log scale); less is better")
    axes.set_title(rows[0]["device"] if rows else name)
    axes.legend(handles=[pyplot.Rectangle((0, 0), 1, 1, color=color, label=x) for x, color in colors.items()], fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return path
