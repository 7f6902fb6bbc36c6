"""The test "intervention" of `evaluate`: whether a map names the tokens whose attention matters.

Each piece of the image, and each word, is a group of tokens. Cutting a group masks it for the explained position, in all layers
and heads. The effect of a group is the drop of the score by its cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.extras import with_progress
from vlattn_fast.interpret.adapters.adapter import WITHOUT_ADAPTER
from vlattn_fast.interpret.adapters.tokens import Tokens
from vlattn_fast.interpret.evaluating.curves import CURVES, PARTS, TENTHS
from vlattn_fast.interpret.evaluating.evaluation import Tally
from vlattn_fast.interpret.evaluating.maps import Batch
from vlattn_fast.interpret.evaluating.perturbation import Sample
from vlattn_fast.interpret.evaluating.plan import EDGES, INTERVENTION, Plan
from vlattn_fast.interpret.evaluating.ties import coarsest, constant, rounding
from vlattn_fast.interpret.intervening.asking import Asked, repeated_set
from vlattn_fast.interpret.intervening.plans import Pair, Plans, Term
from vlattn_fast.interpret.intervening.token_sets import TokenSet, token_set
from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation

SIDE = 4  # pieces along a side of an image, at most
LEAST = 3  # groups, so that a rank correlation exists
Cut = frozenset[tuple[str, int]]  # (part, number) of each group that is cut at once
_DRAWN = ("insertion", "deletion")


@dataclass(frozen=True)
class _Group:
    entries: Tensor  # int64, of the map
    tokens: Tensor  # int64, of the tower


_Groups = dict[str, list[_Group]]  # of a sample, by part
_Masses = dict[tuple[str, int, str], Tensor | None]


@dataclass(frozen=True)
class _Question:
    """A batch, and the model run on it with attention cut."""

    asked: Asked
    target: Any
    pair: Pair  # the tower that attends to itself
    queries: TokenSet

    @classmethod
    def check(cls, plan: Plan, batch: Batch) -> _Question:
        """ValueError if no tower, or several, attend to themselves, or the tower has no explained position."""
        target, processor = batch.question.target, plan.options.get("processor")
        asked = Asked.check(plan.model, batch.question.inputs, target=target, answer=None, tower=None, processor=processor)
        pairs = [pair for pair in Plans(asked.traced).pairs(None) if pair[0] is pair[1]]
        if len(pairs) != 1:
            names = ", ".join(repr(pair[0].name) for pair in pairs) or "none"
            raise ValueError(f"{_IMPOSSIBLE}: one tower must attend to itself; got {names}. {_LEAVE}")
        has_adapter = asked.request.adapter is not WITHOUT_ADAPTER
        read = ("special",) if has_adapter and not pairs[0][0].tokens.predicts else ("last", "special")
        sets = [token_set("queries", name, pairs[0][0]) for name in read]
        queries = next((each for each in sets if isinstance(each, TokenSet)), None)
        if queries is None:
            raise ValueError(f"{_IMPOSSIBLE}: it needs an explained token; {sets[-1]}. {_LEAVE}")
        return cls(asked, target, pairs[0], queries)

    @torch.no_grad()
    def cut(self, masks: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """Scores and probabilities (K, B) with the tokens of masks (K, B, N) cut."""
        copies, results = self.asked.at_once(max(1, batch_size // masks.shape[1])), []
        for part in with_progress(masks.split(copies), "cutting attention", leave=False):
            asked, plans = self.asked.repeated(len(part), self.target), Plans(self.asked.traced)
            queries, keys = repeated_set(self.queries, len(part)), TokenSet(part.flatten(0, 1))
            for each in plans.layers([self.pair], None):
                plans.add_term(each, Term(queries, keys, torch.full((each.call.heads,), -torch.inf)))
            outputs = asked.run(plans)
            measured = asked.scores(outputs)[0], asked.probabilities(outputs)
            results.append(torch.stack([each.detach().double().cpu().view(len(part), -1) for each in measured]))
        scores, probabilities = torch.cat(results, 1)
        if bool((scores.isnan() | probabilities.isnan()).any()):
            raise ValueError(f"{_IMPOSSIBLE}: the model returned NaN with attention cut. {_LEAVE}")
        return scores, probabilities

    @torch.enable_grad()
    def first_order(self, masks: Tensor) -> Tensor:
        """(K, B), the first-order effects of cutting masks (K, B, N): see `attribute_edges`."""
        weight = next(self.asked.request.model.parameters(), torch.zeros(()))
        dtype, plans = torch.promote_types(weight.dtype, torch.float32), Plans(self.asked.traced)
        leaf = torch.zeros(masks.shape[:2], dtype=dtype, device=weight.device, requires_grad=True)
        sets = [TokenSet(mask) for mask in masks]
        for each in plans.layers([self.pair], None):
            for keys, bias in zip(sets, leaf, strict=True):
                plans.add_term(each, Term(self.queries, keys, bias[:, None].expand(-1, each.call.heads)))
        scores, _ = self.asked.scores(self.asked.run(plans))
        (effects,) = torch.autograd.grad(scores.sum(), leaf)
        return effects.double().cpu()


_IMPOSSIBLE = f"Test {INTERVENTION!r} is impossible with this model"
_LEAVE = "Leave it out of tests="


def cut_attention(plan: Plan, batch: Batch, tally: Tally) -> None:
    """Rank correlations and overlaps of each map with the effects of cuts, and curves of cuts in the order of each map."""
    if INTERVENTION not in plan.tests:
        return
    question = _Question.check(plan, batch)
    groups = [_groups(sample, number, question.pair[0].tokens) for number, sample in enumerate(batch.samples)]
    masses = _masses(plan, batch, groups, question)
    cuts: list[dict[Cut, int]] = [{frozenset(): 0} for _ in groups]
    for (_, number, part), mass in masses.items():
        for cut in [] if mass is None else [*_singles(part, mass), *(cut for test in _DRAWN for cut in _drawn(test, part, mass))]:
            cuts[number].setdefault(cut, len(cuts[number]))
    scores, probabilities = question.cut(_masks(cuts, groups, question), plan.batch_size)
    noise = rounding(coarsest(plan.model.parameters()))
    for (name, number, part), mass in masses.items():
        if mass is None:
            for test in ("", ":top", ":insertion", ":deletion"):
                tally.add((name, INTERVENTION + test, part), None)
            continue
        whole, places = scores[0, number], cuts[number]
        falls = whole - scores[[places[cut] for cut in _singles(part, mass)], number]
        falls = falls.where(falls.abs() > noise * whole.abs(), 0.0)
        is_defined = not (constant(mass) or constant(falls))
        tally.add((name, INTERVENTION, part), rank_correlation(mass, falls) if is_defined else None)
        tally.add((name, f"{INTERVENTION}:top", part), overlap(mass, falls) if is_defined else None)
        for test in _DRAWN:
            curve = [float(probabilities[places[cut], number]) for cut in _drawn(test, part, mass)]
            tally.add((name, f"{INTERVENTION}:{test}", part), CURVES[test].value(curve, TENTHS), curve)


def _masses(
    plan: Plan, batch: Batch, groups: Sequence[_Groups], question: _Question
) -> dict[tuple[str, int, str], Tensor | None]:
    """(K,) what each map gives to each group, by (map, sample, part); None if the sample has too few. For "attribute_edges",
    which makes no map, the first-order effects."""
    every = [(number, part) for number in range(len(groups)) for part in PARTS]
    many = {(number, part): len(groups[number][part]) >= LEAST for number, part in every}
    masses: _Masses = {}
    for name, maps in batch.maps.items():
        for number, part in every:
            values = maps[number][part] if many[number, part] else None
            sums = None if values is None else [values[group.entries].sum() for group in groups[number][part]]
            masses[name, number, part] = None if sums is None else torch.stack(sums)
    if edges := [name for name, method in plan.methods.items() if method == EDGES]:
        named = [[(part, place) for part in PARTS for place in range(len(each[part]))] for each in groups]
        effects = question.first_order(_masks([[frozenset([one]) for one in each] for each in named], groups, question))
        for name, (number, part) in product(edges, every):
            rows = [row for row, (of, _) in enumerate(named[number]) if of == part]
            masses[name, number, part] = effects[rows, number] if many[number, part] else None
    return masses


def overlap(one: Tensor, two: Tensor) -> float:
    """The share of the largest quarter (rounded up) of one that is also in that of the other; both (n,), ties in their order."""
    count = math.ceil(len(one) / 4)
    tops = ({*values.argsort(descending=True, stable=True)[:count].tolist()} for values in (one, two))
    return len(set.intersection(*tops)) / count


def _singles(part: str, mass: Tensor) -> list[Cut]:
    return [frozenset([(part, place)]) for place in range(len(mass))]


def _drawn(test: str, part: str, mass: Tensor) -> list[Cut]:
    """The cut at each step of a curve: all groups but those that stay."""
    inputs = CURVES[test].inputs({part: mass}, TENTHS)
    return [frozenset((part, place) for place in range(len(mass)) if place not in stays[part]) for stays in inputs]


def _groups(sample: Sample, number: int, tokens: Tokens) -> _Groups:
    """The pieces of the image, and the words, in the tower; none if its patches are not those of the maps."""
    columns = range(0) if sample.words is None or not tokens.text else [int(one) + tokens.before for one in sample.words]
    words = [_Group(torch.tensor([place]), torch.tensor([column])) for place, column in enumerate(columns)]
    if not tokens.image or sample.grids is None or sample.regions is not None:
        return {"image": [], "text": words}
    numbered = tokens.maps(torch.arange(tokens.shape[1]).expand(tokens.shape))  # the token of each entry
    maps = [] if numbered is None else [one for one, row in zip(*numbered, strict=True) if row == number]
    pieces, before = list[_Group](), 0
    if [tuple(one.shape) for one in maps] == sample.grids:
        for places in maps:
            height, width = places.shape
            rows, columns_of = (torch.arange(size) * min(SIDE, size) // size for size in (height, width))
            piece = rows[:, None] * SIDE + columns_of
            for one in piece.unique():
                entries = (piece == one).flatten().nonzero()[:, 0]
                pieces.append(_Group(before + entries, places.flatten()[entries]))
            before += height * width
    return {"image": pieces, "text": words}


def _masks(cuts: Sequence[Mapping[Cut, int] | Sequence[Cut]], groups: Sequence[_Groups], question: _Question) -> Tensor:
    """bool (K, B, N): the tokens of each sample's cuts; none if other samples have more."""
    masks = torch.zeros(max(map(len, cuts)), *question.pair[0].shape, dtype=torch.bool)
    for number, sample_cuts in enumerate(cuts):
        for place, cut in enumerate(sample_cuts):
            for part, group in cut:
                masks[place, number, groups[number][part][group].tokens] = True
    return masks
