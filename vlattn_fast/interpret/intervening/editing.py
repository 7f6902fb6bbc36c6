"""The attention calls and the states of a model, edited while it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.attachments import add_hook, add_pre_hook
from vlattn_fast._ground.groups import mask_of_groups
from vlattn_fast._ground.tensors import joined
from vlattn_fast.attach.events import (
    RUNNING,
    SCORE_ATTENTION,
    SOFTMAX,
    Attend,
    AttentionEvent,
    ModuleRun,
    Subscriber,
    edits_of,
    first_argument,
)
from vlattn_fast.attach.observer import Observer
from vlattn_fast.attach.session import Steps, uncompiled
from vlattn_fast.attach.written import is_masked_score
from vlattn_fast.backends.inputs import ScoreAttentionInputs, schema_of
from vlattn_fast.interpret.intervening.edits import Edit
from vlattn_fast.interpret.intervening.plans import CallPlan, Plans
from vlattn_fast.interpret.intervening.state_places import StatePlace
from vlattn_fast.interpret.intervening.state_plans import StatePlan
from vlattn_fast.interpret.intervening.traced_model import TracedTower
from vlattn_fast.ops._groups import gated, group_bias_inputs
from vlattn_fast.ops._sinks import with_sink


@dataclass(eq=False)
class _Attending:
    """A run of a module with attention."""

    module: nn.Module
    attended: bool = False
    begun: CallPlan | None = None  # of the call that has begun: a softmax that the module computes itself, or score_attention
    taken_maps: dict[int, tuple[CallPlan, int]] = field(default_factory=dict)  # of each that it took, and its first query's place


class EditedCalls(Subscriber):
    """Edits the attention calls of a model by `plans`.

    A model that generates runs on one new token after the other: its queries are the last of the tokens so far, which its cache
    counts. It may run on its inputs part by part, too.

    Args:
        given: the edits of `intervene` that the plans have; None = the plans are those of another function.
        around: the edits around it in the same thread, which `given` has, too; it can only be entered there.
    """

    edits = True

    def __init__(self, plans: Plans, given: Sequence[Edit] | None = None, around: EditedCalls | None = None) -> None:
        self.given, self._around, self.of_user = given, around, given is not None
        self._ids = plans.traced.arguments.get("input_ids")
        self.model, self._parts, self._plans = plans.traced.model, plans.traced.roots, plans.finished()
        self._of_modules: dict[nn.Module, list[CallPlan]] = {}  # each module's calls in their order
        for plan in self._plans:
            self._of_modules.setdefault(self.model.get_submodule(plan.call.path), []).append(plan)
        # By module, the towers whose first call it makes, and which of its calls that is.
        self._firsts: dict[nn.Module, list[tuple[TracedTower, int]]] = {}
        for tower in dict.fromkeys(plan.call.tower for plan in self._plans):
            first = next(plan for plan in self._plans if plan.call.tower is tower)
            module = self.model.get_submodule(first.call.path)
            self._firsts.setdefault(module, []).append((tower, self._of_modules[module].index(first)))
        self._states: dict[nn.Module, list[StatePlan]] = {}
        self.entries: dict[nn.Module, StatePlace] = {}  # by first layer of a tower, which may not attend: its state
        self._sizes: dict[TracedTower, tuple[int, int]] = {}  # (B, N) of the states of this run
        for state_plan in plans.states.values():
            self._states.setdefault(self.model.get_submodule(state_plan.place.path), []).append(state_plan)
            self.entries[self.model.get_submodule(state_plan.entry.path)] = state_plan.entry
        self._numbers: dict[nn.Module, int] = {}  # of the call that a module makes next
        self._state_runs: dict[nn.Module, int] = {}  # of each module with edited states, in this pass
        self._entry_runs: dict[nn.Module, int] = {}  # of each tower's first layer, likewise
        self._attending: list[_Attending] = []
        self._mask: tuple[Tensor, Tensor] | None = None  # a float mask and what `_with_zeros` made of it
        self._cached: dict[TracedTower, int | None] = {}  # tokens in the cache; None = there is no cache
        self._is_part = False  # the model runs on a part of its inputs, after those in its cache

    def observer(self) -> Observer:
        return Observer(self.model, [self], parts=self._parts)

    def for_explained_run(self) -> ExplainedEdits:
        """The same edits in a run of `explain`."""
        return ExplainedEdits(self)

    def before_run(self) -> None:
        running = RUNNING.get()
        if self.given is None:
            edits_of(None)
        elif (None if running is None else running.edits) is not self._around:
            raise ValueError(
                "va.intervene must be entered where it was made, inside of the same other va.intervene or of none; got another "
                "place. Make it there, or put all edits into one"
            )
        check_not_explained()
        self.count_anew()

    def count_anew(self) -> Callable[[], None]:
        """Begins a run of the model; returns a function that continues the run that is under way, if any."""
        before = self._numbers, self._state_runs, self._entry_runs, self._sizes
        call_before = self._attending, self._cached, self._is_part

        def go_on() -> None:
            self._numbers, self._state_runs, self._entry_runs, self._sizes = before
            self._attending, self._cached, self._is_part = call_before

        self._begin_pass()
        self._attending, self._cached, self._is_part = [], {}, False
        return go_on

    def _begin_pass(self) -> None:
        self._numbers = dict.fromkeys(self._of_modules, 0)
        self._state_runs, self._entry_runs, self._sizes = dict.fromkeys(self._states, 0), {}, {}

    def begins(self, observer: Observer) -> Steps:
        plainly = uncompiled(self.model)
        yield plainly.__exit__
        plainly.__enter__()
        yield from self.hooks_on_states(observer)

    def enter_tower(self, module: nn.Module, arguments: Sequence[Any]) -> None:
        """Notes how many tokens a tower's cache and its states have, if the module is its first layer."""
        if (place := self.entries.get(module)) is not None:
            run, runs = place.run
            number = self._entry_runs[module] = self._entry_runs.get(module, -1) + 1
            if number % runs != run:  # a model that runs its layers again has filled its cache meanwhile
                return
            stream = next(filter(place.may_be, arguments))
            self._cached[place.tower], self._sizes[place.tower] = _cached(arguments), place.sizes(stream)

    def hooks_on_states(self, observer: Observer) -> Steps:
        """The hooks through which modules return edited states in the runs of an observer. They come before those with which
        transformers collects hidden states: LLaVA goes on with the collected ones of its vision tower."""
        for module in self._states:
            yield add_hook(module, observer.hook(self._edit_states), prepend=True)

    def _edit_states(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        number = self._state_runs[module]
        self._state_runs[module] += 1
        for plan in self._states[module]:
            (run, runs), tower = plan.place.run, plan.place.tower
            if number % runs == run:
                if (sizes := self._sizes.get(tower)) is None:
                    raise ValueError(
                        f"model must run the first layer of tower '{tower.name}', {plan.entry.path!r}, if its states are edited; "
                        "got a run without this layer. Set the layer drop to 0, or call model.eval()"
                    )
                total = sizes[1] + (self._cached[tower] or 0)
                self._check_whole(tower, total)
                change = functools.partial(plan.changed, start=total - sizes[1], total=total)
                output = plan.place.replaced(output, sizes, change)
        return output

    def on_end(self) -> None:
        self._mask = None

    # --- modules ---

    def on_enter(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert run.module is not None
        if run.begins_anew:
            self._attending = []
        if run.module in self._of_modules:
            self._attending.append(_Attending(run.module))
        if run.module is self.model:  # the run before may have ended in an error
            self._begin_pass()
            self._is_part = self._takes_part(kwargs.get("input_ids", args[0] if args else None), _cached(kwargs.values()))
        self.enter_tower(run.module, (*args, *kwargs.values()))
        for tower, number in self._firsts.get(run.module, ()):
            if self._numbers[run.module] == number:  # a model that runs its layers again has filled its cache meanwhile
                self._cached[tower] = _cached((*args, *kwargs.values()))

    def on_leave(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if run.module not in self._of_modules or not self._attending:
            return
        attending, plans = self._attending.pop(), self._of_modules[run.module]
        unseen = not attending.attended or attending.taken_maps
        if output is not None and unseen and not all(plan.is_empty for plan in plans):
            raise ValueError(
                "model must call attention through transformers' AttentionInterface or scaled_dot_product_attention to be "
                f"edited; got '{plans[0].call.path}' ({type(run.module).__name__}), whose attention va.intervene does not support"
            )

    def _plan(self) -> CallPlan | None:
        """The plan of the call that runs; None = it is not edited."""
        if not self._attending:
            return None
        self._attending[-1].attended = True
        return self.next_plan(self._attending[-1].module)

    def next_plan(self, module: nn.Module | None, counts: bool = True) -> CallPlan | None:
        """The plan of the next call that a module makes; None = it is not edited. `counts`: it makes the call now."""
        if module not in self._of_modules:
            return None
        plans, number = self._of_modules[module], self._numbers[module]
        self._numbers[module] = (number + counts) % len(plans)
        return None if plans[number].is_empty else plans[number]

    # --- attention calls ---

    def takes_calls(self) -> bool:
        return bool(self._attending)

    def on_attention(self, event: AttentionEvent, attend: Attend) -> Tensor:
        """The attention (B, H, N, Dv) of one call, with its edits."""
        if event.written is not None:
            taken_maps = self._attending[-1].taken_maps if self._attending else {}
            plan, start = taken_maps.pop(event.written.number, (None, 0))
            return attend(event) if plan is None else with_heads(plan, attend(event), start)
        plan = self._plan() if event.inputs is None else self._begun()
        if plan is None:
            return attend(event)
        if plan.meets is not None:
            plan.meets(event)
        start, total = self.rows(plan, event.query.shape[2], event.key.shape[2])
        if plan.kept is not None:
            return _between(plan, self._edited(plan, event, attend, start, total), attend(event))
        if plan.terms and event.inputs is None:
            event = self._with_groups(plan, event, start, total)
        return with_heads(plan, attend(event), start)

    def _edited(self, plan: CallPlan, event: AttentionEvent, attend: Attend, start: int, total: int) -> Tensor:
        """The output of a call with its edited edges, if the event, and what it began with, are without them."""
        if event.inputs is None:
            return attend(self._with_groups(plan, event, start, total))
        output, lse = SCORE_ATTENTION(*schema_of(ScoreAttentionInputs).flat(self._with_row_bias(plan, event.inputs)))
        return output if event.sink is None else with_sink(output, lse, event.sink)

    def _begun(self) -> CallPlan | None:
        """The plan of the call that has begun, and ends now."""
        if not self._attending:
            return None
        plan, self._attending[-1].begun = self._attending[-1].begun, None
        return plan

    def _with_groups(self, plan: CallPlan, event: AttentionEvent, start: int, total: int) -> AttentionEvent:
        """The call with the bias of its edited edges."""
        query, masks, groups = event.query, self.masks(plan, event), _groups(plan, event.query, event.key.shape[2], start, total)
        mask = masks["attn_mask"]
        if mask is None or not mask.requires_grad or not torch.is_grad_enabled():
            return replace(event, masks={**masks, **groups})
        # score_attention takes a mask for a constant, and this one, which the model learns, is N x M anyway
        return replace(event, masks={**masks, "attn_mask": joined(mask, mask_of_groups(query, **groups))})

    def on_inputs(self, run: ModuleRun, inputs: ScoreAttentionInputs) -> ScoreAttentionInputs:
        """score_attention computes with the bias of the edited edges."""
        plan = self._plan()
        if plan is None:
            return inputs
        self._attending[-1].begun = plan
        return self._with_row_bias(plan, inputs) if plan.terms and plan.kept is None else inputs

    def _with_row_bias(self, plan: CallPlan, inputs: ScoreAttentionInputs) -> ScoreAttentionInputs:
        x = inputs.attention
        if x.row_bias is not None:
            raise ValueError(f"model must not have a group_bias if edges are edited; got one in '{plan.call.path}'")
        sizes = x.query.shape[2], x.key.shape[2]
        row_bias, key_groups = self.row_bias(plan, x.query, sizes[1], *self.rows(plan, *sizes))
        # The backend was chosen for a call without groups.
        return inputs._replace(attention=x._replace(row_bias=row_bias, key_groups=key_groups), backend="streaming")

    def row_bias(self, plan: CallPlan, query: Tensor, keys: int, start: int, total: int) -> tuple[Tensor, Tensor]:
        """The bias (B, H, N, G) of a call's edited edges, whose queries are one group each, and the groups of its keys."""
        groups = _groups(plan, query, keys, start, total)
        row_bias, key_groups = group_bias_inputs(query, **groups)
        assert row_bias is not None and key_groups is not None
        return row_bias, key_groups

    def on_call(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The softmax that a module computes itself gets edited scores."""
        if func not in SOFTMAX or not self._attending or not self._takes_softmax(self._attending[-1].module):
            return NotImplemented
        attending, taken = self._attending[-1], first_argument(args, kwargs)
        if not _is_by_head(taken, self._of_modules[attending.module][0].call.share.count):
            return NotImplemented
        plan = attending.begun = self._plan()
        return NotImplemented if plan is None or not plan.terms else self.softmax(plan, func, args, kwargs)

    def _takes_softmax(self, module: nn.Module) -> bool:
        return any(plan.call.by_hand and not plan.is_empty for plan in self._of_modules[module])

    def heads_of_map(self, run: ModuleRun, probabilities: Tensor, dim: Any, number: int) -> int:
        """Its product with the values gets edited heads."""
        plan = self._begun()
        if plan is None or not plan.edits_heads:
            return 0
        with torch._C.DisableTorchFunction():
            self._attending[-1].taken_maps[number] = plan, self.rows(plan, *probabilities.shape[-2:])[0]
        return plan.call.share.count

    def softmax(self, plan: CallPlan, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The softmax `func` of scores (B, H, N, M) or (B * H, N, M), its first argument, with edited edges; zeros for queries
        that lose all keys."""
        taken: Tensor = first_argument(args, kwargs)
        with torch._C.DisableTorchFunction():
            scores = taken if taken.ndim == 4 else taken.unflatten(0, (-1, plan.call.share.count))
            groups = _groups(plan, scores, scores.shape[3], *self.rows(plan, *scores.shape[2:]))
            edited, masked = scores + mask_of_groups(scores, **groups), is_masked_score(scores)
            edited = edited.masked_fill(masked & ~masked.all(-1, keepdim=True), -torch.inf)  # see `_with_zeros`
            empty = edited.isneginf().all(-1, keepdim=True) & ~scores.isneginf().all(-1, keepdim=True)
            edited = edited.masked_fill(empty, 0.0).reshape(taken.shape)
        result: Tensor = func(edited, *args[1:], **{name: value for name, value in kwargs.items() if name != "input"})
        with torch._C.DisableTorchFunction():
            result = result.view(scores.shape).masked_fill(empty, 0.0)
            if plan.kept is not None:
                result = _between(plan, result, func(*args, **kwargs).view(scores.shape))
            return result.view(taken.shape)

    def masks(self, plan: CallPlan, event: AttentionEvent) -> dict[str, Any]:
        """The options of a call with edited edges."""
        masks = dict(event.masks or {})
        mask = masks.setdefault("attn_mask", None)
        if mask is not None and mask.is_floating_point() and plan.cuts:
            masks["attn_mask"] = self._with_zeros(mask)
        return masks

    def _with_zeros(self, mask: Tensor) -> Tensor:
        """A float mask with -inf instead of the lowest finite number. Otherwise a query whose visible keys are all cut would
        attend to the masked ones. Queries that see no key anyway stay unchanged."""
        if self._mask is None or self._mask[0] is not mask:  # all layers have the same
            low = mask <= torch.finfo(mask.dtype).min / 2
            self._mask = mask, mask.masked_fill(low & ~low.all(-1, keepdim=True), -torch.inf)
        return self._mask[1]

    def rows(self, plan: CallPlan, count: int, keys: int) -> tuple[int, int]:
        """The place of the first of `count` queries, and how many tokens the tower has so far."""
        tower = plan.call.tower
        cached = self._cached.get(tower)
        if plan.call.problem:  # its tokens are not known, and only heads are edited
            return 0, count
        if (columns := plan.call.columns) is not None:  # a cache may or may not count keys that are not tokens
            total = keys - (plan.call.keys - len(columns))
        else:
            total = (count if plan.call.crosses else max(count, keys)) if cached is None else cached + count
        self._check_whole(tower, total)
        return total - count, total

    def _takes_part(self, ids: Any, cached: int | None) -> bool:
        """Whether a run on `ids` takes the next tokens of the inputs, but not the last one, after those in its cache."""
        if cached is None or not isinstance(ids, Tensor) or not isinstance(self._ids, Tensor) or len(ids) % len(self._ids):
            return False
        part = self._ids[:, cached : cached + ids.shape[1]].repeat_interleave(len(ids) // len(self._ids), 0)
        return cached + ids.shape[1] < self._ids.shape[1] and torch.equal(ids, part.to(ids))

    def _check_whole(self, tower: TracedTower, total: int) -> None:
        """ValueError for fewer tokens than the inputs have, unless they are the first ones of these."""
        if total < tower.shape[1] and not (self._is_part and self._cached.get(tower) is not None):
            raise ValueError(
                f"model must run on the {tower.shape[1]} tokens of tower '{tower.name}' of va.intervene's inputs at once, or "
                f"part by part with a cache, as by prefill_chunk_size, and then on tokens after them; got {total}"
            )


class ExplainedEdits(Subscriber):
    """The edits of a model in a run of `explain` within `intervene`: each query is a group of its own."""

    trains = False

    def __init__(self, edits: EditedCalls) -> None:
        self._edits = edits

    def begins(self, observer: Observer) -> Steps:
        yield self._edits.count_anew()  # a hook of the edited model may explain it
        for module in self._edits.entries:
            yield add_pre_hook(module, observer.hook(self._enter), with_kwargs=True)
        yield from self._edits.hooks_on_states(observer)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._edits.enter_tower(module, (*args, *kwargs.values()))

    def on_attention(self, event: AttentionEvent, attend: Attend) -> Tensor:
        plan = None if event.run.path is None else self._edits.next_plan(event.run.module or self._edits.model)
        if plan is None:
            return attend(event)
        start, total = self._edits.rows(plan, event.query.shape[2], event.key.shape[2])
        if plan.terms and not plan.call.by_hand:
            if event.inputs is not None or event.written is not None:
                raise ValueError(
                    "model must call attention through transformers' AttentionInterface or scaled_dot_product_attention if "
                    f"explain runs it with edited edges; got '{event.run.path}' ({type(event.run.module).__name__})"
                )
            event = self._with_edges(plan, event, start, total)
        return with_heads(plan, attend(event), start)

    def _with_edges(self, plan: CallPlan, event: AttentionEvent, start: int, total: int) -> AttentionEvent:
        row_bias, key_groups = self._edits.row_bias(plan, event.query, event.key.shape[2], start, total)
        each = torch.arange(event.query.shape[2], device=event.query.device)
        masks = self._edits.masks(plan, event)
        return replace(event, masks={**masks, "query_groups": each, "key_groups": key_groups, "group_bias": row_bias})

    def on_call(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func not in SOFTMAX or run.path is None:
            return NotImplemented
        plan = self._edits.next_plan(run.module or self._edits.model, counts=False)  # its call follows
        if plan is None or not (plan.terms and plan.call.by_hand):
            return NotImplemented
        if not _is_by_head(first_argument(args, kwargs), plan.call.share.count):
            return NotImplemented
        return self._edits.softmax(plan, func, args, kwargs)


def check_not_explained() -> None:
    """ValueError within a run of `explain`."""
    around = RUNNING.get()
    if around is not None and around.explains:
        raise ValueError("model must not be edited while explain runs it; got va.intervene inside of explain. Enter it before")


def token_groups(
    plan: CallPlan, sizes: tuple[int, int, int], start: int, total: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The groups of queries and keys of a call with the `sizes` (B, N, M), whose first query is at place `start` of `total`."""
    assert plan.queries is not None and plan.keys is not None
    call, (batch, queries, keys) = plan.call, sizes
    plan.keys.check_rows(queries, total)
    if call.columns is not None or call.crosses:
        if keys != call.keys:
            raise ValueError(f"model must attend to {call.keys} keys in '{call.path}', as in its run on inputs; got {keys}")
        token_groups = plan.keys.of(0, call.source.shape[1], call.source.shape[1], batch, device)
        key_groups = token_groups
        if call.columns is not None:
            key_groups = token_groups.new_full((batch, keys), -1).index_copy(1, call.columns.to(device), token_groups)
    else:
        # The keys are the last ones of all, or, in a cache of fixed length, the first positions in it.
        key_groups = plan.keys.of(max(0, total - keys), keys, total, batch, device)
    return plan.queries.of(start, queries, total, batch, device), key_groups


def _groups(plan: CallPlan, queries: Tensor, keys: int, start: int, total: int) -> dict[str, Any]:
    """The groups and the bias of queries (B, H, N, *) with so many keys."""
    with torch.inference_mode(False):  # other runs, with gradients, use the same tensors
        query_groups, key_groups = token_groups(plan, (*queries.shape[::2], keys), start, total, queries.device)
        return {"query_groups": query_groups, "key_groups": key_groups, "group_bias": plan.group_bias(queries)}


def _is_by_head(scores: Tensor, heads: int) -> bool:
    """Whether scores may be (B, H, N, M), or (B * H, N, M)."""
    return scores.ndim == 4 or (scores.ndim == 3 and len(scores) % heads == 0)


def _between(plan: CallPlan, edited: Tensor, output: Tensor) -> Tensor:
    """The share `plan.kept` of the way from the edited output, or map, to the one that is not edited."""
    assert plan.kept is not None
    return edited + plan.call.share.part(plan.kept, 1).to(output)[:, :, None, None] * (output - edited)


def with_heads(plan: CallPlan, output: Tensor, start: int) -> Tensor:
    """The outputs (B, H, N, Dv) of a call, whose first query is at place `start`, with the edits of its heads."""
    share = plan.call.share
    if plan.gate is not None:
        output = gated(output, share.part(plan.gate, 0).to(output.device))
    if plan.shift is not None:
        output = output + share.part(plan.shift, 0).to(output)[:, None]
    for patched in plan.patched:
        size, copies = patched.tokens.shape[1], len(output) // len(patched.tokens)
        rows = torch.arange(start, max(start, min(size, start + output.shape[2])))
        if not len(rows):
            continue
        here, heads = (x.to(output.device) for x in share.indices(patched.heads))
        tokens, outputs = (x.repeat_interleave(copies, 0).to(output.device) for x in (patched.tokens, patched.outputs))
        outputs = outputs[:, here]
        before = output[:, heads]
        after = torch.where(tokens[:, None, rows, None], outputs[:, :, rows].to(output), before[:, :, : len(rows)])
        output = output.index_copy(1, heads, torch.cat([after, before[:, :, len(rows) :]], 2))
    return output if plan.through is None else plan.through(output)


def _cached(arguments: Iterable[Any]) -> int | None:
    """How many tokens a cache among a module's arguments has; None without one."""
    for argument in arguments:
        count = getattr(argument, "get_seq_length", None)
        if callable(count):
            return int(count())
    return None
