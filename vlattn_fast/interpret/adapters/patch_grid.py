"""The grid of the image patches that a caller passes."""

from __future__ import annotations

from dataclasses import dataclass

from vlattn_fast._ground.checks import check_integer
from vlattn_fast.interpret.adapters.pixels import Shape


@dataclass(frozen=True)
class PatchGrid:
    """Tells `explain` the grid of the image patches in a tower that no adapter describes.

    The tower has `prefix` tokens, then the patches, row by row. They become `image` (B, rows, columns) of the `Explanation`.
    Without it the grid is derived if the inputs are a single image tensor (B, C, H, W) that is cut into equal squares.

    Examples:
        >>> import vlattn_fast as va
        >>> va.PatchGrid(4, 6, prefix=1)  # pass it as va.explain(..., patches=...)
        PatchGrid(rows=4, columns=6, prefix=1)

    Args:
        rows, columns: the size of the grid. None = derived from the inputs' single image tensor, or else a square.
        prefix: the number of tokens before the patches, such as [CLS] and registers.

    Raises:
        TypeError, ValueError: sizes are not integers above 0, only one of `rows` and `columns` is given, or `prefix` is negative.
    """

    rows: int | None = None
    columns: int | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            if (size := getattr(self, name)) is not None:
                check_integer(name, size, low=1)
        if (self.rows is None) != (self.columns is None):
            raise ValueError(f"rows and columns must both be given, or neither; got {self.rows} and {self.columns}")
        check_integer("prefix", self.prefix, low=0)

    @property
    def shape(self) -> Shape | None:
        return None if self.rows is None or self.columns is None else (self.rows, self.columns)
