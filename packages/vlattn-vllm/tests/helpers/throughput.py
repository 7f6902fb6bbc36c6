"""Tokens per second of vLLM without the plug-in, with it, and where requests ask; and what the plug-in adds to a step.

    python -m tests.helpers.throughput [--seconds 40] [--requests 1 64] [--only "nobody asks"]

One engine serves all rounds, and a round has a block of requests of each kind, in random order: blocks of a round share what else
the machine does, so a share is the median over the rounds. The model is a small random Llama of 8 layers and 8 heads. Prompts
have 256 tokens, answers 32. The rows go to results/serve-cpu.json of this package.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from tests.helpers.tiny import engine, prompts, sampling, saved
from vlattn_fast.benchmarks._records import append, check_path, device_name, provenance
from vlattn_vllm import engine as core
from vlattn_vllm import front, worker
from vlattn_vllm.wrapping import WRAPPED, harmless, wrap

RESULTS = Path(__file__).resolve().parents[2] / "results"
BARE = "without the plug-in"
ASKS: dict[str, dict[str, Any] | None] = {
    BARE: None,
    "nobody asks": None,
    "all ask: mass, one layer": {"layers": [6]},
    "all ask: mass, 8 layers": {},
    "all ask: received, one layer": {"layers": [6], "statistics": ["received"]},
    "all ask: received, 8 layers": {"statistics": ["received"]},
}
PROMPT, TOKENS, LAYERS = 256, 32, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=40,
        help="for each number of requests, and at least three rounds, the first of which warms up",
    )
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--only", nargs="+", default=[*ASKS][1:], choices=[*ASKS][1:], help="kinds beside the first")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "serve-cpu.json"
    check_path(path)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
    llm = engine(saved("Llama", **sizes), enable_prefix_caching=False, max_model_len=512, max_num_seqs=64)
    origin = provenance(f"python -m tests.helpers.throughput {shlex.join(sys.argv[1:])}".strip())
    origin = {"device": device_name(torch.device("cpu")), **origin}
    print(f"{'requests':>8}  {'':30} {'tokens / s':>10} {'of the first':>12} {'rounds':>6} {'peak MiB':>8} {'added us':>8}")
    for requests in options.requests:
        rounds = measured(llm, requests, [BARE, *options.only], options.seconds)
        rows = []
        for name in (BARE, *options.only):
            seconds = [each[name][0] for each in rounds]
            share = statistics.median(each[BARE][0] / each[name][0] for each in rounds)
            row = {"serve": name, "requests": requests, "rounds": len(rounds), "prompt": PROMPT, "tokens": TOKENS}
            row |= {"tokens_per_second": round(requests * TOKENS / statistics.median(seconds), 2), "share": round(share, 4)}
            row |= {"peak_mib": round(max(each[name][1] for each in rounds) / 2**20, 1)}
            if name == "nobody asks":
                row["added_us_a_step"] = round(added(requests) * 1e6, 2)
            rows.append(row)
            values = f"{row['tokens_per_second']:>10.1f} {share:>12.1%} {len(rounds):>6} {row['peak_mib']:>8.0f}"
            print(f"{requests:>8}  {name:30} {values} {row.get('added_us_a_step', ''):>8}", flush=True)
        append([{**row, **origin} for row in rows], path)


def measured(llm: Any, requests: int, names: list[str], seconds: float) -> list[dict[str, tuple[float, int]]]:
    """Of each round: seconds and peak bytes of each kind's block."""
    some, rounds = prompts(*[PROMPT] * requests), []
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or time.perf_counter() < end:
        rounds.append({name: block(llm, some, name) for name in random.sample(names, len(names))})
    return rounds[1:]  # the first one warms up


def block(llm: Any, some: Any, name: str) -> tuple[float, int]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with bare(name == BARE):
        start = time.perf_counter()
        llm.generate(some, sampling(TOKENS, ASKS[name]), use_tqdm=False)
        seconds = time.perf_counter() - start
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return seconds, int(peak.split()[1]) * 1024


def added(requests: int) -> float:
    """Seconds that the plug-in adds to a step of so many requests of which none asks: its code around methods that do nothing."""

    out = SimpleNamespace(reqs_to_abort=[])

    class Engine:
        request_states: ClassVar[dict[str, Any]] = {}

        def method(self, *_: Any) -> Any:
            return out

    scheduled = SimpleNamespace(
        finished_req_ids=set(), scheduled_new_reqs=[], num_scheduled_tokens={str(number): 1 for number in range(requests)}
    )
    outputs = [SimpleNamespace(request_id="", kv_transfer_params=None) for _ in range(requests)]
    parts = (  # what is put around, its arguments, and calls a step
        (harmless(worker._execute_model), (scheduled,), 1),
        (harmless(worker._dispatch), (), 1),
        (worker._forward, (None,) * 6, LAYERS),
        (harmless(worker._sample_tokens), (), 1),
        (harmless(core._update_from_output), (scheduled, SimpleNamespace()), 1),
        (harmless(front._process_outputs), (outputs,), 1),
        (front._new_completion_output, (), requests),
    )
    total, calls = 0.0, 2000
    for around, arguments, count in parts:
        one = type("One", (Engine,), {"method": Engine.method})()
        before = min(timeit.repeat(lambda one=one, arguments=arguments: one.method(*arguments), number=calls, repeat=9))
        wrap(type(one), "method", around)
        after = min(timeit.repeat(lambda one=one, arguments=arguments: one.method(*arguments), number=calls, repeat=9))
        total += (after - before) / calls * count
    return total


@contextmanager
def bare(out: bool) -> Iterator[None]:
    """vLLM's own methods, for a while, in the place of those that the plug-in wraps."""
    wrapped = [(owner, name, getattr(owner, name)) for owner, name in WRAPPED]
    for owner, name, method in wrapped if out else ():
        setattr(owner, name, method.__wrapped__)
    try:
        yield
    finally:
        for owner, name, method in wrapped:
            setattr(owner, name, method)


if __name__ == "__main__":
    main()
