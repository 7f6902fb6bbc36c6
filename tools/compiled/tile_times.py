"""Which tiles are fast on an H100: an estimate from what the compiler says of a kernel, without a device.

    python -m tools.compiled.tile_times    # beside the tiles that an H100 has timed: rank correlations

`python -m tools.gpu.ahead --tiles REGEX` compiles tiles of the hot launches whose names match, and prints the best by it.

One iteration of a program alone takes, in cycles of the SM,

    alone = WAIT + COPY[stages] + ELEMENT e + SPILL s + products

for e pairs of the tile in a thread, s spilled words of a thread, and the products at the rate of the tensor cores. Warps that
repeat a product's rows do all of it again. An SM holds P programs, of which one fills what the others wait for, as far as it has
tensor cores and instructions: a tile takes sqrt((alone / P)^2 + issue^2 + products^2). The six numbers are those that come
nearest to the 180 tiles that were timed. They order tiles of one launch; they are no times of kernels.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tools.compiled.table import programs

STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.json"
WAIT, COPY, ELEMENT, SPILL, AHEAD, ISSUE = 590.0, {1: 1140.0, 2: 340.0}, 13.8, 15.9, 6.1, 11.3
PRODUCTS = {"rows": 1, "forward": 2, "map": 2, "backward_q": 3, "step": 3, "backward_kv": 4}  # of a tile, by the launch
RATE = 2048  # multiply-adds of 16 bits a cycle

Config = dict[str, int]


class Tile(NamedTuple):
    """A configuration and what it compiles to: programs that an SM holds, spilled words of a thread."""

    config: Config
    programs: int
    spilled: int


def cycles(kernel: str, size: int, tile: Tile) -> float:
    """Cycles for a pair of the tile, for a launch of this name with `size` features."""
    queries, keys, warps = (tile.config[name] for name in ("BLOCK_Q", "BLOCK_KV", "num_warps"))
    repeated = repeats(kernel, tile.config)
    pairs = queries * keys
    products = repeated * PRODUCTS[kernel] * pairs * size / RATE
    each = repeated * pairs / (32 * warps)
    alone = WAIT + COPY.get(tile.config["num_stages"], 0.0) + ELEMENT * each + SPILL * tile.spilled + products
    alone += AHEAD * pairs / (32 * warps) * tile.config.get("AHEAD", 0)
    issue = ISSUE * repeated * pairs / 128 + SPILL * tile.spilled * warps * 32 / 128
    return math.hypot(alone / tile.programs, issue, products) / pairs


def repeats(kernel: str, config: Config) -> float:
    """How many warps compute the same rows of a product's result."""
    rows = config["BLOCK_KV" if kernel == "backward_kv" else "BLOCK_Q"]
    return max(1.0, 16 * config["num_warps"] / rows)


def label(config: Config) -> str:
    return " ".join(f"{name}={x}" for name, x in config.items())


def timed() -> dict[str, list[tuple[Tile, float]]]:
    """The tiles that a device has timed, with microseconds, by launch. Those that this estimate chose have a rank, and are left
    out: they do not show what it would say of others."""
    found: dict[str, list[tuple[Tile, float]]] = defaultdict(list)
    for row in json.loads(STORED.read_text(encoding="utf-8")):
        if row["part"] == "tiles" and "us" in row and "rank" not in row:
            asked = {"registers": row["regs"], "shared": row["shared"], "warps": row["config"]["num_warps"]}
            tile = Tile(row["config"], programs(asked, "sm_90"), row["spills"])
            found[row["item"].partition(": ")[0]].append((tile, row["us"]))
    return found


def estimates(launch: str, tiles: Sequence[Tile]) -> list[float]:
    """Of a launch as its row names it: operator, kernel, score, dtype, queries, keys, features, masked."""
    _, kernel, *_, size, _ = launch.split()
    return [cycles(kernel, int(size), tile) for tile in tiles]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; equal numbers rank by their order."""
    ranks = [{i: rank for rank, i in enumerate(sorted(range(len(x)), key=x.__getitem__))} for x in (a, b)]
    n = len(a)
    return 1 - 6 * sum((ranks[0][i] - ranks[1][i]) ** 2 for i in range(n)) / (n * (n * n - 1))


def table() -> str:
    """For each launch that was timed: how well the estimate orders its tiles, and what the tile takes that it puts first."""
    lines = ["| launch | tiles | rank correlation | the estimate's first | the fastest |", "| --- | ---: | ---: | ---: | ---: |"]
    for launch, tiles in timed().items():
        operator, kernel, score, *_, size, _ = launch.split()
        times, guesses = [us for _, us in tiles], estimates(launch, [tile for tile, _ in tiles])
        first = times[guesses.index(min(guesses))]
        correlation = rank_correlation(guesses, times)
        lines.append(
            f"| `{operator}` {kernel}, {score}, {size} features | {len(tiles)} | {correlation:.2f} | {first:.0f} µs | "
            f"{min(times):.0f} µs |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
