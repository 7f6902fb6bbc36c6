"""build/compiled/kernels.md: what the Triton kernels should take on an H200, by the counts in build/compiled/.

python -m tools.pages.kernels_page    # after python -m tools.compiled.triton and python -m tools.compiled.counts
"""

from __future__ import annotations

from tools.compiled import table
from tools.compiled.counts import LEAST_USED, MOST_CONFLICTS, Row, conflicts, read, used
from tools.compiled.triton import TABLE
from tools.pages.cuda_times import section
from tools.pages.kernel_baselines import slower_estimates, torch_section
from tools.pages.kernel_entries import ENTRIES
from tools.pages.kernel_limits import lines_beyond, reasons_of
from tools.pages.kernel_times import (
    FIRST,
    L2,
    LAUNCH,
    PUBLISHED,
    Entry,
    Rows,
    Times,
    floor_of,
    issued,
    nearest,
    rate_of,
    times_of,
)
from vlattn_fast.benchmarks._rates import CLOCK, H200, SMS

PAGE = TABLE.with_name("kernels.md")

HEAD = """# Estimates of the Triton kernels

Triton {version} compiles each kernel for sm_90 down to PTX, `ptx` emulates some programs of the launch, and
`python -m tools.compiled.counts` counts what their threads do. The first columns are the times that one part of an H200 needs for
its share of all kernels of a pass:

- *issue*: all instructions but moves between registers, at 128 a clock and SM;
- *special*: exponentials, logarithms, reciprocals and tanh, at 16 a clock and SM;
- *products*: matrix products, padding of tiles and smaller last tiles included, at {products:.0f} TFLOP/s. One of float32
  is six of bfloat16;
- *L2*: sectors of global memory that the programs read and write, at {l2} TB/s. In a kernel without asynchronous copies each
  program has a sector once, and then finds it in L1;
- *memory*: tensors that each kernel reads or writes, once, at {memory} TB/s.

Three figures follow:

- *floor*: the largest of special, products and memory for the least work that the pass needs. The least work of a backward pass
  includes the scores once more, since no map is kept: a matrix product, or a tanh or half a reciprocal for each hidden unit.
- *estimate*: the sum over the kernels of a pass. A program takes its products, then the longer of issue and special: its softmax
  waits for the scores. Forward passes whose configuration says `AHEAD` compute the next tile's scores beforehand: of 65 to 128
  features and 513 to 1,024 tokens, except in float32. There half of the products, those for the scores, overlap issue and
  special.
  A program also waits {clocks:.0f} clocks for its first tile. An SM has one program at a time, and takes the next one when it
  ends; the kernel ends with its last program. Programs of a causal call have different lengths, and begin in the order in which
  `heads_in_turn` numbers them. Programs that add to the same sums in turns, in CUDA C++, wait for one another. L2 and memory are
  read meanwhile, so that a kernel takes no less than either.
  A kernel without asynchronous copies takes L2 in addition. A launch takes {launch} µs.
- *FlashAttention-3*: its published rate in TFLOP/s, only for dot products, at the nearest published number of tokens and the
  same number of features. *TFLOP/s* is that of the estimate. Both divide the floor's products by the time.

An estimate is too long where programs that share an SM fill one another's waits, and where machine code needs fewer instructions
than PTX. It is too short where instructions wait for one another. Small kernels before and after those of the table of counts,
and the host's time, are left out. Passes over 16,384 tokens have the counts of 4,096 tokens, for as many pairs as they have.

{beyond}

{slower}

At 512 tokens and 64 features FlashAttention-3 takes {forward:.1f} times the floor forward and {backward:.1f} times backward. So
the floor is no goal; FlashAttention-3's rate is. The passes furthest from their floors do more work than these count:

- Backward passes of more than 256 tokens compute the scores and the gradients of the probabilities in each of two kernels, seven
  products for five. Those of tanh and sigmoid take two special functions a pair in each kernel. With 577 tokens they compute 640
  rows. Those of fewer tokens have one kernel, which computes 256 keys with 160 tokens and with 197.
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

The page leaves out times of `congruence_loss`, `stacked_cross_attention` and LXMERT's 36 tokens.
`ptx_counts.json` has the counts of all kernels, `triton.json` their registers and spills.

"""

COUNTED = """These are the counts of the kernels above, on sm_90.

- *issue*, *special*: instructions of threads for each pair of a query and a key, whether a causal mask hides the pair or not.
  They include the padding of tiles, and the beginning and the end of a program;
- *conflicts*: the share of the wavefronts of shared memory that bank conflicts add;
- *sectors*: the share of the sectors of global memory that the bytes in use would fill;
- *registers*, *spilled*: of a thread, and its bytes, as ptxas compiles the kernel. Causal calls of one head are only counted.
"""

BEYOND = """These kernels have more than {conflicts:.0%} of their wavefronts in conflict, or use less than {used:.0%} of their
sectors, in some calls of `tools/compiled/calls/`. The table has the number of these calls, and the worst.

- *once*: the share of its sectors that a program uses if it has each of them once. So it is where L1 keeps a sector until the
  next instructions have read the rest of it;
- *share*: the kernel's part of all sectors of such a call, as the instructions ask for them.

Why:
"""


def counted(architecture: str = "sm_90") -> Rows:
    """The stored counts, a row for each call and kernel."""
    return {(row["call"], row["kernel"].rpartition(".")[2]): row for row in read() if row["architecture"] == architecture}


def compiled() -> tuple[str, dict[str, table.Row]]:
    """The newest stored version of Triton, and what it compiles."""
    tables = table.read(TABLE)
    version = max(tables, key=lambda name: [int(part) for part in name.split(".")])
    return version, tables[version]


def _counts(row: Row) -> list[str]:
    heads, queries, keys = row["pairs"]
    pairs = heads * queries * keys * row["programs"] / row["grid"]
    numbers = issued(row) / pairs, row["instructions"].get("special", 0) / pairs
    return [*(f"{number:.1f}" for number in numbers), f"{conflicts(row):.0%}", f"{used(row):.0%}"]


def _counted(rows: Rows, facts: dict[str, table.Row]) -> list[str]:
    lines = ["| kernel | issue | special | conflicts | sectors | registers | spilled |", f"| --- |{' ---: |' * 6}"]
    for call, kernel in sorted({(entry.call, kernel) for entry in ENTRIES for kernel in entry.kernels}):
        ptxas_facts = facts.get(f"{call} {kernel} sm_90", {})  # that of calls that are only counted is not stored
        cells = [*_counts(rows[call, kernel]), *(str(ptxas_facts.get(name, "")) for name in ("registers", "spills"))]
        lines.append(f"| `{call} {kernel}` | {' | '.join(cells)} |")
    return lines


def _cells(entry: Entry, times: Times) -> list[str]:
    floor = floor_of(entry)
    parts = (times.issue, times.special, times.products, times.l2, times.memory, floor, times.estimate)
    cells = [*(f"{x:,.0f}" for x in parts), f"{times.estimate / floor:.2f}"]
    if (rates := nearest(entry)) is None:
        return [*cells, "", ""]
    without = ", not causal" if entry.workload.causal and not rates.causal else ""
    return [*cells, f"{rate_of(entry, times.estimate):.0f}", f"{rates.flash3} ({rates.tokens:,} tokens{without})"]


def _beyond(times: dict[Entry, Times]) -> str:
    """Says which estimates are above FlashAttention-3's rate."""
    lines = []
    for entry, times_of_entry in times.items():
        rate, at_best = rate_of(entry, times_of_entry.estimate), nearest(entry)
        if at_best and rate > at_best.flash3:
            name = f"{entry.what}, {entry.workload.name}"
            lines.append(
                f"- {name}: {rate:.0f} TFLOP/s, where FlashAttention-3 has {at_best.flash3} at {at_best.tokens:,} tokens."
            )
    if not lines:
        return "No estimate is above FlashAttention-3's rate."
    return "\n".join(["Estimates above FlashAttention-3's rate leave waits out. Do not expect them:", "", *lines])


def page() -> str:
    rows, (version, facts) = counted(), compiled()
    times = {entry: times_of(entry, rows) for entry in ENTRIES}
    head = HEAD.format(
        version=version,
        products=H200.products / 1e12,
        l2=L2 / 1e12,
        memory=H200.memory / 1e12,
        clocks=FIRST * CLOCK,
        launch=LAUNCH * 1e6,
        beyond=_beyond(times),
        slower=slower_estimates(times),
        forward=H200.products / 1e12 / PUBLISHED["forward", 64, False][512][2],
        backward=H200.products / 1e12 / PUBLISHED["backward", 64, False][512][2],
        sms=SMS,
        clock=CLOCK / 1e9,
    )
    lines = [head.rstrip("\n"), ""]
    for workload in dict.fromkeys(entry.workload for entry in ENTRIES):
        causal = ", causal" if workload.causal else ""
        few = f"{workload.few_queries} queries, " if workload.few_queries else ""
        sizes = f"{workload.heads} heads of {workload.size}, {few}{workload.tokens:,} tokens{causal}"
        lines += [
            f"## {workload.name}",
            "",
            f"{sizes}, bfloat16 unless a row says float32.",
            "",
            "| µs | issue | special | products | L2 | memory | floor | estimate | of floor | TFLOP/s | FlashAttention-3 |",
            f"| --- |{' ---: |' * 10}",
            *(f"| {entry.what} | {' | '.join(_cells(entry, times[entry]))} |" for entry in ENTRIES if entry.workload == workload),
            "",
        ]
    limits = BEYOND.format(conflicts=MOST_CONFLICTS, used=LEAST_USED)
    lines += [section(rows)]
    lines += torch_section(times)
    lines += ["## Counts", "", COUNTED.rstrip("\n"), "", *_counted(rows, facts), ""]
    lines += ["## Conflicts and sectors", "", limits.rstrip("\n"), "", *lines_beyond(read()), ""]
    return "\n".join(lines)


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    for row in read():
        for what, reason in reasons_of(row):
            if reason is None:
                print(f"{row['call']} {row['kernel']} {row['architecture']}: {what}, without a reason in kernel_limits.py")


if __name__ == "__main__":
    main()
