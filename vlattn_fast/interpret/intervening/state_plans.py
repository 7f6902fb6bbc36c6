"""Edits of states, resolved to the places of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_index
from vlattn_fast.attach.session import named
from vlattn_fast.interpret.intervening.edits import Numbers, StateEdit, check_numbers
from vlattn_fast.interpret.intervening.grouping import Groups
from vlattn_fast.interpret.intervening.records import StateRecord
from vlattn_fast.interpret.intervening.state_places import StatePlace, StatePlaces
from vlattn_fast.interpret.intervening.token_sets import TokenSet, token_set
from vlattn_fast.interpret.intervening.traced_model import TowerName, TracedModel, TracedTower

# (state (B, n, C), the place of its first token among `total` tokens, total) -> the state that replaces it
Change = Callable[[Tensor, int, int], Tensor]
_NAMES = {"residual": "a residual stream after each layer", "mlp": "an MLP in each layer"}


@dataclass(eq=False)
class StatePlan:
    """The changes of the state at one place, in their order; `entry`: that after the tower's first layer."""

    place: StatePlace
    entry: StatePlace
    changes: list[Change] = field(default_factory=list)

    def changed(self, state: Tensor, start: int, total: int) -> Tensor:
        for change in self.changes:
            state = change(state, start, total)
        return state


def chosen_places(
    traced: TracedModel, places: StatePlaces, of: str, what: str, layers: Numbers, tower: TowerName
) -> list[StatePlace]:
    """The places of one tower's layers; None = all of them, or the only tower. ValueError for an unknown one, or for a layer
    without such a state."""
    if tower is not None:
        traced.tower(str(tower))
    chosen_towers = [each for each in places[of] if (not each.only_by_name if tower is None else each.name == tower)]
    if len(chosen_towers) != 1:
        names = ", ".join(repr(each.name) for each in chosen_towers) or "none with layers"
        raise ValueError(f"{what} needs tower= if the model does not have exactly one tower; got {names}")
    (of_tower,), numbers = chosen_towers, check_numbers("layers", layers)
    by_layer = places[of][of_tower]
    depth, where = 1 + max(by_layer), f"tower '{of_tower.name}'"
    entry_of(places, of_tower, what)
    chosen = sorted(by_layer) if numbers is None else sorted({check_index("layers", n, depth, where) for n in numbers})
    found = list[StatePlace]()
    for layer in chosen:
        place = by_layer.get(layer, f"no layer {layer} with attention")
        if isinstance(place, str):
            raise ValueError(f"model must have {_NAMES[of]} for {what}; got, in layer {layer} of {where}, {place}")
        found.append(place)
    return found


def last_of(traced: TracedModel, places: StatePlaces, tower: TracedTower, what: str) -> StatePlace:
    """The state after the last layer of a tower. ValueError if it is not found, or a layer without attention comes after it."""
    (last,) = chosen_places(traced, places, "residual", what, -1, tower.name)
    if last.followed_by:
        after = named(last.followed_by, traced.model.get_submodule(last.followed_by))
        raise ValueError(f"model must end with a layer that attends or mixes tokens for {what}; got {after} after the last one")
    return last


def entry_of(places: StatePlaces, tower: TracedTower, what: str = "an edit of states") -> StatePlace:
    """The state after the first layer of a tower, whose module takes the embeddings. ValueError if it is not found."""
    layer, place = min(places["residual"][tower].items())
    if isinstance(place, str):
        raise ValueError(
            f"model must have {_NAMES['residual']} for {what}; got, in layer {layer} of tower '{tower.name}', {place}"
        )
    return place


def change_of(edit: StateEdit, place: StatePlace, traced: TracedModel) -> Change:
    """What an edit does to the state at a place. ValueError for values or positions that do not fit."""
    tower = place.tower
    name, value = edit.value
    if isinstance(value, StateRecord):
        value = _recorded(edit, value, place, traced)
    values = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    _check_shape(name, values, place)
    by_token = values.ndim > 1
    groups = None
    if edit.positions is not None or by_token:
        groups = Groups([_positions(edit, tower, traced, grows=not by_token)], as_keys=False)

    def change(state: Tensor, start: int, total: int) -> Tensor:
        those = values.to(state.device, torch.float64 if state.dtype == torch.float64 else torch.float32)
        if by_token:
            those = _at(those, start, state)
        changed = those if name == "set" else state + those if name == "add" else state * those
        changed = changed.to(state.dtype).expand_as(state)
        if groups is None:
            return changed
        with torch.inference_mode(False):  # other runs, with gradients, use the same tensors
            members = groups.members[0].to(state.device)[groups.of(start, state.shape[1], total, len(state), state.device)]
        return torch.where(members[..., None], changed, state)

    return change


def _positions(edit: StateEdit, tower: TracedTower, traced: TracedModel, grows: bool) -> TokenSet:
    problem = next((call.problem for call in traced.calls if call.tower is tower and call.problem), "")
    if problem:
        raise ValueError(f"model must attend over whole inputs if states of some positions are edited; got {problem}")
    chosen = token_set("positions", edit.positions, tower)
    if isinstance(chosen, str):
        raise ValueError(chosen)
    return chosen if grows else TokenSet(chosen.mask)


def _at(values: Tensor, start: int, state: Tensor) -> Tensor:
    """Those of `values` (B, N, C) that belong to the tokens of `state`; 0 for tokens after N, which are not edited."""
    batch, size, channels = len(state), state.shape[1], values.shape[-1]
    values = values.expand(batch if len(values) == 1 else -1, -1, -1)
    values = values.repeat_interleave(batch // len(values), 0)[:, start : start + size]
    return torch.cat([values, values.new_zeros(batch, size - values.shape[1], channels)], 1)


def _check_shape(name: str, values: Tensor, place: StatePlace) -> None:
    (batch, size), channels = place.tower.shape, place.channels
    if tuple(values.shape) not in ((), (channels,), (1, size, channels), (batch, size, channels)):
        shapes = f"(C) = ({channels}) or (B, N, C) = ({batch}, {size}, {channels})"
        where = f"layer {place.layer} of tower '{place.tower.name}'"
        raise ValueError(f"{name} must be a number, or have the shape {shapes} in {where}; got {tuple(values.shape)}")


def _recorded(edit: StateEdit, record: StateRecord, place: StatePlace, traced: TracedModel) -> Tensor:
    """The states of a record at a place; for one of a data set the means."""
    if record.model not in ("", traced.name):
        raise ValueError(f"set must be recorded of a {traced.name}, as the edited model is; got one of a {record.model}")
    by_layer: Mapping[int, Tensor] = record.means if record.states is None else record.states
    asked, has = (edit.of, place.tower.name), (record.of, record.tower)
    if asked != has or place.layer not in by_layer:
        layers = ", ".join(map(str, by_layer))
        raise ValueError(f"set must have recorded layer {place.layer} of {asked}; got layers {layers} of {has}")
    return by_layer[place.layer]
