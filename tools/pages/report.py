"""The report and its plots, from the stored records alone: a page of the site."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.pages import report_pictures
from vlattn_fast.benchmarks._choice import declared
from vlattn_fast.benchmarks._formula import OURS
from vlattn_fast.benchmarks._run import figures, share_of_limit
from vlattn_fast.measuring.records import grouped, markdown, number

Record = dict[str, Any]

COLUMNS = ("variant", "p20", "p50", "p80 (ms)", "host (ms)", "peak MiB", "error", "of bound", "of limit", "calls")
BASELINES = ("reference", "reference compiled", "FlexAttention", "published", "maps stored, one backward", "SDPA, dense mask")
SUMMARY = """The table compares our fastest backend with each baseline: *2.00x* means that the baseline takes twice as long.
*reference* is the formula in eager mode, *reference compiled* the formula under torch.compile, *published* the procedure as its
authors run it. *of bound* is our time over that of the bound: plain SDPA of the same shape, or a model without an explanation or
a loss. This ratio is below 1 where an operator does less work than SDPA, or is faster than torch's SDPA. *of limit* is the
share of what the machine can do (below). *MiB* is the peak memory
that a call adds, and *of a baseline at least* the smallest peak of a baseline.
"""
SETTINGS = """The table has a column for each machine and setting: our time over that of the bound, and the time of the fastest
baseline over ours.
"""
HOST = """The table has the time of Python and torch in a call of one short head, in microseconds above that of
F.scaled_dot_product_attention, with the goal in brackets. The columns of Triton leave launches out; in the columns of *cpu* the
kernels run on a few hundred numbers. `python -m tools.host` measures these times.
"""
INTRODUCTION = """## How it was measured

`make docs` writes this page from the rows in `benchmarks/results/`, and `make bench` measures them. The newest row of each
variant is shown.

- Variants run in turns in one process; on a CPU each variant of `task_explain_models` and of `task_long` has a process of its
  own. p20, p50 and p80 are percentiles over single calls, and *calls* is their number; it is one for the longer inputs of
  `task_long`, whose error is not taken. On a GPU, events time a call behind queued work that hides the host.
- *cuda*, *triton*, *sdpa* and *streaming* are backends of this package. *reference* is the formula with whole maps in eager mode.
  *published* is the procedure as its authors run it.
- *host*: p50 of the time until a call for a GPU returns, which is what Python, torch and the launches cost.
- *peak MiB*: the peak memory that one call adds, by torch's allocator on a GPU and by the process's resident set on a CPU.
- *error*: the largest error of any output or compared gradient over its largest magnitude, against the formula in float64 on a
  part of the batch.
- *of bound*: p50 over the p50 of the bound. The bound, the variant in italics, is a yardstick and not a limit.
- *of limit*: the least time that the machine's rates allow, over p50, and the rate that is reached first: *FMA*, *pairs* of
  bfloat16 or *AMX* tiles are operations of these instructions on registers, *products* those of torch's large matrix product or
  convolution in the same number type where they are more, or where a row is older than these loops; then bytes from memory, and
  torch's exponentials. A CPU's rates are measured in the same run; those of a GPU are constants: of an H100 and an H200 the
  data sheet's products in bfloat16 and bytes, and the special function units (`_rates.py`; older rows: torch's product and copy).
  A table's head has torch's product in the same run, too. A row is above 100 % where torch's product or exponential is slower
  than the processor allows, where the caches hold a part of the data, or where other programs took memory's rate while it was
  measured. Every benchmark counts the least work of its operator (`floor` in `_measure.py`); older rows of `congruence_loss`
  have no share, since it was counted too high. The rest goes to exponentials beside the products, the passes over tiles between
  them, and threads that wait for one another; a small call also pays for Python.
- A sentence under a table says what its rows do not carry.
- CPU rows have fewer batches and heads (SCAN: fewer pairs; whole models: less depth and width). Each table names its sizes.
"""


def write(results: Path, out: Path) -> list[Path]:
    """Writes the report, and in a folder beside it that has its name the pictures of each file of records; returns the paths."""
    paths = [path for path in sorted(results.glob("*.json")) if not path.stem.startswith("evaluation-")]  # have no costs
    stored = {path.stem: json.loads(path.read_text()) for path in paths}
    files = {name: latest for name, records in stored.items() if (latest := newest(records))}
    pictures = out.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    parts, written = ["# Measurements\n"], [out]
    for name, records in files.items():
        settings = _by_setting(records, [record for record in stored[name] if "benchmark" in record])
        first, *rest = settings
        parts.append(f"## {first}\n")
        parts.append(_summary(settings[first]))
        best = [record for record in _best(settings[first]) if not record["is_bound"]]
        written.append(report_pictures.draw_baselines(best, pictures / f"{name}.png", first))
        parts.append(f"![Median time over that of the bound]({written[-1].relative_to(out.parent)})\n")
        if rest:
            parts.append(_settings(settings))
    parts.extend(_host([record for records in stored.values() for record in records if "host" in record]))
    out.write_text("\n".join([*parts, INTRODUCTION, *_tables([record for records in files.values() for record in records])]))
    return written


def newest(records: Iterable[Record]) -> list[Record]:
    """The last record of each setting, benchmark, workload, dtype and variant, for the last sizes only."""
    latest: dict[Any, Record] = {}
    sizes = {}
    for record in records:
        if "benchmark" in record:  # records that tests store in the same folder have none
            latest[_key(record), record["variant"]] = record
            sizes[_key(record)] = record["sizes"]
    return [record for record in latest.values() if record["sizes"] == sizes[_key(record)]]


def _key(record: Record) -> tuple[str, ...]:
    return _setting(record), record["benchmark"], record["workload"], record["dtype"]


def _setting(record: Record) -> str:
    if _on_gpu(record):
        return str(record["device"])
    threads = f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    return ", ".join(filter(None, (record["device"], _instructions(record)[0], threads)))


def _instructions(record: Record) -> list[str]:
    """Those of torch's kernels, and which of this package's kernels follow them."""
    return str(record.get("instructions", "")).split(", ")


def _by_setting(records: Sequence[Record], every: Iterable[Record] = ()) -> dict[str, list[Record]]:
    """The records of each setting; the setting with most records of `every` (default: of these) comes first, and the newest first
    among equals."""
    settings, counts = grouped(records, _setting).items(), Counter(map(_setting, every or records))
    return dict(sorted(settings, key=lambda item: (counts[item[0]], max(x["time"] for x in item[1])), reverse=True))


def _by_benchmark(records: Sequence[Record]) -> dict[tuple[str, ...], dict[str, Record]]:
    """The records with a time, by variant; tables of operators and tasks only."""
    tables = grouped((record for record in records if "p50_us" in record), _key)
    return {key: {record["variant"]: record for record in table} for key, table in tables.items()}


def _fastest(variants: Mapping[str, Record], names: Iterable[str]) -> Record | None:
    return min((variants[name] for name in names if name in variants), key=lambda record: record["p50_us"], default=None)


def _best(records: Sequence[Record]) -> list[Record]:
    """Our fastest backend of each benchmark, under the package's name, the baselines and the bound."""
    best = []
    for variants in _by_benchmark(records).values():
        if ours := _fastest(variants, OURS):
            best.append({**ours, "variant": report_pictures.BEST})
        best.extend(record for name, record in variants.items() if name in BASELINES or record["is_bound"])
    return best


def _summary(records: Sequence[Record]) -> str:
    """Our best backend against each baseline, a line a benchmark."""
    tables = _by_benchmark(records)
    baselines = [name for name in BASELINES if any(name in variants for variants in tables.values())]
    head, lines = ("benchmark", "our best", "ms", *baselines, "of bound", "of limit", "MiB", "of a baseline at least"), []
    for key, variants in tables.items():
        ours = _fastest(variants, OURS)
        if ours is None:
            continue
        times = (f"{variants[name]['p50_us'] / ours['p50_us']:.2f}x" if name in variants else "" for name in baselines)
        peaks = [variants[name]["peak_bytes"] for name in baselines if name in variants and variants[name]["peak_bytes"]]
        memory = [f"{x / 2**20:.1f}" if x else "" for x in (ours["peak_bytes"], min(peaks, default=0))]
        bound = number(ours["ratio_to_bound"], ".2f")
        lines.append((key[1], ours["variant"], f"{ours['p50_us'] / 1e3:.3f}", *times, bound, share_of_limit(ours), *memory))
    return "\n".join([SUMMARY, markdown(head, lines, words=(0, 1)), ""])


def _settings(settings: Mapping[str, Sequence[Record]]) -> str:
    """Our time over the bound's on each machine in each setting, and how much longer the fastest baseline takes."""
    tables = {name: {key[1:]: table for key, table in _by_benchmark(records).items()} for name, records in settings.items()}
    lines = []
    for key in next(iter(tables.values())):
        cells = []
        for table in tables.values():
            ours, baseline = (_fastest(table.get(key, {}), names) for names in (OURS, BASELINES))
            bound = "" if ours is None else number(ours["ratio_to_bound"], ".2f")
            cells.append(bound if ours is None or baseline is None else f"{bound}, {baseline['p50_us'] / ours['p50_us']:.2f}x")
        if all(cells):
            lines.append((key[0], *cells))
    return "\n".join([SETTINGS, markdown(("benchmark", *tables), lines), ""])


def operators(results: Path = Path(__file__).parents[2] / "benchmarks" / "results") -> str:
    """A line for each operator in the setting that opens the CPU's report: medians over its benchmarks, and its worst one."""
    stored = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    setting, records = next(iter(_by_setting(newest(stored), stored).items()))
    ranges: dict[str, tuple[list[float], list[float]]] = {}
    for (_, benchmark, *_), variants in _by_benchmark(records).items():
        ours, baseline = (_fastest(variants, names) for names in (OURS, BASELINES))
        if ours and "SDPA" in variants and not benchmark.startswith("task_"):
            of_bound, of_ours = ranges.setdefault(benchmark.split("/")[0], ([], []))
            of_bound.append(ours["ratio_to_bound"])
            of_ours += [baseline["p50_us"] / ours["p50_us"]] if baseline else []
    lines = []
    for name, (of_bound, of_ours) in ranges.items():
        medians = statistics.median(of_bound), statistics.median(of_ours)
        lines.append((f"`{name}`", f"{medians[0]:.2f} ({max(of_bound):.2f})", f"{medians[1]:.2f} ({min(of_ours):.2f})"))
    table = markdown(("operator", "its time over SDPA's", "the fastest baseline's over its"), lines)
    return f"{table}\n\nMedians over the benchmarks, in brackets the worst one; {setting}."


def _host(records: Sequence[Record]) -> list[str]:
    """The cost of a call beside its kernel: a line an operator, a column a backend and pass."""
    parts = []
    for setting, measured in _by_setting(records).items():
        latest = {(record["host"], record["backend"], record["pass"]): record for record in measured}  # the newest record wins
        columns = list(dict.fromkeys(key[1:] for key in latest))
        names = dict.fromkeys(key[0] for key in latest)
        lines = [(name, *(_host_cell(latest.get((name, *column))) for column in columns)) for name in names]
        origins = dict.fromkeys(_origin(record) for record in latest.values())
        parts.extend([f"## The host: {setting}\n", HOST, markdown(("call", *map(", ".join, columns)), lines), "", *origins, ""])
    return parts


def _host_cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record["host"] == "SDPA":
        return f"takes {record['p50_us']:.1f}"
    return f"{record['above_sdpa_us']:.1f}" + ("" if record["goal_us"] is None else f" ({record['goal_us']:.0f})")


def _tables(everything: Sequence[Record]) -> list[str]:
    parts = []
    names = list(dict.fromkeys([*(x.name for x in declared()), *(record["benchmark"] for record in everything)]))
    for kind, is_kind in (("GPU", _on_gpu), ("CPU", lambda record: not _on_gpu(record))):
        measured = {record["benchmark"] for record in everything if is_kind(record)}
        missing = [one.name for one in declared("cuda" if kind == "GPU" else "cpu") if one.name not in measured]
        if not measured:
            parts.append(f"On a {kind}: not measured.\n")
        elif missing:
            parts.append(f"On a {kind} not measured: {', '.join(missing)}.\n")
    origins = list(dict.fromkeys(_origin(record) for record in everything))
    parts.extend(f"{n}. {origin}" for n, origin in enumerate(origins, 1))
    parts.append("")
    for name in names:
        if tables := grouped((record for record in everything if record["benchmark"] == name), _key):
            parts.extend([f"### {name}\n", *(_table(records, origins) for records in tables.values())])
    return parts


def _on_gpu(record: Record) -> bool:
    return not record["device"].startswith("CPU")


def _table(records: Sequence[Record], origins: Sequence[str]) -> str:
    first = records[0]
    sizes = ", ".join(f"{name} {size}" for name, size in first["sizes"].items())
    runs = sorted({origins.index(_origin(record)) + 1 for record in records})
    peaks = "".join(f"; {name} {peak:,} GFLOP/s" for name, peak in first.get("peaks", {}).items())
    about = f"{first['workload']}: {sizes}; {first['dtype']}; {_setting(first)}{peaks}; run {', '.join(map(str, runs))}."
    lines = [(f"*{record['variant']}*" if record["is_bound"] else record["variant"], *_cells(record)) for record in records]
    titles: Sequence[str] = COLUMNS
    if not _on_gpu(first):  # a call on a CPU has no other host
        at = COLUMNS.index("host (ms)")
        titles, lines = (*COLUMNS[:at], *COLUMNS[at + 1 :]), [(*line[:at], *line[at + 1 :]) for line in lines]
    by_note = grouped((record for record in records if "note" in record), lambda record: record["note"])
    notes = [f"{', '.join(one['variant'] for one in noted)}: {note}" for note, noted in by_note.items()]
    return "\n".join([about, "", markdown(titles, lines), "", *(line for note in notes for line in (note, ""))])


def _cells(record: Record) -> list[str]:
    if "not_run" in record:
        return [f"not run: {record['not_run']}".replace("|", "\\|"), *[""] * (len(COLUMNS) - 2)]
    return [*figures(record), share_of_limit(record), str(record["rounds"])]


def _origin(record: Record) -> str:
    versions = (f"{name} {version}" for name, version in record["versions"].items() if version)
    facts = (*_instructions(record)[1:], f"`{record['command']}`", f"commit {record['commit']}", *versions, record["time"])
    return f"{_setting(record)}: {', '.join(facts)}."
