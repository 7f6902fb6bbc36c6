"""What the host spends on a call before its Triton kernels run, beside what it spends on torch's own attention.

    python -m vlattn_fast.benchmarks host [--device cuda] [--rounds 20] [--out FOLDER]

Forward without gradients, and forward and backward, of each operator on one short head, with launches that do nothing. So it
runs on any machine, on CPU tensors. It leaves out Triton's own launcher (binding and specialising the arguments, looking up what
was compiled, the driver's launch), the change of the current device, and the thread that autograd has for a GPU. Torch's own
operators around the kernels run as they are: on a CPU they compute a few hundred numbers instead of launching a kernel. The
yardstick, F.scaled_dot_product_attention, runs whole.
"""

from __future__ import annotations

import argparse
import gc
import random
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vlattn_fast.benchmarks._measure import randoms
from vlattn_fast.benchmarks._rows import RESULTS, append, device_name, provenance, slug
from vlattn_fast.benchmarks._run import check_device

import vlattn_fast as va
from vlattn_fast import scores
from vlattn_fast.ops import _dispatch

ROUNDS, QUICK_ROUNDS = 20, 1
CALLS = 20  # in a row, a round: alone among others a call would find cold caches
SIZES = {"B": 1, "H": 1, "N": 16, "D": 16}
DTYPE = torch.bfloat16
SDPA = "SDPA"
ABOVE_SDPA = {"score_attention": 25.0, "relevancy_attention": 25.0, "congruence_loss": 60.0}  # goals of a forward pass, us

Tensors = dict[str, Tensor]


class Operator(NamedTuple):
    """`tensors` are differentiated where the operator has gradients."""

    tensors: Tensors
    call: Callable[[Tensors], Any]
    differentiable: bool = True


def operators(device: torch.device) -> dict[str, Operator]:
    """Each operator, named by it and, behind a comma, by what is special; SDPA first."""
    randn = randoms(device, DTYPE)
    n, d = SIZES["N"], SIZES["D"]
    q, k, v, grad = (randn(1, 1, n, d) for _ in range(4))
    qkv = {"query": q, "key": k, "value": v}
    vector, weight, other = randn(d), randn(d, d), randn(d, d)
    rows = torch.rand(1, 1, n, device=device)
    groups = torch.arange(n, device=device) % 2
    pairs = {"images": randn(2, n, d), "captions": randn(2, n, d)}
    blocks = {name: randn(1, 1, n, d) for name in ("text_query", "text_key", "image_query", "image_key")}

    def on_triton(name: str, **options: Any) -> Callable[[Tensors], Any]:
        public: Callable[..., Any] = getattr(va, name)
        return lambda t: public(**t, **options, backend="triton")

    def congruence(t: Tensors) -> Tensor:
        return va.congruence_loss((t["text_query"], t["text_key"]), (t["image_query"], t["image_key"]), backend="triton")

    def tanh(t: Tensors) -> Tensor:
        score = scores.General(t["weight"], activation="tanh")
        return va.score_attention(t["query"], t["key"], t["value"], score=score, backend="triton")

    def additive(t: Tensors) -> Tensor:
        score = scores.Additive(t["vector"], t["query_weight"], t["key_weight"])
        return va.score_attention(t["query"], t["key"], t["value"], score=score, backend="triton")

    step = {**qkv, "relevancy": rows, "grad_output": grad}
    statistics = on_triton("attention_statistics", key_groups=groups, num_groups=2)
    return {
        SDPA: Operator(qkv, lambda t: F.scaled_dot_product_attention(t["query"], t["key"], t["value"])),
        "score_attention": Operator(qkv, on_triton("score_attention")),
        "score_attention, general tanh": Operator({**qkv, "weight": weight}, tanh),
        "score_attention, additive": Operator({**qkv, "vector": vector, "query_weight": weight, "key_weight": other}, additive),
        "relevancy_attention": Operator({**qkv, "carrier": rows}, on_triton("relevancy_attention")),
        "relevancy_attention, step": Operator(step, on_triton("relevancy_step"), False),
        "attention_map": Operator({"query": q, "key": k}, on_triton("attention_map"), False),
        "attention_statistics": Operator({"query": q, "key": k}, statistics),
        "congruence_loss": Operator(blocks, congruence),
        "stacked_cross_attention": Operator(pairs, on_triton("stacked_cross_attention")),
    }


@contextmanager
def without_launches(launched: list[str] | None = None) -> Iterator[None]:
    """Triton's kernels are called and do nothing, on tensors of any device; `launched` takes their names."""
    from triton.runtime.jit import KernelInterface

    def nothing(kernel: Any, grid: Any) -> Callable[..., None]:
        if launched is not None:
            launched.append(kernel.fn.__name__)
        return _nothing

    before, interpreted = KernelInterface.__getitem__, _dispatch.INTERPRETED
    KernelInterface.__getitem__ = nothing
    _dispatch.INTERPRETED = True  # so that Triton's kernels take CPU tensors
    try:
        yield
    finally:
        KernelInterface.__getitem__, _dispatch.INTERPRETED = before, interpreted


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def passes(operator: Operator) -> dict[str, Callable[[], Any]]:
    def forward() -> Any:
        with torch.no_grad():
            return operator.call(operator.tensors)

    if not operator.differentiable:
        return {"forward": forward}
    leaves = {name: x.detach().requires_grad_() for name, x in operator.tensors.items()}

    def outputs() -> list[Tensor]:
        out = operator.call(leaves)
        return [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]

    cotangents = [torch.ones_like(x) for x in outputs()]

    def both() -> Any:
        return torch.autograd.grad(outputs(), list(leaves.values()), cotangents)

    return {"forward": forward, "forward+backward": both}


def measure(device: str = "cpu", *, rounds: int | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """A row for each pass of each operator: microseconds of the host, and those above SDPA's. They take turns, in an order drawn
    for each round."""
    place = check_device(device)
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    launches: dict[tuple[str, str], int] = {}
    with without_launches():
        calls = {(name, what): run for name, each in operators(place).items() for what, run in passes(each).items()}
    for key, run in calls.items():
        launched: list[str] = []
        with without_launches(launched):
            run()
        launches[key] = len(launched)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    gc.collect()
    gc.disable()
    try:
        with without_launches():
            for number in range(rounds):
                for key in random.Random(number).sample(list(calls), len(calls)):
                    calls[key]()
                    for _ in range(CALLS):
                        start = time.perf_counter()
                        calls[key]()
                        times[key].append(time.perf_counter() - start)
                    if place.type == "cuda":
                        torch.cuda.synchronize()
    finally:
        gc.enable()
    return [_row(key, times, launches[key]) for key in calls]


def _row(key: tuple[str, str], times: Mapping[tuple[str, str], list[float]], launches: int) -> dict[str, Any]:
    """`host` is its name, as `benchmark` would make it a row of the report."""
    name, what = key
    p20, p50, p80 = (round(float(p) * 1e6, 2) for p in np.percentile(times[key], (20, 50, 80)))
    above = p50 - float(np.median(times[SDPA, what])) * 1e6
    goal = ABOVE_SDPA.get(name.split(",")[0]) if what == "forward" else None
    facts = {"host": name, "pass": what, "sizes": SIZES, "dtype": str(DTYPE).removeprefix("torch."), "rounds": len(times[key])}
    return {
        **facts,
        "launches": launches,
        "p20_us": p20,
        "p50_us": p50,
        "p80_us": p80,
        "above_sdpa_us": round(above, 2),
        "goal_us": goal,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlattn_fast.benchmarks host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, help=f"of {CALLS} calls of each; default {ROUNDS}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of <device>.json, which rows are added to")
    options = parser.parse_args(arguments)
    place = check_device(options.device)
    command = shlex.join(["python", "-m", "vlattn_fast.benchmarks", "host", *arguments])
    origin = {"device": device_name(place), **provenance(command)}
    rows = measure(options.device, rounds=options.rounds)
    print(f"{'us of the host, launches left out':48}{'p20':>8}{'p50':>8}{'p80':>8}{'above SDPA':>12}{'goal':>8}{'launches':>10}")
    for row in rows:
        goal = "" if row["goal_us"] is None else f"{row['goal_us']:.0f}"
        percentiles = "".join(f"{row[f'p{n}_us']:8.1f}" for n in (20, 50, 80))
        name = f"{row['host']}, {row['pass']}"
        print(f"{name:48}{percentiles}{row['above_sdpa_us']:12.1f}{goal:>8}{row['launches']:10}")
    append([{**row, **origin} for row in rows], options.out / f"{slug(place)}.json")
    return 0
