"""Edges of attention between groups of tokens: their effects, and cuts of single ones and of many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlattn_fast import Edge, Knockout, ScaleHeads, attribute_edges, information_flow, intervene, intervene_each
from vlattn_fast.models import CLIPMapper
from vlattn_lab.experiments.flow.maps import Map, stored_maps
from vlattn_lab.experiments.flow.samples import PAIRS, Asked

# Edges of information flow: the attended tokens (None = all), those that attend, and the pair of towers.
FLOWS = {
    "image to the last token": (None, "last", "cross"),
    "answer's digit to the last token": ("answer", "last", "cross"),
    "asked digit to the last token": ("asked", "last", "cross"),
    "other digits to the last token": ("others", "last", "cross"),
    "image to the words": (None, "words", "cross"),
    "answer's digit to the words": ("answer", "words", "cross"),
    "asked digit to the words": ("asked", "words", "cross"),
    "words to the last token": ("words", "last", "text"),
    "answer's digit to empty patches": ("answer", "empty", "vision"),
    "asked digit to the answer's": ("asked", "answer", "vision"),
}
CUT = (1, 2, 4, 8, 16, 32, 64)  # edges
LISTS = ("true effect", "first order", "first order, by size", "first order after the cut", "relevancy", "attention", "random")


@dataclass(frozen=True)
class Effects:
    """Numbers (E, B) of E edges and B samples.

    first_order, true: effects on the logit of the answer. behind: effects of the true cut of an edge's map, to first order behind
    this map. relevancy: the sum of relu(A * dA) over an edge's pairs. mass: the attention of the tokens that read to those that
    are read, the mean over the former. probability: (B), of the answer.
    """

    edges: list[tuple[str, Edge]]  # by the name of its pair
    first_order: Tensor
    true: Tensor
    behind: Tensor
    relevancy: Tensor
    mass: Tensor
    probability: Tensor

    @classmethod
    def of(cls, model: CLIPMapper, asked: Asked) -> Effects:
        maps, edges, columns = stored_maps(model, asked), list[tuple[str, Edge]](), list[tuple[Tensor, ...]]()
        for pair, towers in PAIRS.items():
            table = attribute_edges(model, asked.inputs, asked.groups(pair), tower=towers)
            cut = intervene_each(model, asked.inputs, table)
            values = [_of_map(maps[pair, edge.layer], asked.groups(pair), edge) for edge in table]
            edges += [(pair, edge) for edge in table]
            columns.append((table.effects, cut.effects, *(torch.stack(rows) for rows in zip(*values, strict=True))))
        joined = [torch.cat(column).double() for column in zip(*columns, strict=True)]
        possible = joined[-1].amax(1) > 0  # a causal mask hides the others
        kept = [edge for edge, is_kept in zip(edges, possible.tolist(), strict=True) if is_kept]
        first_order, true, behind, relevancy, mass = (column[possible] for column in joined)
        return cls(kept, first_order, true, behind, relevancy, mass, _logits(model, asked).softmax(-1).amax(-1))

    def listed(self, name: str, seed: int) -> Tensor:
        """(E, B), by which a list orders the edges of each sample."""
        if name == "random":
            return torch.rand(self.true.shape, generator=torch.Generator().manual_seed(seed))
        by_name = {"true effect": self.true, "first order": self.first_order, "first order, by size": self.first_order.abs()}
        return {**by_name, "first order after the cut": self.behind, "relevancy": self.relevancy, "attention": self.mass}[name]


def _of_map(stored: Map, groups: dict[str, Tensor], edge: Edge) -> tuple[Tensor, Tensor, Tensor]:
    """(B) each: Σ (A - A') dA, where A' is the softmax without the edge, so the true cut of this map, to first order behind it;
    relevancy and mass as in `Effects`."""
    assert edge.head is not None
    logits, gradient = stored.logits[:, edge.head].double(), stored.gradient[:, edge.head].double()
    to, from_ = groups[edge.to][:, :, None], groups[edge.from_][:, None]
    attention, without = (x.softmax(-1).nan_to_num() for x in (logits, logits.masked_fill(from_, -torch.inf)))
    behind = ((attention - without) * gradient * to).sum((1, 2))
    relevancy = ((attention * gradient).clamp(min=0) * (to & from_)).sum((1, 2))
    return behind, relevancy, (attention * (to & from_)).sum((1, 2)) / to.sum((1, 2))


def _logits(model: CLIPMapper, asked: Asked) -> Tensor:
    """(B, classes or words), of all answers."""
    with torch.no_grad():
        return asked.read(model(**asked.inputs).logits).double()


def falls(model: CLIPMapper, asked: Asked) -> list[dict[str, Any]]:
    """By the edge of FLOWS: the share of the answer's probability that is lost where it is cut in one layer, and in all; the mean
    over the samples."""
    measured = []
    for name, (from_, to, pair) in FLOWS.items():
        groups = asked.groups(pair)
        cut: dict[str, Any] = {"queries": groups[to], "keys": None if from_ is None else groups[from_], "tower": PAIRS[pair]}
        data = [(asked.inputs, None)]
        single = information_flow(model, data, window=1, **cut)
        every = information_flow(model, data, window=2 * len(single.layers) - 1, **cut)
        by_layer = {str(layer): round(fall, 4) for layer, fall in zip(single.layers, single.curve.tolist(), strict=True)}
        measured.append({"edge": name, **by_layer, "all": round(float(every.curve[0]), 4)})
    return measured


def cut_together(model: CLIPMapper, asked: Asked, effects: Effects, seed: int) -> list[dict[str, Any]]:
    """The first edges of each list, in each sample its own, cut together: the share of the answer's probability that is lost,
    and the share of samples that get another answer."""
    answers, rows = _logits(model, asked).argmax(-1, keepdim=True), []
    for name in LISTS:
        order = effects.listed(name, seed).argsort(dim=0, descending=True, stable=True)
        for count in CUT:
            chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(0, order[:count], True)
            with intervene(model, asked.inputs, _knockouts(asked, effects, chosen)):
                after = _logits(model, asked).softmax(-1)
            fall = 1 - after.gather(1, answers)[:, 0] / effects.probability
            changed = (after.argmax(-1) != answers[:, 0]).double()
            rows.append({"list": name, "edges": count, "fall": round(fall.mean().item(), 4), "changed": changed.mean().item()})
    return rows


def _knockouts(asked: Asked, effects: Effects, chosen: Tensor) -> list[Knockout]:
    """The edges that bool (E, B) names, each in its samples."""
    edits = []
    for (pair, edge), chosen_samples in zip(effects.edges, chosen, strict=True):
        if bool(chosen_samples.any()):
            groups = asked.groups(pair)
            cut: dict[str, Any] = {"layers": edge.layer, "heads": edge.head, "tower": PAIRS[pair]}
            edits.append(Knockout(queries=groups[edge.to] & chosen_samples[:, None], keys=groups[edge.from_], **cut))
    return edits


def head_effects(model: CLIPMapper, asked: Asked) -> tuple[Tensor, Tensor]:
    """(heads, B): the first-order and the true effects on the logit of the answer of taking each head away."""
    first_order, true = [], []
    whole = _logits(model, asked)
    answers = whole.argmax(-1, keepdim=True)
    for (pair, layer), stored in stored_maps(model, asked).items():
        for head in range(stored.head.shape[1]):
            first_order.append(stored.head[:, head])
            with intervene(model, asked.inputs, ScaleHeads({layer: [head]}, 0.0, tower=PAIRS[pair])):
                true.append((whole - _logits(model, asked)).gather(1, answers)[:, 0])
    return torch.stack(first_order).double(), torch.stack(true)
