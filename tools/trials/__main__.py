"""Counts `relevancy_step` in Triton, as it is, and in Gluon: `python -m tools.trials [TOKENS]` prints docs/gluon.md's table.

Estimates are those of tools/pages/kernels_page.py for CLIP ViT-L/14 with a batch of 64, but for the share of products beside
exponentials.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ptx.running.launch import Launch
from ptx.running.reports import Options
from tools.compiled.counts import Row
from tools.compiled.device import pretend
from tools.compiled.triton import _row as compiled_row
from tools.emulated.triton import emulated
from tools.pages.kernel_times import FIRST, LAUNCH, Entry, Workload, issued, times_of
from tools.trials.relevancy_step import step
from vlattn_fast.backends.inputs import RelevancyStepInputs
from vlattn_fast.benchmarks._rates import SMS
from vlattn_fast.kernels import _configurations, relevancy_attention

BATCH, HEADS, SIZE = 64, 16, 64
PROGRAMS = 2  # of a grid: each does the same work


def as_it_is(r: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, lse: Tensor, scale: float) -> Tensor:
    inputs = RelevancyStepInputs(
        relevancy=r[:, None],
        query=query,
        key=key,
        value=value,
        grad_output=grad_output,
        lse=lse,
        attn_mask=None,
        key_mask=None,
        row_bias=None,
        key_groups=None,
        rule="gradient",
        row_normalize=False,
        score="dot",
        parameter=0.0,
        scale=scale,
        is_causal=False,
        backend="triton",
    )
    return relevancy_attention.step(inputs)[:, 0]


# with the keys of a program, and the share of the products that run beside exponentials by their order in the machine code
STEPS: dict[str, tuple[Callable[..., Tensor], int, float]] = {
    "Triton, as it is": (as_it_is, 1, 0.4),
    "Gluon, products ahead": (lambda *inputs: step(*inputs, ahead=True), 128, 1.0),
    "Gluon, groups in turn": (lambda *inputs: step(*inputs, ahead=False), 256, 1.0),
}
KERNELS = ("_step_kernel", "_gluon_kernel")


def random_inputs(heads: int, tokens: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_output = (torch.randn(1, heads, tokens, SIZE, generator=generator).bfloat16() for _ in range(4))
    scale = 1 / math.sqrt(SIZE)
    lse = (scale * query.double() @ key.double().mT).logsumexp(-1).float()
    return torch.randn(1, tokens, generator=generator), query, key, value, grad_output, lse, scale


def machine_code(call: Callable[..., Tensor], tokens: int) -> Row:
    """Registers, products and waits of the kernel that a call launches."""
    rows: list[Row] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if self.fn.__name__ in KERNELS:
            rows.append(compiled_row(kernel))

    pretend(90)
    with patch.object(JITFunction, "run", compile_only), patch.object(_configurations, "TARGET", "sm_90"):
        call(*random_inputs(HEADS, tokens))
    (row,) = rows
    return row


def counted(call: Callable[..., Tensor], tokens: int) -> Row:
    with emulated(90, Options(counts=True, sample=PROGRAMS)) as launches:
        call(*random_inputs(HEADS, tokens))
    launch: Launch = next(launch for launch in launches if launch.name.endswith(KERNELS))
    return {
        "pairs": (HEADS, tokens, tokens),
        "programs": PROGRAMS,
        "grid": math.prod(launch.grid),
        "instructions": {kind: number for kind, number in launch.lanes.items() if number},
        "flop": launch.flop,
        "sectors": [launch.accesses.sectors, launch.accesses.least_sectors],
        "once": launch.once,
    }


def main(tokens: int) -> None:
    work = Workload(f"CLIP ViT-L/14, {tokens} tokens", BATCH, HEADS, tokens, SIZE)
    print("| | issued | registers | spills | shared | products / waits | issue | special | products | L2 | estimate |")
    print("| --- |" + " ---: |" * 10)
    for name, (call, keys, beside) in STEPS.items():
        if tokens % keys:
            continue
        code, row = machine_code(call, tokens), counted(call, tokens)
        times = times_of(Entry(name, work, "", {"": 4}, 2, 4), {("", ""): row})
        programs = row["grid"] * BATCH
        rest, share = max(times.issue, times.special), beside * times.products
        program = 1e6 * FIRST + SMS * (max(share, rest) + times.products - share) / programs
        estimate = 1e6 * LAUNCH + max(times.memory, times.l2, program * math.ceil(programs / SMS))
        print(
            f"| {name} | {issued(row) / PROGRAMS * row['grid'] / (HEADS * tokens**2):.1f} | {code['registers']} "
            f"| {code['spills']} | {code['shared'] / 1024:.0f} KB | {code['products']} / {code['waits']} | {times.issue:.0f} "
            f"| {times.special:.0f} | {times.products:.0f} | {times.l2:.0f} | {estimate:.0f} |"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 768)
