"""The command line of the experiments: measures the cells that have no stored record, stores each record, then draws and prints.

An interrupted run continues: records of the same commit are kept, unless the checkout has uncommitted changes, no commit is
known, or models come from a directory, whose content may have changed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vlattn_fast._ground.checks import check_integer, check_writable
from vlattn_fast._ground.extras import with_progress
from vlattn_fast.measuring.provenance import commit, versions
from vlattn_fast.measuring.records import read_json, write_records
from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage, effects_table

NAMES = (
    *("scores", "congruence", "value", "weighted_relevancy", "robust", "flow", "pruning", "sinks", "hybrid"),
    *("planted_circuits", "distillation", "evidence", "recipes", "indexer", "known_heads", "twins"),
)
# Experiments that take trained models, and the trainings of these.
MODELS = {
    "value": "uniter and lxmert",
    "weighted_relevancy": "uniter, clip, vqa and captions",
    "flow": "vqa and captions",
    "sinks": "vqa and captions",
    "hybrid": "hybrid and transformer",
    "recipes": "transformer",
    "indexer": "transformer",
    "twins": "twin, in none, frame, word and lone",
}
RESULTS, FIGURES = Path("benchmarks/results"), Path("docs/experiments")


def experiment(name: str) -> Experiment:
    loaded: Experiment = import_module(f"vlattn_lab.experiments.{name}").EXPERIMENT
    return loaded


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlattn_lab.experiments", description="Repeats an experiment on DigitScenes.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="each has one thread")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}/experiment-NAME.json")
    parser.add_argument("--figures", type=Path, help=f"directory of the pictures; default: {FIGURES}, with --smoke that of --out")
    left = ", of ".join(f"{name}: {trainings}" for name, trainings in MODELS.items())
    parser.add_argument("--models", type=Path, help=f"directory whose folders 0, 1, ... hold what lab.train left, of {left}")
    parser.add_argument("--stored", action="store_true", help="measure nothing; draw and print the stored records")
    parser.add_argument("--smoke", action="store_true", help="everything once and short, to see that it runs")
    chosen = parser.parse_args(arguments)
    if chosen.smoke and chosen.out is None:
        parser.error("--smoke needs --out, so that it does not replace the records of a real run")
    if chosen.models is not None and chosen.name not in MODELS:
        parser.error(f"--models belongs to the experiments {', '.join(MODELS)} alone; got {chosen.name}")
    out = chosen.out or RESULTS / f"experiment-{chosen.name}.json"
    figures = chosen.figures or (out.parent if chosen.smoke else FIGURES)
    settings = Settings(chosen.seeds, chosen.smoke, chosen.models)
    try:
        for option in ("seeds", "processes"):
            check_integer(f"--{option}", getattr(chosen, option), low=1)
        for name, folder in (("--out", out.parent), ("--figures", figures)):
            check_writable(name, folder, folder=True)
        _stored(out, chosen.name, settings, commit())
    except ValueError as error:
        parser.error(str(error))
    loaded = experiment(chosen.name)
    if chosen.stored:
        report = json.loads(out.read_text())
        records = report.pop("rows")
        _write(out, report, records, loaded)
    else:
        records = run(chosen.name, settings, out, chosen.processes)
    for figure, draw in loaded.figures.items():
        draw(records).savefig(figures / f"{figure}.png", dpi=120, bbox_inches="tight")
    print(*loaded.tables(records), effects_table(loaded.effects(records)), f"wrote {out}", sep="\n\n")


def run(name: str, settings: Settings, out: Path, processes: int = 1) -> list[Record]:
    """All records of an experiment; records of this commit in `out` are kept, and `out` is written after each new record."""
    here = commit()
    stored = _stored(out, name, settings, here)
    records: list[Record] = []
    for number, stage in enumerate(experiment(name).stages):
        cells = stage.cells(settings, records)
        kept = [record for record in stored if record["stage"] == number and _cell(record, cells) is not None]
        done = [_cell(record, cells) for record in kept]
        missing = [cell for cell in cells if cell not in done]
        finished = list(kept)
        bar = with_progress(_measured(name, number, missing, settings, 1 if stage.alone else processes), name, total=len(missing))
        for cell, result, seconds in bar:
            finished.append({"stage": number, **cell, **result, "seconds": round(seconds, 1), "commit": here})
            _write(out, _facts(name, settings), records + finished)
        order = {json.dumps(cell): place for place, cell in enumerate(cells)}
        records += sorted(finished, key=lambda record: order[json.dumps(_cell(record, cells))])
    _write(out, _facts(name, settings), records, experiment(name))
    return records


def _cell(record: Record, cells: Sequence[Cell]) -> Cell | None:
    return next((cell for cell in cells if all(record.get(key) == value for key, value in cell.items())), None)


def _measured(
    name: str, number: int, cells: Sequence[Cell], settings: Settings, processes: int
) -> Iterator[tuple[Cell, dict[str, Any], float]]:
    """(cell, result, seconds) in the order in which cells end."""
    stage = experiment(name).stages[number]
    if stage.alone or processes == 1 or len(cells) < 2:
        for cell in cells:
            yield _measure(name, number, cell, settings)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for future in as_completed([pool.submit(_measure, name, number, cell, settings) for cell in cells]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _measure(name: str, number: int, cell: Cell, settings: Settings) -> tuple[Cell, dict[str, Any], float]:
    stage: Stage = experiment(name).stages[number]
    threads, began = torch.get_num_threads(), time.process_time()
    if not stage.alone:
        torch.set_num_threads(1)  # sums have the same order in every run
    try:
        return cell, stage.measure(cell, settings), time.process_time() - began
    finally:
        torch.set_num_threads(threads)


def _stored(out: Path, name: str, settings: Settings, here: str) -> list[Record]:
    keys, must = {"experiment", "smoke", "rows", "command"}, f"out must be a file of {name}"
    if not out.exists():
        return []
    report = read_json(out, lambda content: isinstance(content, dict) and keys <= content.keys(), must)
    if report["experiment"] != name or report["smoke"] != settings.smoke:
        raise ValueError(f"{must}, smoke={settings.smoke}; got {out} of {report['experiment']}")
    if here.endswith("+dirty") or here == "unknown" or settings.models is not None or " --models" in report["command"]:
        return []
    return [record for record in report["rows"] if record["commit"] == here]


def _facts(name: str, settings: Settings) -> dict[str, Any]:
    models = " --models MODELS" if settings.models else ""
    return {
        "experiment": name,
        "command": f"python -m vlattn_lab.experiments {name} --seeds {settings.seeds}{models}",
        "smoke": settings.smoke,
        "versions": versions("torch", "vlattn_fast"),
    }


def _write(out: Path, facts: dict[str, Any], records: Sequence[Record], complete: Experiment | None = None) -> None:
    """complete: the experiment, whose effects are stored, too, as all of its records are there."""
    facts = facts | {"cpu_seconds": round(sum(record["seconds"] for record in records), 1)}
    if complete is not None:
        facts["effects"] = [one._asdict() for one in complete.effects(records)]
    write_records(out, records, facts)
