"""What a caller says about the patches of an image."""

from __future__ import annotations

from dataclasses import dataclass

from vlattn_fast._ground.checks import check_integer
from vlattn_fast.interpret.adapters.pixels import Shape


@dataclass(frozen=True)
class PatchGrid:
    """How the patches of an image lie among the tokens of a tower that no adapter describes: `prefix` tokens, then the patches,
    row by row. They become `image` (B, rows, columns) of an `Explanation`.

    Without it the grid is derived if the inputs are a single image tensor (B, C, H, W) that equal squares cut up.

    Args:
        rows, columns: of the grid. None = as derived: from the inputs' single image tensor, or else a square.
        prefix: tokens in front of the patches, such as [CLS] and registers.

    Raises:
        TypeError, ValueError: sizes that are not integers above 0, or rows without columns; a negative `prefix`.

    Example:
        >>> PatchGrid(4, 6, prefix=1)
        PatchGrid(rows=4, columns=6, prefix=1)
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
