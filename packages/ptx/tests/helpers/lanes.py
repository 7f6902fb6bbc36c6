"""Few lines of PTX run by one or some warps: registers go in and come out as arrays of numbers a lane."""

from __future__ import annotations

import numpy as np
import torch

from ptx.running.launch import Launch, launch
from ptx.running.memory import Memory
from ptx.running.program import Program
from ptx.running.reports import Options

HEADER = """
.version 8.7
.target {target}
.address_size 64
.visible .entry tested(.param .u64 input, .param .u64 output) .maxntid {threads}
{{
    .reg .pred %p<64>; .reg .b16 %h<64>; .reg .b32 %r<1000>; .reg .f32 %f<64>; .reg .b64 %rd<64>;
    .shared .align 1024 .b8 memory[{shared}];
    ld.param.u64 %rd1, [input];
    ld.param.u64 %rd2, [output];
    mov.u32 %r999, %tid.x;
    mul.wide.u32 %rd3, %r999, 4;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
"""


def run_lanes(
    body: str,
    inputs: np.ndarray,
    outputs: int,
    *,
    threads: int = 32,
    shared: int = 1024,
    options: Options | None = None,
    target: str = "sm_90a",
) -> tuple[np.ndarray, Launch]:
    """Runs `body`, which finds row k of `inputs` (k, threads) in %r{k} and leaves row k of the outputs in %r{500 + k}.

    `memory` is shared memory. %r999 is the thread; %rd1 to %rd3 are taken.
    """
    loads = "".join(f"    ld.global.b32 %r{k}, [%rd1+{4 * threads * k}];\n" for k in range(len(inputs)))
    stores = "".join(f"    st.global.b32 [%rd2+{4 * threads * k}], %r{500 + k};\n" for k in range(outputs))
    text = HEADER.format(threads=threads, shared=shared, target=target) + loads + body + "\n" + stores + "    ret;\n}\n"
    memory = Memory()
    source = torch.from_numpy(np.ascontiguousarray(inputs).view(np.int32).copy())
    result = torch.zeros(outputs, threads, dtype=torch.int32)
    values = [memory.place(source, "input"), memory.place(result, "output")]
    done = launch(Program(text, "tested"), values, (1, 1, 1), (threads, 1, 1), 0, memory, options or Options())
    memory.back()
    return result.numpy().view(np.uint32), done


def kinds(launch: Launch) -> list[str]:
    """What was reported, sorted."""
    return sorted({finding.kind for finding in launch.findings})


def registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + k}" for k in range(count)) + "}"
