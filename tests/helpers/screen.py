"""What a bar of progress is drawn on, and the time that it reads."""

from __future__ import annotations

import io


class Screen(io.StringIO):
    """Stands for stderr: a terminal, or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Clock:
    """Stands for `time.time`: it goes on by so many seconds whenever it is read."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 1e9, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now
