"""`intervene` and `record_heads`: a model whose attention is edited, and the outputs of its heads."""

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
from vlattn_fast.interpret.intervening.seen_calls import TowerName, see, with_start


def intervene(model: nn.Module, inputs: Mapping[str, Any], edits: Edit | Sequence[Edit]) -> Observer:
    """A context in which the attention of a model is edited: `model(**inputs)` and `model.generate(**inputs)`, with gradients or
    without.

    `model(**inputs)` runs once before, to see which layers, heads and tokens there are. Edited calls run by `score_attention`
    with a bias of pairs of token groups, so no mask of N x M is made. Several edits compose: biases add up, factors multiply.
    Groups are of the tokens of `inputs`; tokens that the model generates behind them belong to "answer" and "text", and the row
    that runs is "last". Beams and several sequences a prompt are copies of their prompt.

    The model runs as it is, in train mode or not, and is left as it was, also after an error. Where it checkpoints gradients,
    backward() runs it again, so call that within the context, too. `explain` within the context explains the edited model, by
    methods that see attention. Compiled parts run as plain Python meanwhile. Other threads see no edit; no thread may explain,
    train or run the model meanwhile but this one.

    Args:
        model: any model that `explain` sees, see there, also in its wrappers.
        inputs: the model's keyword arguments, e.g. what a processor returns.
        edits: `Knockout`, `Steer`, `ScaleHeads`, `Patch`, one or several.

    Raises:
        TypeError, ValueError: no edit, or an unknown layer, head or tower; a group that is empty, or has another length than the
            tokens; a group that several towers have; heads that are patched and scaled; a model whose attention is not seen, or
            is in windows where edges are edited; an intervene within another one, or within `explain`.
            In the context: inputs of other sizes, or another run that sees attention, as `attribute_edges` or `explain` of
            another model. Other inputs of the same sizes keep the groups of these.

    >>> with intervene(model, inputs, [Knockout(queries="last", keys="image", layers=range(10, 16))]):  # doctest: +SKIP
    ...     logits = model(**inputs).logits
    """
    edits = [edits] if isinstance(edits, (EdgeEdit, HeadEdit)) else edits
    if not isinstance(edits, Sequence) or isinstance(edits, str) or not all(isinstance(e, (EdgeEdit, HeadEdit)) for e in edits):
        raise TypeError(f"edits must be va.Knockout, va.Steer, va.ScaleHeads or va.Patch, or a list; got {describe(edits)}")
    if not edits:
        raise ValueError("edits must have at least one; got none")
    check_not_explained()
    with torch.inference_mode(False):  # the context may train
        return EditedCalls(Plans(see(model, inputs, map(tower_of, edits)), edits)).observer()


def record_heads(
    model: nn.Module,
    inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    layers: Numbers = None,
    tower: str | tuple[str, str] | None = None,
) -> HeadRecord:
    """The outputs of heads in front of the output projection: of one run for `Patch`, or their means for `ScaleHeads`.

    Args:
        model: as `intervene` takes it; it runs in eval mode.
        inputs: the model's keyword arguments: a record with the outputs and their means. Or several of them, as a data set gives
            them: a record with the means alone.
        layers: numbers from 0, or negative from the end; None = all.
        tower: whose heads: a name, or (queries', keys') for cross-attention. None = the only one that attends to itself.

    Raises:
        TypeError, ValueError: an argument is of no such kind; an unknown layer or tower; a tower that attends in windows; a layer
            with several self-attention calls; a data set without inputs; and what `intervene` raises.
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
    seen = see(model, inputs, [tower])
    plans = Plans(seen)
    pair = plans.self_pair("record_heads", tower)
    outputs: dict[int, Tensor] = {}
    chosen = plans.layers([pair], layers)
    by_layer = Counter(plan.call.layer for plan in chosen)
    for plan in chosen:
        if plan.call.problem:
            raise ValueError(f"model must attend over whole inputs where heads are recorded; got {plan.call.problem}")
        if by_layer[plan.call.layer] > 1:
            raise ValueError(f"model must attend once in a layer where heads are recorded; got layer {plan.call.layer}")
        plan.sees = functools.partial(_keep, outputs, plan)
    with torch.inference_mode(False), torch.no_grad(), at_rest(unwrapped(model)), EditedCalls(plans).observer():
        unwrapped(model)(**with_start(unwrapped(model), inputs))
    outputs = {plan.call.layer: plan.call.share.whole(outputs[plan.call.layer], 1) for plan in chosen}
    real = pair[0].tokens.real()
    real = torch.ones(pair[0].shape, dtype=torch.bool) if real is None else real.bool().cpu()
    with torch.inference_mode(False):
        means = {layer: x.transpose(1, 2)[real.to(x.device)].double().mean(0) for layer, x in outputs.items()}
    return HeadRecord((pair[0].name, pair[1].name), means, outputs, int(real.sum()), seen.name)


def _keep(outputs: dict[int, Tensor], plan: CallPlan, output: Tensor) -> None:
    outputs[plan.call.layer] = output.detach().clone()
