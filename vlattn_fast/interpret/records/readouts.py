"""Read-outs: which row of the relevancy matrix is read at the end of a tower, by the name that a `Tower` has as `readout`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlattn_fast.interpret.records.tokens import Tokens, real_words


@dataclass(frozen=True)
class ReadOut:
    """The row of one token, or a mean of rows.

    Args:
        position: gives the token (B,) whose row is read; None = a mean.
        skipped: gives how many tokens in front are left out of the mean; None = there is no mean, and the weights are ones.
        predicts: the token predicts the next one.
        asks: the token is one of the prompt's, without which another question would be asked.
    """

    position: Callable[[Tokens], Tensor] | None = None
    skipped: Callable[[Tokens], int] | None = None
    predicts: bool = False
    asks: bool = False

    def weights(self, tokens: Tokens, like: Tensor) -> Tensor:
        """The weights (B, 1, N) of the rows, as `like` (behind a pooling head N is its number of probes)."""
        if self.position is not None:
            return torch.zeros_like(like).scatter_(2, self.position(tokens).to(like.device)[:, None, None], 1.0)
        if self.skipped is None:
            return torch.ones_like(like)
        start, rows = self.skipped(tokens), torch.zeros_like(like)
        rows[:, :, start:] = 1.0 / (like.shape[2] - start)
        return rows


def _query(tokens: Tokens) -> Tensor:
    raise ValueError("read must say which object query a callable target scores; got None")


READOUTS = {
    "cls": ReadOut(lambda tokens: torch.zeros(tokens.shape[0], dtype=torch.long)),
    "eot": ReadOut(lambda tokens: tokens.end_of_text()),
    "last": ReadOut(lambda tokens: torch.full((tokens.shape[0],), tokens.shape[1] - 1)),  # of padding or not
    "target": ReadOut(lambda tokens: tokens.last_real(), predicts=True, asks=True),
    "before_sep": ReadOut(lambda tokens: (real_words(tokens.inputs).sum(-1) - 2).clamp(min=0), asks=True),
    "mean": ReadOut(skipped=lambda tokens: 0),
    "patch_mean": ReadOut(skipped=lambda tokens: tokens.prefix),
    "pool": ReadOut(),  # of the probes of a pooling head
    "query": ReadOut(_query),
}
