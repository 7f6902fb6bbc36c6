"""The command line of the trainings."""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlattn_fast._ground.checks import check_integer, check_writable
from vlattn_fast.interpret.result.numbers.tensor_files import write_tensors
from vlattn_fast.measuring.provenance import commit
from vlattn_fast.measuring.records import read_json, write_records
from vlattn_lab import clip as clip_model
from vlattn_lab import hybrid as hybrid_model
from vlattn_lab import lxmert as lxmert_model
from vlattn_lab import mapper as mapper_model
from vlattn_lab import twins as twin_model
from vlattn_lab import uniter as uniter_model
from vlattn_lab.grids import CUES
from vlattn_lab.train import clip, hybrid, lxmert, mapper, twins, uniter
from vlattn_lab.weights import DATA

EVALUATED = {
    "uniter": 5000,
    "lxmert": 5000,
    "clip": 2000,
    "vqa": 1000,
    "captions": 1000,
    "hybrid": 400,
    "transformer": 400,
    "twin": 500,
}  # test scenes per measure


@dataclass(frozen=True)
class Training:
    """A training: its function, its default length, and the file of its weights.

    config: what the loader builds the model from; half: the weights are stored in float16.
    """

    weights: str
    steps: int
    train: Callable[..., nn.Module]
    evaluate: Callable[..., dict[str, Any]]
    config: Callable[[nn.Module], dict[str, Any]]
    half: bool = True


def _mapper(task: str, steps: int) -> Training:
    return Training(
        mapper_model.WEIGHTS[task],
        steps,
        functools.partial(mapper.train, task),
        functools.partial(mapper.evaluate, task),
        lambda model: {"clip": clip_model.CONFIG, "mapper": mapper_model.CONFIG[task]},
    )


def _beside_image(kind: str) -> Training:
    """The training of a captioner whose words and patches are one sequence."""
    train = functools.partial(hybrid.train, kind)
    return Training(hybrid_model.WEIGHTS[kind], hybrid.STEPS, train, hybrid.evaluate, lambda model: hybrid_model.config(kind))


TRAININGS = {
    "uniter": Training(
        uniter_model.WEIGHTS, 3000, uniter.train, uniter.evaluate, lambda model: asdict(uniter_model.CONFIG), half=False
    ),
    "lxmert": Training(lxmert_model.WEIGHTS, 2000, lxmert.train, lxmert.evaluate, lambda model: lxmert_model.CONFIG, half=False),
    "clip": Training(clip_model.WEIGHTS, 3600, clip.train, clip.evaluate, lambda model: clip_model.CONFIG),
    "vqa": _mapper("vqa", 5000),
    "captions": _mapper("captions", 3000),
    **{kind: _beside_image(kind) for kind in hybrid_model.WEIGHTS},
    "twin": Training(twin_model.WEIGHTS, twins.TWIN_STEPS, twins.train, twins.evaluate, lambda model: asdict(twin_model.CONFIG)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlattn_lab.train", description="Trains a model of DigitScenes.")
    named = parser.add_subparsers(dest="name", required=True)
    for name, training in TRAININGS.items():
        options = named.add_parser(name)
        for option, default in (("steps", training.steps), ("seed", 0), ("threads", 2)):
            options.add_argument(f"--{option}", type=int, default=default)
        options.add_argument("--output", type=Path, default=Path("digitscenes"), help="directory for weights and report")
        options.add_argument("--rows", type=Path, help="JSON list of records that the report is added to, without its config")
        if name in mapper_model.WEIGHTS:
            options.add_argument("--clip", type=Path, default=DATA, help="directory of the CLIP weights")
        if name in ("uniter", "lxmert"):
            options.add_argument("--validate", action="store_true", help="train on 'fit' and measure on 'validation' scans")
            options.add_argument("--recipe", choices=[*uniter.RECIPES], default="located", help="the losses")
        if name == "twin":
            options.add_argument("--cue", choices=CUES, help="what tells the answer without the objects; default: nothing does")
    chosen = parser.parse_args(arguments)
    try:
        for option, least in (("steps", 1), ("seed", 0), ("threads", 1)):
            check_integer(f"--{option}", getattr(chosen, option), low=least)
        check_writable("--output", chosen.output, folder=True)
        if chosen.rows is not None:
            check_writable("--rows", chosen.rows.parent, folder=True)
            _stored(chosen.rows)
    except ValueError as error:
        parser.error(str(error))
    run(chosen)


def run(chosen: argparse.Namespace) -> None:
    training, count = TRAININGS[chosen.name], EVALUATED[chosen.name]
    torch.set_num_threads(chosen.threads)
    more = {"clip": chosen.clip} if hasattr(chosen, "clip") else {}
    validate = getattr(chosen, "validate", False)
    measured, held = "test", {}
    if validate:
        measured, held, more["split"] = "validation", {"split": "validation"}, "fit"
    recipe = getattr(chosen, "recipe", "located")
    more |= {"recipe": recipe} if hasattr(chosen, "recipe") else {}
    more |= {"cue": chosen.cue} if chosen.name == "twin" else {}
    origin = commit()
    began, cpu_began = time.perf_counter(), time.process_time()
    model = training.train(chosen.steps, seed=chosen.seed, **more)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    state = model.state_dict()
    if training.half:
        state = {name: tensor.half() for name, tensor in state.items()}
        model.load_state_dict(state)  # the stored weights are measured
    chosen.output.mkdir(parents=True, exist_ok=True)
    weights = chosen.output / training.weights
    write_tensors(weights, state)  # before the measurements, which take long
    command = f"{chosen.name} --steps {chosen.steps} --seed {chosen.seed} --threads {chosen.threads}" + " --validate" * validate
    command += f" --recipe {recipe}" * (recipe != "located")
    command += f" --cue {chosen.cue}" if getattr(chosen, "cue", None) else ""
    if more.get("clip", DATA) != DATA:  # else the command would not repeat this training
        command += f" --clip {shlex.quote(str(chosen.clip))}"
    report = {
        "command": f"python -m vlattn_lab.train {command}",
        **{option: getattr(chosen, option) for option in ("steps", "seed", "threads")},
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "commit": origin,
        "torch": torch.__version__,
        "config": training.config(model),
        measured: {"count": count, "seed": 0, **training.evaluate(model, count=count, **held)},
    }
    weights.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    if chosen.rows is not None:
        store(chosen.rows, {key: value for key, value in report.items() if key != "config"})
    print(json.dumps(report[measured], indent=2))
    print(f"{seconds:.0f} s, {cpu_seconds:.0f} s of processor time; wrote {weights}")


def store(path: Path, record: dict[str, Any]) -> None:
    """Adds a record to a file, in place of the record of the same command."""
    write_records(path, [*(kept for kept in _stored(path) if kept["command"] != record["command"]), record])


def _stored(path: Path) -> list[dict[str, Any]]:
    def fits(content: Any) -> bool:
        return isinstance(content, list) and all(isinstance(record, dict) and "command" in record for record in content)

    stored: list[dict[str, Any]] = read_json(path, fits, "--rows must be a JSON list that trainings wrote")
    return stored
