"""The time of a kernel, from the counts of its compiled loops and the rates of an H200. docs/kernels.md says what is added up.

Only the loops over tiles are counted.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tools.compiled.machine_code import Loop, of_whole_tiles
from tools.compiled.table import Row
from vlattn_fast.benchmarks._measure import CLOCK, MEMORY, SMS, SPECIAL, TENSOR
from vlattn_fast.kernels._configurations import Config, by_table

# of an H200, as those of benchmarks/_measure.py; docs/kernels.md names the sources
ISSUE, L2 = 128 * CLOCK * SMS, 6.65e12  # instructions of threads and bytes a second
FIRST, LAUNCH = 700 / CLOCK, 1.3e-6  # seconds
# TFLOP/s of FlashAttention-3 on an H100 by (pass, features, causal), then by tokens; a backward pass has no causal figure
PUBLISHED = {
    ("forward", 64, False): {512: 333, 1024: 392},
    ("backward", 64, False): {512: 272, 1024: 363},
    ("forward", 128, True): {512: 292, 1024: 423, 16384: 616},
    ("backward", 128, False): {512: 316, 1024: 424, 16384: 561},
}
SPECIAL_A_UNIT = {"additive": 0.5, "hadamard_tanh": 1.0}  # in `_sum_pairs`: half a reciprocal, or tanh


@dataclass(frozen=True)
class Workload:
    name: str
    batch: int
    heads: int
    tokens: int
    size: int
    causal: bool = False

    @property
    def pairs(self) -> float:
        return self.batch * self.heads * self.tokens**2 / (2 if self.causal else 1)

    def programs(self, rows: int, keys: int, edge: int | None, by_key: bool) -> list[tuple[int, int]]:
        """The tiles of each program of a head that hold any pair, as (tiles away from the edge, tiles at the edge).

        A program goes over all keys of its rows, or by key over all rows of its keys. The edge has the last tile where a kernel
        has a smaller one for it, or else the diagonal of a causal mask; by key the diagonal does not count as one."""
        blocks, inner = (keys, rows) if by_key else (rows, keys)
        starts = range(0, self.tokens, blocks)
        if self.causal and by_key:
            return [(-(-self.tokens // rows) - start // rows, 0) for start in starts]
        if self.causal:
            whole = [(start + 1) // keys for start in starts]
            return [(n, -(-min(self.tokens, start + rows) // keys) - n) for n, start in zip(whole, starts, strict=True)]
        tiles = (-(-self.tokens // inner), 0) if edge is None else (self.tokens // inner, int(self.tokens % inner > 0))
        return [tiles] * len(starts)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of (B, H, N, D) in bfloat16."""
        return 2 * self.batch * self.heads * self.tokens * self.size

    @property
    def map_bytes(self) -> int:
        """Bytes of (B, N, N) in float32."""
        return 4 * self.batch * self.tokens**2


class Work(NamedTuple):
    """A kernel's matrix products over pairs; the tensors of B H N D that each program reads tile by tile; all that the kernel
    reads or writes. A float32 tensor counts twice."""

    products: int
    streamed: int
    tensors: int


@dataclass(frozen=True, eq=False)
class Entry:
    """One pass of an operator.

    call: as in tools/compiled/calls/. products, tensors, special: the floor's matrix products over pairs, tensors of B H N D read
    or written, and special functions a pair.
    """

    what: str
    workload: Workload
    call: str
    kernels: dict[str, Work]
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


@dataclass(frozen=True)
class Turn:
    """Work of a program's threads on a tile: instructions, special functions among them, and pairs."""

    issue: float
    special: float
    pairs: int


def turns_of(key: str, row: Row, size: int, queries: int | None = None) -> tuple[Turn, Turn]:
    """The turns for a whole tile and for a tile at the edge. key: of the row in the table.

    queries: the number of a tile's queries, where a kernel skips missing ones (`_units_backward_kernel`); all by default.
    """
    rows, keys = map(int, row["tile"].split("x"))
    threads, edge_keys = 32 * row["warps"], row["edge"] or 0
    edge: list[tuple[list[int], float]] = []
    if row["per_pair"] is not None:
        # a pass over the tiles for each number of matrix instructions, and the pass's loop without masks
        loops = [Loop(*loop) for loop in row["loops"] if loop[1] > 0]
        whole = of_whole_tiles(loops, (rows, keys), row["edge"])
        turns = [
            (list(min((x.instructions, x.mma, x.mufu) for x in whole if x.mma == mma)), 1.0) for mma in {x.mma for x in whole}
        ]
        edge = [([x.instructions, x.mma, x.mufu], 1.0) for x in loops if x not in whole]
        return _turn(turns, threads, rows * keys), _turn(edge, threads, edge_keys * (keys if _by_key(key) else rows))
    # sums over hidden units: a loop for each way to combine exponentials, for the scores, then for the gradients, where a thread
    # has one unit of a group of keys and takes two queries a turn; the loops of the tile at the edge follow
    loops_of_units = [loop for loop in row["loops"] if loop[1] == 0 and loop[2]]
    ways, groups = 3 if "additive" in key else 1, max(1, threads // size)
    special = row.get("special_a_unit", SPECIAL_A_UNIT[key.split()[1]])  # rows of old kernels hold theirs
    of_a_tile = 2 * ways if "backward" in key else ways

    def turn(loops: list[list[int]], pairs: int) -> Turn:
        scores = min(loops[:ways])
        units = round(scores[2] * threads / pairs / special)  # in a turn of the loop; a weight takes a reciprocal, too
        turns = [(scores, size / units)]
        if "backward" in key:
            turns.append((min(loops[ways:]), groups * math.ceil((rows if queries is None else queries) / 2 / groups)))
        return _turn(turns, threads, pairs)

    whole_tile = turn(loops_of_units[:of_a_tile], rows * keys)
    if len(loops_of_units) == of_a_tile or "forward" in key:
        return whole_tile, Turn(0, 0, 0)
    return whole_tile, turn(loops_of_units[of_a_tile:], rows * edge_keys)


def _by_key(key: str) -> bool:
    return any(name in key for name in ("_backward_kv_kernel", "_received_kernel", "_units_backward_kernel"))


def _turn(loops: Sequence[tuple[Sequence[int], float]], threads: int, pairs: int) -> Turn:
    return Turn(*(threads * sum(loop[k] * times for loop, times in loops) for k in (0, 2)), pairs)


Program = list[tuple[int, Turn]]  # its tiles, as (number, turn) of equal tiles, first those away from the edge


def programs_of(key: str, row: Row, work: Workload) -> tuple[list[Program], int]:
    """The programs of a head in the order of the launch, and how many times a launch has them."""
    rows, keys = map(int, row["tile"].split("x"))
    heads = work.batch * work.heads
    if "_units_backward_kernel" in key:  # a program has a head
        blocks = (work.tokens // keys, 1) if row["edge"] and work.tokens % keys else (math.ceil(work.tokens / keys), 0)
        last = work.tokens % rows
        head = [
            (count * tiles, turn)
            for queries, tiles in ((rows, work.tokens // rows), (last, int(last > 0)))
            for count, turn in zip(blocks, turns_of(key, row, work.size, queries), strict=True)
        ]
        return [head], heads
    whole, edge = turns_of(key, row, work.size)
    edge = whole if work.causal else edge
    if "_map_kernel" in key:  # a program has a tile of all heads
        return [[(work.heads, whole)]] * (math.ceil(work.tokens / rows) * math.ceil(work.tokens / keys)), work.batch
    # the sums over units of a forward pass have tiles of one size
    counts = work.programs(rows, keys, None if row["per_pair"] is None else row["edge"], _by_key(key))
    if "_forward_kernel" not in key:
        counts = sorted(counts, reverse=True)  # the longest first
    return [[(count, whole), (few, edge)] for count, few in counts], heads


def forward_configuration(entry: Entry) -> Config:
    """That of `_forward_kernel` on sm_90."""
    work, score = entry.workload, entry.call.split()[1]
    facts = {"score": score, "dtype": torch.bfloat16, "N": work.tokens, "M": work.tokens, "size": work.size, "masked": False}
    return by_table("score_attention", "forward", architecture="sm_90", **facts)


def carries_scores(entry: Entry, kernel: str) -> bool:
    """Whether the loop computes the next tile's scores under this tile's softmax."""
    return kernel == "_forward_kernel" and forward_configuration(entry).get("AHEAD", 0) == 1


def seconds_of(program: Program, products: int, size: int, ahead: bool) -> float:
    """The time of an SM for a program. Products and the rest come one after another; with `ahead`, away from the edge the product
    for the scores runs beside the rest."""
    seconds = FIRST
    for edge, (count, turn) in enumerate(program):
        together = 2 * products * size * turn.pairs * SMS / TENSOR
        rest = max(turn.issue / ISSUE, turn.special / SPECIAL) * SMS
        beside = together / products if ahead and not edge else 0.0
        seconds += count * (max(beside, rest) + together - beside)
    return seconds


def last_end(lengths: Iterable[float]) -> float:
    """When the last of these programs ends, if each goes to the SM that is free first, and an SM has one at a time."""
    ends = [0.0] * SMS
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def times_of(entry: Entry, rows: dict[str, Row]) -> Times:
    """The times of all kernels of the pass, one after another."""
    work, kernels = entry.workload, []
    for kernel, does in entry.kernels.items():
        key = f"{entry.call} {kernel} sm_90"
        row, ahead = rows[key], carries_scores(entry, kernel)
        programs, copies = programs_of(key, row, work)
        issue, special, pairs = (
            copies * sum(count * getattr(turn, name) for program in programs for count, turn in program)
            for name in ("issue", "special", "pairs")
        )
        height, width = map(int, row["tile"].split("x"))
        rows_read = pairs / (width if _by_key(key) else height)  # of a tensor, by all programs
        if kernel == "_map_kernel":
            rows_read += pairs / width  # both sides of its tile, for each head
        l2 = 2 * does.streamed * work.size * rows_read / L2
        memory = (does.tensors * work.tensor_bytes + work.map_bytes * (kernel == "_map_kernel")) / MEMORY
        busy = last_end([seconds_of(program, does.products, work.size, ahead) for program in programs] * copies)
        estimate = LAUNCH + max(memory, l2, busy if row["cp_async"] else busy + l2)
        kernels.append((issue / ISSUE, special / SPECIAL, 2 * does.products * work.size * pairs / TENSOR, l2, memory, estimate))
    return Times(*(1e6 * sum(times) for times in zip(*kernels, strict=True)))


def floor_of(entry: Entry) -> float:
    """The least time that the machine's rates allow, in microseconds."""
    work = entry.workload
    products = 2 * entry.products * work.size * work.pairs / TENSOR
    return 1e6 * max(products, entry.special * work.pairs / SPECIAL, entry.tensors * work.tensor_bytes / MEMORY)


def rate_of(entry: Entry, microseconds: float) -> float:
    """TFLOP/s of the floor's matrix products."""
    return 2e-6 * entry.products * entry.workload.size * entry.workload.pairs / microseconds


def published(entry: Entry) -> tuple[int, int, bool] | None:
    """FlashAttention-3's rate in TFLOP/s at the nearest published length, this length, and whether that call was causal."""
    *operator, way = entry.what.split(", ")
    if operator != ["score_attention", "dot"]:
        return None
    work = entry.workload
    causal = work.causal and (way, work.size, True) in PUBLISHED
    rates = PUBLISHED[way, work.size, causal]
    tokens = min(rates, key=lambda tokens: abs(tokens - work.tokens))
    return rates[tokens], tokens, causal
