"""Small kernels in PTX on tensors."""

from __future__ import annotations

from collections import Counter

import torch
from ptx.memory import Memory
from ptx.program import Program
from ptx.reports import Launch, Options

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry tested({parameters}) .maxntid {threads}
{{
    .reg .pred %p<64>; .reg .b16 %h<64>; .reg .b32 %r<200>; .reg .f32 %f<64>; .reg .b64 %rd<200>;
    .shared .align 1024 .b8 memory[{shared}];
    .local .align 16 .b8 stack[64];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %laneid;
    mov.u32 %r2, %ctaid.x;
    shr.u32 %r3, %r0, 5;
    mov.u32 %r4, memory;
    mad.lo.u32 %r5, %r0, 4, %r4;
    setp.eq.u32 %p0, %r0, 0;
    setp.eq.u32 %p1, %r3, 0;
"""


def run(
    body: str, *tensors: torch.Tensor, grid: int = 1, threads: int = 32, shared: int = 4096, options: Options | None = None
) -> Launch:
    """Runs `body` and changes the tensors.

    It finds in %r0 the thread, in %r1 its lane, in %r2 the block, in %r3 the warp, in %r4 the address of `memory` (shared), in %r5 this
    thread's word of it; in %p0 whether it is thread 0, in %p1 whether warp 0; and tensor k's address in %rd{k}, this thread's word
    of it in %rd{100 + k}. Shared variables are also named: `stack` is local.
    """
    parameters = ", ".join(f".param .u64 tensor{k}" for k in range(len(tensors)))
    text = HEADER.format(parameters=parameters, threads=threads, shared=shared)
    for k in range(len(tensors)):
        text += f"ld.param.u64 %rd{k}, [tensor{k}]; mad.wide.u32 %rd{100 + k}, %r0, 4, %rd{k};\n"
    memory = Memory()
    values = [memory.place(tensor, f"tensor {k}") for k, tensor in enumerate(tensors)]
    launch = Program(text + body.replace(";", ";\n") + "\nret;\n}\n", "tested").launch(
        values, (grid,), (threads,), 0, memory, options or Options()
    )
    memory.back()
    return launch


def kinds(body: str, *tensors: torch.Tensor, seeds: int = 5, **arguments: int) -> set[str]:
    """What is reported whatever the order of warps, as it is asserted to be the same for some seeds."""
    seen = Counter()
    for seed in range(seeds):
        copies = [tensor.clone() for tensor in tensors]
        seen.update({finding.kind for finding in run(body, *copies, options=Options(seed=seed), **arguments).findings})
    assert set(seen.values()) <= {seeds}, seen
    return set(seen)


def kinds_of_any(body: str, *tensors: torch.Tensor, seeds: int = 5, **arguments: int) -> set[str]:
    """What is reported for some seed."""
    seen: set[str] = set()
    for seed in range(seeds):
        copies = [tensor.clone() for tensor in tensors]
        seen |= {finding.kind for finding in run(body, *copies, options=Options(seed=seed), **arguments).findings}
    return seen


def words(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)
