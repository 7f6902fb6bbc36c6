"""Relevancy rows of a model that trains, with their gradients: the calls keep their graph, and the rows are made of them.

The model runs unchanged. A row r goes back through the calls of its tower, r <- r * a + (r * b) Abar, by `relevancy_step`, which
is differentiable and stores no map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import is_wrapped
from vlattn_fast.attach.frozen import Frozen
from vlattn_fast.attach.session import is_checkpointed, named
from vlattn_fast.attach.transformers_interface import ADDITIVE_NAME, CONFIG_NAME, SDPA_NAME
from vlattn_fast.interpret.relevancy.method import BackwardPass, CarriedMethod, Method
from vlattn_fast.interpret.relevancy.sink_detection import KEEP
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall, weighted
from vlattn_fast.ops.score_attention import score_attention


class LiveCalls(Method):
    """The relevancy of `formula`, from calls with their graph. `higher_order`: the score's gradient has a gradient, too."""

    trains = True
    adds_parallel: bool
    holds_start: bool

    def __init__(self, formula: Method, higher_order: bool) -> None:
        super().__init__()
        if not isinstance(formula, CarriedMethod):
            raise ValueError(
                "method must carry relevancy through the layers, such as 'gradient', 'weighted' and 'rollout'; got "
                f"{formula.name!r}"
            )
        if formula.sinks != KEEP or formula.through_connector:
            raise ValueError(
                f"method must have neither sinks= nor through_connector= in capture_relevancy; got {formula.label!r}"
            )
        self.formula, self.higher_order, self.freeze = formula, higher_order, formula.freeze
        self.name, self.needs_score, self.holds_start = formula.name, formula.needs_score, formula.holds_start
        self.adds_parallel, self.start_layer = formula.adds_parallel, formula.start_layer
        self.weighs_sums = formula.weighs_sums
        if self.higher_order and not self.needs_score:
            raise ValueError(f"higher_order must be False for method {self.name!r}, which takes no gradient; got True")

    @property
    def options(self) -> dict[str, Any]:
        return self.formula.options

    # --- the forward pass ---

    def constants(self) -> Frozen:
        frozen = super().constants()
        frozen.differentiable = self.higher_order
        return frozen

    def follow(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], last_tower: Callable[..., tuple[TowerTrace | None, bool]]
    ) -> Any:
        return self.formula.follow(func, args, kwargs, last_tower)

    def attend(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        self.formula.begins(tower, call.chunk)
        output = self._computed(tower, call)
        tower.cached.append(replace(call, output=output).for_training(self.higher_order))
        return output

    def pool(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        output = self._computed(tower, call)
        tower.pool = replace(call, output=output).for_training(self.higher_order)
        return output

    def cross(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        self.formula.begins(tower, carries=False)
        return self._computed(tower, call)

    def _computed(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        self._check(call, tower.model.get_submodule(call.path))
        if self.higher_order and call.ran is None:
            # the lse keeps torch's own attention out, which is differentiable once
            options = {**call.masks, "dropout_p": call.dropout_p, "return_lse": True}
            output, _ = score_attention(call.query, call.key, call.value, **options)
        else:
            output = call.computed()
        return self.watched(tower, output)

    def watched(self, tower: TowerTrace, output: Tensor) -> Tensor:
        if not self.needs_score:
            return output
        if not output.requires_grad and not is_wrapped(output):  # torch.func has gradients of its own
            if is_checkpointed():
                raise ValueError(f"tower '{tower.name}' must have a trained parameter before its checkpointed layers; got none")
            output.requires_grad_()
        tower.enters_gradient(output)
        return output

    def _check(self, call: TracedCall, module: nn.Module) -> None:
        """ValueError for a call whose relevancy has no gradient, or not that of the unchanged model."""
        where = f"attention {named(call.path, module)}"
        if not torch.is_grad_enabled():
            raise ValueError(
                f"capture_relevancy needs gradients in {where}; got a call without them, such as under torch.utils.checkpoint "
                "with use_reentrant=True. Pass use_reentrant=False"
            )
        if call.chunk or call.mesh is not None:
            why = "attends in chunks" if call.chunk else "has its heads in several processes"
            raise ValueError(f"capture_relevancy does not support {where}, which {why}")
        mask = call.masks["attn_mask"]
        if self.higher_order and "softcap" in call.masks:
            raise ValueError(f"higher_order=True needs plain dot products; got softcapped scores in {where}")
        if mask is not None and mask.requires_grad:
            raise ValueError(
                f"capture_relevancy has no gradient for a learned bias of the scores; got one in {where}. Freeze its parameters "
                "with requires_grad_(False)"
            )
        if call.ran is not None and (call.score != "dot" or call.sink() is not None):
            kind = f"score {call.score!r}" if call.sink() is None else "score with a sink"
            raise ValueError(f"capture_relevancy needs dot products of queries and keys; got the {kind} in {where}")
        written = isinstance(vars(module).get("forward"), functools.partial)  # replaced by `handwritten`
        if written and module.training and not isinstance(module, nn.MultiheadAttention) and _drops_out(module):
            raise ValueError(
                f"capture_relevancy does not support dropout in {where}, which computes its softmax itself. Set its dropout to 0"
            )
        names = set[Any]()  # of the attention, which a call without a softmax has none of
        if not call.is_mixing:
            names = {getattr(value, CONFIG_NAME, None) for value in vars(module).values()}
        if is_checkpointed() and (written or self.higher_order or names & {SDPA_NAME, ADDITIVE_NAME}):
            needed = "higher_order=False" if self.higher_order else "attn_implementation='sdpa'"
            raise ValueError(
                f"capture_relevancy needs {needed} if torch.utils.checkpoint runs layers twice; got {where}, whose second run "
                "would differ"
            )

    # --- afterwards ---

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        calls = {tower: self._calls(tower) for tower in backward.towers}
        terms = {tower: self.formula.terms(tower) for tower in backward.towers}
        attended = [call for of in calls.values() for call in of] + [t.pool for t in backward.towers if t.pool is not None]
        tensors = [call.output for call in attended]
        tensors += [terms[tower][call.number][2] for tower in backward.towers if terms[tower] for call in calls[tower]]
        grads = dict(zip(map(id, tensors), backward.gradients(tensors), strict=True)) if self.needs_score else {}
        rows, recursion = [], self.formula.recursion
        for tower, row in zip(backward.towers, backward.starts, strict=True):
            positions, last_share, added = tower.positions, 1.0, None  # by a mixer parallel to the call
            if (pool := tower.pool) is not None:
                row = pool.added(row, grads.get(id(pool.output)), recursion)
                if positions.reorders:
                    tokens = positions.call(pool.token_positions)
                    row = tokens.spread(row, tokens.keys)
            for call in reversed(calls[tower]):
                grad, term = grads.get(id(call.output)), terms[tower].get(call.number)
                if call.parallel:
                    last_share, this_share = recursion.parallel
                    added = call.added(row * this_share, grad, recursion)
                    continue
                a, b = self.formula.weights(call, term, None if term is None else grads[id(term[2])])
                at = positions.call(call.token_positions) if positions.reorders else None
                places = None if at is None or term is None else positions.locate_states(term[0])  # of the tokens of a sum
                row = weighted(row, a, at, places) + call.added(weighted(row, b, at, places), grad, recursion, at)
                if added is not None:
                    row, added = row * last_share + added, None
            rows.append(row)
        return rows

    def between(self, backward: BackwardPass) -> list[Tensor]:
        calls = [replace(call, attention=call.attention.for_training(self.higher_order)) for call in backward.calls]
        return self.formula.between(replace(backward, calls=calls))

    def check_between(self, entries: Sequence[Any]) -> None:
        self.formula.check_between(entries)

    def _calls(self, tower: TowerTrace) -> list[TracedCall]:
        """The calls of layer `start_layer` and later ones."""
        first = tower.first_layer(self.start_layer)
        return [call for call in tower.cached if call.layer >= first]


def _drops_out(module: nn.Module) -> bool:
    """Whether a module has dropout, in a part or as a number."""
    numbers = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    return any(number > 0 for number in numbers) or any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
