"""Sets of tokens, which may overlap, as groups of tokens, which do not: the tokens of a group are in the same sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlattn_fast.interpret.intervening.token_sets import TokenSet


class Groups:
    """The groups of a tower's N tokens, and of those that a model generates after them.

    Args:
        sets: masks (B, N).
        as_keys: the tokens are keys: in a set that "runs", only the newest token is a member.
    """

    def __init__(self, sets: Sequence[TokenSet], as_keys: bool) -> None:
        masks = torch.stack([each.mask for each in sets])  # (S, B, N)
        runs = torch.tensor([each.runs for each in sets])
        grows = torch.tensor([each.grows for each in sets])
        self.batch, self.size = masks.shape[1:]
        self._newest_alone = as_keys and bool(runs.any())
        earlier = masks & ~runs[:, None, None] if self._newest_alone else masks
        new, newest = grows if as_keys else grows | runs, grows | runs
        every = torch.cat([masks.flatten(1), earlier.flatten(1), new[:, None], newest[:, None]], 1)
        groups = torch.zeros(every.shape[1], dtype=torch.int64)
        for row in every:  # `unique(dim=1)` of all rows compares tokens one by one
            groups = (2 * groups + row).unique(return_inverse=True)[1]
        self.members = every.new_empty(len(every), int(groups.max()) + 1)  # (S, groups), which group is in which set
        self.members[:, groups] = every
        tokens = masks[0].numel()
        self._tokens, self._earlier = (part.view(self.batch, self.size) for part in groups[: 2 * tokens].split(tokens))
        self._new, self._newest = groups[2 * tokens :].tolist()
        self._latest: tuple[tuple[object, ...], Tensor] | None = None  # all layers need the same

    def of(self, start: int, count: int, total: int, batch: int, device: torch.device) -> Tensor:
        """int64 (`batch`, `count`), the groups of `count` positions from `start` on, of `total` tokens; a cache of a fixed
        length has positions after them.

        Raises:
            ValueError: a batch of another size; several new tokens at once, if "last" is among the keys.
        """
        asked = (start, count, total, batch, device)
        if self._latest is not None and self._latest[0] == asked:
            return self._latest[1]
        if batch % self.batch:
            raise ValueError(f"model must run on the {self.batch} samples that va.intervene was given; got a batch of {batch}")
        groups = self._tokens if total <= self.size else self._earlier
        end = start + count
        if end > self.size:
            tail = groups.new_full((self.batch, end - max(start, self.size)), self._new)
            groups = torch.cat([groups[:, start:], tail], 1)
            if self._newest_alone and total > self.size and start < total <= end:
                groups[:, total - 1 - start] = self._newest
        else:
            groups = groups[:, start:end]
        groups = groups.repeat_interleave(batch // self.batch, 0).contiguous().to(device)
        self._latest = asked, groups
        return groups

    def check_rows(self, count: int, total: int) -> None:
        """ValueError for `count` tokens that run at once after the inputs, of which each would have another newest key."""
        if self._newest_alone and count > 1 and total > self.size:
            raise ValueError(f"keys='last' needs tokens that run one by one after the inputs; got {count} at once")
