"""Faults for the kernels in kernels.py. A rule changes the text of a kernel or of its launch, at the first or last place it fits.

The kinds are those that papers on generated kernels name (arXiv 2606.20128, 2606.27396), and those of parallel programs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TEXT = Path(__file__).with_name("kernels.py").read_text()
HEAD, *_ROUGH = re.split(r"(?m)^# ---- (.*)$", TEXT)
SECTIONS = dict(zip(_ROUGH[::2], _ROUGH[1::2], strict=True))
MASK = r", mask=(?:[^(),\[\]]|\([^()]*\)|\[[^\]]*\])+(?:, other=(?:float\(\"-inf\"\)|[\d.]+))?"
ALIASES = [  # the section, the output, and the input that takes its place
    ("transpose", "out = empty(m, n)", "out = x.view(m, n)"),
    ("neighbours", "out = empty(n)", "out = x"),
    ("causal attention", "out = empty(n, d)", "out = k"),
    ("causal attention", "out = empty(n, d)", "out = v"),
    ("reversed through memory", "out = empty(n)\n    buffer = empty(triton.cdiv(n, 128) * 128)",
     "out = buffer = empty(triton.cdiv(n, 128) * 128)[:n]"),
    ("rows by index", "out = empty(n, table.shape[1])", "out = table.repeat(n // 9 + 1, 1)[:n]; table = out"),
]  # fmt: skip
RULES: list[tuple[str, str, str]] = [
    ("tail mask", MASK, ""),
    ("tail mask", r"other=0\.0", "other=1.0"),
    ("tail mask", r'other=float\("-inf"\)', "other=0.0"),
    ("tail mask", r"tl\.where\(o < n, (.*), 0\.0\)", r"\1"),
    ("tail mask", r" & \(columns < N\)", ""),
    ("off by one", r"o < n\b", "o <= n"),
    ("off by one", r"o < n\b", "o < n - 1"),
    ("off by one", r">= columns", "> columns"),
    ("off by one", r"range\(0, (\w+), BLOCK\)", r"range(0, \1 - 1, BLOCK)"),
    ("off by one", r"\(tl\.program_id\(0\) \+ 1\) \* BLOCK, BLOCK", "tl.program_id(0) * BLOCK, BLOCK"),
    ("off by one", r"127 - o", "128 - o"),
    ("wrong grid", r"(?<=\[\()triton\.cdiv\((\w+), (\w+)\)", r"\1 // \2"),
    ("wrong grid", r"\[\((rows|x\.shape\[0\]),\)\]", r"[(\1 - 1,)]"),
    ("wrong grid", r"\[\((rows|x\.shape\[0\]),\)\]", r"[(\1 + 1,)]"),
    ("wrong grid", r"program_id\(1\)", "program_id(0)"),
    ("accumulator", r"total \+= (.+)", r"total = (total + \1).to(tl.float16).to(tl.float32)"),
    ("accumulator", r"total \+= (.+)", r"total = \1"),
    ("accumulator", r"(total|sums) = (\1 \* .+)", r"\1 = (\2).to(tl.bfloat16).to(tl.float32)"),
    ("accumulator", r"tl\.sum\(tl\.load\((.*?)\), 0\)", r"tl.sum(tl.load(\1).to(tl.float16), 0).to(tl.float32)"),
    ("missing rescale", r" \* shrink(?:\[:, None\])?", ""),
    ("missing rescale", r" \* scale\b", ""),
    ("missing rescale", r" / n\b", ""),
    ("race", r"tl\.atomic_add\((.+?\)), (tl\.load\(.+?\)), (mask=o < n)\)",
     r"tl.store(\1, tl.load(\1, mask=o < n) + \2, \3)"),
    ("race", r"    while tl\.atomic_cas.*\n        pass\n", ""),
    ("race", r'sem="(?:acquire|release)"', 'sem="relaxed"'),
    ("race", r"(?<=, )lock, 0\b", "lock, 1"),
    ("race", r"out \+ row\b(?= \+|,)", "out + 0 * row"),
    ("race", r"buffer \+ (?=o,)", "buffer + o // 2 + 0 * "),
    ("missing barrier", r"    tl\.debug_barrier\(\)\n", ""),
    ("index", r"\[:, None\] \* (K|M|N|D)\b", r"[:, None] * (\1 - 1)"),
    ("index", r"tl\.trans\(tile\)", "tile"),
    ("index", r"row \* stride", "row * (stride + 1)"),
]  # fmt: skip


class Fault(NamedTuple):
    kernel: str
    kind: str
    place: str  # the line before, and after
    text: str  # of the section; its module is HEAD and this


def faults() -> Iterator[Fault]:
    for name, section in SECTIONS.items():
        code = section[: section.index("def inputs")]
        seen = {code}
        changes = [
            (kind, match.start(), code[: match.start()] + match.expand(new) + code[match.end() :])
            for kind, old, new in RULES
            for match in [*re.finditer(old, code)][:: max(len(re.findall(old, code)) - 1, 1)]  # the first and the last place
        ]
        changes += [("aliasing", code.index(old), code.replace(old, new)) for one, old, new in ALIASES if one == name]
        for kind, at, changed in changes:
            if changed not in seen:
                seen.add(changed)
                lines = [text[text.rfind("\n", 0, at) + 1 :].partition("\n")[0].strip() for text in (code, changed)]
                yield Fault(name, kind, " -> ".join(lines), changed + section[len(code) :])
