"""The time that Python spends on a call, beside the time that Python spends on torch's attention.

    python -m vlattn_fast.benchmarks host [--device cuda] [--rounds 20] [--out FOLDER]

Forward without gradients, and forward and backward, of each operator on one short head.

With backend "triton" launches do nothing, so the measurement runs on any machine, on CPU tensors. The records leave out Triton's
launcher (binding and specialising the arguments, looking up the compiled kernel, the driver's launch), the change of the current
device, and autograd's thread for a GPU. Torch's operators around the kernels run as they are: on a CPU they compute a few hundred
numbers instead of launching a kernel. With backend "cpu", where it is built, the kernels compute a few hundred numbers, too. The
yardstick, F.scaled_dot_product_attention, runs whole, in the dtype of the backend's records.
"""

from __future__ import annotations

import argparse
import gc
import random
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.origin import device_name
from vlattn_fast.backends.native import library
from vlattn_fast.benchmarks._measure import percentiles
from vlattn_fast.benchmarks._records import RESULTS, append, provenance, slug
from vlattn_fast.benchmarks._run import check_device
from vlattn_fast.checking.cases import Example, Sizes, cases_of
from vlattn_fast.dispatch.call import OnCpu, run_gpu_kernels_on_cpu
from vlattn_fast.measuring.records import number
from vlattn_fast.ops import OPERATORS

ROUNDS, QUICK_ROUNDS = 20, 1
CALLS = 20  # in a row, a round: a single call would meet cold caches
SIZES = {"B": 1, "H": 1, "N": 16, "D": 16}
OF_CALLS = Sizes(16, 16, 16, 16, 16, 16, 16, batch=1, heads=1, rows=1, images=2, captions=2)
DTYPES = {"triton": torch.bfloat16, "cpu": torch.float32, "streaming": torch.float32}  # by backend
SDPA = "SDPA"
# goals of a forward pass above SDPA's, us; Triton has goals for some operators, and the CPU's kernels one goal for all
TRITON_GOALS = dict.fromkeys(("score_attention", "relevancy_attention", "relevancy_step"), 25.0) | {"congruence_loss": 60.0}
CPU_GOAL = 30.0

Key = tuple[str, str, str]  # backend, call, pass


def timed_backends(operator: str) -> list[str]:
    """Those with kernels, where the operator has such; else streaming."""
    table = OPERATORS[operator].backends
    return [name for name in ("triton", "cpu") if table[name].exists] or ["streaming"]


def backends_on(device: torch.device) -> list[str]:
    """The backends whose calls are timed on this device."""
    timed = {name for operator in OPERATORS for name in timed_backends(operator)}
    return [name for name in DTYPES if name in timed and (name != "cpu" or (device.type == "cpu" and library.exists))]


def examples(device: torch.device, backend: str) -> dict[str, Example]:
    """Calls by their titles, on this device in the dtype of the backend; SDPA first."""
    with device:
        plain = next(cases_of("score_attention").host(OF_CALLS))
        names = [name for name in OPERATORS if backend in timed_backends(name)]
        made = [example for name in names for example in cases_of(name).host(OF_CALLS)]
    made = [replace(example, options={**example.options, "backend": backend}) for example in made]
    titled = {SDPA: replace(plain, call=F.scaled_dot_product_attention)}
    titled |= {example.title: example for example in made}
    return {title: replace(example, tensors=example.in_dtype(DTYPES[backend], device)) for title, example in titled.items()}


@contextmanager
def without_launches(launched: list[str] | None = None) -> Iterator[None]:
    """Inside, calls of Triton's kernels do nothing, on tensors of any device; `launched` takes the kernels' names."""
    from triton.runtime.jit import KernelInterface

    def nothing(kernel: Any, grid: Any) -> Callable[..., None]:
        if launched is not None:
            launched.append(kernel.fn.__name__)
        return lambda *args, **kwargs: None

    launch, runner = KernelInterface.__getitem__, run_gpu_kernels_on_cpu(OnCpu())
    KernelInterface.__getitem__ = nothing
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launch
        run_gpu_kernels_on_cpu(runner)


def passes(example: Example) -> dict[str, Callable[[], Any]]:
    call, arrange, tensors, options = example.call, example.arrange, example.tensors, example.placed_options(example.tensors)

    def forward() -> Any:
        with torch.no_grad():
            return call(**arrange(tensors), **options)

    if not example.differentiable:
        return {"forward": forward}
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}

    def outputs() -> list[Tensor]:
        out = call(**arrange(leaves), **options)
        return [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]

    cotangents = [torch.ones_like(x) for x in outputs()]

    def both() -> Any:
        return torch.autograd.grad(outputs(), list(leaves.values()), cotangents)

    return {"forward": forward, "forward+backward": both}


def measure(device: str = "cpu", *, rounds: int | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """A record for each pass of each operator: microseconds of the host, and microseconds above SDPA's. Operators take turns, in
    an order drawn for each round."""
    place = check_device(device)
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    with without_launches():
        calls = {
            (backend, name, what): run
            for backend in backends_on(place)
            for name, each in examples(place, backend).items()
            for what, run in passes(each).items()
        }
    launches: dict[Key, list[str]] = {key: [] for key in calls}
    for key, run in calls.items():
        with without_launches(launches[key]):
            run()
    times: dict[Key, list[float]] = {key: [] for key in calls}
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
    return [_record(key, times, len(launches[key])) for key in calls]


def _record(key: Key, times: Mapping[Key, list[float]], launches: int) -> dict[str, Any]:
    """A record, named by `host` as records of benchmarks are named by `benchmark`."""
    backend, name, what = key
    of_calls = percentiles(times[key], 2)
    above = of_calls["p50_us"] - float(np.median(times[backend, SDPA, what])) * 1e6
    goal = TRITON_GOALS.get(name.split(",")[0]) if backend == "triton" else CPU_GOAL
    return {
        "host": name,
        "backend": backend,
        "pass": what,
        "sizes": SIZES,
        "dtype": str(DTYPES[backend]).removeprefix("torch."),
        "rounds": len(times[key]),
        "launches": launches,
        **of_calls,
        "above_sdpa_us": round(above, 2),
        "goal_us": goal if what == "forward" and name != SDPA else None,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlattn_fast.benchmarks host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, help=f"of {CALLS} calls of each; default {ROUNDS}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of host-<device>.json, which records are added to")
    options = parser.parse_args(arguments)
    place = check_device(options.device)
    command = shlex.join(["python", "-m", "vlattn_fast.benchmarks", "host", *arguments])
    origin = {"device": device_name(place), **provenance(command)}
    records = measure(options.device, rounds=options.rounds)
    print(f"{'us of the host':56}{'p20':>8}{'p50':>8}{'p80':>8}{'above SDPA':>12}{'goal':>8}{'launches':>10}")
    for record in records:
        percentiles = "".join(f"{record[f'p{n}_us']:8.1f}" for n in (20, 50, 80))
        name, goal = f"{record['backend']}: {record['host']}, {record['pass']}", number(record["goal_us"], ".0f")
        print(f"{name:56}{percentiles}{record['above_sdpa_us']:12.1f}{goal:>8}{record['launches']:10}")
    append([{**record, **origin} for record in records], options.out / f"host-{slug(place)}.json")
    return 0
