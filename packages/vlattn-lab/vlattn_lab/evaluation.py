"""Evaluates explanations of the shipped models on DigitScenes: python -m vlattn_lab.evaluation [TASK] [--samples N].

Tasks: matching (UNITER, the default), clip (the dual encoder), vqa and captions (CLIPMapper), see `tasks`. With --add a stored
file gains the methods and tests that it lacks, measured on the same scenes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast import Evaluation, evaluate, explain
from vlattn_fast._ground.checks import check_integer, check_writable
from vlattn_fast.backends.reference.relevancy_residual import residual_weights
from vlattn_fast.interpret.evaluating.curves import BOTH, CURVES, PARTS
from vlattn_fast.interpret.evaluating.plan import INTERVENTION, RANDOM, CustomMethod
from vlattn_fast.interpret.evaluating.plan import TESTS as ALL_TESTS
from vlattn_fast.interpret.relevancy.methods.registry import published
from vlattn_fast.measuring.provenance import commit, fingerprint, version, versions
from vlattn_fast.measuring.records import grouped, markdown, read_json, write_records
from vlattn_fast.methods import Method, Weighted
from vlattn_fast.models import CLIPMapper
from vlattn_lab import rivals
from vlattn_lab.tasks import PLAIN, TASKS, Task, matching
from vlattn_lab.uniter import log_odds

RESULTS = Path("benchmarks/results")
TESTS = tuple(test for test in ALL_TESTS if test != INTERVENTION)  # which models of two towers cannot take


def methods_of(task: Task) -> dict[str, str | Method | CustomMethod]:
    """The methods and rivals of a task, by name; captum's methods only where captum is installed."""
    methods: dict[str, str | Method | CustomMethod] = {**dict(map(_in_published_form, task.methods)), **task.frozen}
    for kind in task.rivals:
        if kind != "CAPTUM" or version("captum") is not None:
            methods |= getattr(rivals, kind)
    return methods


def _in_published_form(method: str | Method) -> tuple[str, str | Method]:
    """A method of `evaluate` and its name in a table."""
    if method == RANDOM:
        return RANDOM, RANDOM
    made = published(method) if isinstance(method, str) else method
    return made.label, made


def run(
    task: Task,
    model: nn.Module,
    samples: int,
    seed: int,
    methods: Mapping[str, str | Method | CustomMethod],
    tests: Sequence[str] = TESTS,
) -> Evaluation:
    """Tests on scenes drawn with one seed."""
    read = {CURVES[test].measure: getattr(task, CURVES[test].measure) for test in tests if test in CURVES}
    items = task.items(model, samples, seed, task.batch)
    return evaluate(model, items, methods=methods, tests=tests, seed=seed, **read)


def whole(runs: Sequence[Evaluation]) -> float | None:
    """Accuracy of the whole inputs, over all runs; None where a run has none."""
    curves = [[curve for curve in run.curves if curve["test"] == "positive" and curve["part"] == "image"] for run in runs]
    first = [image_curves[0]["mean"][0] for image_curves in curves if image_curves]
    return sum(first) / len(first) if len(first) == len(runs) else None


def residual_shares(
    task: Task, model: nn.Module, samples: int, freeze: Sequence[str] = (), asked: nn.Module | None = None
) -> list[dict[str, Any]]:
    """The weight a of weighted relevancy's residual term by "contribution", a record for each attention of each tower, first to
    last: mean, 5th and 95th percentile over the tokens at which the score has a gradient. freeze: see `Weighted`. asked: the
    model whose captions are explained, if not `model`."""
    shares: dict[tuple[str, int], list[Tensor]] = {}
    for inputs, target, _ in task.items(model if asked is None else asked, samples, 0, task.batch):
        # by number of tokens, which differs between towers, then by memory, which stays theirs since `residual` is kept; in the
        # order of the last calls, since linked towers weigh a sum twice
        seen: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}

        def weighting(
            residual: Tensor, branch: Tensor, gradient: Tensor, seen: dict[int, dict[int, tuple[Tensor, Tensor]]] = seen
        ) -> tuple[Tensor, Tensor]:
            a, b = residual_weights(residual, branch, gradient, "contribution")
            same_size = seen.setdefault(residual.shape[1], {})
            same_size.pop(residual.data_ptr(), None)
            same_size[residual.data_ptr()] = residual, a[gradient.abs().amax(-1) > 0]
            return a, b

        explain(model, inputs, target=target, method=Weighted(weighting=weighting, freeze=freeze))
        for size, sums in seen.items():
            parts = [part for _, part in sums.values()]
            image = "image" if "pixel_values" in inputs else "joint"
            # the backward pass goes from the last layer to the first; between towers layers come in the order in which they ran
            ordered = parts if isinstance(model, CLIPMapper) else parts[::-1]
            for number, part in enumerate(ordered, 1):
                shares.setdefault(("text" if size == inputs["input_ids"].shape[1] else image, number), []).append(part)
    records = []
    for (tower, number), parts in sorted(shares.items()):
        tokens = torch.cat(parts).double()
        low, high = tokens.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        facts = {"tower": tower, "attention": number, "tokens": len(tokens)}
        records.append({**facts, "mean": float(tokens.mean()), "p5": low, "p95": high})
    return records


@torch.no_grad()
def accepted(samples: int, seeds: int) -> dict[str, Any]:
    """Share of the true captions that the model accepts: whole captions, and captions without their first to fifth word."""
    model = TASKS["matching"].load()
    counts = torch.zeros(6, dtype=torch.float64)
    for seed in range(seeds):
        for inputs, _, _ in matching(model, samples, seed):
            for word in range(6):
                stays = [column for column in range(7) if column != word or word == 0]
                left = {name: inputs[name][:, stays] for name in ("input_ids", "attention_mask")}
                counts[word] += (log_odds(model(**{**inputs, **left})) > 0).sum()
    shares = (counts / (samples * seeds)).tolist()
    return {"whole": shares[0], "without_word": shares[1:]}


def over_seeds(runs: Sequence[Evaluation], stored: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """A record for each method, test and part: mean and standard deviation of the value and of its difference from PLAIN in the
    same run, over the "seeds" runs that have a value. Records of earlier runs over the same scenes, `stored`, come first."""
    counts = ("samples", "left_out")
    seen = {_place(record): {key: record[key] for key in ("values", *counts)} for record in stored}
    for place in map(_place, runs[0].table if runs else ()):
        same = [next(record for record in run.table if _place(record) == place) for run in runs]
        seen[place] = {"values": [one["value"] for one in same], **{key: sum(one[key] for one in same) for key in counts}}
    records = []
    for (method, test, part), facts in seen.items():
        plain = seen[PLAIN, test, part]["values"]
        values = [one for one in facts["values"] if one is not None]
        less, less_sd = _mean([one - two for one, two in zip(facts["values"], plain, strict=True) if None not in (one, two)])
        mean, sd = _mean(values)
        record = {"method": method, "test": test, "part": part, "values": facts["values"], "value": mean, "sd": sd}
        record |= {"minus_gradient": less, "minus_gradient_sd": less_sd, "seeds": len(values)}
        records.append(record | {key: facts[key] for key in counts})
    return records


def _place(record: Mapping[str, Any]) -> tuple[str, str, str]:
    return record["method"], record["test"], record["part"]


def lacking(rows: Sequence[Mapping[str, Any]], methods: Iterable[str]) -> dict[tuple[str, ...], list[str]]:
    """The methods that lack some tests in these records, by the tests that they lack."""
    have = {(row["method"], row["test"]) for row in rows}
    missing = grouped(methods, lambda method: tuple(test for test in TESTS if (method, test) not in have))
    return {tests: names for tests, names in missing.items() if tests}


def _mean(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; None where too few values are there."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return float(numbers.mean()) if values else None, float(numbers.std()) if len(values) > 1 else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlattn_lab.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", choices=list(TASKS), default="matching")
    parser.add_argument("--samples", type=int, default=200, help="scenes for each seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--add", action="store_true", help="measure the methods and tests that the stored file lacks")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULTS}/evaluation-TASK.json")
    options = parser.parse_args(arguments)
    name, out = options.task, options.out or RESULTS / f"evaluation-{options.task}.json"
    try:
        for option in ("samples", "seeds"):
            check_integer(f"--{option}", getattr(options, option), low=1)
        check_writable("--out", out.parent, folder=True)
        check_writable("--out", out)
    except ValueError as error:
        parser.error(str(error))
    task = TASKS[name]
    began = time.process_time()
    model, methods = task.load(), methods_of(task)
    if "CAPTUM" in task.rivals and version("captum") is None:
        print("captum is not installed, so its methods are left out (pip install captum)")
    report: dict[str, Any] = {
        "command": f"python -m vlattn_lab.evaluation {name} --samples {options.samples} --seeds {options.seeds}",
        "commit": commit(),
        "versions": versions("torch", "transformers", "captum", "vlattn_fast"),
        "weights": fingerprint(model),
        "threads": torch.get_num_threads(),
    }
    if options.add:
        added = {key: report[key] for key in ("commit", "versions", "threads")}
        report = _stored(out, report, parser.error)
        table = report.pop("rows")
        groups = lacking(table, methods)
    else:
        table, groups = [], {TESTS: list(methods)}
    for tests, names in groups.items():
        chosen = {method: methods[method] for method in names}
        runs = [run(task, model, options.samples, seed, chosen, tests) for seed in range(options.seeds)]
        table = over_seeds(runs, table)
        report["facts"] = _joined(report.get("facts"), runs[0].metadata)
    order = {key: place for place, key in enumerate((*methods, *TESTS, *PARTS, BOTH))}
    table.sort(key=lambda record: [order.get(key, -1) for key in _place(record)])
    if options.add:
        added |= {"tests": {method: list(tests) for tests, names in groups.items() for method in names}}
        report["added"] = [*report.get("added", []), added | {"cpu_seconds": round(time.process_time() - began, 1)}]
    else:
        report["accuracy_of_whole"] = whole(runs)
        report["residual_shares"] = residual_shares(task, model, options.samples)
        if name == "matching":
            report["accepted"] = accepted(options.samples, options.seeds)
        report["cpu_seconds"] = round(time.process_time() - began, 1)
    write_records(out, table, report)
    print(*tables(table), f"{time.process_time() - began:.1f} s of processor time; wrote {out}", sep="\n\n")


def _stored(path: Path, report: Mapping[str, Any], refuse: Callable[[str], Any]) -> dict[str, Any]:
    """The file of an earlier run of the same command on the same weights."""
    stored: Any = {}
    try:
        stored = read_json(path, lambda content: isinstance(content, dict) and "rows" in content, "--out must hold a stored run")
    except ValueError as error:
        refuse(str(error))
    for key in ("command", "weights"):
        if stored[key] != report[key]:
            refuse(f"--add must be used with the {key} of the stored run, {stored[key]}; got {report[key]}")
    return stored


def _joined(one: Mapping[str, Any] | None, two: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of two runs: methods and tests of both."""
    if one is None:
        return dict(two)
    lists = {key: list(dict.fromkeys([*one[key], *two[key]])) for key in ("methods", "tests")}
    return {**two, **lists, "steps": {**one["steps"], **two["steps"]}}


_NONE: Mapping[str, Any] = dict.fromkeys(("value", "sd", "minus_gradient", "minus_gradient_sd"))


def tables(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown tables for the image, the text and both: every method, and how weights and ablations change the methods; – for a
    test that a method lacks."""
    stored = {_place(record): record for record in records}
    methods = list(dict.fromkeys(record["method"] for record in records))
    for part in (*PARTS, BOTH):
        tests = [test for test in TESTS if (PLAIN, test, part) in stored]
        shown = [m for m in methods if any(stored.get((m, test, part), _NONE)["value"] is not None for test in tests)]
        less = [m for m in shown if m.startswith(("gradient", "weighted")) and m != PLAIN]
        if shown:
            lines = [
                [f"`{m}`", *(_cell(stored.get((m, test, part), _NONE), "value", "sd", test == "sanity") for test in tests)]
                for m in shown
            ]
            yield markdown(["method", *tests], lines)
        if less:
            compared = [test for test in tests if test != "sanity"]
            keys = "minus_gradient", "minus_gradient_sd", True
            lines = [[f"`{m}`", *(_cell(stored.get((m, test, part), _NONE), *keys) for test in compared)] for m in less]
            yield markdown([f"less `{PLAIN}`", *compared], lines)


def _cell(record: Mapping[str, Any], mean: str, deviation: str, signed: bool) -> str:
    value, sd = record[mean], record[deviation]
    return "–" if value is None or sd is None else f"{value:{'+' if signed else ''}.3f} ± {sd:.3f}"


if __name__ == "__main__":
    main()
