"""The processes of one run: one, or as many as torchrun started."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

_MEETING, _FOREVER = timedelta(minutes=10), timedelta(days=365)  # ranks begin together and end at different times


@dataclass
class Ranks:
    """This process among `world` processes, with a shared counter."""

    rank: int
    world: int
    local: int
    store: Any = None
    counted: int = 0  # the counter without a store

    def from_first(self, value: Any) -> Any:
        """The first rank's `value`."""
        values = [value]
        if self.world > 1:
            distributed.broadcast_object_list(values)
        return values[0]

    def gather(self, value: list[Any]) -> list[Any]:
        """On the first rank, the lists of all ranks, joined; elsewhere an empty list."""
        if self.world == 1:
            return value
        gathered: list[Any] | None = [None] * self.world if self.rank == 0 else None
        distributed.gather_object(value, gathered)
        return [one for part in gathered or [] for one in part]

    def count(self, more: int) -> int:
        """Adds to the shared counter and returns the sum."""
        self.counted += more
        return self.counted if self.store is None else int(self.store.add("items", more))

    def wait(self, total: int, report: Callable[[int], None]) -> None:
        """On the first rank, watches the counter until it reaches `total`."""
        while self.world > 1 and self.rank == 0:
            report(count := self.count(0))
            if count >= total:
                return
            time.sleep(0.2)


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The process group that torchrun's environment describes; without it, only this process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(0, 1, 0)
        return
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # not in torch's __all__

    local = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"  # lists of ids and failures are on the CPU
    store, rank, world = next(rendezvous("env://", timeout=_MEETING))
    distributed.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=world, timeout=_FOREVER)
    try:
        yield Ranks(rank, world, local, PrefixStore("explained", store))
    finally:
        distributed.destroy_process_group()
