"""Tables of the parts of a number: names, the share of each, and their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_choice, check_integer
from vlattn_fast._ground.extras import extra

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class PartTable:
    """The base of `ScoreParts` and `LogitParts`: numbers of P parts, of several kinds, by sample and perhaps by head."""

    names: tuple[str, ...]

    def _kinds(self) -> dict[str, Tensor]:
        """Of each kind of number (B, P) or (B, H, P)."""
        raise NotImplementedError

    def _mean(self, kind: str | None) -> tuple[str, Tensor]:
        """A kind, by default the first one, and its mean over the samples: (P), or (H, P)."""
        kinds = self._kinds()
        name = next(iter(kinds)) if kind is None else kind
        check_choice("kind", name, tuple(kinds))
        return name, kinds[name].double().mean(0)

    def to_pandas(self) -> pd.DataFrame:
        """Returns a data frame: a line for each sample, head if there are several, and part. ModuleNotFoundError without
        pandas."""
        with extra("tables"):
            import pandas as pd
        kinds = self._kinds()
        shape = next(iter(kinds.values())).shape
        index = torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist()
        heads = getattr(self, "heads", ())
        columns: dict[str, list[object]] = {"sample": [at[0] for at in index]}
        if len(shape) == 3:
            columns["head"] = [heads[at[1]] for at in index]
        columns["part"] = [self.names[at[-1]] for at in index]
        columns |= {name: numbers.flatten().tolist() for name, numbers in kinds.items()}
        return pd.DataFrame(columns)

    def _lines(self, kind: str | None, count: int) -> list[str]:
        name, mean = self._mean(kind)
        rows = mean if mean.ndim == 2 else mean[None]
        labels = [f"head {head}  " for head in getattr(self, "heads", ())] or [""]
        entries = list[tuple[float, str]]()
        for label, row in zip(labels, rows.tolist(), strict=True):
            entries += [(x, label + part) for part, x in zip(self.names, row, strict=True)]
        entries.sort(key=lambda entry: -abs(entry[0]))
        return [f"largest {name}:", *(f"  {label:<24} {x:+.4g}" for x, label in entries[:count])]


def bars(names: Sequence[str], values: Tensor, title: str, count: int) -> Figure:
    """The parts with the largest values, in their order, as bars: red above 0, blue below."""
    check_integer("count", count, low=1)
    with extra("viz"):
        from matplotlib.figure import Figure
    chosen = sorted(values.abs().argsort(descending=True, stable=True)[:count].tolist())
    figure = Figure(figsize=(5, 0.8 + 0.22 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    numbers = [float(values[i]) for i in chosen]
    axes.barh(range(len(chosen)), numbers, color=["#b2182b" if x > 0 else "#2166ac" for x in numbers])
    axes.set_yticks(range(len(chosen)), [names[i] for i in chosen])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
