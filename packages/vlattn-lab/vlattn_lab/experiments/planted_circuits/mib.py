"""CPR and CMD of the Mechanistic Interpretability Benchmark (Mueller et al., ICML 2025, arXiv 2504.13151) for lists of edges.

A circuit is the first edges of a list; all other attention is cut. Its faithfulness is

    f = (m(circuit) - m(no edge)) / (m(all edges) - m(no edge)), where m is the mean score.

CPR, the circuit performance ratio, is the area under f over the share of the edges that are kept; the list orders effects with
their sign. CMD, the circuit-model distance, is the area of |1 - f|; the list orders effects by size. Shares, rounding, orders and
trapezoids are those of the code published with the benchmark. Its edges connect all parts of a model and are replaced by their
activations in another input, and its score is a difference of logits. Here the edges are those of attention, they are knocked
out, and the score is the answer's logit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast import Edge, Knockout, attribute_edges, intervene, intervene_each
from vlattn_fast.attach.frozen import Frozen
from vlattn_fast.attach.observer import Observer
from vlattn_fast.interpret.evaluating.curves import area_under
from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation
from vlattn_fast.models import CLIPMapper
from vlattn_lab.experiments.flow.edges import Effects, head_effects
from vlattn_lab.experiments.flow.maps import stored_maps
from vlattn_lab.experiments.flow.samples import PAIRS, Asked
from vlattn_lab.experiments.planted_circuits.models import Circuit, Samples

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the edges that are kept
TRUE, FIRST_ORDER, HELD, RELEVANCY, RANDOM = "true cuts", "first order", "first order, norms held fixed", "relevancy", "random"
LISTS = (TRUE, FIRST_ORDER, HELD, RELEVANCY, RANDOM)
Place = tuple[str, Edge]  # an edge, and the name of the towers that it lies between
Lists = dict[str, Tensor]  # by its name, what a list orders the edges by, (E)


@dataclass
class Circuits:
    """A model of which only some edges are left.

    groups: by the name of a pair of towers, bool (B, N) by name. towers: by the same name, those of queries and keys; None = the
    model's only one. score: the outputs -> (B).
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    edges: Sequence[Place]
    groups: Callable[[str], Mapping[str, Tensor]]
    towers: Mapping[str, Any]
    score: Callable[[Any], Tensor]
    seen: dict[frozenset[int], float] = field(default_factory=dict)

    @torch.no_grad()
    def mean(self, kept: Sequence[int]) -> float:
        """The mean score with the edges of these numbers alone."""
        places = frozenset(kept)
        if places not in self.seen:
            cuts: dict[tuple[str, int, str, str], list[int]] = {}
            for number, (pair, edge) in enumerate(self.edges):
                if number not in places:
                    assert edge.head is not None
                    cuts.setdefault((pair, edge.layer, edge.from_, edge.to), []).append(edge.head)
            edits = []
            for (pair, layer, from_, to), heads in cuts.items():
                queries, keys = (self.groups(pair)[name] for name in (to, from_))
                edits.append(Knockout(queries=queries, keys=keys, layers=layer, heads=heads, tower=self.towers[pair]))
            if edits:
                with intervene(self.model, self.inputs, edits):
                    outputs = self.model(**self.inputs)
            else:
                outputs = self.model(**self.inputs)
            self.seen[places] = float(self.score(outputs).double().mean())
        return self.seen[places]

    def faithfulness(self, kept: Sequence[int]) -> float:
        """The faithfulness of the circuit of these edges, 1 if they are all edges, 0 if there are none."""
        none, whole = self.mean(()), self.mean(range(len(self.edges)))
        return (self.mean(kept) - none) / (whole - none)

    def measured(self, lists: Lists) -> list[dict[str, Any]]:
        """CPR and CMD of each list, and the two curves."""
        rows = []
        for name, effects in lists.items():
            signed, sized = (self._curve(values) for values in (effects, effects.abs()))
            cpr, cmd = area_under(SHARES, signed), area_under(SHARES, [abs(1 - f) for f in sized])
            curves = {"signed": _rounded(signed), "sized": _rounded(sized)}
            rows.append({"list": name, "cpr": round(cpr, 4), "cmd": round(cmd, 4), **curves})
        return rows

    def _curve(self, values: Tensor) -> list[float]:
        order = values.argsort(descending=True, stable=True).tolist()
        return [self.faithfulness(order[: int(share * len(order))]) for share in SHARES]


def measures_on_planted(circuit: Circuit, ranking: Samples, tested: Samples, seed: int) -> dict[str, Any]:
    """CPR and CMD on the samples `tested`, of lists that were made on `ranking`; the places of the planted edges in these lists;
    and the faithfulness of only the planted edges."""
    model = circuit.model
    asked: dict[str, Any] = {"target": ranking.answers.tolist()}
    plain = attribute_edges(model, ranking.inputs, ranking.groups, **asked)
    with Observer(model, [Frozen()]):
        held = attribute_edges(model, ranking.inputs, ranking.groups, **asked)
    true = intervene_each(model, ranking.inputs, plain)
    kept = [number for number, edge in enumerate(plain) if not circuit.is_causal or is_causal(ranking.groups, edge)]
    lists = {TRUE: true.effects, FIRST_ORDER: plain.effects, HELD: held.effects}
    by_name = {name: effects[kept].double().mean(1) for name, effects in lists.items()}
    edges = [("", plain[number]) for number in kept]
    planted = [[_named(edge) for _, edge in edges].index(place) for place in circuit.edges]
    by_name[RANDOM] = torch.rand(len(edges), generator=torch.Generator().manual_seed(seed))

    def score(outputs: Any) -> Tensor:
        logits: Tensor = outputs.logits if outputs.logits.ndim == 2 else outputs.logits[:, -1]
        return logits.gather(1, tested.answers[:, None])[:, 0]

    circuits = Circuits(model, tested.inputs, edges, lambda _: tested.groups, {"": None}, score)
    places = {name: [1 + int((values > values[number]).sum()) for number in planted] for name, values in by_name.items()}
    areas = circuits.measured(by_name)
    return {"edges": len(edges), "alone": round(circuits.faithfulness(planted), 4), "places": places, "areas": areas}


def is_causal(groups: Mapping[str, Tensor], edge: Edge) -> bool:
    """Whether in some sample a token of `to` may see one of `from_`."""
    numbers = torch.arange(next(iter(groups.values())).shape[1])
    first = numbers.masked_fill(~groups[edge.from_], len(numbers)).amin(1)
    last = numbers.masked_fill(~groups[edge.to], -1).amax(1)
    return bool((first <= last).any())


def measures_on_scenes(model: CLIPMapper, asked: Asked, seed: int) -> dict[str, Any]:
    """CPR and CMD on one half of the scenes, of lists that were made on the other half, and the rank correlations of first-order
    effects with true ones: with norms that keep their derivative, and with norms held fixed."""
    half = len(asked.inputs["input_ids"]) // 2
    ranking, tested = part(asked, slice(half)), part(asked, slice(half, None))
    effects = Effects.of(model, ranking)
    with Observer(model, [Frozen()]):
        tables = {pair: attribute_edges(model, ranking.inputs, ranking.groups(pair), tower=PAIRS[pair]) for pair in PAIRS}
        heads = torch.cat([stored.head.T for stored in stored_maps(model, ranking).values()]).double()
    held_rows = {
        (pair, *_named(edge)): row for pair, table in tables.items() for edge, row in zip(table, table.effects, strict=True)
    }
    held = torch.stack([held_rows[pair, *_named(edge)] for pair, edge in effects.edges]).double()
    lists = {TRUE: effects.true, FIRST_ORDER: effects.first_order, HELD: held, RELEVANCY: effects.relevancy}
    by_name = {name: values.mean(1) for name, values in lists.items()}
    by_name[RANDOM] = torch.rand(len(effects.edges), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        answers = tested.read(model(**tested.inputs).logits).argmax(-1, keepdim=True)

    def score(outputs: Any) -> Tensor:
        return tested.read(outputs.logits).gather(1, answers)[:, 0]

    circuits = Circuits(model, tested.inputs, effects.edges, tested.groups, PAIRS, score)
    plain, true = head_effects(model, ranking)
    ranks = {"edges": (effects.true, effects.first_order, held), "heads": (true, plain, heads)}
    return {
        "edges": len(effects.edges),
        "areas": circuits.measured(by_name),
        "ranks": {of: dict(zip((FIRST_ORDER, HELD), _ranks(*values), strict=True)) for of, values in ranks.items()},
    }


def part(asked: Asked, chosen: slice) -> Asked:
    """Some of the scenes."""
    return Asked(*({name: x[chosen] for name, x in each.items()} for each in (asked.inputs, asked.text, asked.image)))


def _named(edge: Edge) -> tuple[Any, ...]:
    return edge.layer, edge.head, edge.from_, edge.to


def _ranks(true: Tensor, *predicted: Tensor) -> list[float]:
    """Rank correlations of means over the samples."""
    return [round(rank_correlation(effects.mean(1), true.mean(1)) or 0.0, 4) for effects in predicted]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
