"""The gate of `make gpu`: kernels are timed where the rows of its part `verify` allow it."""

from __future__ import annotations

import math

from tools.gpu.session import Session

BLOCKS = 4.0  # errors in units of the tolerance rule's bound, beyond which a kernel is not timed
NOT_TIMED, UNVERIFIED = "not timed: ", "not verified (make gpu PARTS=verify)"


class Gate:
    """Lets kernels be timed that are verified and not far from right."""

    def __init__(self, run: Session) -> None:
        self._rows = {tuple(item.split("/")): row for item, row in run.known("verify").items() if item.count("/") == 4}

    def doubt(self, operators: list[str], what: str, backend: str, dtype: str = "bfloat16") -> str:
        """Why this backend is not timed; empty where it may be timed. The cases that begin with the first word of `what` count,
        or, without such cases, all cases of the operators."""
        from tools.gpu.production import first_word

        named = [name for name in self._rows if name[0] in operators and name[3:] == (dtype, backend)]
        named = [name for name in named if first_word(name[1]) == first_word(what)] or named
        if not named:
            return f"{NOT_TIMED}{what} of {', '.join(operators)} is {UNVERIFIED}"
        for name in named:
            row = self._rows[name]
            if not row["passed"] and row.get("ratio", math.inf) > BLOCKS:
                return f"{NOT_TIMED}{backend} is wrong in {'/'.join(name[:4])}"
        return ""
