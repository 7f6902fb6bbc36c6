"""docs/kernels.md, from the stored table of the Triton kernels: `python -m tools.pages.kernels_page` writes it and its counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.compiled.table import Row, read
from tools.compiled.triton import TABLE
from tools.pages.kernel_times import (
    FIRST,
    L2,
    LAUNCH,
    PUBLISHED,
    Entry,
    Times,
    Work,
    Workload,
    floor_of,
    published,
    rate_of,
    times_of,
    turns_of,
)
from vlattn_fast.benchmarks._measure import CLOCK, MEMORY, SMS, TENSOR

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
COUNTS = ROOT / "benchmarks" / "results" / "machine_code.json"  # of old and present kernels

CLIP = Workload("CLIP ViT-L/14@336, batch of 64", 64, 16, 577, 64)
UNITER = Workload("UNITER, batch of 256", 256, 12, 160, 64)
LLAVA = Workload("LLaVA-7B, batch of 4", 4, 32, 704, 128, causal=True)
HIGHRES = Workload("16,384 tokens, 32 heads of 128", 1, 32, 16384, 128, causal=True)


FORWARD = {"_forward_kernel": Work(2, 2, 4)}
BACKWARD = {"_backward_q_kernel": Work(3, 2, 6), "_backward_kv_kernel": Work(4, 2, 6)}
# with the exponentials of each side in float32; the backward pass reads and writes sums of dQ for each block of keys
UNITS_FORWARD, UNITS_BACKWARD = {"_forward_kernel": Work(1, 4, 8)}, {"_units_backward_kernel": Work(2, 8, 11)}
ROWS = {"_rows_kernel": Work(1, 1, 2)}
OF_A_MAP, OF_A_GRADIENT = {"_map_kernel": Work(1, 1, 2)}, {"_map_kernel": Work(2, 2, 4)}


def _scores() -> list[Entry]:
    entries = []
    for kind, special in (("dot", 1), ("cosine", 1), ("dot_relu", 1), ("dot_tanh", 2), ("dot_sigmoid", 2)):
        call = f"score_attention {kind} bf16 64"
        entries.append(Entry(f"score_attention, {kind}, forward", CLIP, call, FORWARD, 2, 4, special))
        entries.append(Entry(f"score_attention, {kind}, backward", CLIP, call, BACKWARD, 5, 8, special))
    # two hidden units share a reciprocal, or each takes a tanh; backward repeats this, as it recomputes products of q and k
    for kind, special in (("additive", 32.0), ("hadamard_tanh", 64.0)):
        call = f"score_attention {kind} bf16 64"
        entries.append(Entry(f"score_attention, {kind}, forward", CLIP, call, UNITS_FORWARD, 1, 4, special))
        entries.append(Entry(f"score_attention, {kind}, backward", CLIP, call, UNITS_BACKWARD, 2, 8, 2 * special))
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
    Entry("relevancy_step, lse given", CLIP, "relevancy_attention step bf16 64", {"_backward_kv_kernel": Work(2, 2, 4)}, 2, 4),
    Entry("attention_map, attention", CLIP, "attention_map attention bf16 577 64", ROWS | OF_A_MAP, 1, 2),
    Entry("attention_map, gradient", CLIP, "attention_map gradient bf16 577 64", ROWS | OF_A_GRADIENT, 2, 4),
    Entry("attention_map, attention", UNITER, "attention_map attention bf16 160 64", OF_A_MAP, 1, 2),
    Entry("attention_map, gradient", UNITER, "attention_map gradient bf16 160 64", ROWS | OF_A_GRADIENT, 2, 4),
    Entry("attention_map, log-sum-exp alone", CLIP, "attention_map attention bf16 577 64", ROWS, 1, 2),
    Entry("attention_map, attention, lse given", CLIP, "attention_map attention lse bf16 577 64", OF_A_MAP, 1, 2),
    Entry("attention_map, gradient, lse given", CLIP, "attention_map gradient lse bf16 577 64", OF_A_GRADIENT, 2, 4),
    *(
        entry
        for workload, call in (
            (CLIP, "attention_statistics 2 groups bf16 64"),
            (UNITER, "attention_statistics 2 groups bf16 160 64"),
        )
        for entry in (
            Entry("attention_statistics, 2 groups, forward", workload, call, ROWS | {"_received_kernel": Work(1, 1, 2)}, 1, 2),
            Entry(
                "attention_statistics, 2 groups, backward",
                workload,
                call,
                {"_backward_q_kernel": Work(3, 2, 3), "_backward_kv_kernel": Work(2, 1, 3)},
                3,
                4,
            ),
        )
    ),
]


HEAD = """# Triton kernels, estimated

No kernel on this page was measured on a GPU. Triton {version} compiles each kernel for sm_90, and a script counts the
instructions of the loops over tiles. The first columns are the times that one part of an H200 needs for its share of all kernels
of a pass:

- *issue*: all instructions, at 128 a clock and SM;
- *special*: exponentials, reciprocals and tanh, at 16 a clock and SM;
- *products*: matrix products, padding of tiles and smaller last tiles included, at {products:.0f} TFLOP/s;
- *L2*: rows that programs read tile by tile, at {l2} TB/s;
- *memory*: tensors that each kernel reads or writes, once, at {memory} TB/s.

Three figures follow:

- *floor*: the largest of special, products and memory for the least work that the pass needs. The least work of a backward pass
  includes the scores once more, since no map is kept: a matrix product, or a tanh or half a reciprocal for each hidden unit.
- *estimate*: the sum over the kernels of a pass. A tile takes its products, then the longer of issue and special: a program's
  softmax waits for the scores. The forward passes with 128 features below compute the next tile's scores beforehand, which the
  configuration of the launch says (`AHEAD`). There, but for tiles on the diagonal, the product for the scores runs beside issue
  and special. A program also waits {clocks:.0f} clocks for its first tile. An SM has one program at a time, and takes the next
  one when it ends; the kernel ends with its last program. L2 and memory are read meanwhile, so that a kernel takes no less than
  either. A kernel without asynchronous copies takes L2 in addition. A launch takes {launch} µs.
- *FlashAttention-3*: its published rate in TFLOP/s, for dot products alone, at the nearest published number of tokens and the
  same number of features. *TFLOP/s* is that of the estimate. Both divide the floor's products by the time.

An estimate is too long where programs that share an SM fill one another's waits, and too short where instructions wait for one
another. Small kernels before and after those of the last table, the host's time, and masks of tiles on the diagonal are left out.

{beyond}

At 512 tokens and 64 features FlashAttention-3 takes {forward:.1f} times the floor forward and {backward:.1f} times backward. So
the floor is no goal; FlashAttention-3's rate is. The passes furthest from their floors do more work than these count:

- Backward passes compute the scores and the gradients of the probabilities in each of two kernels, seven products for five. Those
  of tanh and sigmoid take two special functions a pair in each kernel. With 577 tokens they compute 640 rows.
- A map without a given log-sum-exp takes two exponentials a pair, one in the kernel for the log-sum-exp and one in the kernel
  for the map. Each tile of a map reads its rows and keys of every head. With 577 tokens and the rule "gradient", this takes L2
  longer than all else in the kernel.
- Statistics take a dozen instructions a pair for the entropy, the maximum, its place and the groups. The received attention goes
  over the pairs once more, and the backward pass goes over the pairs three times.
- For 160 tokens, maps and statistics compute 192 rows, and a map in one kernel 256 keys.

The constants come from these sources:

- Products and memory were measured on an H200, which has {sms} SMs at {clock:.2f} GHz.
- The rates of issue and special functions are those of compute capability 9.0 in NVIDIA's CUDA C++ programming guide.
- The rate of L2 is that of an H100 in openxla/xla, `CalculateL2Time` of its cost model for matrix products.
- The latency of memory is that of an H100 in markdewing/AI_kernels, in the README of `latency`.
- The launch is one call of cuLaunchKernel in meta-pytorch/tritonbench#1016.
- FlashAttention-3's rates are on an H100 in float16, from the figures of its paper (arXiv 2407.08608). We have the numbers above
  the bars as others transcribed them. With 128 features and no causal mask these are 467 at 512 tokens and 648 at 16,384 tokens,
  where pytorch/benchmark#2391 measured 430 and 621. The paper has no causal backward pass.

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


def _cells(entry: Entry, times: Times) -> list[str]:
    floor = floor_of(entry)
    parts = (times.issue, times.special, times.products, times.l2, times.memory, floor, times.estimate)
    cells = [*(f"{x:,.0f}" for x in parts), f"{times.estimate / floor:.2f}"]
    if (rate := published(entry)) is None:
        return [*cells, "", ""]
    tflops, tokens, causal = rate
    without = ", not causal" if entry.workload.causal and not causal else ""
    return [*cells, f"{rate_of(entry, times.estimate):.0f}", f"{tflops} ({tokens:,} tokens{without})"]


def _beyond(times: dict[Entry, Times]) -> str:
    """Says which estimates are above FlashAttention-3's rate."""
    lines = []
    for entry, of_entry in times.items():
        rate, at_best = rate_of(entry, of_entry.estimate), published(entry)
        if at_best and rate > at_best[0]:
            tflops, tokens, _ = at_best
            name = f"{entry.what}, {entry.workload.name}"
            lines.append(f"- {name}: {rate:.0f} TFLOP/s, where FlashAttention-3 has {tflops} at {tokens:,} tokens.")
    if not lines:
        return "No estimate is above FlashAttention-3's rate."
    return "\n".join(["Estimates above FlashAttention-3's rate leave waits out. Do not expect them:", "", *lines])


def page() -> str:
    version, table = newest()
    times = {entry: times_of(entry, table) for entry in ENTRIES}
    head = HEAD.format(
        version=version,
        products=TENSOR / 1e12,
        l2=L2 / 1e12,
        memory=MEMORY / 1e12,
        clocks=FIRST * CLOCK,
        launch=LAUNCH * 1e6,
        beyond=_beyond(times),
        forward=TENSOR / 1e12 / PUBLISHED["forward", 64, False][512],
        backward=TENSOR / 1e12 / PUBLISHED["backward", 64, False][512],
        sms=SMS,
        clock=CLOCK / 1e9,
    )
    lines = [head.rstrip("\n"), ""]
    for workload in dict.fromkeys(entry.workload for entry in ENTRIES):
        causal = ", causal" if workload.causal else ""
        lines += [
            f"## {workload.name}",
            "",
            f"{workload.heads} heads of {workload.size}, {workload.tokens:,} tokens{causal}, bfloat16.",
            "",
            "| µs | issue | special | products | L2 | memory | floor | estimate | of floor | TFLOP/s | FlashAttention-3 |",
            f"| --- |{' ---: |' * 10}",
            *(f"| {entry.what} | {' | '.join(_cells(entry, times[entry]))} |" for entry in ENTRIES if entry.workload == workload),
            "",
        ]
    lines += ["## Before and after", "", BEFORE.format(commit=counts()["commit_before"]).rstrip("\n"), "", *_changes(), ""]
    return "\n".join(lines)


def main() -> None:
    COUNTS.write_text(json.dumps(counts(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
