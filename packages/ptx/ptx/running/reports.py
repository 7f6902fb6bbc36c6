"""Options of a launch, and what it reports: findings with their places in the PTX and in the source, accesses, errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ptx.reading.encoding import Place


class EmulationError(Exception):
    """A launch ended early: an access outside of memory, a deadlock, a trap, an instruction that is not known."""


class FindingsError(AssertionError):
    """A launch ran to its end with findings."""


@dataclass
class Options:
    seed: int = 0
    races: bool = True  # look for races, reads of what was never written, copies in flight
    fences: bool = True  # look for fences that matrix products and bulk copies lack
    noise: int = 0  # special functions err as much as documented, each number in another way; 0: not at all
    counts: bool = False  # count instructions by kind, wavefronts and sectors
    interleave: bool | int = False  # several programs run at once; a number: how many
    in_order: bool = False  # programs and warps in order
    limit: int = 1 << 40  # instructions of a warp, over the whole grid
    sample: int = 0  # run so many programs of the grid, drawn at random; 0: all
    whole: tuple[str, ...] = ()  # kernels of which all programs run nevertheless

    @property
    def resident(self) -> int:
        return 4 if self.interleave is True else max(int(self.interleave), 1)


class Finding(NamedTuple):
    kind: str
    text: str
    place: str  # the two below, and the instruction
    count: int  # type: ignore[assignment]  # not that of tuples
    line: int = 0  # of the PTX text; 0: of no instruction
    source: str = ""  # "kernel.py:12", and where a function of another file is inlined, " in other.py:34"

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.kind}{times}: {self.text}\n    {self.place}"


class Accesses(NamedTuple):
    """Wavefronts of shared memory and sectors of global memory: counted, and the least that could be."""

    wavefronts: int = 0
    least_wavefronts: int = 0
    sectors: int = 0
    least_sectors: int = 0


def read_findings(text: str, at: Callable[[int], str], places: Sequence[Place]) -> tuple[str, list[Finding]]:
    """The machine's text as an error (or "") and findings. `at(n)` and `places[n]` tell where instruction n stands."""
    error, findings = "", []
    for line in text.splitlines():
        kind, message, count = line.split("\t")
        match = re.match(r"@(-?\d+) (.*)", message)
        assert match, line
        number = int(match[1])
        where, place = (at(number), places[number]) if number >= 0 else ("", Place(0, ""))
        message = re.sub(r"@(\d+)", lambda m: f"[{at(int(m[1]))}]", match[2])
        if kind == "error":
            error = f"{message}\n    {where}" if where else message
        else:
            findings.append(Finding(kind, message, where, int(count), *place))
    return error, findings
