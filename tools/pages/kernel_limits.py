"""Why some kernels have many bank conflicts, or use little of their sectors; kernels_page.py shows it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tools.compiled.counts import Row, beyond, conflicts, used, used_once


class Reason(NamedTuple):
    name: str
    what: str  # "conflicts" or "sectors"
    kernels: str  # a pattern, as the next
    calls: str
    text: str


REASONS = [
    Reason(
        "CUDA C++ rows",
        "sectors",
        "^(congruence|units)_",
        "cuda",
        """A lane reads an operand of `mma.sync` from global memory as the instruction wants it, four bytes of a row at a time,
  and stores results so. Hidden units are read 16 bytes a lane, each lane of another row. Dot products of rows and maps are read
  by the number. L1 holds the rest of the sector.""",
    ),
    Reason(
        "CUDA C++ columns",
        "conflicts",
        "^(congruence|units)_",
        "cuda",
        """Columns of a map are copied to rows in shared memory, and lanes with hidden units of their own read those of one
  column, or their exponentials. Each meets three others in its bank.""",
    ),
    Reason(
        "float32",
        "conflicts",
        "",
        " fp32",
        """An operand of float32 numbers lies in shared memory until it is split into three of bfloat16. Lanes read it in the
  layout of the 16-bit product, two neighbours each: half as many bytes as the layout is made for, so that lanes of several rows
  meet in one bank. A kernel cannot choose the layout.""",
    ),
    Reason(
        "bytes of masks",
        "conflicts",
        "",
        "masked|padded",
        """Key masks are bytes. Triton looks for the narrowest number that an operand of `mma.sync` is made from, finds these
  bytes, and lays out 16-bit operands as if they had 8 bits (`kWidth = 4`). `ldmatrix` then transposes tiles with two lanes a
  bank. `wgmma` has no such layout: on sm_90 this concerns only products of 32 rows, which run `mma.sync`.""",
    ),
    Reason(
        "float masks",
        "sectors",
        "^(score_attention|_products_backward|attention_map|attention_statistics|_statistics_backward)",
        "masked",
        """Rows and keys beyond the last one read its mask, which costs less than a condition (`add_mask`). The compiler does not
  see that the keys of a row lie side by side, and gives the lanes of a warp different rows.""",
    ),
    Reason(
        "groups in turn",
        "sectors",
        "_statistics_backward",
        "2 groups",
        "Gradients of the mass, (B, N, G), are read one group after another.",
    ),
    Reason(
        "a row for each group",
        "sectors",
        "_group_bias",
        "",
        """A tile of keys loads the bias of its queries side by side. So the kernel writes (B, H, N, G) as (B, H, 1 + G, N), once
  a call. It reads a number of each query at a time; L1 holds the rest of the sector.""",
    ),
    Reason(
        "carried rows",
        "conflicts",
        "_map_backward",
        "step backward 64 rows",
        """64 carried rows, whose product is the gradient of the map, are float32. A lane takes 8 neighbours, as of bfloat16
  numbers, and writes them into the product's operand in two parts: the lanes lie 32 bytes apart, two a bank.""",
    ),
    Reason(
        "short rows",
        "sectors",
        "congruence|_stacked|_map_backward",
        "",
        """Triton gives a lane 4 or 8 neighbours of a row, as many as some load or store of the kernel takes at once. A lane reads
  float32 numbers one by one where the length of their rows is not known to be a multiple of 4, or a mask decides about each, and
  8 of them in two parts in any case.""",
    ),
]


def reasons_of(row: Row) -> Iterator[tuple[str, Reason | None]]:
    """The numbers of a row that are beyond the limits, and why."""
    for what in beyond(row):
        fits = (r for r in REASONS if r.what == what and re.search(r.kernels, row["kernel"]) and re.search(r.calls, row["call"]))
        yield what, next(fits, None)


def _sectors(row: Row) -> float:
    """Those of the whole launch."""
    return row["sectors"][0] * row["grid"] / row["programs"]


def lines_beyond(rows: Iterable[Row]) -> list[str]:
    """The reasons, and a table of the kernels."""
    by_call: dict[tuple[str, str], float] = {}
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        call = row["call"], row["architecture"]
        by_call[call] = by_call.get(call, 0) + _sectors(row)
        for what, reason in reasons_of(row):
            groups.setdefault((what, reason.name if reason else "not known", row["kernel"].split()[0]), []).append(row)
    lines = [f"- *{reason.name}*: {reason.text}" for reason in REASONS]
    lines += [
        "",
        "| kernel | calls | on | conflicts | sectors | once | share | why |",
        f"| --- | ---: | --- |{' ---: |' * 4} --- |",
    ]
    for (what, name, kernel), members in sorted(groups.items()):
        if what == "conflicts":
            numbers = [f"{max(map(conflicts, members)):.0%}", "", ""]
        else:
            numbers = ["", f"{min(map(used, members)):.0%}", f"{min(map(used_once, members)):.0%}"]
        numbers.append(f"{max(_sectors(row) / by_call[row['call'], row['architecture']] for row in members):.0%}")
        calls, architectures = {row["call"] for row in members}, sorted({row["architecture"] for row in members})
        lines.append(f"| `{kernel}` | {len(calls)} | {', '.join(architectures)} | {' | '.join(numbers)} | {name} |")
    return lines
