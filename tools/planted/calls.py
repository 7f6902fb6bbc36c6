"""Calls of operators, forward and backward, whose kernels take faults."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.jit import JITFunction

import ptx.cuda
import ptx.running.memory
import ptx.triton
import tools.emulated.cuda
import tools.emulated.triton
from ptx.planting.faults import IN_PTX, IN_SOURCE, Change, Fault, edited
from ptx.reading.reader import Module, PtxError
from ptx.running.program import Program
from ptx.running.reports import EmulationError, Options
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Sizes, Tensors
from vlattn_fast.checking.tolerance import Errors

SEEDS = (1, 2, 3)  # further ones where the first shows nothing
# No multiples of a tile, and so many tiles that a loop takes each place of its buffers again.
LONG = Sizes(208, 332, 64, 64, 50, 40, 128)
SHORT = Sizes(80, 140, 64, 64, 50, 40, 128)
NARROW = Sizes(41, 70, 40, 24, 50, 40, 128)


class Called(NamedTuple):
    operator: str
    name: str  # of a case of `vlattn verify`
    dtype: torch.dtype
    backend: str = "triton"
    sizes: Sizes = LONG
    all_keys: bool = False  # whether a program has all keys of a head, which sm_90 has kernels for; tile by tile otherwise

    @property
    def title(self) -> str:
        words = " CUDA C++" * (self.backend == "cuda") + ", all keys" * self.all_keys
        return f"{self.operator} {self.name} {str(self.dtype)[6:]}{words}"

    @property
    def architectures(self) -> tuple[int, ...]:
        if self.all_keys:
            return (90,)
        return (80, 90) if self.backend == "cuda" else (80, 90, 100)


CALLS = (
    Called("score_attention", "scaled_dot causal", torch.bfloat16),
    Called("relevancy_attention", "row-normalised", torch.bfloat16),
    Called("attention_map", "gradient", torch.float32),
    Called("stacked_cross_attention", "SCAN t2i", torch.bfloat16),
    Called("score_attention", "hadamard relu", torch.float32),
    Called("attention_statistics", "three groups", torch.float32),
    Called("congruence_loss", "iais_singular", torch.float32, sizes=SHORT),
    Called("score_attention", "additive", torch.bfloat16, "cuda", NARROW),
    Called("relevancy_attention", "row-normalised", torch.bfloat16, "cuda", NARROW),
    Called("congruence_loss", "iais_distributed", torch.float32, "cuda", NARROW),
    Called("score_attention", "grouped heads", torch.bfloat16),
    Called("score_attention", "scaled_dot causal", torch.bfloat16, sizes=SHORT, all_keys=True),
    Called("relevancy_attention", "gradient", torch.bfloat16, sizes=SHORT._replace(rows=1), all_keys=True),
)


class Outcome(NamedTuple):
    state: str  # noticed, harmless, within tolerance, not executed
    by: tuple[str, ...] = ()


ProgramOf = Callable[[str, Program], Program]


class Call:
    def __init__(self, architecture: int, called: Called) -> None:
        self.architecture, self.called = architecture, called
        cases = verify.cases(0, called.sizes, [called.operator])
        self.case = next(case for case in cases if case.name == called.name)
        self.tensors = self.case.in_dtype(called.dtype)
        self.programs: dict[str, Program] = {}  # without a fault, by names
        self._names: dict[tuple[str, str], str] = {}

    @cached_property
    def truth(self) -> tuple[Tensors, Tensors]:
        return verify._run(self.case, self.tensors, "reference", torch.float64), verify._run(self.case, self.tensors, "reference")

    @cached_property
    def unchanged(self) -> Tensors:
        """The results without a fault; `programs` and `executed` follow from this run."""

        def keep(title: str, program: Program) -> Program:
            if (program.text, program.name) not in self._names:
                same = sum(one.partition(" #")[0] == title for one in self.programs)
                name = f"{title} #{same + 1}" if same else title
                self._names[program.text, program.name], self.programs[name] = name, program
            return program

        results, launches = self.run(keep, 1)
        assert not (findings := [str(one) for launch in launches for one in launch.findings]), findings
        self.executed = {
            name: {one.line for count, one in zip(program.hits(), program.kernel.instructions, strict=True) if count}
            for name, program in self.programs.items()
        }
        return results

    def run(self, program_of: ProgramOf, seed: int) -> tuple[Tensors, list[Any]]:
        module = tools.emulated.cuda if self.called.backend == "cuda" else tools.emulated.triton
        with ExitStack() as stack:
            launches = stack.enter_context(module.emulated(self.architecture, Options(seed=seed), strict=False))
            stack.enter_context(nullcontext() if self.called.all_keys else tile_by_tile())
            stack.enter_context(_programs(program_of))
            stack.enter_context(ptx.running.memory.marked("vlattn_fast"))
            return verify._run(self.case, self.tensors, self.called.backend), launches

    def faults(self) -> list[Fault]:
        """All that apply to what the call runs."""
        assert self.unchanged
        lines = [
            (name, n, program.lines[n - 1])
            for name, program in self.programs.items()
            for n in sorted({one.line for one in program.kernel.instructions})
        ]
        in_ptx = [Fault(kind, name, n) for kind, edit in IN_PTX.items() for name, n, line in lines if edit(line) is not None]
        if self.called.backend == "cuda":
            return in_ptx
        compiled = {place for one in self.programs.values() for place in re.findall(r"// (\w+\.py:\d+):", one.text)}
        in_source = [
            Fault(kind, name, n)
            for kind, fault in IN_SOURCE.items()
            for name, function in _functions().items()
            for n, lines in enumerate(edited(function.src, fault, -1)[1])
            if any(f"{name.partition('.')[0]}.py:{function.def_file_line_number + n - 1}" in compiled for n in lines)
        ]
        return in_ptx + in_source

    def may_run(self, fault: Fault) -> bool:
        return fault.kind in IN_SOURCE or fault.place in self.executed[fault.kernel]

    def try_fault(self, fault: Fault) -> Outcome | None:
        """None where the fault makes no PTX, or no kernel, that compiles."""
        assert self.unchanged
        if fault.kind in IN_SOURCE:
            with _changed(fault, IN_SOURCE[fault.kind]):
                return self._judge(_same, in_source=True)
        if not self.may_run(fault):
            return Outcome("not executed")
        return self._with(fault, IN_PTX[fault.kind](self.line(fault)) or "")

    # ---- what reasons ask

    def line(self, fault: Fault) -> str:
        return self.programs[fault.kernel].lines[fault.place - 1]

    def same(self, fault: Fault, instead: str | Change) -> bool:
        """Whether nothing is noticed, and no bit differs, with another line (or lines), or node, at the place of a fault."""
        return self._with(fault, instead) == Outcome("harmless")

    def keeps_tolerance(self, fault: Fault, instead: str | Change) -> bool:
        return self._with(fault, instead) in (Outcome("harmless"), Outcome("within tolerance"))

    def _with(self, fault: Fault, instead: str | Change) -> Outcome | None:
        if not isinstance(instead, str):
            with _changed(fault, instead):
                return self._judge(_same)
        try:
            return self._judge(self._with_line(fault, instead))
        except PtxError:
            return None

    def _with_line(self, fault: Fault, line: str) -> ProgramOf:
        original = self.programs[fault.kernel]
        lines = list(alone(original).splitlines())
        lines[fault.place - 1] = line
        changed = Program("\n".join(lines), original.name)
        return lambda title, program: changed if (program.text, program.name) == (original.text, original.name) else program

    def _judge(self, program_of: ProgramOf, in_source: bool = False) -> Outcome | None:
        texts: set[str] = set()

        def note(title: str, program: Program) -> Program:
            texts.add(program.text)
            return program_of(title, program)

        same = True
        for seed in SEEDS:
            try:
                results, launches = self.run(note, seed)
            except EmulationError:
                return Outcome("noticed", ("error",))
            except triton.CompilationError:
                return None
            if in_source and texts <= {one.text for one in self.programs.values()}:
                return Outcome("not executed")
            by = {finding.kind for launch in launches for finding in launch.findings}
            by |= {"wrong result"} if self._wrong(results) else set()
            if by:
                return Outcome("noticed", tuple(sorted(by)))
            same &= all(_same_bits(results[name], x) for name, x in self.unchanged.items())
        return Outcome("harmless" if same else "within tolerance")

    def _wrong(self, results: Tensors) -> bool:
        exact, formula = self.truth
        for name, x in results.items():
            errors = Errors()
            errors.add(x, exact[name], formula[name])
            if not errors.ratio() <= 1:
                return True
        return False


@contextmanager
def tile_by_tile() -> Iterator[None]:
    """Within it kernels take keys tile by tile: no program has all keys of a head."""
    from vlattn_fast.kernels import _products_backward

    before, _products_backward.whole_config = _products_backward.whole_config, lambda *_: None
    try:
        yield
    finally:
        _products_backward.whole_config = before


def _same(title: str, program: Program) -> Program:
    return program


def _same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.detach().contiguous().view(torch.uint8), two.detach().contiguous().view(torch.uint8))


def alone(program: Program) -> str:
    """A program's text where other kernels have no bodies; each line keeps its number."""
    lines = list(program.lines)
    module = Module(program.text)
    for name in module.entries:
        if name != program.name:
            one = module.routines[name]
            first, last = one.line, one.line + one.body.count("\n")
            lines[first : last - 1] = [""] * (last - 1 - first)
    return "\n".join(lines)


@contextmanager
def _programs(program_of: ProgramOf) -> Iterator[None]:
    """Each launch takes the program that the function gives for a kernel's title and program."""
    launch, kernel = ptx.triton.Driver.launch, ptx.cuda.Device.kernel

    def triton_launch(self: ptx.triton.Driver, name: str, program: Program, *rest: Any) -> None:
        launch(self, name, program_of(program.name, program), *rest)

    def cuda_kernel(self: ptx.cuda.Device, one: Any) -> Any:
        fresh = ctypes.addressof(one) not in self.loaded
        loaded = kernel(self, one)
        if fresh:
            loaded.program = program_of(loaded.title, loaded.program)
        return loaded

    ptx.triton.Driver.launch, ptx.cuda.Device.kernel = triton_launch, cuda_kernel  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ptx.triton.Driver.launch, ptx.cuda.Device.kernel = launch, kernel  # type: ignore[method-assign]


def _functions() -> dict[str, JITFunction[Any]]:
    """The package's Triton functions, by module and name."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith("vlattn_fast.kernels.")}
    return {
        f"{one.__module__.rpartition('.')[2]}.{one.__name__}": one
        for module in modules.values()
        for one in vars(module).values()
        if isinstance(one, JITFunction) and one.__module__ in modules
    }


@contextmanager
def changed_source(name: str, edit: Callable[[str], str]) -> Iterator[None]:
    """Within it the Triton function has the source that `edit` makes of its own."""
    functions = _functions()
    function = functions[name]
    source = function.src
    function._unsafe_update_src(edit(source))
    _forget(functions)
    try:
        yield
    finally:
        function._unsafe_update_src(source)
        _forget(functions)


def _changed(fault: Fault, change: Change) -> AbstractContextManager[None]:
    return changed_source(fault.kernel, lambda source: edited(source, IN_SOURCE[fault.kind], fault.place, change)[0])


def _forget(functions: dict[str, JITFunction[Any]]) -> None:
    """Keys of what is compiled depend on the sources of all functions that a kernel calls."""
    for one in functions.values():
        one.hash = None
        one.device_caches.clear()
