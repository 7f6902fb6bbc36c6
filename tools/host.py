"""The time that Python spends on a call, beside the time that Python spends on torch's attention.

    python -m tools.host [--device cuda] [--rounds 400] [--out FOLDER] [--benchmark-compare ...]

Forward without gradients, and forward and backward, of each operator on one short head. pytest-benchmark times them and compares
runs: after `--benchmark-autosave`, `--benchmark-compare` shows the next run beside the stored one.

With backend "triton" launches do nothing, so the measurement runs on any machine, on CPU tensors. The records leave out Triton's
launcher (binding and specialising the arguments, looking up the compiled kernel, the driver's launch), the change of the current
device, and autograd's thread for a GPU. Torch's operators around the kernels run as they are: on a CPU they compute a few hundred
numbers instead of launching a kernel. With backend "cpu", where it is built, the kernels compute a few hundred numbers, too. The
yardstick, F.scaled_dot_product_attention, runs whole, in the dtype of the backend's records.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
from vlattn_fast.ops import OPERATORS

ROUNDS, WARMUP = 400, 20  # the first calls meet cold caches
STORAGE = Path("build") / "benchmarks"  # of pytest-benchmark
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
    return [name for name in ("triton", "cpu") if name in table] or ["streaming"]


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


@dataclass(frozen=True)
class Timed:
    """A pass of a call, timed by `test_pass`."""

    key: Key
    run: Callable[[], Any]
    device: torch.device
    rounds: int
    times: list[float] = field(default_factory=list)  # seconds
    launched: list[str] = field(default_factory=list)  # kernels of one run

    def record(self, sdpa_us: float) -> dict[str, Any]:
        """Named by `host` as records of benchmarks are named by `benchmark`."""
        backend, name, what = self.key
        times = percentiles(self.times, 2)
        goal = TRITON_GOALS.get(name.split(",")[0]) if backend == "triton" else CPU_GOAL
        return {
            "host": name,
            "backend": backend,
            "pass": what,
            "sizes": SIZES,
            "dtype": str(DTYPES[backend]).removeprefix("torch."),
            "rounds": self.rounds,
            "launches": len(self.launched),
            **times,
            "above_sdpa_us": round(times["p50_us"] - sdpa_us, 2),
            "goal_us": goal if what == "forward" and name != SDPA else None,
        }


def test_pass(benchmark: Any, timed: Timed) -> None:
    """pytest-benchmark's groups are backends and passes, so that its table shows each call beside SDPA."""
    backend, _, what = timed.key
    benchmark.group = f"{backend}, {what}"
    with without_launches(timed.launched):
        timed.run()
    with without_launches():
        wait = torch.cuda.synchronize if timed.device.type == "cuda" else None
        benchmark.pedantic(timed.run, setup=wait, rounds=timed.rounds, warmup_rounds=min(WARMUP, timed.rounds))
    timed.times.extend(benchmark.stats.stats.data)


class _Calls:
    """A plug-in of pytest that gives `test_pass` its calls."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.left_out: list[Any] = []
        with without_launches():
            self.timed = {
                f"{backend}: {name}, {what}": Timed((backend, name, what), run, device, rounds)
                for backend in backends_on(device)
                for name, each in examples(device, backend).items()
                for what, run in passes(each).items()
            }

    def pytest_generate_tests(self, metafunc: Any) -> None:
        metafunc.parametrize("timed", self.timed.values(), ids=self.timed)

    def pytest_deselected(self, items: Sequence[Any]) -> None:
        self.left_out += [item for item in items if item.callspec.params["timed"].key[1] == SDPA]

    def pytest_collection_finish(self, session: Any) -> None:
        """SDPA runs beside the chosen calls, which are compared with it."""
        session.items += self.left_out if session.items else []


def measure(device: str = "cpu", *, rounds: int = ROUNDS, options: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A record for each pass of each operator: microseconds of the host, and microseconds above SDPA's. `options` are pytest's.

    Raises:
        RuntimeError: a call failed; pytest has printed it.
    """
    import pytest

    calls = _Calls(check_device(device), rounds)
    folder = Path(__file__).parent
    alone = [
        "-c",
        os.devnull,
        f"--rootdir={folder}",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-qq",
    ]
    timing = ["--benchmark-disable-gc", "--benchmark-columns=min,median,iqr,rounds", "--benchmark-sort=name"]
    timing.append(f"--benchmark-storage={STORAGE}")
    with patch.dict(os.environ):
        os.environ.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark does not time what it believes to run beside others
        status = pytest.main([__file__, *alone, *timing, *options], plugins=[calls])
    if status != 0:
        raise RuntimeError("a call failed, or an option is not pytest's; see above")
    done = [timed for timed in calls.timed.values() if timed.times]
    sdpa = {(backend, what): np.median(x.times) * 1e6 for x in done for backend, name, what in [x.key] if name == SDPA}
    return [x.record(float(sdpa[backend, what])) for x in done for backend, _, what in [x.key]]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.host",
        description=(__doc__ or "").splitlines()[0],
        epilog="Other options go to pytest-benchmark, such as --benchmark-autosave and --benchmark-compare.",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="Device. Default: cpu.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"Number of timed calls of each pass. Default: {ROUNDS}.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="Folder of host-<device>.json, to which results are added.")
    options, pytest_options = parser.parse_known_args(arguments)
    place = check_device(options.device)
    command = shlex.join(["python", "-m", "tools.host", *arguments])
    origin = {"device": device_name(place), **provenance(command)}
    records = measure(options.device, rounds=options.rounds, options=pytest_options)
    append([{**record, **origin} for record in records], options.out / f"host-{slug(place)}.json")


if __name__ == "__main__":
    main(sys.argv[1:])
