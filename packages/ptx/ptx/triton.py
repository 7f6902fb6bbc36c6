"""Triton kernels on CPU tensors: compiled for a GPU down to PTX, which is emulated.

Triton asks its driver for the device, and hands it compiled kernels. The driver here names a GPU that is not there, takes PTX for
its machine code, and emulates it. All else is as on that GPU: the launchers, the specialisation of a kernel by its arguments
(dtypes, divisibility by 16, ones, constants), the passes of the compiler, and what the device refuses (too much shared memory).

    with ptx.triton.emulated(90) as launches:
        kernel[grid](x, y, BLOCK=128)
    print(launches[0].executed)

Triton's autotuner times nothing here: of the configurations that its pruning leaves it takes the first that the GPU can launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import KernelInterface

from ptx.architectures import properties
from ptx.running.launch import Launch, launch
from ptx.running.memory import Memory
from ptx.running.program import Program
from ptx.running.reports import EmulationError, FindingsError, Options
from ptx.running.tensor_maps import SWIZZLES, TensorMap

SCRATCH = ("global_scratch", "profile_scratch")  # memory of a launch beside its tensors, in the order of the parameters

_PROGRAMS: dict[str, Program] = {}  # by text


@contextmanager
def emulated(
    architecture: int, options: Options | None = None, *, strict: bool = True, keep: bool = True
) -> Iterator[list[Launch]]:
    """Within it Triton launches on CPU tensors. Gives the list of launches, which grows unless not `keep`.

    A launch with findings raises, unless not `strict`. Errors, after which a kernel cannot go on, raise in any case. Kernels are
    kept in a folder of their own: Triton 3.6 would take their PTX for what a GPU runs.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("Triton was imported with TRITON_INTERPRET=1, and leaves kernels uncompiled: unset it")
    if not hasattr(knobs.runtime, "add_stages_inspection_hook"):
        raise RuntimeError(f"ptx takes launches out of Triton 3.6 and newer; Triton {triton.__version__} is installed")
    emulating = Driver(architecture, options or Options(), strict, keep)
    before = driver._active, knobs.runtime.add_stages_inspection_hook, Autotuner.run
    driver.set_active(emulating)
    knobs.runtime.add_stages_inspection_hook = _end_at_ptx
    Autotuner.run = _untimed(Autotuner.run)
    try:
        with knobs.cache.scope():
            knobs.cache.dir = str(Path(knobs.cache.dir, "ptx"))
            yield emulating.launches
    finally:
        driver._active, knobs.runtime.add_stages_inspection_hook, Autotuner.run = before


def _untimed(run: Callable[..., Any]) -> Callable[..., Any]:
    """Autotuner.run, which times nothing, and neither looks up nor remembers what was fastest: a GPU may come later."""

    def run_untimed(self: Any, *arguments: Any, **named: Any) -> Any:
        before = self.cache, self.cache_results
        self.cache, self.cache_results, self._bench = {}, False, _first_that_fits(self)
        try:
            return run(self, *arguments, **named)
        finally:
            self.cache, self.cache_results = before
            del self._bench

    return run_untimed


def _first_that_fits(tuner: Any) -> Callable[..., list[float]]:
    """In place of the times of a configuration: none for the first that can be launched, endless ones for the others."""
    fits = False

    def times(*arguments: Any, config: Any, **named: Any) -> list[float]:
        nonlocal fits
        if not fits:
            with suppress(OutOfResources, CompileTimeAssertionFailure):
                tuner.fn.run(*arguments, **{**named, **config.all_kwargs(), "warmup": True})._init_handles()
                fits = True
                return [0.0]
        return [math.inf]

    return times


def reseed() -> None:
    """Within `emulated`: the launches from here on are drawn as the first ones."""
    driver.active.launched = 0


def check_kernel(kernel: Any) -> None:
    """Raises where this is nothing that Triton compiles and launches."""
    inner = kernel
    while hasattr(inner, "fn") and isinstance(inner, KernelInterface):  # autotuned, with heuristics
        if isinstance(inner, InterpretedFunction):
            raise TypeError(
                f"{inner.fn.__name__} was decorated with TRITON_INTERPRET=1, and is not compiled: unset it before the import"
            )
        inner = inner.fn
    if inner is kernel:
        raise TypeError(f"a kernel must be a function of @triton.jit, autotuned or not, or PTX text; got {kernel!r}")


def _end_at_ptx(
    backend: Any = None, stages: dict[str, Any] | None = None, options: Any = None, language: Any = None, capability: Any = None
) -> tuple[str, str] | None:
    """Triton's hook in its list of stages: PTX is the machine code. Without arguments it says what caches keep apart."""
    if stages is None:
        return "PTX is the machine code", "ptx"
    stages["cubin"] = lambda text, metadata: text.encode()
    return None


class Driver:
    """What Triton asks of a driver. Each architecture is a device of its own, so that a kernel is kept for each."""

    def __init__(self, architecture: int, options: Options, strict: bool, keep: bool) -> None:
        self.properties = properties(architecture)
        self.architecture, self.options, self.strict, self.keep = architecture, options, strict, keep
        self.launched, self.launches = 0, list[Launch]()
        self.utils = SimpleNamespace(load_binary=_load, unload_module=_unload, get_device_properties=self._properties)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def _properties(self, device: int) -> dict[str, int]:
        shared, processors = self.properties
        return {"max_shared_mem": shared, "multiprocessor_count": processors, "max_num_regs": 65536, "warpSize": 32}

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(source, metadata)

    def launch(
        self, name: str, program: Program, values: list[Any], grid: Any, metadata: Any, memory: Memory, shapes: dict[str, Any]
    ) -> None:
        """Emulates a launch with a seed of its own."""
        sample = 0 if name in self.options.whole else self.options.sample
        options = replace(self.options, seed=self.options.seed + self.launched, sample=sample)
        self.launched += 1
        try:
            done = launch(program, values, grid, (32 * metadata.num_warps, 1, 1), metadata.shared, memory, options)
            done.name, done.shapes = name, shapes
            memory.back()
            if self.keep:
                self.launches.append(done)
            if self.strict:
                done.check()
        except (EmulationError, FindingsError) as error:
            raise type(error)(f"sm_{self.architecture}, seed {options.seed}, {name}: {error}") from None


def _load(name: str, machine_code: bytes, shared: int, device: int) -> tuple[None, Program, int, int, int]:
    """Module, function, registers, spills, and the most threads of a block."""
    text = machine_code.decode()
    if text not in _PROGRAMS:
        _PROGRAMS[text] = Program(text, name)
    return None, _PROGRAMS[text], 0, 0, 1024


def _unload(module: None) -> None:
    pass


class Launcher:
    """What Triton calls in place of a launch, made once for a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature, self.metadata = source.signature, metadata
        self.name = f"{source.fn.__module__.rpartition('.')[2]}.{source.fn.__name__}"

    def __call__(self, x: int, y: int, z: int, stream: int, program: Program, *more: Any) -> None:
        """more: packed metadata, the launch's metadata, two hooks, and the kernel's arguments."""
        memory, grid = Memory(), (x * self.metadata.num_ctas, y, z)  # a program is a cluster of blocks
        layouts = iter(getattr(self.metadata, "tensordesc_meta", None) or repeat(None))
        flat = _flat(zip(self.signature, self.signature.values(), more[4:], strict=True))
        arguments = [one for argument in flat for one in _without_descriptors(*argument, layouts)]
        values = [
            memory.place(value, name)
            if isinstance(value, Tensor)
            else value.encoded(memory, name)
            if isinstance(value, TensorMap)
            else float(value)
            if kind[0] in "fb"
            else int(value)
            for name, kind, value in arguments
        ]
        sizes = [getattr(self.metadata, f"{name}_size", 0) for name in SCRATCH]
        # FpSan and ConSan keep what they know in the profiler's. The tensors live until their copies are written back
        scratch = [torch.zeros(size * x * y * z, dtype=torch.uint8) for size in sizes]
        values += [memory.place(one, name) for name, one in zip(SCRATCH, scratch, strict=True)]
        shapes = {name: tuple(value.shape) for name, _, value in arguments if isinstance(value, Tensor | TensorMap)}
        driver.active.launch(self.name, program, values, grid, self.metadata, memory, shapes)


def _flat(arguments: Any) -> Iterator[tuple[str, str, Any]]:
    """Names, types and values of a kernel's parameters: members of tuples each by itself, and no constants."""
    for name, kind, value in arguments:
        if isinstance(kind, tuple):
            names = getattr(value, "_fields", range(len(kind)))
            yield from _flat((f"{name}.{member}", part, one) for member, part, one in zip(names, kind, value, strict=True))
        elif kind != "constexpr":
            yield name, kind, value


def _without_descriptors(
    name: str, kind: str, value: Any, layouts: Iterator[dict[str, Any] | None]
) -> Iterator[tuple[str, str, Any]]:
    """An argument, or what stands for a tensor descriptor: the map of its layout, or, where no copies of boxes were compiled, all
    that the descriptor says; then its shape and strides."""
    if not kind.startswith("tensordesc"):
        yield name, kind, value
        return
    layout, nan, rounded = next(layouts), value.padding == "nan", getattr(value, "round_f32_to_tf32", None)
    if rounded or (layout or {}).get("fp4_padded") or (layout or {}).get("is_im2col"):
        raise NotImplementedError(f"{name}: the emulator has no descriptors that round to tf32, of 4 bits, or for convolutions")
    if layout is None:
        yield name, "*", value.base
        for number in (*value.shape, *value.strides, nan, *([] if rounded is None else [rounded])):  # Triton 3.6 rounds nothing
            yield name, "i64", number
    else:
        swizzle = SWIZZLES[layout["swizzle"]]
        yield name, "nvTmaDesc", TensorMap(value.base, value.shape, value.strides, layout["block_size"], swizzle, nan)
    for number in (*value.shape, *value.strides):
        yield name, "i64", number
