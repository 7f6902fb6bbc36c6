"""An extension of Python-Markdown: it turns formulas into MathML, and writes costs and counts from stored results into the pages.

A page then needs no script to show a formula, and its figures are always those of the stored rows. Zensical loads it by its
name in mkdocs.yml.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "results" / "cpu.json"
ROWS_OF_GPU = ROOT / "benchmarks" / "results" / "h100-80gb-hbm3.json"
FUZZED, EMULATED = ROOT / "tests" / "fuzz" / "results.json", ROOT / "tests" / "fuzz" / "emulated.json"
COST = re.compile(r"<!-- cost( on an H100)?: (.+?) -->")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def makeExtension(**_: Any) -> Any:  # the name that Python-Markdown calls
    from markdown.extensions import Extension  # the tests' environment has no Python-Markdown
    from markdown.postprocessors import Postprocessor
    from markdown.preprocessors import Preprocessor

    class Stored(Preprocessor):
        def run(self, lines: list[str]) -> list[str]:
            return with_stored("\n".join(lines)).split("\n")

    class Formulas(Postprocessor):
        def run(self, text: str) -> str:
            return FORMULA.sub(formula, text)

    class Pages(Extension):
        def extendMarkdown(self, md: Any) -> None:
            md.preprocessors.register(Stored(md), "stored", 25)  # before HTML, whose comments they replace
            md.postprocessors.register(Formulas(md), "formulas", 0)  # after all others

    return Pages()


def with_stored(markdown: str) -> str:
    """A page's text with tables in place of its comments."""
    with_costs = COST.sub(lambda match: (cost_on_gpu if match[1] else cost)(match[2].split()), markdown)
    return with_costs.replace("<!-- fuzz -->", fuzz()).replace("<!-- fuzz, emulated -->", fuzz_emulated())


def cost(stems: list[str]) -> str:
    """A table of median milliseconds and peak MiB: a line for each workload of these benchmarks, from its newest stored rows.

    The file has rows of several machines and settings. The table takes those of the setting that opens the report, or, if
    it has none of these benchmarks, of the one that measured them last.

    Raises:
        ValueError: no stored row belongs to these benchmarks.
    """
    stored = json.loads(ROWS.read_text(encoding="utf-8"))
    counts = Counter(map(_setting, stored))
    shown = _setting(max(stored, key=lambda row: (counts[_setting(row)], row["time"])))
    chosen = [row for row in stored if row["benchmark"].split("/")[0] in stems]
    if chosen and all(_setting(row) != shown for row in chosen):  # measured later, on another machine
        shown = _setting(max(chosen, key=lambda row: row["time"]))
    lines, first = _table([row for row in chosen if _setting(row) == shown], ROWS, stems, _cell)
    where = f"{', '.join(map(str, _setting(first)))} threads, torch {first['versions']['torch']}"
    dtype = "float32 unless a row says bfloat16"
    return "\n".join([*lines, "", f"Median ms / peak MiB of one call; {where}, {dtype}. The bound is in italics."])


def cost_on_gpu(stems: list[str]) -> str:
    """The same table of the rows of a GPU, with the time over that of the bound in place of memory."""
    stored = json.loads(ROWS_OF_GPU.read_text(encoding="utf-8"))
    shown = [
        row
        for row in stored
        if row["benchmark"].split("/")[0] in stems and not re.search(r", graph$|^SDPA |^reference$|^streaming$", row["variant"])
    ]  # of SDPA's kernels the one that torch takes
    lines, first = _table(shown, ROWS_OF_GPU, stems, _cell_of_gpu)
    where = f"{first['device']}, torch {first['versions']['torch']}, Triton {first['versions']['triton']}, {first['dtype']}"
    return "\n".join([*lines, "", f"Median ms of one call, in brackets over that of SDPA; {where}."])


def _table(
    chosen: list[dict[str, Any]], file: Path, stems: list[str], cell: Callable[[dict[str, Any] | None], str]
) -> tuple[list[str], dict[str, Any]]:
    """The lines of a table, and one of its rows."""
    if not chosen:
        raise ValueError(f"a cost comment must name benchmarks with rows in {file}; got {stems}")
    newest: dict[str, dict[str, dict[str, Any]]] = {}
    for row in chosen:
        newest.setdefault(row["benchmark"], {})[row["variant"]] = row
    rows = [row for variants in newest.values() for row in variants.values()]
    bounds = {row["variant"] for row in rows if row["is_bound"]}
    names = sorted(dict.fromkeys(row["variant"] for row in rows), key=lambda name: name in bounds)
    lines = [
        f"| row in `benchmarks/results/{file.name}` | {' | '.join(f'*{name}*' if name in bounds else name for name in names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    for benchmark, variants in newest.items():
        sizes = ", ".join(f"{name} {size}" for name, size in next(iter(variants.values()))["sizes"].items())
        lines.append(f"| {benchmark} ({sizes}) | {' | '.join(cell(variants.get(name)) for name in names)} |")
    return lines, rows[0]


def _setting(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["device"], row["instructions"].split(", ")[0], row["threads"]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row.get("p50_us") is None:
        return "not run" if row else ""
    return f"{row['p50_us'] / 1e3:.1f} / {row['peak_bytes'] / 2**20:.1f}"


def _cell_of_gpu(row: dict[str, Any] | None) -> str:
    if row is None or row.get("p50_us") is None:
        return "not run" if row else ""
    return f"{row['p50_us'] / 1e3:.2f} ({row['ratio_to_bound']:.2f})"


def fuzz() -> str:
    """A table of the counts of the stored fuzzer run."""
    if not FUZZED.exists():
        return "Not yet run."
    run = json.loads(FUZZED.read_text(encoding="utf-8"))
    backends = sorted({*run["compared"], *run["refused"]})
    lines = ["| backend | compared | not supported |", "| --- | ---: | ---: |"]
    lines += [f"| `{name}` | {run['compared'].get(name, 0):,} | {run['refused'].get(name, 0):,} |" for name in backends]
    compared, unsupported = sum(run["compared"].values()), sum(run["refused"].values())
    lines.append(f"| all {run['configurations']:,} | {compared:,} | {unsupported:,} |")
    worst = f"The worst error is {run['worst_ratio']:.2f} of what is allowed: `{run['worst']}`."
    return "\n".join([*lines, "", f"Failed: {len(run['failures'])}. {worst} Commit {run['commit']}."])


def fuzz_emulated() -> str:
    """A table of the stored runs on emulated GPUs, a line for each."""
    runs = json.loads(EMULATED.read_text(encoding="utf-8"))
    lines = [
        "| kernels | compared | not supported | failed | worst error, of what is allowed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        counts = sum(run["compared"].values()), sum(run["refused"].values()), len(run["failures"])
        numbers = [f"{count:,}" for count in counts] + [f"{run['worst_ratio']:.2f}"]
        lines.append(f"| `{run['backend']}`, {run['architecture']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def formula(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    tag, source = match[1], html.unescape(match[2]).strip()
    mathml = convert(source, display="inline" if tag == "span" else "block")
    if "\\" in re.sub(r"<[^>]*>", "", mathml):
        raise ValueError(f"latex2mathml does not know a command in this formula: {source}")
    return f'<{tag} class="arithmatex">{mathml}</{tag}>'
