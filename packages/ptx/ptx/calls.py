"""`run` launches one kernel, `emulated` takes all launches of Triton while it lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor

from ptx.architectures import properties
from ptx.running.launch import Launch, launch
from ptx.running.memory import Memory, marked
from ptx.running.program import Program
from ptx.running.reports import Options
from ptx.running.tensor_maps import TensorMap

Grid = int | tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]


def run(
    kernel: Any, grid: Grid, *arguments: Any, arch: int = 90, options: Options | None = None, strict: bool = True, **named: Any
) -> Launch:
    """Launches a kernel on CPU tensors as the GPU sm_`arch` (80, 90, 100) would. Results are in the tensors; the launch that it
    gives has counts and findings.

        launch = ptx.run(add_kernel, (4,), x, y, out, x.numel(), BLOCK=128)

    `kernel`: a function of @triton.jit, autotuned or not (the first configuration that fits is taken), with `named` as in
    kernel[grid](...). Or PTX text: then `named` are `block`, the threads of a block in up to three dimensions, `shared`, bytes
    of dynamic shared memory, `name`, that of the kernel where the text has several, and `cluster`, blocks of a cluster (three
    dimensions at most) where the text does not say how many.
    Findings raise FindingsError, unless not `strict`. An access outside of the tensors, a deadlock or a trap raises
    EmulationError in any case. To have reads of what was never written reported, allocate within `emulated`.
    """
    properties(arch)
    if options is not None and not isinstance(options, Options):
        raise TypeError(f"options must be ptx.Options; got {options!r}. A kernel's own argument of this name goes by position")
    if isinstance(kernel, str):
        return _run_text(kernel, (grid,) if isinstance(grid, int) else grid, arguments, options or Options(), strict, **named)
    triton = _triton()
    triton.check_kernel(kernel)
    with triton.emulated(arch, options, strict=strict) as launches:
        kernel[(grid,) if isinstance(grid, int) else grid](*arguments, **named)
    if not launches:
        raise ValueError(f"the grid {grid} has no programs: nothing was launched")
    return launches[-1]


@contextmanager
def emulated(arch: int = 90, options: Options | None = None, *, strict: bool = True) -> Iterator[list[Launch]]:
    """Within it launches of Triton take CPU tensors and run as on the GPU sm_`arch`. Gives the list of launches, which grows.

        with ptx.emulated(90) as launches:
            loss = library_function(x)
            loss.backward()

    What Python allocates within it and no kernel writes (torch.empty) comes full of NaN, and kernels that read it are reported.
    """
    with _triton().emulated(arch, options, strict=strict) as launches, marked():
        yield launches


def _triton() -> ModuleType:
    try:
        from ptx import triton
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
        raise ModuleNotFoundError(
            "ptx takes the launches of Triton, which is not installed: pip install triton", name="triton"
        ) from None
    return triton


def _run_text(
    text: str,
    grid: Any,
    arguments: tuple[Any, ...],
    options: Options,
    strict: bool,
    block: int | tuple[int, ...] = 0,
    shared: int = 0,
    name: str = "",
    cluster: int | tuple[int, ...] = (),
) -> Launch:
    program, memory = Program(text, name), Memory()
    threads, blocks = ((size,) if isinstance(size, int) else size for size in (block, cluster))
    if not all(isinstance(n, int) and n > 0 for n in (*grid, *threads, *blocks)):
        raise ValueError(f"grid, block and cluster must be positive numbers, three at most; got {grid=}, {block=}, {cluster=}")
    if len(arguments) != len(program.parameters):
        raise TypeError(f"{program.name} takes {len(program.parameters)} arguments; got {len(arguments)}")
    values = [
        memory.place(argument, f"argument {n}")
        if isinstance(argument, Tensor)
        else argument.encoded(memory, f"argument {n}")
        if isinstance(argument, TensorMap)
        else argument
        for n, argument in enumerate(arguments)
    ]
    done = launch(program, values, grid, threads, shared, memory, options, blocks)
    memory.back()
    if strict:
        done.check()
    return done
