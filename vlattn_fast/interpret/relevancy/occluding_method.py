"""Methods that run the model on its input with some tokens replaced, and compare the scores."""

from __future__ import annotations

from torch import Tensor

from vlattn_fast._ground.checks import check_integer
from vlattn_fast.interpret.relevancy.embedding_method import MEAN, Baseline, BaselineMethod


class OccludingMethod(BaselineMethod):
    """The relevancy of a token is what the score loses when windows with the token are replaced."""

    needs_score = False
    reads_score = True
    option = "fill"
    default_baseline = MEAN
    lenient = True
    unlabelled = ("batch_size",)

    def __init__(
        self, window: int = 1, stride: int = 1, fill: Baseline = MEAN, *, batch_size: int = 16, of: str | None = None
    ) -> None:
        """
        Args:
            window: the rows and columns of patches that a window covers, or its number of consecutive words.
            stride: the distance between the beginnings of two windows, at most `window`.
            fill: what replaces the window: a baseline, see `InputGradient`. None = embeddings of zero.
            batch_size: the number of windows of each input that the model runs on at once; 1 if a batch cannot be made longer.
            of: see `Method`.

        Raises:
            TypeError, ValueError: an option has a wrong type or value.
        """
        for name, value in (("window", window), ("stride", stride), ("batch_size", batch_size)):
            check_integer(name, value, low=1)
        if stride > window:
            raise ValueError(f"stride must be at most window, so that every patch is replaced; got {stride} and {window}")
        self.window, self.stride, self.batch_size = window, stride, batch_size
        super().__init__(fill, of=of)

    @property
    def fill(self) -> Baseline:
        return self.baseline

    def windows(self, tokens: Tensor) -> list[Tensor]:
        """The tokens of each window, from those of each patch, (rows, columns, numbers). The last window ends at the edge."""
        rows, columns = (self._starts(size) for size in tokens.shape[:2])
        return [tokens[i : i + self.window, j : j + self.window].flatten() for i in rows for j in columns]

    def _starts(self, size: int) -> list[int]:
        last = max(0, size - self.window)
        return [*range(0, last, self.stride), last]
