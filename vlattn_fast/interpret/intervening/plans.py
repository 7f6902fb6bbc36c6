"""Edits, resolved to the attention calls of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_index
from vlattn_fast.attach.events import AttentionEvent
from vlattn_fast.attach.session import named
from vlattn_fast.interpret.intervening.edits import EDITS, EdgeEdit, Edit, Patch, ScaleHeads, StateEdit
from vlattn_fast.interpret.intervening.grouping import Groups
from vlattn_fast.interpret.intervening.records import HeadRecord, StateRecord
from vlattn_fast.interpret.intervening.state_places import StatePlace, StatePlaces, find_states
from vlattn_fast.interpret.intervening.state_plans import Change, StatePlan, change_of, chosen_places, entry_of
from vlattn_fast.interpret.intervening.token_sets import PARTS, TokenSet, disjoint, token_set
from vlattn_fast.interpret.intervening.traced_model import ModelCall, TowerName, TracedModel, TracedTower

Pair = tuple[TracedTower, TracedTower]  # of the queries and of the keys


@dataclass(frozen=True, eq=False)
class Term:
    """A number for each head, (H,) or (B, H), that is added to the logits of `queries` with `keys`."""

    queries: TokenSet
    keys: TokenSet
    bias: Tensor


class Grouped(NamedTuple):
    """The groups of a table, which have each token once, and their sets in the towers of the queries and of the keys."""

    pair: Pair
    groups: dict[str, Any]
    queries: dict[str, TokenSet]
    keys: dict[str, TokenSet]


@dataclass(frozen=True, eq=False)
class Patched:
    """Outputs (B, H', N, Dv) that replace those of `heads` at `tokens` (B, N)."""

    heads: Tensor
    outputs: Tensor
    tokens: Tensor


@dataclass(eq=False)
class CallPlan:
    """The edits of one attention call."""

    call: ModelCall
    terms: list[Term] = field(default_factory=list)
    kept: Tensor | None = None  # (B, H), the share of the way from outputs with the terms to those without; None = 0
    gate: Tensor | None = None  # (H,), a factor of the outputs
    shift: Tensor | None = None  # (H, Dv), added to them
    patched: list[Patched] = field(default_factory=list)
    meets: Callable[[AttentionEvent], None] | None = None  # called with the call, before it is computed
    through: Callable[[Tensor], Tensor] | None = None  # the outputs (B, H, N, Dv) -> those that replace them
    queries: Groups | None = None
    keys: Groups | None = None
    _bias: Tensor | None = None  # the last `group_bias` without a gradient

    @property
    def is_empty(self) -> bool:
        return not (self.terms or self.edits_heads or self.meets)

    @property
    def edits_heads(self) -> bool:
        """Whether it changes or reads outputs."""
        return bool(self.patched) or not (self.gate is None and self.shift is None and self.through is None)

    @property
    def cuts(self) -> bool:
        """Whether a term cuts edges."""
        return any(bool(torch.isneginf(term.bias).any()) for term in self.terms)

    @property
    def pair(self) -> Pair:
        return self.call.tower, self.call.source

    def group_bias(self, query: Tensor) -> Tensor:
        """(H, Gq, Gk) or (B, H, Gq, Gk), of this process's heads: for each pair of groups the sum of the terms whose sets they
        are in."""
        assert self.queries is not None and self.keys is not None
        dtype, total = torch.float64 if query.dtype == torch.float64 else torch.float32, None
        if self._bias is not None and self._bias.dtype == dtype and self._bias.device == query.device:
            return self._bias
        query_members, key_members = (groups.members.to(query.device) for groups in (self.queries, self.keys))
        for term, row, column in zip(self.terms, *(_numbers(_sets(self.terms, name)) for name in _SIDES), strict=True):
            in_both = query_members[row][:, None] & key_members[column]
            part = torch.where(in_both, term.bias.to(query.device, dtype)[..., None, None], 0.0)
            total = part if total is None else total + part
        assert total is not None
        total = self.call.share.part(total, total.ndim - 3)
        self._bias = None if total.requires_grad else total
        return total


_SIDES = ("queries", "keys")


def _sets(terms: Sequence[Term], side: str) -> list[TokenSet]:
    return [getattr(term, side) for term in terms]


def _numbers(sets: Sequence[TokenSet]) -> list[int]:
    """The number of each set among the distinct ones."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id(each), len(numbers)) for each in sets]


class Plans:
    """The plans of all calls of a model, to which edits are added one by one."""

    def __init__(self, traced: TracedModel, edits: Iterable[Edit] = ()) -> None:
        self.traced = traced
        self.calls = [CallPlan(call) for call in traced.calls]
        self.states: dict[StatePlace, StatePlan] = {}
        self._edited: dict[tuple[int, int], str] = {}  # by plan and head: the edit that sets its outputs
        for edit in edits:
            self.add(edit)

    def anew(self) -> Plans:
        """Plans of the same model without edits, which know where its states are."""
        plans = Plans(self.traced)
        plans.state_places = self.state_places
        return plans

    # --- which calls ---

    def pairs(self, tower: TowerName) -> list[Pair]:
        """The towers of queries and keys with attention between them, or only those that `tower` names."""
        names = tower if isinstance(tower, tuple) else (tower, None)
        for name in names:
            if name is not None:
                self.traced.tower(name)
        pairs = list(dict.fromkeys(plan.pair for plan in self.calls))
        if tower is None:
            pairs = [pair for pair in pairs if not pair[0].only_by_name]
        chosen = [pair for pair in pairs if all(name in (None, of.name) for name, of in zip(names, pair, strict=True))]
        if not self.calls:
            raise ValueError("model must have layers with a softmax, whose attention has edges; got none")
        if not chosen:
            allowed = ", ".join(str((of.name, to.name)) for of, to in pairs)
            raise ValueError(f"tower must be a pair of which the first attends to the second, {allowed}; got {tower!r}")
        return chosen

    def self_pair(self, what: str, tower: TowerName) -> Pair:
        """The pair that `tower` names; of one name, or none, that of a tower with itself."""
        pairs = [pair for pair in self.pairs(tower) if isinstance(tower, tuple) or pair[0] is pair[1]]
        if len(pairs) != 1:
            names = ", ".join(repr(pair[0].name) for pair in pairs) or "none that attends to itself"
            raise ValueError(f"{what} needs tower= if the model does not have exactly one tower; got {names}")
        return pairs[0]

    def with_tokens(self, what: str, queries: Any, keys: Any, tower: TowerName) -> dict[Pair, tuple[TokenSet, TokenSet]]:
        """The pairs of one tower's queries that have both groups, with the sets of these."""
        chosen: dict[Pair, tuple[TokenSet, TokenSet]] = {}
        problems: list[str] = []
        for pair in self.pairs(tower):
            query_set, key_set = token_set("queries", queries, pair[0]), token_set("keys", keys, pair[1])
            problems += [each for each in (query_set, key_set) if isinstance(each, str)]
            if isinstance(query_set, TokenSet) and isinstance(key_set, TokenSet):
                chosen[pair] = query_set, key_set
        _check_one(what, chosen, problems)
        return chosen

    def with_groups(self, groups: Mapping[str, Any], tower: TowerName) -> Grouped:
        """The towers of queries and keys that have all groups. In a named pair each has those that it can. ValueError for groups
        that overlap, see `disjoint`."""
        (pair,) = self._of_groups(groups, tower)
        apart = disjoint(groups, pair)
        return Grouped(pair, apart, *self._of_groups(apart, tower)[pair])

    def named_groups(self, tower: TowerName) -> dict[str, str]:
        """The names of which a tower has tokens; None = the tower that has the most of them. ValueError if none has one."""

        def has(name: str, of: TracedTower) -> bool:
            found = token_set("groups", name, of)
            return isinstance(found, TokenSet) and bool(found.mask.any())

        pairs = [pair for pair in self.pairs(tower) if pair[0] is pair[1] or isinstance(tower, tuple)]
        named = [{name: name for name in PARTS if any(has(name, of) for of in pair)} for pair in pairs]
        if not any(named):
            raise ValueError("groups must be given for a tower whose kinds of tokens are not known; got None")
        return max(named, key=len)

    def _of_groups(self, groups: Mapping[str, Any], tower: TowerName) -> dict[Pair, tuple[dict[str, TokenSet], ...]]:
        chosen: dict[Pair, tuple[dict[str, TokenSet], ...]] = {}
        problems: list[str] = []
        across: list[str] = []
        for pair in self.pairs(tower):
            if pair[0] is not pair[1] and not isinstance(tower, tuple):
                across.append(f"tower={(pair[0].name, pair[1].name)!r} names tokens of two towers")
                continue
            sets = [{name: token_set(f"groups[{name!r}]", group, of) for name, group in groups.items()} for of in pair]
            queries, keys = ({name: each for name, each in of.items() if isinstance(each, TokenSet)} for of in sets)
            wrong = [str(sets[0][name]) for name in groups if name not in queries and name not in keys]
            if not wrong:
                sides = zip(pair, ("queries", "keys"), (queries, keys), strict=True)
                wrong = [f"none is of tokens of '{of.name}', the tower of the {side}" for of, side, sets in sides if not sets]
            problems += wrong
            if not wrong:
                chosen[pair] = queries, keys if pair[0] is not pair[1] else queries
        _check_one("groups", chosen, problems or across)
        return chosen

    def layers(self, pairs: Iterable[Pair], numbers: Iterable[int] | None, name: str = "layers") -> list[CallPlan]:
        """The plans of the calls of some layers between these towers; None = of all layers. Negative numbers count from the
        tower's end. ValueError, which names the argument `name`, for an unknown layer."""
        pairs = set(pairs)
        plans = [plan for plan in self.calls if plan.pair in pairs]
        if numbers is None:
            return plans
        with_edges, tower = sorted({plan.call.layer for plan in plans}), plans[0].call.tower
        mixing = {layer: f"{place}, without a softmax" for layer, place in self.without_edges(pairs).items()}
        chosen = {check_index(name, number, self._depth(tower), f"tower '{tower.name}'") for number in numbers}
        for layer in sorted(chosen.difference(with_edges)):
            what = mixing.get(layer, f"which does not attend to {', '.join(repr(pair[1].name) for pair in pairs)}")
            raise ValueError(f"{name} must be among {with_edges}, which have attention; got {layer}, {what}")
        return [plan for plan in plans if plan.call.layer in chosen]

    def _depth(self, tower: TracedTower) -> int:
        """The number of layers of a tower."""
        layers = [plan.call.layer for plan in self.calls if plan.call.tower is tower]
        return 1 + max(layers + [layer for of, layer, _ in self.traced.mixing if of is tower])

    def once_in_layers(self, pair: Pair, numbers: Iterable[int] | None, doing: str) -> list[CallPlan]:
        """Those of `layers`, for a pair whose outputs are read by layer and token. ValueError, with what the caller is `doing`,
        for attention in windows and for several calls in a layer."""
        plans = self.layers([pair], numbers)
        for plan in plans:
            if plan.call.problem:
                raise ValueError(f"model must attend over whole inputs if {doing}; got {plan.call.problem}")
        check_once(plans, doing)
        return plans

    def without_edges(self, pairs: Iterable[Pair]) -> dict[int, str]:
        """Layer -> the module's path and class, for each layer without a softmax, such as recurrences."""
        towers = [pair[0] for pair in pairs if pair[0] is pair[1]]
        with_edges = {plan.call.layer for plan in self.calls if plan.call.tower in towers}
        model = self.traced.model
        return {
            layer: named(path, model.get_submodule(path))
            for tower, layer, path in self.traced.mixing
            if tower in towers and layer not in with_edges
        }

    # --- edits ---

    def add(self, edit: Edit) -> None:
        """Adds an edit. ValueError, naming the problem, if the model does not support it, or it contradicts another edit."""
        what = type(edit).__name__
        if isinstance(edit, EdgeEdit):
            sets = self.with_tokens(what, edit.queries, edit.keys, edit.tower)
            mixing = self.without_edges(sets)
            if mixing and edit.layers is None:
                number, place = next(iter(mixing.items()))
                raise ValueError(
                    f"{what} needs layers= if some layers have no softmax, and so no edges; got None, and layer {number}, {place}"
                )
            for plan in self.layers(sets, edit.layers):  # type: ignore[arg-type]
                chosen = heads_of(plan.call, edit.heads)  # type: ignore[arg-type]
                bias = torch.zeros(plan.call.heads, dtype=torch.float64).index_fill(0, chosen, edit.bias)
                self.add_term(plan, Term(*sets[plan.pair], bias))
        elif isinstance(edit, (ScaleHeads, Patch)):
            self._check_record(edit)
            pair, named = self.self_pair(what, tower_of(edit)), dict[int, int]()
            for layer, heads in edit.heads.items():
                plans = self.layers([pair], [layer])
                if (before := named.setdefault(plans[0].call.layer, layer)) != layer:
                    raise ValueError(f"heads must name each layer once; got {before} and {layer} of {self._depth(pair[0])}")
                for plan in plans:
                    chosen = heads_of(plan.call, heads)  # type: ignore[arg-type]
                    self._claim(plan, chosen, what)
                    if isinstance(edit, ScaleHeads):
                        _scale(plan, edit, chosen)
                    else:
                        _patch(plan, edit, chosen)
        elif isinstance(edit, StateEdit):
            for state in chosen_places(self.traced, self.state_places, edit.of, what, edit.layers, tower_of(edit)):
                self.add_change(state, change_of(edit, state, self.traced))
        else:
            raise TypeError(f"edits must be {EDITS}; got {what}")

    @cached_property
    def state_places(self) -> StatePlaces:
        """Where the model has its states; takes a forward pass."""
        return find_states(self.traced)

    def add_change(self, place: StatePlace, change: Change) -> None:
        if place not in self.states:
            self.states[place] = StatePlan(place, entry_of(self.state_places, place.tower))
        self.states[place].changes.append(change)

    def _check_record(self, edit: ScaleHeads | Patch) -> None:
        """ValueError for a record of another class of models. Other weights are allowed, e.g. of a checkpoint before training."""
        name, record = ("mean", edit.mean) if isinstance(edit, ScaleHeads) else ("other_run", edit.other_run)
        if record is not None and record.model not in ("", self.traced.name):
            raise ValueError(
                f"{name} must be recorded of a {self.traced.name}, as the edited model is; got one of a {record.model}"
            )

    def add_term(self, plan: CallPlan, term: Term) -> None:
        check_edges(plan)
        plan.terms.append(term)

    def _claim(self, plan: CallPlan, heads: Tensor, what: str) -> None:
        """Notes which edit sets the outputs of these heads. A head may be scaled twice, but patched only by itself."""
        for head in heads.tolist():
            before = self._edited.get((id(plan), head))
            if before is not None and "Patch" in (what, before):
                raise ValueError(
                    f"edits must set the outputs of a head once; got {before} and {what} of head {head}, layer {plan.call.layer}"
                )
            self._edited[id(plan), head] = what

    def finished(self) -> list[CallPlan]:
        """The plans of all calls, with the groups of their tokens. Calls over the same sets share them."""
        shared: dict[tuple[bool, tuple[int, ...]], Groups] = {}

        def groups(plan: CallPlan, side: str) -> Groups:
            sets = list({id(each): each for each in _sets(plan.terms, side)}.values())
            key = side == "keys", tuple(map(id, sets))
            if key not in shared:
                shared[key] = Groups(sets, as_keys=key[0])
            return shared[key]

        for plan in self.calls:
            if plan.terms:
                plan.queries, plan.keys = groups(plan, "queries"), groups(plan, "keys")
        return self.calls


def keep(kept: dict[Any, Tensor], key: Any, value: Tensor, *place: int) -> Tensor:
    """Stores a copy of a state, or of the outputs of heads, that goes on unchanged: the end of a `Change` or of `through`."""
    kept[key] = value.detach().clone()
    return value


def tower_of(edit: Any) -> TowerName:
    """The tower that an edit names, itself or in its record."""
    named_records = (getattr(edit, name, None) for name in ("mean", "other_run", "set"))
    record = next((each for each in named_records if isinstance(each, (HeadRecord, StateRecord))), None)
    tower: TowerName = edit.tower
    return record.tower if tower is None and record is not None else tower


def _check_one(what: str, chosen: Mapping[Pair, Any], problems: Sequence[str]) -> None:
    """ValueError unless the pairs that have the tokens of an argument have the queries of one tower."""
    if not chosen:
        raise ValueError(f"{what} must be of tokens that attend to one another: {'; '.join(dict.fromkeys(problems))}")
    towers = list(dict.fromkeys(pair[0].name for pair in chosen))
    if len(towers) > 1:
        pairs = ", ".join(str((of.name, to.name)) for of, to in chosen)
        raise ValueError(f"{what} needs tower=(of the queries, of the keys) if several towers have such tokens; got {pairs}")


def check_edges(plan: CallPlan) -> None:
    """ValueError for a call whose queries and keys have no groups."""
    if plan.call.problem:
        raise ValueError(f"model must attend over whole inputs if edges are edited; got {plan.call.problem}")


def check_once(plans: Iterable[CallPlan], doing: str) -> None:
    """ValueError, with what the caller is `doing`, for several calls in a layer, such as DiffLlama's."""
    for layer, count in Counter(plan.call.layer for plan in plans).items():
        if count > 1:
            raise ValueError(f"model must attend once in a layer if {doing}; got layer {layer}, which does {count} times")


def heads_of(call: ModelCall, numbers: Sequence[int] | None) -> Tensor:
    """int64, some heads of a call; None = all. Negative numbers count from the end."""
    if numbers is None:
        return torch.arange(call.heads)
    where = f"layer {call.layer} of tower '{call.tower.name}'"
    return torch.tensor(sorted({check_index("heads", number, call.heads, where) for number in numbers}))


def _scale(plan: CallPlan, edit: ScaleHeads, heads: Tensor) -> None:
    """output -> mean + factor (output - mean), after the earlier edits."""
    factor = torch.ones(plan.call.heads, dtype=torch.float64).index_fill(0, heads, edit.factor)
    plan.gate = factor if plan.gate is None else plan.gate * factor
    if plan.shift is not None:
        plan.shift = plan.shift * factor[:, None]
    if edit.mean is not None:
        means = _recorded("mean", edit.mean, edit.mean.means, plan.call).double()
        added = torch.zeros_like(means).index_copy(0, heads, means[heads] * (1 - edit.factor))
        plan.shift = added if plan.shift is None else plan.shift + added


def _patch(plan: CallPlan, edit: Patch, heads: Tensor) -> None:
    assert edit.other_run.outputs is not None
    outputs = _recorded("other_run", edit.other_run, edit.other_run.outputs, plan.call)
    batch, size = plan.call.tower.shape
    if outputs.shape[2] != size or len(outputs) not in (1, batch):
        raise ValueError(
            f"other_run must have {batch} samples (or one) and {size} tokens; got {len(outputs)} and {outputs.shape[2]}"
        )
    tokens = token_set("queries", edit.queries, plan.call.tower)
    if isinstance(tokens, str):
        raise ValueError(f"Patch must be of tokens of its tower: {tokens}")
    if plan.call.problem:
        raise ValueError(f"model must attend over whole inputs if outputs are patched; got {plan.call.problem}")
    plan.patched.append(Patched(heads, outputs.expand(batch, -1, -1, -1)[:, heads.to(outputs.device)], tokens.mask))


def _recorded(name: str, record: HeadRecord, by_layer: Mapping[int, Tensor], call: ModelCall) -> Tensor:
    """The part of a record for a call's layer."""
    towers, recorded = (call.tower.name, call.source.name), by_layer.get(call.layer)
    if record.tower != towers or recorded is None or recorded.shape[-3 if recorded.ndim == 4 else 0] != call.heads:
        has = f"layers {', '.join(map(str, by_layer))} of {record.tower}"
        raise ValueError(f"{name} must have recorded layer {call.layer} of {towers} with {call.heads} heads; got {has}")
    return recorded
