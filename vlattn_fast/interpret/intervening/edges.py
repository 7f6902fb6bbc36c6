"""Edges of attention, from keys of one group of tokens to queries of another in one head, and their effects on a score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer, describe
from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Edge:
    """The attention of one head between two groups, from -> to: information flows from the keys of one to the queries of another.

    Args:
        layer: its number, from 0; as an argument also negative, from the end.
        head: likewise; None = all heads of the layer.
        from_: the group of the keys and values.
        to: the group of the queries.
        effect: what the edge adds to the score, the mean over the samples; NaN if it was not measured.
    """

    layer: int
    head: int | None
    from_: str
    to: str
    effect: float = float("nan")


@dataclass(frozen=True, eq=False)
class EdgeTable(Sequence[Edge]):
    """Edges with their effects on a score; `print` shows the largest, `plot` and `plot_flow` draw them.

    The order is that of layers, heads and groups, or of `top`.

    Args:
        edges: each with its mean effect.
        effects: (E, B), for each edge and sample.
        scores: (B,), of the unedited model.
        groups: the tokens of each name, as for `Knockout`; no token is in two. A name without the tokens of another is written
            "question - last".
        asked: the arguments of the call that define the score, such as target, answer, processor and tower.
        first_order: True = the effects are gradients, or means of these; False = the edges were cut.
        without_edges: the layers without a softmax, such as recurrences, which have no edges.
        gaps: (F, F), [from, to] as in `by_layer`, for integrated effects: their sum over layers and heads, less the effect of all
            these cuts at once, in the score's unit, the mean over the samples. NaN without such edges. Otherwise None.
    """

    edges: tuple[Edge, ...]
    effects: Tensor
    scores: Tensor
    groups: Mapping[str, Any]
    asked: Mapping[str, Any] = field(repr=False)
    first_order: bool = True
    without_edges: tuple[int, ...] = ()
    gaps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.edges)

    @overload
    def __getitem__(self, index: int) -> Edge: ...
    @overload
    def __getitem__(self, index: slice) -> EdgeTable: ...
    def __getitem__(self, index: int | slice) -> Edge | EdgeTable:
        return self.edges[index] if isinstance(index, int) else self._chosen(range(len(self))[index])

    def __iter__(self) -> Iterator[Edge]:
        return iter(self.edges)

    def __repr__(self) -> str:
        lines = [
            f"layer {e.layer:>3}  head {'all' if e.head is None else e.head:>3}  {e.from_} -> {e.to}  {e.effect:+.4g}"
            for e in self
        ]
        lines = [*lines[:10], *(["..."] if len(lines) > 10 else [])]
        if self.without_edges:
            lines.append(f"no edges in layers {', '.join(map(str, self.without_edges))}, which take no softmax")
        if self.gaps is not None:
            lines.append(
                f"the whole table's sums differ from all cuts at once by {float(self.gaps.nan_to_num().abs().max()):.2g} or less"
            )
        return "\n".join([f"{len(self)} edges, {self._kind}:", *lines])

    @property
    def _kind(self) -> str:
        first = "first-order effects" if self.gaps is None else "integrated effects"
        return first if self.first_order else "effects"

    def _chosen(self, numbers: Sequence[int]) -> EdgeTable:
        return replace(self, edges=tuple(self.edges[i] for i in numbers), effects=self.effects[list(numbers)])

    def top(self, k: int) -> EdgeTable:
        """Returns the `k` edges with the largest effects, positive or negative; the largest first."""
        check_integer("k", k, low=1)
        order = torch.tensor([edge.effect for edge in self.edges]).abs().argsort(descending=True, stable=True)
        return self._chosen(order[:k].tolist())

    def matrix(self, from_: str, to: str) -> Tensor:
        """Returns the effects (L, H) of the edges from_ -> to, from keys of one group to queries of the other. NaN if the table
        has no such edge. ValueError for unknown groups."""
        for name, group in (("from_", from_), ("to", to)):
            if group not in self.groups:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, self.groups))}; got {group!r}")
        edges = [edge for edge in self.edges if edge.head is not None]
        shape = 1 + max((e.layer for e in edges), default=-1), 1 + max((e.head for e in edges if e.head is not None), default=-1)
        matrix = torch.full(shape, torch.nan)
        for edge in edges:
            if (edge.from_, edge.to) == (from_, to) and edge.head is not None:
                matrix[edge.layer, edge.head] = edge.effect
        return matrix

    def by_layer(self) -> Tensor:
        """Returns the effects (L, F, F) of each layer, [layer, from, to]: from the keys of one group to the queries of another,
        both in the order of `groups`. It is the effect of all heads at once if the table has it, else the sum over its heads. NaN
        without either."""
        names, size = list(self.groups), 1 + max((edge.layer for edge in self.edges), default=-1)
        effects = torch.full((size, len(names), len(names)), torch.nan, dtype=torch.float64)
        for edge in sorted(self.edges, key=lambda edge: edge.head is None):  # edges of all heads replace sums
            place = edge.layer, names.index(edge.from_), names.index(edge.to)
            before = 0.0 if edge.head is None else float(effects[place].nan_to_num())
            effects[place] = before + edge.effect
        return effects

    def rank_correlation(self, table: EdgeTable) -> float | None:
        """Returns Spearman's correlation with the effects of the same edges in another table, e.g. of first-order and true
        effects; None for fewer than three edges, and if all effects are equal. ValueError for other edges."""
        pair = self, table
        named = [[(edge.layer, edge.head, edge.from_, edge.to) for edge in each] for each in pair]
        if named[0] != named[1]:
            raise ValueError(f"table must have the same {len(self)} edges in the same order; got {len(table)} other ones")
        return rank_correlation(*(torch.tensor([edge.effect for edge in each]) for each in pair))

    def plot(self, from_: str, to: str) -> Figure:
        """Draws `matrix`, layers down, heads across. ModuleNotFoundError without matplotlib."""
        matrix = self.matrix(from_, to)
        with extra("viz"):
            from matplotlib.figure import Figure
        largest = float(matrix.abs().nan_to_num().max()) if matrix.numel() else 0.0
        figure = Figure(figsize=(1.5 + 0.35 * matrix.shape[1], 1.2 + 0.35 * matrix.shape[0]), layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(matrix.tolist(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set(xlabel="head", ylabel="layer", title=f"{from_} -> {to}")
        figure.colorbar(picture, ax=axes)
        return figure

    def plot_flow(self) -> Figure:
        """Draws the effects of `by_layer` as ribbons, layer after layer, from keys of a group on the left to queries of one on
        the right. A ribbon is as wide as its effect: red if the edge adds to the score, blue if it subtracts.
        ModuleNotFoundError without matplotlib."""
        effects, names = self.by_layer().nan_to_num(), list(self.groups)
        with extra("viz"):
            from matplotlib.figure import Figure
        largest = float(effects.abs().max()) if effects.numel() else 0.0
        figure = Figure(figsize=(2 + min(0.6 * len(effects), 20), 1 + 0.7 * len(names)), layout="constrained")
        axes = figure.subplots()
        way = torch.linspace(0, 1, 33, dtype=torch.float64)
        rise = way * way * (3 - 2 * way)
        for layer, from_, to in (effects != 0).nonzero().tolist():
            effect = float(effects[layer, from_, to])
            middle, half = from_ + (to - from_) * rise, 0.3 * abs(effect) / largest
            sides = [(layer + way).tolist(), (middle - half).tolist(), (middle + half).tolist()]
            axes.fill_between(*sides, color="#b2182b" if effect > 0 else "#2166ac", alpha=0.6, linewidth=0)
        axes.set(xlim=(0, max(len(effects), 1)), ylim=(len(names) - 0.5, -0.5), xlabel="layer")
        axes.set_title(f"{self._kind}, the widest {largest:.3g}\nred adds to the score, blue subtracts", fontsize=10)
        axes.set_yticks(range(len(names)), names)
        step = -(-len(effects) // 16)  # so that the numbers are legible
        numbers = list(range(0, len(effects), step or 1))
        axes.set_xticks([number + 0.5 for number in numbers], list(map(str, numbers)))
        axes.tick_params(length=0)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def to_pandas(self) -> pd.DataFrame:
        """Returns a data frame with a line per edge and the columns layer, head, from (keys), to (queries) and effect.
        ModuleNotFoundError without pandas."""
        with extra("tables"):
            import pandas as pd
        columns = {"layer": "layer", "head": "head", "from": "from_", "to": "to", "effect": "effect"}
        frame = pd.DataFrame({name: [getattr(edge, each) for edge in self.edges] for name, each in columns.items()})
        return frame.astype({"head": "Int64"})


def as_edge(edge: Any, groups: Mapping[str, Any]) -> Edge:
    """An `Edge`, or a tuple (layer, head, from, to), between known groups."""
    if isinstance(edge, tuple) and len(edge) == 4:
        edge = Edge(*edge)
    if not isinstance(edge, Edge):
        raise TypeError(f"edges must be va.Edge or tuples (layer, head, from, to); got {describe(edge)}")
    for name, number in (("layer", edge.layer), ("head", edge.head)):
        if (number is not None or name == "layer") and type(number) is not int:
            raise ValueError(f"edges must have an int as their {name}, -1 for the last; got {number!r}")
    for name in (edge.from_, edge.to):
        if name not in groups:
            raise ValueError(f"edges must go between groups among {', '.join(map(repr, groups))}; got {name!r}")
    return edge
