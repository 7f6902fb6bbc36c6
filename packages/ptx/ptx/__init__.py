"""Compiled GPU kernels run on a CPU: the PTX of Triton and of nvcc, instruction by instruction, watched while it runs.

    launch = ptx.run(add_kernel, (4,), x, y, out, x.numel(), BLOCK=128, arch=90)

    PTX text → reading/ (reader, translate by the table in opcodes, flow) → running/ (program, launch) → machine/ (C++) → Launch

`triton` and `cuda` take launches out of Triton and out of CUDA's host code. `calls` has the functions that are here, and `plugin`
is pytest's. README.md shows each by an example. `sanitizers` compiles Triton's kernels under FpSan and ConSan.

It runs what is compiled: layouts, shared memory, barriers, asynchronous copies, tensor-core products, predicates. Blocks and
warps take turns in an order drawn by a seed. It reports accesses outside of the tensors, reads of what was never written, races,
copies and products that are used before their wait, misaligned vectors, and deadlocks, each with its lines in the PTX and in the
source. An opcode that the table does not name stops with its line.

What it cannot show:
- weak ordering: memory is seen in the order of execution; races are told by barriers and fences, not by values that come late;
- timing: clocks count instructions; caches, latencies, occupancy and the arbitration between warps of a device are not there;
- rounding in tensor cores: products are summed in float32, in the order of k; a device keeps other bits on the way;
- approximations of a device: they are exact to one rounding, or, with noise, off by up to the error that the PTX ISA documents;
- what ptxas makes of PTX: registers, spills, the order of instructions, and its faults;
- results that PTX leaves open, such as the quotient by zero or the last bit of a sum of atomics.

In: Triton kernels, CUDA C++ kernels or PTX text, on CPU tensors.
Out: the tensors as a GPU leaves them; launches with counts and findings.
Imports: ptx.reading, ptx.running.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptx.calls import emulated, run
    from ptx.reading.reader import PtxError
    from ptx.running.launch import Launch
    from ptx.running.reports import EmulationError, Finding, FindingsError, Options
    from ptx.running.tensor_maps import TensorMap

# Imported when they are first asked for: where ptx is installed, each process of pytest loads the plugin, and so this module.
_MODULES = {
    "ptx.calls": ("emulated", "run"),
    "ptx.reading.reader": ("PtxError",),
    "ptx.running.launch": ("Launch",),
    "ptx.running.reports": ("EmulationError", "Finding", "FindingsError", "Options"),
    "ptx.running.tensor_maps": ("TensorMap",),
}

__all__ = ["EmulationError", "Finding", "FindingsError", "Launch", "Options", "PtxError", "TensorMap", "emulated", "run"]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
