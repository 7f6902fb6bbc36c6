"""The GPUs whose launches are emulated, by compute capability, and what a program may ask of them."""

from __future__ import annotations

from typing import NamedTuple


class Properties(NamedTuple):
    shared: int  # bytes that a block may take, at most
    processors: int  # streaming multiprocessors: of the A100, the H100 SXM and the B200


PROPERTIES = {80: Properties(163 * 1024, 108), 90: Properties(227 * 1024, 132), 100: Properties(227 * 1024, 148)}
ARCHITECTURES = tuple(PROPERTIES)


def properties(architecture: int) -> Properties:
    if architecture not in PROPERTIES:
        known = ", ".join(map(str, ARCHITECTURES))
        raise ValueError(f"an architecture that is emulated is one of {known} (sm_90 is 90); got {architecture!r}")
    return PROPERTIES[architecture]
