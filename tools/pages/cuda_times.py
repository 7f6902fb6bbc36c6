"""The CUDA C++ kernels compared with Triton's: estimates for the same pass, with launches and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from tools.pages.kernel_times import LAUNCH, Entry, Rows, Workload, times_of


class Side(NamedTuple):
    """One language's pass: its counted call, its kernels with the tensors that each reads or writes, torch's small launches."""

    call: str
    kernels: dict[str, int]
    further: int


class Pair(NamedTuple):
    """A pass in both languages."""

    what: str
    workload: Workload
    triton: Side
    cuda: Side


WORDS = Workload("UNITER's 60 words and 100 regions", 1, 12, 60, 64)  # of whose sizes a count is scaled by heads and words
CLIP = Workload("CLIP ViT-L/14@336", 1, 16, 577, 64)
BATCHES = (1, 16, 256)

MAPS = {"map_kernel": 4, "_divergence_kernel": 0}
STEPS = ("map_kernel", "_divergence_kernel launch 2", "_target_backward_kernel", "_target_backward_kernel launch 2")
GRADIENTS = dict.fromkeys(STEPS, 0) | {"gradient_kernel": 8}


def _pairs() -> Iterator[Pair]:
    call = "cacr masked bf16 64"
    maps, again = {"congruence_map_kernel": 4, "congruence_divergence_kernel": 0}, ("map_kernel", "divergence_kernel")
    steps = dict.fromkeys((*(f"congruence_{kernel} launch 2" for kernel in again), "congruence_target_kernel"), 0)
    for what, triton_kernels, cuda_kernels, further in (
        ("forward", MAPS, maps, 1),  # the sum over parts of the loss
        ("backward", GRADIENTS, steps | {"congruence_gradient_kernel": 8}, 0),
    ):
        triton = Side(f"congruence_loss {call}", triton_kernels, further)
        yield Pair(f"congruence_loss, cacr, {what}", WORDS, triton, Side(f"congruence_loss cuda {call}", cuda_kernels, further))
    forward, backward = {"_prepare_kernel": 4, "_forward_kernel": 8}, {"_units_rows_kernel": 2, "_units_backward_kernel": 11}
    rows = {"units_rows_kernel": 2, "units_backward_kernel": 9, "units_query_kernel": 3}
    steps = {"_prepare_kernel": 4, "_rows_kernel": 4, "_units_step_kernel": 4}
    for score, call, what, triton_kernels, cuda_kernels, further in (
        (score, *each)
        for score in ("additive", "hadamard_tanh")
        for each in (
            ("score_attention", "forward", forward, {"units_forward_kernel": 4}, 0),
            ("score_attention", "backward", backward, rows, 2),  # a fill or a copy, and the sum of the vector's gradient
            ("relevancy_attention", "step", steps, {"units_rows_kernel": 4, "units_step_kernel": 4}, 3),
        )
    ):
        name = f"{'step ' if what == 'step' else ''}{score} bf16 64"
        sides = Side(f"{call} {name}", triton_kernels, further), Side(f"{call} cuda {name}", cuda_kernels, further)
        yield Pair(f"{call}, {score}, {what}", CLIP, *sides)


PAIRS = tuple(_pairs())


def estimates(pair: Pair, side: Side, batch: int, rows: Rows) -> tuple[float, float]:
    """Microseconds of a pass with all its launches, and in a graph, which has none."""
    entry = Entry(pair.what, replace(pair.workload, batch=batch), side.call, side.kernels, 0, 0)
    launches, estimate = 1e6 * LAUNCH * len(side.kernels), times_of(entry, rows).estimate
    return estimate + 1e6 * LAUNCH * side.further, estimate - launches


TEXT = """## CUDA C++ kernels compared with Triton's

The same estimate of the CUDA C++ kernels, which nvcc compiles for sm_90, and of Triton's kernels for the same pass. *launches*
counts the kernels of a pass and torch's small ones around them, {launch} µs each. *graph* is the estimate without
them, as in a CUDA graph. Times of torch's kernels are left out of both.

{table}

- Congruence: the CUDA C++ kernels pad rows and columns to 16, and copy a head while they work on another. Their estimate is
  shorter {congruence}
- Hidden units: the CUDA C++ kernels choose the layout of the scores in registers. Their estimate of additive scores is shorter
  {additive}
  Of Hadamard scores it is shorter {hadamard_tanh}
"""


def _wins(pairs: list[Pair], rows: Rows) -> str:
    """Where the CUDA C++ kernels' estimates are shorter."""
    shorter: tuple[list[str], list[str]] = ([], [])
    for pair in pairs:
        by_batch = [
            zip(estimates(pair, pair.cuda, batch, rows), estimates(pair, pair.triton, batch, rows), strict=True)
            for batch in BATCHES
        ]
        for cases, both in zip(shorter, zip(*by_batch, strict=True), strict=True):
            batches = [f"{batch}" for batch, (cuda, triton) in zip(BATCHES, both, strict=True) if cuda < triton]
            if batches:
                name = f"{pair.workload.name} {pair.what.rpartition(', ')[2]}"
                cases.append(name if len(batches) == len(BATCHES) else f"{name} with batches of {' and '.join(batches)}")
    launches, graph = (", ".join(cases) or "nowhere" for cases in shorter)
    return f"with launches: {launches}; in a graph: {graph}."


def section(rows: Rows) -> str:
    table = [
        "| µs | batch | launches, Triton | estimate | graph | launches, CUDA C++ | estimate | graph |",
        f"| --- |{' ---: |' * 7}",
    ]
    for pair in PAIRS:
        for batch in BATCHES:
            cells = [f"{pair.what}: {pair.workload.name}", f"{batch}"]
            for side in (pair.triton, pair.cuda):
                numbers = (f"{x:,.1f}" if x < 100 else f"{x:,.0f}" for x in estimates(pair, side, batch, rows))
                cells += [f"{len(side.kernels) + side.further}", *numbers]
            table.append(f"| {' | '.join(cells)} |")
    wins = {
        name: _wins([pair for pair in PAIRS if name in pair.what], rows) for name in ("congruence", "additive", "hadamard_tanh")
    }
    return TEXT.format(launch=LAUNCH * 1e6, table="\n".join(table), **wins)
