"""Evaluates explanations of the shipped UNITER on DigitScenes: python -m vlattn_fast.lab.evaluation [--samples N] [--seeds S].

Image-text matching of true captions on test scans. Ground truth are the boxes of the two digits that a caption names.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.evaluation import TESTS, Evaluation, evaluate
from vlattn_fast.lab.scenes import CANVAS, digit_scenes
from vlattn_fast.lab.uniter import load_uniter

METHODS = ("gradient", "weighted", "weighted:norm", "weighted:equal", "rollout", "attention", "gradcam", "random")
RESULTS = Path("benchmarks/results/evaluation-digitscenes.json")


def log_odds(outputs: Any) -> Tensor:
    """(B): that the caption is true of the picture."""
    logits: Tensor = outputs.logits
    return logits[:, 1] - logits[:, 0]


def matching(samples: int, seed: int, batch: int = 50) -> Iterator[tuple[dict[str, Tensor], Any, list[Tensor]]]:
    """True captions of `samples` test scenes as `evaluate` takes them."""
    scenes = digit_scenes(samples, seed=seed)
    for start in range(0, samples, batch):
        rows = slice(start, start + batch)
        inputs = {name: value[rows] for name, value in scenes.inputs().items()}
        boxes = [corners[named] / CANVAS for corners, named in zip(scenes.boxes[rows], scenes.named[rows], strict=True)]
        yield inputs, log_odds, boxes


def run(samples: int, seed: int, methods: Sequence[str] = METHODS) -> Evaluation:
    """All tests on scenes drawn with one seed. A caption is accepted where its log odds are above 0."""
    model, _ = load_uniter()
    return evaluate(
        model,
        matching(samples, seed),
        methods=methods,
        tests=TESTS,
        accuracy=lambda outputs: (log_odds(outputs) > 0).float(),
        probability=lambda outputs: log_odds(outputs).sigmoid(),
        seed=seed,
    )


@torch.no_grad()
def accepted(samples: int, seeds: int) -> dict[str, Any]:
    """Share of the true captions that the model accepts: as they are, and without their first to fifth word."""
    model, _ = load_uniter()
    counts = torch.zeros(6, dtype=torch.float64)
    for seed in range(seeds):
        for inputs, _, _ in matching(samples, seed):
            for word in range(6):
                stays = [column for column in range(7) if column != word or word == 0]
                left = {name: inputs[name][:, stays] for name in ("input_ids", "attention_mask")}
                counts[word] += (log_odds(model(**{**inputs, **left})) > 0).sum()
    shares = (counts / (samples * seeds)).tolist()
    return {"whole": shares[0], "without_word": shares[1:]}


def over_seeds(runs: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """A row for each method, test and part: mean and standard deviation over the runs that have a value ("seeds" of them), and of
    the difference from "gradient" in the same run."""
    rows = []
    for first in runs[0].table:
        place = (first["method"], first["test"], first["part"])
        same = [next(r for r in e.table if (r["method"], r["test"], r["part"]) == place) for e in runs]
        pairs = [(row["value"], e.value("gradient", *place[1:])) for row, e in zip(same, runs, strict=True)]
        values = [one for one, _ in pairs if one is not None]
        row = {**dict(zip(("method", "test", "part"), place, strict=True)), "values": [one for one, _ in pairs]}
        row |= dict(zip(("value", "sd"), _mean(values), strict=True))
        differences = [one - two for one, two in pairs if one is not None and two is not None]
        row |= dict(zip(("minus_gradient", "minus_gradient_sd"), _mean(differences), strict=True))
        rows.append({**row, "seeds": len(values), **{key: sum(r[key] for r in same) for key in ("samples", "left_out")}})
    return rows


def _mean(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; None where there are too few for one."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return float(numbers.mean()) if values else None, float(numbers.std()) if len(values) > 1 else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlattn_fast.lab.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200, help="scenes for each seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    began = time.process_time()
    runs = [run(options.samples, seed) for seed in range(options.seeds)]
    table = over_seeds(runs)
    report = {
        "command": f"python -m vlattn_fast.lab.evaluation --samples {options.samples} --seeds {options.seeds}",
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "vlattn_fast": _version()},
        "threads": torch.get_num_threads(),
        "cpu_seconds": round(time.process_time() - began, 1),
        "facts": runs[0].facts,
        "accepted": accepted(options.samples, options.seeds),
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in report.items()]
    rows = ",\n".join(json.dumps(row) for row in table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("{\n" + ",\n".join(lines) + f',\n"rows": [\n{rows}\n]\n}}\n')
    for row in table:
        value, sd = ("-" if row[name] is None else f"{row[name]:.4f}" for name in ("value", "sd"))
        print(f"{row['method']:15}{row['test']:10}{row['part']:6}{value:>8} ± {sd}")
    print(f"{report['cpu_seconds']} s of processor time; wrote {options.out}")


def _commit() -> str:
    """The commit of the checkout that holds this file, "+dirty" where it differs from it in more than results."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        top = Path(git("rev-parse", "--show-toplevel"))
        if top / "vlattn_fast" / "lab" / Path(__file__).name != Path(__file__).resolve():
            return "unknown"
        changes = git("-C", str(top), "status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version() -> str | None:
    try:
        return metadata.version("vlattn_fast")
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
