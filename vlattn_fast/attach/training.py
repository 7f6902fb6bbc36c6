"""A context around training, which a callback of a Trainer enters and leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Any


class TrainingContext(ABC):
    """A context whose `__enter__` keeps its ways back. A callback calls `_begin_training` and `_end_training`; these leave a
    context alone that is entered by hand."""

    _ways_back: ExitStack | None = None  # where it is entered
    _by_callback = False

    @abstractmethod
    def __enter__(self) -> Any:
        """Attaches it, and sets `_ways_back`."""

    def __exit__(self, *error: Any) -> None:
        ways_back, self._ways_back, self._by_callback = self._ways_back, None, False
        if ways_back is not None:
            ways_back.close()

    def _begin_training(self) -> None:
        self._end_training()  # an error ended the training before: transformers' Trainer has no event for that
        if self._ways_back is None:
            self.__enter__()
            self._by_callback = True

    def _end_training(self) -> None:
        if self._by_callback:
            self.__exit__()
