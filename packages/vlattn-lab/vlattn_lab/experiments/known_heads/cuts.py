"""Predictions of the effects of cuts, compared with true cuts of one edge and of sets of edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation

SHARES, DRAWS = (0.1, 0.25, 0.5), 8  # of the edges of a set, and sets of each share
STEPS = (1, 4)
FIRST_ORDER, UNDONE, TRUE = "first order", "first order, softmax undone", "true cuts"
PREDICTIONS = (FIRST_ORDER, *(f"integrated, n_steps={steps}" for steps in STEPS), UNDONE)
Places = Sequence[tuple[int, int, str, str]]  # layer, head, from, to
Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A score of a model, and edges that it may depend on.

    inputs: tensors (B, ...), or tuples of one. groups: bool (B, N) by name. score: outputs for any number of copies of the
    batch -> (copies * B). mass: (L, H), the attention of the one query to the keys of the edges, if there are no other edges.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    groups: Mapping[str, Tensor]
    places: Places
    score: Callable[[Any], Tensor]
    tower: tuple[str, str] | None = None
    mass: Tensor | None = None

    def predictions(self) -> dict[str, Tensor]:
        """The effects (E), means over the samples, by PREDICTIONS."""
        asked: Row = {"target": self.score, "tower": self.tower}
        tables = {FIRST_ORDER: va.attribute_edges(self.model, self.inputs, self.groups, **asked)}
        for steps in STEPS:
            name = f"integrated, n_steps={steps}"
            tables[name] = va.attribute_edges(self.model, self.inputs, self.groups, n_steps=steps, **asked)
        named = {name: {(e.layer, e.head, e.from_, e.to): e.effect for e in table} for name, table in tables.items()}
        found = {name: torch.tensor([by[place] for place in self.places]).double() for name, by in named.items()}
        if self.mass is not None:  # A (1 - A) m instead of A m, for a difference m of the mean values
            layers, heads = (torch.tensor(each) for each in list(zip(*self.places, strict=True))[:2])
            found[UNDONE] = found[FIRST_ORDER] / (1 - self.mass[layers, heads].double()).clamp(min=1e-9)
        return found

    def cut(self, sets: Tensor) -> Tensor:
        """(S), how much the score falls if the edges of a set, bool (S, E), are cut together; the mean over the samples."""
        copies, batch = len(sets), len(next(iter(self.groups.values())))

        def repeated(x: Any) -> Any:
            return tuple(map(repeated, x)) if isinstance(x, tuple) else x.repeat(copies, *[1] * (x.ndim - 1))

        inputs, edits = {name: repeated(x) for name, x in self.inputs.items()}, []
        keys = {name: mask.repeat(copies, 1) for name, mask in self.groups.items()}
        for number, chosen in enumerate(sets):
            cuts: dict[tuple[int, str, str], list[int]] = {}
            for place in chosen.nonzero()[:, 0].tolist():
                layer, head, from_, to = self.places[place]
                cuts.setdefault((layer, from_, to), []).append(head)
            here = torch.zeros(copies, dtype=torch.bool).index_fill(0, torch.tensor([number]), True).repeat_interleave(batch)
            queries = {name: mask & here[:, None] for name, mask in keys.items() if mask.shape[1] == self._queries}
            for (layer, from_, to), heads in cuts.items():
                tokens: Row = {"queries": queries[to], "keys": keys[from_], "tower": self.tower}
                edits.append(va.Knockout(**tokens, layers=layer, heads=heads))
        with torch.no_grad():
            whole = self.score(self.model(**self.inputs)).double().mean()
            with va.intervene(self.model, inputs, edits):
                return whole - self.score(self.model(**inputs)).double().view(copies, batch).mean(1)

    @property
    def _queries(self) -> int:
        return self.groups[self.places[0][3]].shape[1]


def measured(question: Question, seed: int) -> Row:
    """The effects of each edge, true and predicted; the rank correlations of predictions with single cuts and with cuts of sets;
    and by how much the sum of all predictions misses the cut of all edges, as a share of it."""
    count, random = len(question.places), torch.Generator().manual_seed(seed)
    sets = torch.stack([torch.rand(count, generator=random) < share for share in SHARES for _ in range(DRAWS)])
    sets[:, 0] |= ~sets.any(1)
    every = torch.cat([sets, torch.ones(1, count, dtype=torch.bool)])
    together, predictions = question.cut(every), question.predictions()
    asked: Row = {"groups": question.groups, "target": question.score, "tower": question.tower}
    table = va.intervene_each(question.model, question.inputs, question.places, **asked)
    single = torch.tensor([edge.effect for edge in table]).double()
    rows = []
    for name, effects in predictions.items():
        sums = sets.double() @ effects
        rows.append(
            {
                **{"by": name, "single": ranks(effects, single), "sets": ranks(sums, together[:-1])},
                **{"gap": float((effects.sum() - together[-1]).abs() / together[-1].abs()), "effects": digits(effects)},
            }
        )
    return {"all": float(together[-1]), "true": digits(single), "predictions": rows}


def ranks(one: Tensor, two: Tensor) -> float:
    return round(rank_correlation(one, two) or 0.0, 4)


def digits(numbers: Tensor) -> list[float]:
    return [float(f"{number:.4g}") for number in numbers.tolist()]


def place_of(effects: Sequence[float], number: int) -> int:
    """The rank of an edge among all, 1 = the largest effect."""
    return 1 + sum(other > effects[number] for other in effects)
