"""docs/kernels.md, from the stored table of the Triton kernels: `python -m tools.pages.kernels_page` writes it and its counts.

The predicted time of a kernel is the largest of four: instructions over issue slots, special functions over their unit's slots,
matrix products, and bytes. Kernels of one pass run one after another. Only the loops over tiles are counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.compiled.machine_code import Loop, of_whole_tiles
from tools.compiled.table import Row, read
from tools.compiled.triton import TABLE

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
COUNTS = ROOT / "benchmarks" / "results" / "machine_code.json"  # of old and present kernels

# an H200: measured rates of bfloat16 matrix products and copies; the rest from its clock of 1.83 GHz and 132 SMs
PRODUCTS, BYTES = 790e12, 4.3e12
CLOCKS = 132 * 1.83e9
ISSUE, SPECIAL = 128 * CLOCKS, 16 * CLOCKS  # instructions of threads a second
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

    def tiles(self, rows: int, keys: int, edge: int | None, by_key: bool) -> tuple[int, int]:
        """(whole tiles of a head that hold any pair, smaller tiles at the edge, where a kernel has these).

        A program goes over all keys of its rows, or by key over all rows of its keys."""
        blocks, inner = (keys, rows) if by_key else (rows, keys)
        if self.causal or edge is None:
            ends = [min(self.tokens, i + rows) if self.causal else self.tokens for i in range(0, self.tokens, rows)]
            return sum(-(-end // keys) for end in ends), 0
        programs = -(-self.tokens // blocks)
        return programs * (self.tokens // inner), programs * (self.tokens % inner > 0)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of (B, H, N, D) in bfloat16."""
        return 2 * self.batch * self.heads * self.tokens * self.size


CLIP = Workload("CLIP ViT-L/14@336, batch of 64", 64, 16, 577, 64)
UNITER = Workload("UNITER, batch of 256", 256, 12, 160, 64)
LLAVA = Workload("LLaVA-7B, batch of 4", 4, 32, 704, 128, causal=True)
HIGHRES = Workload("16,384 tokens, 32 heads of 128", 1, 32, 16384, 128, causal=True)


@dataclass(frozen=True)
class Entry:
    """One pass of an operator.

    call: as in tools/compiled/calls/. kernels: (name, matrix products over pairs) of each. products, tensors, special: the
    floor's matrix products over pairs, tensors of B H N D read or written, and special functions a pair.
    """

    what: str
    workload: Workload
    call: str
    kernels: dict[str, int]
    products: int
    tensors: int
    special: float = 1


FORWARD, BACKWARD = {"_forward_kernel": 2}, {"_backward_q_kernel": 3, "_backward_kv_kernel": 4}


def _scores() -> list[Entry]:
    entries = []
    for kind, special in (("dot", 1), ("cosine", 1), ("dot_relu", 1), ("dot_tanh", 2), ("dot_sigmoid", 2)):
        call = f"score_attention {kind} bf16 64"
        entries.append(Entry(f"score_attention, {kind}, forward", CLIP, call, FORWARD, 2, 4, special))
        entries.append(Entry(f"score_attention, {kind}, backward", CLIP, call, BACKWARD, 5, 8, special))
    # two hidden units share a reciprocal, or each takes a tanh; backward repeats this, as it recomputes products of q and k
    for kind, special in (("additive", 32.0), ("hadamard_tanh", 64.0)):
        call = f"score_attention {kind} bf16 64"
        entries.append(Entry(f"score_attention, {kind}, forward", CLIP, call, {"_forward_kernel": 1}, 1, 4, special))
        entries.append(Entry(f"score_attention, {kind}, backward", CLIP, call, {"_units_backward_kernel": 2}, 2, 8, 2 * special))
    for workload, call in (
        (UNITER, "score_attention dot padded bf16 160 64"),
        (LLAVA, "score_attention dot bf16 128"),
        (HIGHRES, "score_attention dot bf16 128"),
    ):
        entries.append(Entry("score_attention, dot, forward", workload, call, FORWARD, 2, 4))
        entries.append(Entry("score_attention, dot, backward", workload, call, BACKWARD, 5, 8))
    return entries


ENTRIES = [
    *_scores(),
    Entry("relevancy_attention, backward", CLIP, "relevancy_attention backward bf16 64", BACKWARD, 5, 8),
    Entry("relevancy_attention, backward", UNITER, "relevancy_attention backward 1 rows of 160 bf16 64", BACKWARD, 5, 8),
    Entry("relevancy_attention, backward", LLAVA, "relevancy_attention backward bf16 128", BACKWARD, 5, 8),
    Entry("relevancy_attention, backward", HIGHRES, "relevancy_attention backward bf16 128", BACKWARD, 5, 8),
    Entry("relevancy_step, lse given", CLIP, "relevancy_attention step bf16 64", {"_backward_kv_kernel": 2}, 2, 4),
    Entry("attention_map, attention", CLIP, "attention_map attention bf16 577 64", {"_rows_kernel": 1, "_map_kernel": 1}, 1, 2),
    Entry("attention_map, gradient", CLIP, "attention_map gradient bf16 577 64", {"_rows_kernel": 1, "_map_kernel": 2}, 2, 4),
    Entry("attention_map, attention", UNITER, "attention_map attention bf16 160 64", {"_map_kernel": 1}, 1, 2),
    Entry("attention_map, gradient", UNITER, "attention_map gradient bf16 160 64", {"_rows_kernel": 1, "_map_kernel": 2}, 2, 4),
    Entry("attention_map, log-sum-exp alone", CLIP, "attention_map attention bf16 577 64", {"_rows_kernel": 1}, 1, 2),
    Entry("attention_map, attention, lse given", CLIP, "attention_map attention lse bf16 577 64", {"_map_kernel": 1}, 1, 2),
    Entry("attention_map, gradient, lse given", CLIP, "attention_map gradient lse bf16 577 64", {"_map_kernel": 2}, 2, 4),
    *(
        entry
        for workload, call in (
            (CLIP, "attention_statistics 2 groups bf16 64"),
            (UNITER, "attention_statistics 2 groups bf16 160 64"),
        )
        for entry in (
            Entry("attention_statistics, 2 groups, forward", workload, call, {"_rows_kernel": 1, "_received_kernel": 1}, 1, 2),
            Entry(
                "attention_statistics, 2 groups, backward",
                workload,
                call,
                {"_backward_q_kernel": 3, "_backward_kv_kernel": 2},
                3,
                4,
            ),
        )
    ),
]


@dataclass(frozen=True)
class Times:
    """Microseconds of the loops over tiles, by the resource that they wait for."""

    issue: float
    special: float
    products: float
    memory: float
    predicted: float  # the sum over kernels of the longest of the first three, or the memory of all


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


def tiles_of(key: str, row: Row, work: Workload) -> list[tuple[int, Turn]]:
    """The tiles of a head, as (number, turn) of equal tiles."""
    rows, keys = map(int, row["tile"].split("x"))
    if "_units_backward_kernel" not in key:
        edge = None if row["per_pair"] is None else row["edge"]  # the rest of the sums over units have tiles of one size
        counts = work.tiles(rows, keys, edge, _by_key(key))
        return list(zip(counts, turns_of(key, row, work.size), strict=True))
    blocks = (work.tokens // keys, 1) if row["edge"] and work.tokens % keys else (math.ceil(work.tokens / keys), 0)
    last = work.tokens % rows
    return [
        (count * tiles, turn)
        for queries, tiles in ((rows, work.tokens // rows), (last, int(last > 0)))
        for count, turn in zip(blocks, turns_of(key, row, work.size, queries), strict=True)
    ]


def times_of(entry: Entry, rows: dict[str, Row]) -> Times:
    """The times of all kernels of the pass, one after another."""
    work, kernels = entry.workload, []
    for kernel, products in entry.kernels.items():
        key = f"{entry.call} {kernel} sm_90"
        tiles = tiles_of(key, rows[key], work)
        issue, special, pairs = (
            work.batch * work.heads * sum(count * getattr(turn, name) for count, turn in tiles)
            for name in ("issue", "special", "pairs")
        )
        kernels.append((issue / ISSUE, special / SPECIAL, 2 * products * work.size * pairs / PRODUCTS))
    sums = (sum(times) for times in zip(*kernels, strict=True))
    memory = entry.tensors * work.tensor_bytes / BYTES
    return Times(*(1e6 * x for x in (*sums, memory, max(memory, sum(max(times) for times in kernels)))))


def floor_of(entry: Entry) -> float:
    """The least time that the machine's rates allow, in microseconds."""
    work = entry.workload
    products = 2 * entry.products * work.size * work.pairs / PRODUCTS
    return 1e6 * max(products, entry.special * work.pairs / SPECIAL, entry.tensors * work.tensor_bytes / BYTES)


def goal_of(entry: Entry) -> float:
    """The multiple of the floor that a pass may take."""
    return 1.6 if "backward" in entry.what else 1.4


HEAD = """# Triton kernels, predicted

Nothing on this page was measured on a GPU. The times are **predicted from machine code**: Triton {version} compiles each kernel
for sm_90, and a script counts the instructions of the loops over tiles. Each column is the time that one part of an H200 needs
for its share of these instructions:

- *issue*: all instructions, at 128 a clock and SM;
- *special*: exponentials, reciprocals and tanh, at 16 a clock and SM;
- *products*: matrix products, padding of tiles and smaller last tiles included, at 790 TFLOP/s;
- *memory*: every tensor read or written once, at 4.3 TB/s.

*predicted* adds up the largest of issue, special and products over the kernels of a pass, and is never less than memory.
*predicted* is a lower bound: other waiting, and work outside of the loops, are not counted. *floor* is the largest of special,
products and memory for the least work that the pass needs. The goal is 1.4 times the floor for a forward pass and 1.6 times for
a backward pass; an ! marks passes beyond the goal.

The least work of a backward pass includes the scores once more, since no map is kept: a matrix product, or a tanh or half a
reciprocal for each hidden unit.

The passes beyond the goal do more work than their floor counts:

- A map without a given log-sum-exp takes two exponentials a pair, one in the kernel for the log-sum-exp and one in the kernel
  for the map. Each kernel is within the goal of its own floor.
- Statistics take a dozen instructions a pair for the entropy, the maximum, its place and the groups. The received attention goes
  over the pairs once more, and the backward pass goes over the pairs three times.
- Backward passes of tanh and sigmoid take two special functions a pair in each of two kernels, and compute 640 rows for 577.
- For 160 tokens, maps and statistics compute 192 rows, and a map in one kernel 256 keys.

The page leaves out `congruence_loss`, `stacked_cross_attention` and LXMERT's 36 tokens: their loops have a few turns or one, and
most of their work lies outside of the loops. `tests/compiled/triton.json` has the counts of all kernels.

"""

BEFORE = """The arrows compare with commit {commit}. The rows are in `benchmarks/results/machine_code.json`.
"""


def newest() -> tuple[str, dict[str, Row]]:
    """The newest stored version of Triton, and its rows."""
    table = read(TABLE)
    version = max(table, key=lambda name: [int(part) for part in name.split(".")])
    return version, table[version]


def counts() -> dict[str, Any]:
    """The content of COUNTS, with the present counts under "after"."""
    stored: dict[str, Any] = json.loads(COUNTS.read_text(encoding="utf-8"))
    version, table = newest()
    keys = sorted({f"{entry.call} {kernel} sm_90" for entry in ENTRIES for kernel in entry.kernels})
    return {**stored, "triton": version, "after": {key: table[key] for key in keys}}


def _changes() -> list[str]:
    lines = [
        "| kernel | instructions a pair | registers | spilled bytes | warps, each computing |",
        "| --- | --- | --- | --- | --- |",
    ]
    counted = counts()
    sizes = {f"{entry.call} {kernel} sm_90": entry.workload.size for entry in ENTRIES for kernel in entry.kernels}
    for key, after in counted["after"].items():
        versions = [row for row in (counted["before"].get(key), after) if row]  # some kernels are new
        whole = [turns_of(key, {"edge": None, **row}, sizes[key])[0] for row in versions]
        pairs = [f"{turn.issue / turn.pairs:.1f}" for turn in whole]
        warps = [f"{row['warps']}, {'a part' if row['repeated'] == 1 else 'all of it'}" for row in versions]
        cells = (pairs, *([str(row[name]) for row in versions] for name in ("registers", "spills")), warps)
        changes = (" → ".join(dict.fromkeys(cell)) for cell in cells)
        lines.append(f"| `{key.removesuffix(' sm_90')}` | {' | '.join(changes)} |")
    return lines


def page() -> str:
    version, table = newest()
    lines = [HEAD.format(version=version).rstrip("\n"), ""]
    for workload in dict.fromkeys(entry.workload for entry in ENTRIES):
        causal = ", causal" if workload.causal else ""
        lines += [
            f"## {workload.name}",
            "",
            f"{workload.heads} heads of {workload.size}, {workload.tokens:,} tokens{causal}, bfloat16.",
            "",
        ]
        lines += ["| µs | issue | special | products | memory | predicted | floor | of floor |", f"| --- |{' ---: |' * 7}"]
        for entry in ENTRIES:
            if entry.workload == workload:
                times, floor = times_of(entry, table), floor_of(entry)
                ratio = times.predicted / floor
                cells = (times.issue, times.special, times.products, times.memory, times.predicted, floor)
                beyond = " !" if ratio > goal_of(entry) else ""
                lines.append(f"| {entry.what} | {' | '.join(f'{x:,.0f}' for x in cells)} | {ratio:.2f}{beyond} |")
        lines.append("")
    lines += ["## Before and after", "", BEFORE.format(commit=counts()["commit_before"]).rstrip("\n"), "", *_changes(), ""]
    return "\n".join(lines)


def main() -> None:
    COUNTS.write_text(json.dumps(counts(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
