"""The time of a kernel, from the counts of its emulated programs and the rates of an H200; kernels_page.py says how."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tools.compiled.table import Row
from vlattn_fast.benchmarks._rates import CLOCK, H200, SMS
from vlattn_fast.kernels._configurations import by_table
from vlattn_fast.kernels._tiles import CACHED

# of an H200, as those of benchmarks/_measure.py; kernels_page.py names the sources
ISSUE, L2 = 128 * CLOCK * SMS, 6.65e12  # instructions of threads and bytes a second
FIRST, LAUNCH = 700 / CLOCK, 1.3e-6  # seconds
# TFLOP/s of FlashAttention-2, cuDNN and FlashAttention-3 on an H100 by (pass, features, causal), then by tokens; a backward pass
# has no causal figure
PUBLISHED = {
    ("forward", 64, False): {512: (282, 335, 333), 1024: (306, 373, 392)},
    ("backward", 64, False): {512: (198, 266, 272), 1024: (238, 348, 363)},
    ("forward", 128, True): {512: (191, 315, 292), 1024: (260, 410, 423), 16384: (335, 539, 616)},
    ("backward", 128, False): {512: (214, 305, 316), 1024: (260, 408, 424), 16384: (322, 516, 561)},
}


@dataclass(frozen=True)
class Workload:
    name: str
    batch: int
    heads: int
    tokens: int
    size: int
    causal: bool = False
    few_queries: int = 0  # instead of as many as tokens

    @property
    def queries(self) -> int:
        return self.few_queries or self.tokens

    @property
    def pairs(self) -> float:
        return self.batch * self.heads * self.queries * self.tokens / (2 if self.causal else 1)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of (B, H, N, D) in bfloat16."""
        return 2 * self.batch * self.heads * self.tokens * self.size

    @property
    def map_bytes(self) -> int:
        """Bytes of (B, N, N) in float32."""
        return 4 * self.batch * self.tokens**2


@dataclass(frozen=True, eq=False)
class Entry:
    """One pass of an operator.

    call: as in tools/compiled/calls/. kernels: their names, and the tensors of B H N D that each reads or writes, of which one in
    float32 counts twice. products, tensors, special: the floor's matrix products over pairs, tensors read or written, and special
    functions a pair.
    """

    what: str
    workload: Workload
    call: str
    kernels: dict[str, int]
    products: int
    tensors: int
    special: float = 1


@dataclass(frozen=True)
class Times:
    """Microseconds that each part needs for its share of all kernels, and the estimate of the pass."""

    issue: float
    special: float
    products: float
    l2: float
    memory: float
    estimate: float


Rows = dict[tuple[str, str], Row]  # by the call and the kernel, all of one architecture


def issued(row: Row) -> int:
    """Instructions of threads, without moves between registers, of which machine code has few."""
    return sum(number for kind, number in row["instructions"].items() if kind != "move")


def share_under_softmax(entry: Entry, kernel: str) -> float:
    """The share of the products that the loop computes under the softmax of the tile before, on sm_90.

    It is the scores of all tiles in forward passes whose configuration says `AHEAD`.
    """
    if kernel != "_forward_kernel":
        return 0.0
    work = entry.workload
    dtype = torch.float32 if " fp32 " in entry.call else torch.bfloat16
    facts = {"dtype": dtype, "N": work.queries, "M": work.tokens, "size": work.size, "masked": False}
    config = by_table("score_attention", "forward", architecture="sm_90", score=entry.call.split()[1], **facts)
    return 0.5 if config.get("AHEAD", 0) else 0.0


def causal_time(blocks: int, heads: int, work: float, elements: int) -> float:
    """Seconds until the last program of a causal call ends: the next program begins where one ends.

    The programs of a head have 1 to `blocks` shares of all `work`, the sum of seconds. They come as `heads_in_turn` has them, for
    `elements` of keys and of values.
    """
    share = work / (heads * blocks * (blocks + 1) / 2)
    together = math.ceil(heads / min(heads, math.ceil(2 * heads * elements / CACHED.value)))
    ends = [0.0] * SMS
    for first in range(0, heads, together):
        for length in range(blocks, 0, -1):
            for _ in range(min(together, heads - first)):
                heapq.heapreplace(ends, ends[0] + FIRST + length * share)
    return max(ends)


def turns_time(work: Workload, seconds: float) -> float:
    """Seconds until the last program of csrc/cuda/relevancy_attention_long.cu ends: a program takes a tile of queries after the
    program of the keys before, or after these with a causal mask, has passed it on. seconds: of all tiles, one after another."""
    keys, tiles, heads = math.ceil(work.tokens / 128), math.ceil(work.tokens / 64), work.batch * work.heads
    together = max(1, (32 << 20) // (8 * work.tokens * work.size))
    firsts = [2 * n if work.causal else 0 for n in range(keys)]
    step = seconds / heads / sum(tiles - first for first in firsts)
    order = [*reversed(range(keys))] if work.causal else [*range(keys)]
    ends, passed = [0.0] * SMS, [[0.0] * tiles for _ in range(heads)]
    for begin in range(0, heads, together):
        for n in order:
            for head in range(begin, min(begin + together, heads)):
                now = ends[0] + FIRST
                for tile in range(firsts[n], tiles):
                    now = max(now, passed[head][tile]) + step
                    passed[head][tile] = now + step / 2  # it is passed on in the program's next tile
                heapq.heapreplace(ends, now)
    return max(ends)


def times_of(entry: Entry, rows: Rows) -> Times:
    """The times of all kernels of the pass, one after another."""
    work, kernels = entry.workload, []
    for kernel, tensors in entry.kernels.items():
        row = rows[entry.call, kernel]
        heads, queries, keys = row["pairs"]  # of the call, which has fewer
        programs = row["grid"] * work.batch * work.heads / heads * work.queries / queries
        copies = programs / row["programs"] * work.tokens / keys
        issue, special = copies * issued(row) / ISSUE, copies * row["instructions"].get("special", 0) / H200.exponentials
        # copies pass by L1, which holds what other instructions read again
        copied = "cp.async" in row["instructions"]
        products, l2 = copies * row["flop"] / H200.products, copies * 32 * row["sectors" if copied else "once"][0] / L2
        memory = (tensors * work.tensor_bytes + work.map_bytes * (kernel == "_map_kernel")) / H200.memory
        rest, hidden = max(issue, special), products * share_under_softmax(entry, kernel)
        program = FIRST + SMS * (max(hidden, rest) + products - hidden) / programs
        busy = program * math.ceil(programs / SMS)  # programs of one length end in rounds
        if kernel == "relevancy_long_kernel":
            busy = turns_time(work, programs * (program - FIRST))
        elif work.causal:
            heads = work.batch * work.heads
            busy = causal_time(round(programs / heads), heads, programs * (program - FIRST), work.tokens * work.size)
        estimate = LAUNCH + max(memory, l2, busy if copied else busy + l2)
        kernels.append((issue, special, products, l2, memory, estimate))
    return Times(*(1e6 * sum(times) for times in zip(*kernels, strict=True)))


def floor_of(entry: Entry) -> float:
    """The least time that the machine's rates allow, in microseconds."""
    work = entry.workload
    products = 2 * entry.products * work.size * work.pairs / H200.products
    return 1e6 * max(products, entry.special * work.pairs / H200.exponentials, entry.tensors * work.tensor_bytes / H200.memory)


def rate_of(entry: Entry, microseconds: float) -> float:
    """TFLOP/s of the floor's matrix products."""
    return 2e-6 * entry.products * entry.workload.size * entry.workload.pairs / microseconds


class Published(NamedTuple):
    """Rates in TFLOP/s of calls with so many tokens."""

    flash2: int
    cudnn: int
    flash3: int
    tokens: int
    causal: bool


def nearest(entry: Entry) -> Published | None:
    """The rates at the nearest published length."""
    *operator, way = entry.what.split(", ")
    if operator != ["score_attention", "dot"]:
        return None
    work = entry.workload
    causal = work.causal and (way, work.size, True) in PUBLISHED
    rates = PUBLISHED[way, work.size, causal]
    tokens = min(rates, key=lambda tokens: abs(tokens - work.tokens))
    return Published(*rates[tokens], tokens, causal)
