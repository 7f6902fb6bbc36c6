"""Tensor maps: what copies of boxes (cp.async.bulk.tensor) read of a tensor, as CUDA's driver makes them on the host."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ptx.running.memory import Memory

MAGIC, BYTES = 0x70616D726F736E74, 128  # struct TensorMap of machine/tensor_copies.cpp
SWIZZLES = (0, 32, 64, 128)  # bytes of a row, by the number that stands for them in CUDA


@dataclass(frozen=True)
class TensorMap:
    """A tensor, and a box of it that one copy brings. Dimensions count from the outermost one, as torch's do.

    The box may reach out of `shape`: a load gives zeros there, or NaN (`nan`), and a store leaves it out. In shared memory each
    row of the box has `swizzle` bytes, whose parts of 16 are exchanged; without one it lies as in C.
    """

    base: Tensor
    shape: Sequence[int]
    strides: Sequence[int]  # of the tensor's elements
    box: Sequence[int]
    swizzle: int = 0
    nan: bool = False

    def __post_init__(self) -> None:
        """What the driver refuses."""
        size = self.base.element_size()
        row = self.box[-1] * size
        rules = {
            "shape, strides and box have one to five dimensions": len({*map(len, (self.shape, self.strides, self.box))}) == 1
            and 1 <= len(self.box) <= 5,
            "shape is positive and below 2^32": all(0 < n <= 1 << 32 for n in self.shape),
            "a box has 1 to 256 elements in each dimension": all(1 <= n <= 256 for n in self.box),
            "the base address is a multiple of 16": self.base.data_ptr() % 16 == 0,
            "the last stride is 1": self.strides[-1] == 1,
            "other strides are multiples of 16 bytes, below 2^40": all(
                n * size % 16 == 0 and 0 <= n * size < 1 << 40 for n in self.strides[:-1]
            ),
            "a row of the box has a multiple of 16 bytes": row % 16 == 0,
            f"swizzle is one of {SWIZZLES}": self.swizzle in SWIZZLES,
            "a row of the box has as many bytes as the swizzle": self.swizzle in (0, row),
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            text = f"shape={tuple(self.shape)}, strides={tuple(self.strides)}, box={tuple(self.box)} of {self.base.dtype}"
            raise ValueError(f"a tensor map must follow these rules: {'; '.join(broken)}; got {text}, swizzle={self.swizzle}")

    def encoded(self, memory: Memory, name: str) -> bytes:
        """As the emulator's parameter, with the tensor's place in the memory of a launch."""
        size, rank = self.base.element_size(), len(self.box)
        missing = [0] * (5 - rank)
        numbers = [MAGIC, memory.place(self.base, name), *self.shape[::-1], *missing]
        numbers += [*(n * size for n in self.strides[-2::-1]), *missing, *self.box[::-1], *missing]
        return struct.pack("<2Q5Q4Q5I4B16x", *numbers, rank, size, self.swizzle, 255 if self.nan else 0)

    @property
    def bytes(self) -> int:
        """Of the box in shared memory."""
        return math.prod(self.box) * self.base.element_size()
