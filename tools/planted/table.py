"""The table of planted faults: draws them, plants each, and stores what noticed it or why it is harmless."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton

from ptx.architectures import ARCHITECTURES
from ptx.planting.faults import IN_PTX, IN_SOURCE
from ptx.running.program import Program
from tools.planted.calls import CALLS, Call, alone
from tools.planted.reasons import judged

TABLE = Path(__file__).parents[2] / "tests" / "compiled" / "planted.json"
STATES = ("noticed", "harmless", "within tolerance", "unexplained")
SOURCES = 1  # of a kind in a call: each compiles the call's kernels


def key_of(program: Program) -> str:
    """A digest of a kernel's PTX without its lines about the source's places."""
    lines = [line for line in alone(program).splitlines() if not re.match(r"\s*(\.loc|\.file|//|$)", line)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def plant(architecture: int, number: int, limit: int) -> dict[str, Any]:
    """The outcomes of one call's faults: of each kind so many that are executed, at most."""
    called = CALLS[number]
    call = Call(architecture, called)
    faults = call.faults()
    random.Random(f"{architecture} {called.title}").shuffle(faults)
    executed, idle = Counter[str](), Counter[str]()
    rows = []
    for fault in faults:
        most = SOURCES if fault.kind in IN_SOURCE else limit
        if limit and executed[fault.kind] + (idle[fault.kind] if fault.kind in IN_SOURCE else 0) >= most and call.may_run(fault):
            continue
        outcome = judged(call, fault)
        if outcome:
            (idle if outcome[0] == "not executed" else executed)[fault.kind] += 1
        if outcome and outcome[0] != "not executed":
            rows.append([*fault, *outcome])
    keys = {name: key_of(program) for name, program in call.programs.items()}
    return {"architecture": architecture, "call": called.title, "kernels": keys, "not executed": idle, "faults": sorted(rows)}


def summary(calls: list[dict[str, Any]]) -> list[str]:
    """By kind and architecture: planted where a call runs, and each state. In Markdown."""
    counts: dict[tuple[str, int], Counter[str]] = {}
    for call in calls:
        for kind, _, _, state, _ in call["faults"]:
            counts.setdefault((kind, call["architecture"]), Counter())[state] += 1

    def cell(states: Counter[str]) -> str:
        numbers = [sum(states.values()), *(states[state] for state in STATES)]
        return " / ".join(map(str, numbers)) if states else "–"

    head = ["fault", *(f"sm_{architecture}" for architecture in ARCHITECTURES)]
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * len(ARCHITECTURES))]
    for kind in [*IN_PTX, *IN_SOURCE]:
        cells = [cell(counts.get((kind, architecture), Counter())) for architecture in ARCHITECTURES]
        lines.append(" | ".join([kind, *cells]))
    return [f"| {line} |" for line in lines]


def reasons(calls: list[dict[str, Any]]) -> list[str]:
    """How many faults that nothing noticed have each reason. In Markdown."""
    counts = Counter((state, by) for call in calls for *_, state, by in call["faults"] if state != "noticed")
    ordered = sorted((state, -count, by) for (state, by), count in counts.items())
    rows = [f"{by} | {state} | {-count}" for state, count, by in ordered]
    return [f"| {line} |" for line in ("reason | the fault is | faults", "--- | --- | ---:", *rows)]


def planted_faults() -> str:
    """The summary of the stored faults."""
    return "\n".join(summary(json.loads(TABLE.read_text(encoding="utf-8"))["calls"]))


def planted_reasons() -> str:
    return "\n".join(reasons(json.loads(TABLE.read_text(encoding="utf-8"))["calls"]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.planted")
    parser.add_argument("--limit", type=int, default=4, metavar="N", help="faults of a kind in a call; 0: all (default: 4)")
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--call", type=int, choices=range(len(CALLS)), action="append", help="number of a call; default: all")
    parser.add_argument("--write", type=Path, default=TABLE, metavar="FILE", help="where the outcomes go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads(options.write.read_text())["calls"] if options.write.exists() else []
    outcomes = {(one["architecture"], one["call"]): one for one in stored}
    calls = stored
    for architecture in options.architecture or ARCHITECTURES:
        for number in options.call or range(len(CALLS)):
            if architecture not in CALLS[number].architectures:
                continue
            before = time.process_time()
            planted = plant(architecture, number, options.limit)
            rows, seconds = planted["faults"], time.process_time() - before
            print(f"sm_{architecture} {planted['call']}: {dict(Counter(row[3] for row in rows))}, {seconds:.0f} s", flush=True)
            for row in rows:
                if row[3] != "noticed":
                    print("   ", *row, sep=" | ", flush=True)
            outcomes[architecture, planted["call"]] = planted
            places = ((architecture, one.title) for architecture in ARCHITECTURES for one in CALLS)
            calls = [outcomes[place] for place in places if place in outcomes]
            with options.write.open("w") as file:
                json.dump({"triton": triton.__version__, "calls": calls}, file, indent=None, separators=(",", ":"))
                file.write("\n")
    print("\n".join([*summary(calls), "", *reasons(calls)]))
