"""Methods that run the model on its input without some of its tokens, and read the score."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer
from vlattn_fast.interpret.relevancy.embedding_method import MEAN, Baseline, BaselineMethod
from vlattn_fast.interpret.relevancy.embedding_trace import Embeddings
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


class OccludingMethod(BaselineMethod):
    """A token counts by what the score loses when windows with the token are taken away."""

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
            window: rows and columns of patches that a window covers, or so many words in a row.
            stride: from the beginning of a window to that of the next; at most `window`.
            fill: what stands in the window: a baseline, see `InputGradient`. None = embeddings of zero.
            batch_size: how many windows of each input the model runs on at once; 1 if a batch cannot be made longer.
            of: see `Method`.

        Raises:
            TypeError, ValueError: an option is of no such kind.
        """
        for name, value in (("window", window), ("stride", stride), ("batch_size", batch_size)):
            check_integer(name, value, low=1)
        if stride > window:
            raise ValueError(f"stride must be at most window, so that every patch is taken away; got {stride} and {window}")
        self.window, self.stride, self.batch_size = window, stride, batch_size
        super().__init__(fill, of=of)

    def begin(self) -> None:
        super().begin()
        self.fills: dict[tuple[str, int], Tensor] = {}  # by tower and number in it: what may take the place of the embeddings
        self.masks: Mapping[str, Tensor] = {}  # bool (copies * B, N), by tower: what does

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
        fill = self.fills[tower.name, len(self.kept.get(tower, []))]
        fill = torch.cat([fill] * (len(values) // len(fill)))
        return torch.where(Embeddings(values, values, dim).over_features(mask.to(values.device)), fill.to(values), values)

    def note_fills(self, tower: TowerTrace, patches: Tensor) -> None:
        """Notes what may take the place of the embeddings of `tower`, which have just entered. `patches` (B, N): tokens that are
        patches of a picture."""
        for number, part in enumerate(self.kept[tower]):
            values, fill = part.values.detach(), torch.zeros_like(part.values)
            if part.origin is not None:
                changes = part.per_token(lambda x, dim: x.any(dim), values != part.origin)
                stands = patches | (changes & ~patches).any()
                fill = torch.where(part.over_features(stands), part.origin, fill)
            self.fills[tower.name, number] = fill
