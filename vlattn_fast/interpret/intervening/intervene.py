"""`intervene` and `record_heads`: edits of a model's attention, and the outputs of its heads."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_items, describe
from vlattn_fast._ground.extras import with_progress
from vlattn_fast.attach.observer import Observer
from vlattn_fast.attach.session import at_rest, unwrapped
from vlattn_fast.interpret.intervening.editing import EditedCalls, check_not_explained
from vlattn_fast.interpret.intervening.edits import EdgeEdit, Edit, HeadEdit, Numbers, check_numbers, check_tower
from vlattn_fast.interpret.intervening.head_record import HeadRecord
from vlattn_fast.interpret.intervening.plans import CallPlan, Plans, tower_of
from vlattn_fast.interpret.intervening.traced_model import TowerName, trace_model, with_start


def intervene(model: nn.Module, inputs: Mapping[str, Any], edits: Edit | Sequence[Edit]) -> Observer:
    """Edits a model's attention inside of a context: for `model(**inputs)` and `model.generate(**inputs)`, including gradients.

    On exit, the model is restored, even after an error. `model(**inputs)` runs once on entry, to find layers, heads and tokens.
    Edited calls run with `score_attention` and a bias between groups of tokens, so no mask of N x M is stored.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
        >>> model, inputs = ViTForImageClassification(ViTConfig(**sizes)), {"pixel_values": torch.rand(2, 3, 16, 16)}
        >>> with va.intervene(model, inputs, va.Knockout(queries="special", keys="image", layers=-1)):
        ...     model(**inputs).logits.shape
        torch.Size([2, 2])

    Several edits compose: biases add up, factors multiply. Groups are tokens of `inputs`; other inputs of the same sizes have the
    same groups. Tokens that the model generates after them belong to "answer" and "text", and the newest one is "last". Beams and
    several sequences per prompt are copies of their prompt.

    `explain` inside of the context explains the edited model, with methods that use attention. Call backward() inside of the
    context, too, if the model checkpoints gradients. The model may be in train or eval mode; compiled parts run as plain Python.
    Other threads are not affected, but must not explain, train or run the model meanwhile.

    Args:
        model: a model that `explain` supports, including its wrappers.
        inputs: the model's keyword arguments, e.g. what a processor returns.
        edits: one or several of `Knockout`, `Steer`, `ScaleHeads` and `Patch`.

    Raises:
        TypeError, ValueError: no edit, or an unknown layer, head or tower; a group that is empty, or has another length than the
            tokens; a group that several towers have; heads that are patched and scaled; a model whose attention is not supported,
            or is in windows if edges are edited; an intervene inside of another one, or inside of `explain`.
            In the context: inputs of other sizes, or another run that uses attention, such as `attribute_edges`, or `explain` of
            another model.
    """
    edits = [edits] if isinstance(edits, (EdgeEdit, HeadEdit)) else edits
    if not isinstance(edits, Sequence) or isinstance(edits, str) or not all(isinstance(e, (EdgeEdit, HeadEdit)) for e in edits):
        raise TypeError(f"edits must be va.Knockout, va.Steer, va.ScaleHeads or va.Patch, or a list; got {describe(edits)}")
    if not edits:
        raise ValueError("edits must have at least one; got none")
    check_not_explained()
    with torch.inference_mode(False):  # the context may train
        return EditedCalls(Plans(trace_model(model, inputs, map(tower_of, edits)), edits)).observer()


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
    if isinstance(inputs, Mapping):
        return _of_one_run(model, inputs, chosen, tower)
    check_items("inputs", inputs, "a mapping of the model's keyword arguments, or several")
    sums: dict[int, Tensor] = {}
    count, record = 0, None
    for one in with_progress(inputs, "recording"):
        if not isinstance(one, Mapping):
            raise TypeError(f"inputs must be mappings of the model's keyword arguments; got {describe(one)}")
        record = _of_one_run(model, one, chosen, tower)
        for layer, means in record.means.items():
            part = means.double() * record.count
            sums[layer] = sums[layer] + part if layer in sums else part
        count += record.count
    if record is None:
        raise ValueError("inputs must have at least one item; got an empty data set")
    means_of_all = {layer: total / count for layer, total in sums.items()}
    return replace(record, means=means_of_all, outputs=None, count=count)


def _of_one_run(model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int] | None, tower: TowerName) -> HeadRecord:
    traced = trace_model(model, inputs, [tower])
    plans = Plans(traced)
    pair = plans.self_pair("record_heads", tower)
    outputs: dict[int, Tensor] = {}
    chosen = plans.layers([pair], layers)
    by_layer = Counter(plan.call.layer for plan in chosen)
    for plan in chosen:
        if plan.call.problem:
            raise ValueError(f"model must attend over whole inputs if heads are recorded; got {plan.call.problem}")
        if by_layer[plan.call.layer] > 1:
            raise ValueError(f"model must attend once in a layer if heads are recorded; got layer {plan.call.layer}")
        plan.sees = functools.partial(_keep, outputs, plan)
    with torch.inference_mode(False), torch.no_grad(), at_rest(unwrapped(model)), EditedCalls(plans).observer():
        unwrapped(model)(**with_start(unwrapped(model), inputs))
    outputs = {plan.call.layer: plan.call.share.whole(outputs[plan.call.layer], 1) for plan in chosen}
    real = pair[0].tokens.real()
    real = torch.ones(pair[0].shape, dtype=torch.bool) if real is None else real.bool().cpu()
    with torch.inference_mode(False):
        means = {layer: x.transpose(1, 2)[real.to(x.device)].double().mean(0) for layer, x in outputs.items()}
    return HeadRecord((pair[0].name, pair[1].name), means, outputs, int(real.sum()), traced.name)


def _keep(outputs: dict[int, Tensor], plan: CallPlan, output: Tensor) -> None:
    outputs[plan.call.layer] = output.detach().clone()
