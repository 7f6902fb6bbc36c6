"""The path of each module that runs, where parts of a model may share a module."""

from __future__ import annotations

from collections import Counter

from torch import nn


class ModulePaths:
    """The paths of the modules of `model` within a part of it, "" = the whole. A module that several parts share has several: in
    a run it has that of the part that calls it, and a list that holds it several times calls each in turn."""

    def __init__(self, model: nn.Module, within: str) -> None:
        self._names: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if not within or f"{path}.".startswith(f"{within}."):
                self._names.setdefault(module, []).append(path)
        self._times: Counter[tuple[int, nn.Module]] = Counter()  # how often a shared module ran within a run of another

    def of(self, module: nn.Module, around: str | None, run: int) -> str | None:
        """The path of a module that the one at `around` calls in its run number `run`; None = it lies elsewhere."""
        names = self._names.get(module, [])
        if len(names) < 2:
            return names[0] if names else None
        names = [name for name in names if around and name.startswith(f"{around}.")] or names
        self._times[run, module] += 1
        return names[(self._times[run, module] - 1) % len(names)]
