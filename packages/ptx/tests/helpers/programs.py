"""Small kernels in PTX on tensors."""

from __future__ import annotations

from dataclasses import replace

import torch

from ptx.running.launch import Launch, launch
from ptx.running.memory import Memory
from ptx.running.program import Program
from ptx.running.reports import Options
from ptx.running.tensor_maps import TensorMap

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
    body: str,
    *tensors: torch.Tensor | TensorMap,
    grid: int = 1,
    threads: int = 32,
    shared: int = 4096,
    options: Options | None = None,
) -> Launch:
    """Runs `body` and changes the tensors.

    Registers hold: %r0 the thread, %r1 its lane, %r2 the block, %r3 the warp, %r4 the address of `memory` (shared), %r5 this
    thread's word of it, %p0 whether it is thread 0, %p1 whether it is in warp 0, %rd{k} tensor k's address, %rd{100 + k} this
    thread's word of it. `stack` is local. A tensor map's address is that of the parameter.
    """
    maps = [isinstance(one, TensorMap) for one in tensors]
    declared = (f".align 64 .b8 tensor{k}[128]" if is_map else f".u64 tensor{k}" for k, is_map in enumerate(maps))
    parameters = ", ".join(f".param {one}" for one in declared)
    text = HEADER.format(parameters=parameters, threads=threads, shared=shared)
    for k, is_map in enumerate(maps):
        if is_map:
            text += f"mov.b64 %rd{k}, tensor{k}; cvta.param.u64 %rd{k}, %rd{k};\n"
        else:
            text += f"ld.param.u64 %rd{k}, [tensor{k}]; mad.wide.u32 %rd{100 + k}, %r0, 4, %rd{k};\n"
    memory = Memory()
    values = [
        one.encoded(memory, f"tensor {k}") if isinstance(one, TensorMap) else memory.place(one, f"tensor {k}")
        for k, one in enumerate(tensors)
    ]
    program = Program(text + body.replace(";", ";\n") + "\nret;\n}\n", "tested")
    done = launch(program, values, (grid,), (threads,), 0, memory, options or Options())
    memory.back()
    return done


def kinds(body: str, *tensors: torch.Tensor | TensorMap, seeds: int = 6, **arguments: int) -> set[str]:
    """What is reported for some seeds: something for each of them, or nothing for any."""
    seen = []
    for seed in range(seeds):
        copies = [replace(one, base=one.base.clone()) if isinstance(one, TensorMap) else one.clone() for one in tensors]
        options = Options(seed=seed, interleave=seed % 2 * 3)
        seen.append({finding.kind for finding in run(body, *copies, options=options, **arguments).findings})
    assert all(seen) or not any(seen), seen
    return set().union(*seen)


def words(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)
