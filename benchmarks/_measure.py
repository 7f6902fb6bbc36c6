"""Benchmarks: their declaration, their measurement, and their records.

Every variant of a benchmark runs once a round, in turns, in one process, so that a busy moment, a clock change and the caches
affect all variants alike; each round draws a new order. On a GPU events time a call. A backlog keeps the stream busy while the
host prepares the call, since a pair of events on an idle stream would time the host. Percentiles are over single calls.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.benchmarks import _gpu
from vlattn_fast.benchmarks._formula import OURS, WRONG, Formula, largest_error
from vlattn_fast.benchmarks._formula import Run as Run
from vlattn_fast.benchmarks._formula import Tensors as Tensors
from vlattn_fast.benchmarks._launches import Tile, recording
from vlattn_fast.benchmarks._rates import rates
from vlattn_fast.benchmarks._workloads import Sizes, Workload
from vlattn_fast.checking import blocks
from vlattn_fast.measuring.memory import peak_of_call
from vlattn_fast.ops import OPERATORS

ROUNDS = {"cpu": 7, "cuda": 50}
QUICK_ROUNDS = {"cpu": 3, "cuda": 10}
SECONDS_A_VARIANT = {"cpu": 4.0, "cuda": 4.0}  # a slower variant skips some rounds, but runs in
LEAST_ROUNDS = 3  # at least
LONGEST_BACKLOG = 0.05  # seconds
EMULATED = ("triton", "cuda")  # on a CPU, where kernels are not timed

QKV = ("query", "key", "value")
Finish = Callable[[Callable[[Tensors], Any]], Run]  # a call -> what is compared: `forward`, or `backward` of some inputs


class Pass(NamedTuple):
    """The least work of one pass."""

    flops: float
    bytes: float = 0.0
    exps: float = 0.0


class Variant(NamedTuple):
    run: Run
    maps: float = 0.0  # whole maps (Problem.map_elements) that the variant holds at once
    compiled: bool = False


class Problem(NamedTuple):
    """A benchmark at a size: its inputs and its variants. Times are divided by those of the variant `bound`."""

    tensors: Tensors
    variants: Mapping[str, Variant]
    bound: str
    truth: Run  # the formula on `part` of the inputs; its outputs are compared with `part` of the variants' outputs
    part: Callable[[str, Tensor], Tensor]
    map_elements: int
    floor: Sequence[Pass]
    not_run: Mapping[str, str] = {}
    in_blocks: bool = False  # the truth holds a block of a map at a time
    plain: Run | None = None  # the formula in the dtype of the inputs, where `truth` computes in float64 whatever they are


@dataclass(frozen=True)
class Benchmark:
    module: str
    what: str
    workload: Workload
    build: Callable[[Sizes, torch.device, torch.dtype], Problem]
    cuda_dtype: torch.dtype = torch.bfloat16
    cpu_dtype: torch.dtype = torch.float32
    compile_when_quick: bool = False
    isolated: Callable[..., list[dict[str, Any]]] | None = None  # on a CPU: measures each variant in a process of its own
    once: bool = False  # a call takes minutes: one run gives time and memory, and no error is taken; a quick run has them all

    @property
    def name(self) -> str:
        return f"{self.module.rpartition('.')[2]}/{self.what}/{self.workload.key}"


def in_bfloat16(*benchmarks: Benchmark) -> list[Benchmark]:
    """The same beside float32, on a CPU alone."""
    return [replace(one, what=f"{one.what}, bfloat16", cpu_dtype=torch.bfloat16) for one in benchmarks]


# --- variants of an operator ---


def forward(call: Callable[[Tensors], Any]) -> Run:
    return torch.no_grad()(lambda tensors: _named(call(tensors)))


def backward(inputs: Sequence[str], cotangents: Sequence[str], not_compared: Sequence[str] = ()) -> Finish:
    """Forward and backward: gradients of `inputs` for `cotangents`, by name; gradients of `not_compared` are computed only."""

    def wrap(call: Callable[[Tensors], Any]) -> Run:
        def run(tensors: Tensors) -> Tensors:
            leaves = {name: tensors[name].detach().requires_grad_() for name in inputs}
            outputs = _named(call({**tensors, **leaves}))
            used = [x for x in outputs.values() if x.requires_grad]
            grads = torch.autograd.grad(used, list(leaves.values()), [tensors[name] for name in cotangents])
            compared = {f"gradient of {name}": x for name, x in zip(inputs, grads, strict=True) if name not in not_compared}
            return {name: x.detach() for name, x in outputs.items()} | compared

        return run

    return wrap


def finished(both: bool, inputs: Sequence[str], cotangents: Sequence[str], not_compared: Sequence[str] = ()) -> Finish:
    """`backward` where `both` passes are measured, else `forward`."""
    return backward(inputs, cotangents, not_compared) if both else forward


def without_output(run: Run) -> Run:
    """A bound without its result, which is not the benchmark's."""

    def silent(tensors: Tensors) -> Tensors:
        run(tensors)
        return {}

    return silent


def taking(*names: str, **constants: Any) -> Callable[[Tensors], dict[str, Any]]:
    """The arguments of a call: the tensors of these names, and constants."""
    return lambda tensors: {**{name: tensors[name] for name in names}, **constants}


def operator_problem(
    call: str,
    arguments: Callable[[Tensors], dict[str, Any]],
    tensors: Tensors,
    finish: Finish,
    maps: float,
    bound: Run,
    part: Callable[[str, Tensor], Tensor],
    map_elements: int,
    floor: Sequence[Pass],
    *,
    baselines: Mapping[str, Variant] = MappingProxyType({}),
    names: Sequence[str] | None = None,
) -> Problem:
    """A public call on every backend that takes it (or on `names`), the formula, the same under torch.compile, the `baselines`,
    and plain SDPA as `bound`."""
    public, formula = getattr(va, call), getattr(va.reference, call)

    def ours(name: str) -> Callable[[Tensors], Any]:
        return lambda t: public(**arguments(t), backend=name)

    names = backends(call, arguments(tensors)) if names is None else names
    variants = {name: Variant(finish(ours(name))) for name in names}
    variants["reference"] = Variant(finish(lambda t: formula(**arguments(t))), maps)
    variants["reference compiled"] = Variant(finish(compile_later(lambda t: formula(**arguments(t)))), maps, compiled=True)
    variants |= {**baselines, "SDPA": Variant(without_output(bound))}
    in_blocks = "query" in tensors
    truth = finish(lambda t: blocks.formula(call)(**arguments(t))) if in_blocks else variants["reference"].run
    return Problem(tensors, variants, "SDPA", truth, part, map_elements, floor, in_blocks=in_blocks)


def compile_later(call: Callable[[Tensors], Any], mode: str | None = None) -> Callable[[Tensors], Any]:
    """torch.compile, which loads much, at the first call."""
    made = functools.cache(lambda: torch.compile(call, dynamic=False, mode=mode))
    return lambda tensors: made()(tensors)


def backends(operator: str, arguments: Mapping[str, Any]) -> list[str]:
    """The backends that run this call; the reference is no competitor."""
    facts = OPERATORS[operator].describe(**arguments)
    left_out = ("reference", *(EMULATED if facts.device_type == "cpu" else ()))
    return [
        name for name, backend in OPERATORS[operator].backends.items() if name not in left_out and not backend.refusals(facts)
    ]


def randoms(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Standard normal tensors, the same at each call of this function."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape, std=1.0: (std * torch.randn(*shape, generator=generator, device=device)).to(dtype)


def _named(outputs: Any) -> Tensors:
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, dict):
        return outputs
    names = getattr(outputs, "_fields", [f"output {i}" for i in range(len(outputs))])
    return {name: x for name, x in zip(names, outputs, strict=True) if x is not None}


# --- measuring ---


@dataclass
class _Standing:
    """A variant while it is measured."""

    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    stride: int = 1
    backlog: float = 0.0
    peak: int | None = None
    error: float | None = None
    not_run: str = ""
    tiles: list[Tile] = field(default_factory=list)  # of the Triton launches of its first call


class Measurement:
    """A benchmark in a process: compiles and warms up every variant, takes its memory and error, and then runs rounds."""

    def __init__(
        self,
        benchmark: Benchmark,
        device: torch.device,
        *,
        quick: bool = False,
        rounds: int | None = None,
        overrides: Sizes | None = None,
        compiled: bool = True,
        dtype: torch.dtype | None = None,
        only: Sequence[str] | None = None,
        truth: Tensors | None = None,
    ) -> None:
        """A quick measurement has few rounds, small sizes on a CPU, and torch.compile on a GPU only for the benchmark that asks.

        Args:
            overrides: the largest size by name.
            only: variants to measure; all by default.
            truth: the formula's result in float64, where it is known; the tolerance rule is then not asked.
        """
        torch._dynamo.reset()  # behind its limit of compilations of a function, dynamo runs eagerly without a word
        self.benchmark, self.device, self.quick = benchmark, device, quick
        self.dtype = dtype or (benchmark.cpu_dtype if device.type == "cpu" else benchmark.cuda_dtype)
        self.rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)[device.type]
        self.sizes = benchmark.workload.sizes(device, overrides, quick)
        self.problem = benchmark.build(self.sizes, device, self.dtype)
        if device.type == "cuda" and not quick and "task_" not in benchmark.module:
            runs = _gpu.more({name: variant.run for name, variant in self.problem.variants.items()})
            variants = {**self.problem.variants, **{name: Variant(run) for name, run in runs.items()}}
            self.problem = self.problem._replace(variants=variants)
        compiled = compiled and (not quick or (device.type == "cuda" and benchmark.compile_when_quick))
        self.standing = {
            name: _Standing()
            for name, variant in self.problem.variants.items()
            if (compiled or not variant.compiled) and (only is None or name in only)
        }
        self.once = benchmark.once and not quick and not overrides
        self.formula = self._formula() if truth is None and not self.once else None
        self.truth = self.formula.exact if self.formula else truth
        gc.collect()
        for name, standing in self.standing.items():
            standing.not_run = self._too_large(self.problem.variants[name])
            if not standing.not_run:
                self._try(name, functools.partial(self._warm_up, name))

    def _formula(self) -> Formula | None:
        """The formula's results; None where the formula in float64 needs more memory than there is."""
        problem = self.problem
        share = min((problem.part(name, x).numel() / x.numel() for name, x in problem.tensors.items()), default=1.0)
        formula = problem.variants.get("reference", problem.variants.get("maps stored, one backward"))
        maps = 0.0 if formula is None or problem.in_blocks else formula.maps
        if not self._fits(8 * share * maps * problem.map_elements):
            return None
        try:
            return Formula(problem.tensors, problem.part, problem.truth, problem.plain or problem.truth)
        except torch.OutOfMemoryError:
            return None

    def _fits(self, needed: float) -> bool:
        """Whether so many bytes fit into half of the free memory."""
        free = _free_memory(self.device)
        return free is None or needed <= free / 2

    def _too_large(self, variant: Variant) -> str:
        needed = variant.maps * self.problem.map_elements * self.dtype.itemsize
        if self._fits(needed):
            return ""
        return f"its whole maps need {needed / 2**30:.0f} GiB, over half of the memory that is free"

    def _try(self, name: str, step: Callable[[], None]) -> None:
        """Runs a step; a failure is a result, and the variant's record says why."""
        try:
            step()
        except Exception as error:
            lines = str(error).strip().splitlines()
            self.standing[name].not_run = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
            gc.collect()

    def _warm_up(self, name: str) -> None:
        run, standing = functools.partial(self.problem.variants[name].run, self.problem.tensors), self.standing[name]
        with self._recording(name) as standing.tiles:
            if self.once:
                standing.peak, spent, _ = _peak_of(run, self.device)
                standing.seconds = [spent]
                return
            first = run()
        standing.error = largest_error({n: self.problem.part(n, x) for n, x in first.items()}, self.truth)
        if self.formula and name.removesuffix(_gpu.GRAPH) in OURS:
            wrong = self.formula.wrong(self.problem.variants[name].run, first)
            if wrong:  # times of wrong numbers are no result
                raise ArithmeticError(f"{WRONG}: {wrong}")
        del first
        standing.peak, spent, host = _peak_of(run, self.device)
        standing.peak = None if name.endswith(_gpu.GRAPH) else standing.peak  # a graph has separate memory
        standing.backlog = min(1.5 * host + 5e-5, LONGEST_BACKLOG)
        affordable = max(LEAST_ROUNDS, int(SECONDS_A_VARIANT[self.device.type] / (10 if self.quick else 1) / spent))
        standing.stride = math.ceil(self.rounds / affordable)

    def _recording(self, name: str) -> AbstractContextManager[list[Tile]]:
        """Records a variant of this package that may launch Triton kernels. Other calls import no Triton."""
        ours = name.removesuffix(_gpu.GRAPH)
        return recording() if ours in OURS and (self.device.type == "cuda" or ours == "triton") else nullcontext([])

    def round(self, number: int = 0) -> None:
        """One call of each variant, in another order each round, since the formula's maps spoil the caches for the next variant.
        A slow variant skips some rounds."""
        for name in random.Random(number).sample(list(self.standing), len(self.standing)):
            standing = self.standing[name]
            if not standing.not_run and not self.once and number % standing.stride == 0:
                self._try(name, functools.partial(self._timed, name))

    def _timed(self, name: str) -> None:
        run, standing = self.problem.variants[name].run, self.standing[name]
        if self.device.type == "cpu":
            start = time.perf_counter()
            run(self.problem.tensors)
            standing.seconds.append(time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(standing.backlog * _clock(self.device)))
        begin.record()
        start = time.perf_counter()
        run(self.problem.tensors)
        standing.host.append(time.perf_counter() - start)
        end.record()
        end.synchronize()
        standing.seconds.append(begin.elapsed_time(end) / 1e3)

    def run(self) -> list[dict[str, Any]]:
        for number in range(self.rounds):
            self.round(number)
        return self.records()

    def records(self) -> list[dict[str, Any]]:
        """A record per variant. Times are in microseconds; without a time, `not_run` says why. `tiles` are those of the Triton
        launches that a variant of this package made, since the table of a commit need not be what ran."""
        bound = self.standing[self.problem.bound].seconds if self.problem.bound in self.standing else None
        can = rates(self.device, self.dtype)
        least, limit = can.limit(self.problem.floor) if can else (None, None)
        shared = {
            "benchmark": self.benchmark.name,
            "workload": self.benchmark.workload.title,
            "sizes": self.sizes,
            "dtype": str(self.dtype).removeprefix("torch."),
            "peaks": {name: round(peak / 1e9) for name, peak in can.peaks.items()} if can else {},  # GFLOP/s
        }
        table = []
        for name, x in self.standing.items():
            record: dict[str, Any] = {**shared, "variant": name, "is_bound": name == self.problem.bound}
            if x.seconds and not x.not_run:
                p50 = float(np.median(x.seconds))
                record |= {
                    **percentiles(x.seconds, 3),
                    "host_p50_us": round(float(np.median(x.host)) * 1e6, 3) if x.host else None,
                    "rounds": len(x.seconds),
                    "peak_bytes": x.peak,
                    "memory_by": MEMORY_BY[self.device.type],
                    "error": x.error,
                    "ratio_to_bound": p50 / float(np.median(bound)) if bound else None,
                    "share_of_limit": least / p50 if least else None,
                    "limit": limit,
                    **({"tiles": x.tiles} if x.tiles else {}),
                }
            table.append(record if "p50_us" in record else {**record, "not_run": x.not_run or "no round was left for it"})
        return table + [{**shared, "variant": name, "is_bound": False, "not_run": x} for name, x in self.problem.not_run.items()]


def percentiles(seconds: Sequence[float], digits: int) -> dict[str, float]:
    """The 20th, 50th and 80th, in microseconds."""
    return {f"p{n}_us": round(float(np.percentile(seconds, n)) * 1e6, digits) for n in (20, 50, 80)}


MEMORY_BY = {
    "cuda": "torch.cuda.max_memory_allocated above the level before the call",
    "cpu": "the process's largest resident set (VmHWM) above the level before the call",
}


def _peak_of(run: Callable[[], Any], device: torch.device) -> tuple[int | None, float, float]:
    """Peak bytes of one call, its seconds, and the seconds that the host was busy."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        run()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held, time.perf_counter() - start, host
    peak, spent = peak_of_call(run)
    return peak, spent, spent


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    meminfo = Path("/proc/meminfo")
    return int(re.findall(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.M)[0]) * 1024 if meminfo.exists() else None


@functools.cache
def _clock(device: torch.device) -> float:
    """The measured cycles a second of torch.cuda._sleep."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)
    begin.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    end.synchronize()
    return 1e7 / (begin.elapsed_time(end) / 1e3)
