"""Methods that run the model on its input with some tokens replaced, and compare the scores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer
from vlattn_fast.interpret.relevancy.embedding_method import MEAN, Baseline, BaselineMethod
from vlattn_fast.interpret.relevancy.embedding_trace import Embeddings
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


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

    def begin(self) -> None:
        super().begin()
        self.fills: dict[tuple[str, int], Tensor] = {}  # by tower and number in it: what may replace the embeddings
        self.masks: Mapping[str, Tensor] = {}  # bool (copies * B, N), by tower: which tokens are replaced

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

    # --- the forward pass ---

    def origin(self, tower: TowerTrace, values: Tensor) -> Tensor | None:
        return None if self.fills else super().origin(tower, values)

    def entering(self, tower: TowerTrace, values: Tensor, origin: Tensor | None, dim: int | None) -> Tensor:
        mask = self.masks.get(tower.name)
        if mask is None:
            return values * 1
        fill = self.fills[tower.name, len(self.cached.get(tower, []))]
        fill = torch.cat([fill] * (len(values) // len(fill)))
        return torch.where(Embeddings(values, values, dim).over_features(mask.to(values.device)), fill.to(values), values)

    def note_fills(self, tower: TowerTrace, patches: Tensor) -> None:
        """Notes what may replace the embeddings of `tower`, which have just entered. `patches` (B, N): tokens that are patches of
        an image."""
        for number, part in enumerate(self.cached[tower]):
            values, fill = part.values.detach(), torch.zeros_like(part.values)
            if part.origin is not None:
                changes = part.per_token(lambda x, dim: x.any(dim), values != part.origin)
                stands = patches | (changes & ~patches).any()
                fill = torch.where(part.over_features(stands), part.origin, fill)
            self.fills[tower.name, number] = fill
