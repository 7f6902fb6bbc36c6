"""`intervene`, `record_heads` and `record_states`: edits of a model, the outputs of its heads, and its states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_choice, check_items, describe
from vlattn_fast._ground.extras import with_progress
from vlattn_fast.attach.events import edits_of, plain
from vlattn_fast.attach.observer import Observer
from vlattn_fast.attach.session import at_rest, unwrapped
from vlattn_fast.interpret.intervening.editing import EditedCalls, check_not_explained
from vlattn_fast.interpret.intervening.edits import EDITS, Edit, Numbers, check_numbers, check_tower, check_tower_name
from vlattn_fast.interpret.intervening.plans import Plans, keep, tower_of
from vlattn_fast.interpret.intervening.records import HeadRecord, StateRecord
from vlattn_fast.interpret.intervening.state_places import KINDS
from vlattn_fast.interpret.intervening.state_plans import chosen_places
from vlattn_fast.interpret.intervening.traced_model import TowerName, TracedTower, trace_model, with_start


def intervene(model: nn.Module, inputs: Mapping[str, Any], edits: Edit | Sequence[Edit]) -> Observer:
    """Edits attention or states of a model inside of a context: for `model(**inputs)` and `model.generate(**inputs)`, including
    gradients.

    On exit, the model is restored, even after an error. `model(**inputs)` runs once on entry, to find layers, heads and tokens,
    and a second time for edits of states.
    Edited calls run with `score_attention` and a bias between groups of tokens, so no mask of N x M is stored.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
        >>> model, inputs = ViTForImageClassification(ViTConfig(**sizes)), {"pixel_values": torch.rand(2, 3, 16, 16)}
        >>> with va.intervene(model, inputs, va.Knockout(queries="special", keys="image", layers=-1)):
        ...     model(**inputs).logits.shape
        torch.Size([2, 2])

    Several edits compose: biases add up, factors multiply, and edits of one state act one after the other. Groups are tokens of
    `inputs`; other inputs of the same sizes have the same groups. Tokens that the model generates after them belong to "answer"
    and "text", and the newest one is "last". Beams and several sequences per prompt are copies of their prompt.

    An `intervene` inside of another one adds its edits to those around it. `explain` inside of the context explains the edited
    model, with methods that use attention. Call backward() inside of the context, too, if the model checkpoints gradients. The
    model may be in train or eval mode; compiled parts run as plain Python. Other threads are not affected, but must not explain,
    train or run the model meanwhile.

    Args:
        model: a model that `explain` supports, including its wrappers.
        inputs: the model's keyword arguments, e.g. what a processor returns.
        edits: one or several of `Knockout`, `Steer`, `ScaleHeads`, `Patch`, `Residual` and `Mlp`.

    Raises:
        TypeError, ValueError: no edit, or an unknown layer, head or tower; a group that is empty, or has another length than the
            tokens; a group that several towers have; heads that are patched and scaled; a model whose attention is not supported,
            or is in windows if edges are edited; a layer whose states are not found, or have another size than the values; an
            intervene inside of `explain`, or entered inside of another one in which it was not made.
            In the context: inputs of other sizes, or another run that uses attention, such as `attribute_edges`, or `explain` of
            another model.
    """
    edits = [edits] if isinstance(edits, Edit) else edits
    if not isinstance(edits, Sequence) or isinstance(edits, str) or not all(isinstance(each, Edit) for each in edits):
        raise TypeError(f"edits must be {EDITS}, or a list; got {describe(edits)}")
    if not edits:
        raise ValueError("edits must have at least one; got none")
    check_not_explained()
    around = edits_of(unwrapped(model))
    if around is not None and not around.of_user:
        edits_of(None)  # another function edits the model, such as attribute_edges
    edits = [*(() if around is None else around.given), *edits]
    with torch.inference_mode(False), plain():  # the context may train; it is found without the edits around it
        plans = Plans(trace_model(model, inputs, map(tower_of, edits)), edits)
        return EditedCalls(plans, edits, around).observer()


def record_heads(
    model: nn.Module,
    inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    layers: Numbers = None,
    tower: str | tuple[str, str] | None = None,
) -> HeadRecord:
    """Records the outputs of heads before the output projection: those of one run for `Patch`, or their means for `ScaleHeads`.

    Returns a `HeadRecord`. It takes two forward passes per item of `inputs`, in eval mode: the first finds the calls. Memory
    holds all outputs of an item, (B, H, N, Dv) per layer, and for a data set also their sums.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
        >>> model, inputs = ViTForImageClassification(ViTConfig(**sizes)), {"pixel_values": torch.rand(2, 3, 16, 16)}
        >>> record = va.record_heads(model, inputs)
        >>> with va.intervene(model, inputs, va.ScaleHeads({0: [1]}, 0, mean=record)):  # mean ablation of head 1 of layer 0
        ...     model(**inputs).logits.shape
        torch.Size([2, 2])

    Args:
        model: as in `intervene`.
        inputs: the model's keyword arguments, for outputs and their means; or an iterable of several such mappings, for the means
            over a data set.
        layers: numbers from 0, or negative from the end; None = all.
        tower: the tower of the heads: a name, or (queries', keys') for cross-attention. None = the only one that attends to
            itself.

    Raises:
        TypeError, ValueError: an argument is invalid; an unknown layer or tower; a tower that attends in windows; a layer with
            several self-attention calls; a data set without inputs; and what `intervene` raises.
    """
    chosen = check_numbers("layers", layers)
    check_tower(tower)
    record, runs = _recorded(inputs, lambda one: _heads_of_run(model, one, chosen, tower))
    return record if runs == 1 else replace(record, outputs=None)


def record_states(
    model: nn.Module,
    inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    layers: Numbers = None,
    *,
    of: str = "residual",
    tower: str | None = None,
) -> StateRecord:
    """Records states for `Residual` and `Mlp`: those of one run, or their means over a data set.

    Returns a `StateRecord`. It takes three forward passes per item of `inputs`, in eval mode: the first two find the layers.
    Memory holds all states of an item, (B, N, C) per layer, and for a data set also their sums.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
        >>> model, inputs = ViTForImageClassification(ViTConfig(**sizes)), {"pixel_values": torch.rand(2, 3, 16, 16)}
        >>> run = va.record_states(model, inputs)
        >>> run.states[1].shape
        torch.Size([2, 17, 32])
        >>> other = {"pixel_values": torch.rand(2, 3, 16, 16)}
        >>> with va.intervene(model, other, va.Residual(0, "image", set=run)):  # activation patching
        ...     model(**other).logits.shape
        torch.Size([2, 2])

    Args:
        model: as in `intervene`.
        inputs: the model's keyword arguments, for states and their means; or an iterable of several such mappings, for the means
            over a data set.
        layers: numbers from 0, or negative from the end; None = all.
        of: "residual" for the residual stream after each layer; "mlp" for what its MLP adds to it.
        tower: the name of the tower; None = the only one.

    Raises:
        TypeError, ValueError: an argument is invalid; an unknown layer or tower; a layer whose states are not found; a data set
            without inputs; and what `intervene` raises.
    """
    check_choice("of", of, KINDS)
    chosen = check_numbers("layers", layers)
    check_tower_name(tower)
    record, runs = _recorded(inputs, lambda one: _states_of_run(model, one, chosen, of, tower))
    return record if runs == 1 else replace(record, states=None)


R = TypeVar("R", HeadRecord, StateRecord)


def _recorded(inputs: Any, of_one: Callable[[Mapping[str, Any]], R]) -> tuple[R, int]:
    """The record of the last run, with the means and the number of tokens of all runs, and how many there were."""
    if isinstance(inputs, Mapping):
        return of_one(inputs), 1
    check_items("inputs", inputs, "a mapping of the model's keyword arguments, or several")
    sums: dict[int, Tensor] = {}
    runs, count, record = 0, 0, None
    for one in with_progress(inputs, "recording"):
        if not isinstance(one, Mapping):
            raise TypeError(f"inputs must be mappings of the model's keyword arguments; got {describe(one)}")
        record = of_one(one)
        for layer, means in record.means.items():
            part = means.double() * record.count
            sums[layer] = sums[layer] + part if layer in sums else part
        runs, count = runs + 1, count + record.count
    if record is None:
        raise ValueError("inputs must have at least one item; got an empty data set")
    if runs == 1:
        return record, 1  # without rounding
    return replace(record, means={layer: total / count for layer, total in sums.items()}, count=count), runs


def _states_of_run(
    model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int] | None, of: str, tower: str | None
) -> StateRecord:
    traced = trace_model(model, inputs, [tower])
    plans, states = Plans(traced), dict[int, Tensor]()
    places = chosen_places(traced, plans.state_places, of, "record_states", layers, tower)
    for place in places:
        plans.add_change(place, functools.partial(keep, states, place.layer))
    _run(model, inputs, plans)
    means, count = _means(states, places[0].tower)
    return StateRecord(of, places[0].tower.name, means, states, count, traced.name)


def _run(model: nn.Module, inputs: Mapping[str, Any], plans: Plans) -> None:
    """Runs a model in eval mode with plans that record."""
    with torch.inference_mode(False), torch.no_grad(), at_rest(unwrapped(model)), EditedCalls(plans).observer():
        unwrapped(model)(**with_start(unwrapped(model), inputs))


def _means(by_layer: Mapping[int, Tensor], tower: TracedTower) -> tuple[dict[int, Tensor], int]:
    """The means of (B, N, ...) over the real tokens of a tower, and their number."""
    real = tower.tokens.real()
    real = torch.ones(tower.shape, dtype=torch.bool) if real is None else real.bool().cpu()
    with torch.inference_mode(False):
        return {layer: x[real.to(x.device)].double().mean(0) for layer, x in by_layer.items()}, int(real.sum())


def _heads_of_run(model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int] | None, tower: TowerName) -> HeadRecord:
    traced = trace_model(model, inputs, [tower])
    plans = Plans(traced)
    pair = plans.self_pair("record_heads", tower)
    outputs: dict[int, Tensor] = {}
    chosen = plans.once_in_layers(pair, layers, "heads are recorded")
    for plan in chosen:
        plan.through = functools.partial(keep, outputs, plan.call.layer)
    _run(model, inputs, plans)
    outputs = {plan.call.layer: plan.call.share.whole(outputs[plan.call.layer], 1) for plan in chosen}
    means, count = _means({layer: x.transpose(1, 2) for layer, x in outputs.items()}, pair[0])
    return HeadRecord((pair[0].name, pair[1].name), means, outputs, count, traced.name)
