"""The values of `evaluate`'s samples, gathered into records of its table and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class Tally:
    """The values of each sample by (method, test, part)."""

    def __init__(self, keys: list[tuple[str, str, str]]) -> None:
        self._values: dict[tuple[str, str, str], list[float]] = {key: [] for key in keys}
        self._curves: dict[tuple[str, str, str], list[list[float]]] = {key: [] for key in keys}
        self._left_out = dict.fromkeys(keys, 0)

    def add(self, key: tuple[str, str, str], value: float | None, curve: list[float] | None = None) -> None:
        """Adds a sample's value; None = left out."""
        if value is None:
            self._left_out[key] += 1
            return
        self._values[key].append(value)
        if curve is not None:
            self._curves[key].append(curve)

    def table(self) -> list[dict[str, Any]]:
        records = []
        for (method, test, part), values in self._values.items():
            numbers = torch.tensor(values, dtype=torch.float64)
            record: dict[str, Any] = {"method": method, "test": test, "part": part}
            record |= {
                "value": float(numbers.mean()) if values else None,
                "sd": float(numbers.std()) if len(values) > 1 else None,
            }
            records.append({**record, "samples": len(values), "left_out": self._left_out[method, test, part]})
        return records

    def curves(self, steps: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
        records = []
        for (method, test, part), curves in self._curves.items():
            if not curves:
                continue
            numbers = torch.tensor(curves, dtype=torch.float64)
            sd = numbers.std(0).tolist() if len(curves) > 1 else None
            record = {"method": method, "test": test, "part": part, "steps": list(steps[test])}
            records.append({**record, "mean": numbers.mean(0).tolist(), "sd": sd, "samples": len(curves)})
        return records
