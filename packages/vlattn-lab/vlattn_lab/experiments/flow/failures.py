"""How far first-order effects, relevancy and attention go with true effects, and where they do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation
from vlattn_lab.experiments.flow.edges import Effects
from vlattn_lab.experiments.flow.samples import PAIRS

EFFECTS = ("first_order", "behind", "true")
MASSES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)  # bounds of the bins of attention


def correlations(effects: Effects, heads: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """Spearman's correlations with true effects: of means over the samples, and the mean of those of each sample. Relevancy and
    attention have no sign, and are compared with sizes."""
    by_pair = {pair: torch.tensor([name == pair for name, _ in effects.edges]) for pair in PAIRS}
    everything = torch.ones(len(effects.edges), dtype=torch.bool)
    rows = [_row("heads", "first order", *heads)]
    parts = {"edges": everything, **{f"edges of {pair}": chosen for pair, chosen in by_pair.items()}}
    for name, values in (("first order", effects.first_order), ("first order after the cut", effects.behind)):
        rows += [_row(kind, name, values[chosen], effects.true[chosen]) for kind, chosen in parts.items()]
    for name, values in (
        ("first order", effects.first_order.abs()),
        ("relevancy", effects.relevancy),
        ("attention", effects.mass),
    ):
        rows.append(_row("sizes of edges", name, values, effects.true.abs()))
    return rows


def _row(kind: str, name: str, one: Tensor, two: Tensor) -> dict[str, Any]:
    each = [rank_correlation(a, b) or 0.0 for a, b in zip(one.T, two.T, strict=True)]
    mean_correlation = rank_correlation(one.mean(1), two.mean(1)) or 0.0
    return {
        "of": kind,
        "by": name,
        "count": len(one),
        "means": round(mean_correlation, 4),
        "samples": round(sum(each) / len(each), 4),
    }


def by_mass(effects: Effects) -> list[dict[str, Any]]:
    """The edges of all samples, by the attention that they have: mean sizes of the effects, the rank correlation of
    first-order and true ones, and how often a true effect above 0.1 has another sign by first order."""
    rows = []
    for low, high in zip(MASSES, MASSES[1:], strict=False):
        chosen = (effects.mass > low) & (effects.mass <= high)
        first_order, true = effects.first_order[chosen], effects.true[chosen]
        large = true.abs() > 0.1
        wrong = (first_order * true <= 0)[large]
        row = {"from": low, "to": high, "count": int(chosen.sum()), **_sizes(effects, chosen)}
        rank = rank_correlation(first_order, true)
        rows.append({**row, "rank": rank and round(rank, 4), "large": int(large.sum()), "wrong": int(wrong.sum())})
    return rows


def by_source(effects: Effects) -> list[dict[str, Any]]:
    """The same sizes by the group that is read, beside its mean attention: a sink has much of it and does little."""
    sources = dict.fromkeys((pair, edge.from_) for pair, edge in effects.edges)
    rows = []
    for pair, from_ in sources:
        chosen = torch.tensor([(name, edge.from_) == (pair, from_) for name, edge in effects.edges])
        mass = round(effects.mass[chosen].mean().item(), 4)
        rows.append({"pair": pair, "from": from_, "mass": mass, **_sizes(effects, chosen)})
    return rows


def largest_miss(effects: Effects) -> dict[str, Any]:
    """The edge and sample whose true effect is largest beyond the first-order one."""
    miss = effects.true.abs() - effects.first_order.abs()
    place, sample = divmod(int(miss.argmax()), miss.shape[1])
    pair, edge = effects.edges[place]
    named = {"pair": pair, "layer": edge.layer, "head": edge.head, "from": edge.from_, "to": edge.to}
    values = {name: round(float(getattr(effects, name)[place, sample]), 4) for name in (*EFFECTS, "mass")}
    return {**named, **values}


def _sizes(effects: Effects, chosen: Tensor) -> dict[str, float | None]:
    """The mean size of each kind of effect; None without an edge."""
    values = {name: getattr(effects, name)[chosen].abs() for name in EFFECTS}
    return {name: round(sizes.mean().item(), 5) if sizes.numel() else None for name, sizes in values.items()}
