"""A run of a model whose attention calls are edited."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlattn_fast._ground.groups import columns_of_groups, rows_of_groups
from vlattn_fast.attach.current import RUNNING, SCORE_ATTENTION, SOFTMAX, attention, edits_of, first_argument
from vlattn_fast.attach.session import Steps, Stepwise, as_mode, uncompiled, visible
from vlattn_fast.attach.written_scores import is_masked_score, joined
from vlattn_fast.backends.inputs import ScoreAttentionInputs
from vlattn_fast.interpret.intervening.plans import CallPlan, Plans
from vlattn_fast.interpret.intervening.seen_calls import SeenTower
from vlattn_fast.interpret.relevancy.written_maps import WrittenMaps
from vlattn_fast.ops._groups import gated, group_bias_inputs
from vlattn_fast.ops.score_attention import score_attention

_SDPA = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class _Grouped(NamedTuple):
    """The parts of a call that `group_bias_inputs` reads."""

    query: Tensor
    query_groups: Tensor
    key_groups: Tensor
    group_bias: Tensor


@dataclass(eq=False)
class _Inside:
    """A run of a module that attends."""

    module: nn.Module
    attended: bool = False
    maps: WrittenMaps | None = None  # where the module takes its softmax itself: those that are not yet multiplied with values
    of_maps: dict[int, tuple[CallPlan, int]] = field(default_factory=dict)  # of each, and the place of its first query


class Editing(Stepwise, TorchFunctionMode):
    """A context in which the attention calls of a model, in this thread, are edited as `plans` say.

    A model that generates runs on one new token after the other: the rows that run are the last ones of the tokens so far, which
    its cache counts.
    """

    explains, trains, edits = False, True, True

    def __init__(self, plans: Plans) -> None:
        super().__init__()
        self.model, self._roots, self._plans = plans.seen.model, plans.seen.roots, plans.finished()
        self._of_modules: dict[nn.Module, list[CallPlan]] = {}  # each module's calls in their order
        for plan in self._plans:
            self._of_modules.setdefault(self.model.get_submodule(plan.call.path), []).append(plan)
        # By module, the towers whose first call it makes, and which of its calls that is.
        self._firsts: dict[nn.Module, list[tuple[SeenTower, int]]] = {}
        for tower in dict.fromkeys(plan.call.tower for plan in self._plans):
            first = next(plan for plan in self._plans if plan.call.tower is tower)
            module = self.model.get_submodule(first.call.path)
            self._firsts.setdefault(module, []).append((tower, self._of_modules[module].index(first)))

    def __getstate__(self) -> None:
        """A model that is copied or pickled meanwhile takes its hooks along. A copy's hooks do nothing."""

    def _steps(self) -> Steps:
        edits_of(None)
        check_not_explained()
        self._around = RUNNING.get()
        self._numbers = dict.fromkeys(self._of_modules, 0)  # of the call that a module makes next
        self._inside: list[_Inside] = []
        self._explained: object = None  # the run of `explain` that takes the edits along
        self._mask: tuple[Tensor, Tensor] | None = None  # a float mask and what `_with_zeros` made of it
        self._before: dict[SeenTower, int | None] = {}  # tokens in the cache; None = there is no cache
        plainly, attention_seen = uncompiled(self.model), visible(self._roots)
        yield plainly.__exit__
        plainly.__enter__()
        yield attention_seen.__exit__
        attention_seen.__enter__()
        yield self._end
        RUNNING.set(self)
        yield self.model.register_forward_pre_hook(self._begin).remove
        for module in self._of_modules:
            yield module.register_forward_pre_hook(self._enter, with_kwargs=True).remove
            yield module.register_forward_hook(self._leave, always_call=True).remove
        yield from as_mode(self)

    def _end(self) -> None:
        RUNNING.set(self._around)
        self._mask = None

    # --- modules ---

    def _begin(self, module: nn.Module, args: Any) -> None:
        if RUNNING.get() is self:  # a run before may have ended in an error
            self._numbers = dict.fromkeys(self._of_modules, 0)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if RUNNING.get() is not self:
            return
        by_hand = any(plan.call.by_hand and not plan.is_empty for plan in self._of_modules[module])
        self._inside.append(_Inside(module, maps=WrittenMaps(keeps_graph=False) if by_hand else None))
        for tower, number in self._firsts.get(module, ()):
            if self._numbers[module] == number:  # a model that runs its layers again has filled its cache meanwhile
                self._before[tower] = _cached((*args, *kwargs.values()))

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if RUNNING.get() is not self or not self._inside:
            return
        inside = self._inside.pop()
        unseen = not inside.attended or inside.of_maps
        if result is not None and unseen and not all(plan.is_empty for plan in self._of_modules[module]):
            path = self._of_modules[module][0].call.path
            raise ValueError(
                "model must call attention through transformers' AttentionInterface or scaled_dot_product_attention where it is "
                f"edited; got '{path}' ({type(module).__name__}), whose attention va.intervene does not see"
            )

    def _plan(self) -> CallPlan | None:
        """The plan of the call that runs; None = it is not edited."""
        if not self._inside:
            return None
        self._inside[-1].attended = True
        return self._next_plan(self._inside[-1].module)

    def _next_plan(self, module: nn.Module) -> CallPlan | None:
        plans, number = self._of_modules[module], self._numbers[module]
        self._numbers[module] = (number + 1) % len(plans)
        return None if plans[number].is_empty else plans[number]

    # --- attention calls ---

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside and RUNNING.get() is self:
            if func is functional.scaled_dot_product_attention:
                return self._sdpa(*args, **kwargs)
            if func is SCORE_ATTENTION:
                return self._score_attention(*args)
            if self._inside[-1].maps is not None:
                return self._by_hand(self._inside[-1], func, args, kwargs)
        return func(*args, **kwargs)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = {**dict(zip(_SDPA, args, strict=False)), **kwargs}
        mask = options.get("attn_mask")
        single = query.ndim == 3  # (B, N, D) is one head
        if single:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            options["attn_mask"] = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
        elif not options.get("enable_gqa"):  # torch's function broadcasts batch and heads
            shape = torch.broadcast_shapes(*(x.shape[:2] for x in (query, key, value)))
            query, key, value = (x.expand(*shape, -1, -1) for x in (query, key, value))
        output = self.attend(query, key, value, options)
        return output.squeeze(1) if single else output

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, masks: Mapping[str, Any], module: nn.Module | None = None
    ) -> Tensor:
        """The attention (B, H, N, Dv) of one call, with its edits."""
        plan = self._plan()
        with torch._C.DisableTorchFunction():  # the run does not see what it computes itself
            if plan is None:
                return attention(query, key, value, masks)
            start, total = self._rows(plan, query.shape[2], key.shape[2])
            if not plan.terms:
                return _with_heads(plan, attention(query, key, value, masks), start)
            groups = _groups(plan, query, key.shape[2], start, total)
            mask = masks.get("attn_mask")
            if mask is not None and mask.is_floating_point() and plan.cuts:
                masks = {**masks, "attn_mask": (mask := self._with_zeros(mask))}
            if mask is None or not mask.requires_grad or not torch.is_grad_enabled():
                output = score_attention(query, key, value, **masks, **groups)
            else:  # score_attention takes a mask for a constant, and this one, which the model learns, is N x M anyway
                output = attention(query, key, value, {**masks, "attn_mask": joined(mask, _as_mask(query, **groups))})
            return _with_heads(plan, output, start)

    def edited(
        self, run: object, path: str, query: Tensor, key: Tensor, masks: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
        """See `Edits`: this call of `explain`, whose queries are one group each."""
        module = self._explains(run, path)
        plan = self._next_plan(module) if module in self._of_modules else None
        if plan is None:
            return masks, torch.nn.Identity()
        start, total = self._rows(plan, query.shape[2], key.shape[2])
        if plan.terms and not plan.call.by_hand:
            if "score" in masks:
                raise ValueError(
                    "model must call attention through transformers' AttentionInterface or scaled_dot_product_attention where "
                    f"explain runs it with edited edges; got '{path}' ({type(module).__name__})"
                )
            groups = _Grouped(query, **_groups(plan, query, key.shape[2], start, total))
            mask = masks["attn_mask"]
            if mask is not None and mask.is_floating_point() and plan.cuts:
                masks = {**masks, "attn_mask": self._with_zeros(mask)}
            row_bias, key_groups = group_bias_inputs(groups)
            each = torch.arange(query.shape[2], device=query.device)
            masks = {**masks, "query_groups": each, "key_groups": key_groups, "group_bias": row_bias}
        return masks, functools.partial(_with_heads, plan, start=start)

    def edited_softmax(self, run: object, path: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """See `Edits`."""
        module = self._explains(run, path)
        if module not in self._of_modules:
            return None
        plan = self._of_modules[module][self._numbers[module]]  # its call follows
        if not (plan.terms and plan.call.by_hand and _is_by_head(first_argument(args, kwargs), plan.call.share.count)):
            return None
        return self._softmax(plan, func, args, kwargs)

    def _explains(self, run: object, path: str) -> nn.Module:
        """The module at `path`, which attends in a run of `explain`; counts anew where the run is new."""
        if self._explained is not run:
            self._explained, self._numbers = run, dict.fromkeys(self._of_modules, 0)
            self._before.clear()
        return self.model.get_submodule(path)

    def _score_attention(self, *args: Any) -> tuple[Tensor, Tensor]:
        """The operator's output and log-sum-exp, where the model calls `score_attention` itself."""
        plan, inputs = self._plan(), ScoreAttentionInputs(*args)
        if plan is None:
            return SCORE_ATTENTION(*inputs)
        with torch._C.DisableTorchFunction():
            if inputs.row_bias is not None and plan.terms:
                raise ValueError(f"model must not have a group_bias where edges are edited; got one in '{plan.call.path}'")
            if inputs.sink is not None and not (plan.shift is None and not plan.patched and plan.sees is None):
                raise ValueError(
                    f"model must have no sink where outputs of heads are recorded, patched or replaced by means; got one in "
                    f"'{plan.call.path}'"
                )  # it is applied behind the operator
            start, total = self._rows(plan, inputs.query.shape[2], inputs.key.shape[2])
            if plan.terms:
                groups = _Grouped(inputs.query, **_groups(plan, inputs.query, inputs.key.shape[2], start, total))
                row_bias, key_groups = group_bias_inputs(groups)
                # The backend was chosen for a call without groups, which this one takes everywhere.
                inputs = inputs._replace(row_bias=row_bias, key_groups=key_groups, backend="streaming")
            output, lse = SCORE_ATTENTION(*inputs)
            return _with_heads(plan, output, start), lse

    def _by_hand(self, inside: _Inside, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a function in a module that takes its softmax itself. The softmax gets edited scores, and its product
        with the values edited heads."""
        assert inside.maps is not None
        heads = self._of_modules[inside.module][0].call.share.count
        if func not in SOFTMAX or not _is_by_head(scores := first_argument(args, kwargs), heads):
            result = func(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                call = inside.maps.product(func, args, kwargs, result) if inside.of_maps else None
                if call is None:
                    return result
                of_map, start = inside.of_maps.pop(call.number)
                return call.as_product(_with_heads(of_map, call.output, start))
        plan = self._plan()
        result = func(*args, **kwargs) if plan is None or not plan.terms else self._softmax(plan, func, args, kwargs)
        if plan is not None and plan.edits_heads:
            with torch._C.DisableTorchFunction():
                number = inside.maps.take(plan.call.path, result, None if scores.ndim == 4 else heads)
                inside.of_maps[number] = plan, self._rows(plan, *result.shape[-2:])[0]
        return result

    def _softmax(self, plan: CallPlan, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The softmax `func` of scores (B, H, N, M) or (B * H, N, M), its first argument, with edited edges; zeros in rows that
        lose all keys."""
        taken: Tensor = first_argument(args, kwargs)
        with torch._C.DisableTorchFunction():
            scores = taken if taken.ndim == 4 else taken.unflatten(0, (-1, plan.call.share.count))
            groups = _groups(plan, scores, scores.shape[3], *self._rows(plan, *scores.shape[2:]))
            edited, masked = scores + _as_mask(scores, **groups), is_masked_score(scores)
            edited = edited.masked_fill(masked & ~masked.all(-1, keepdim=True), -torch.inf)  # see `_with_zeros`
            empty = edited.isneginf().all(-1, keepdim=True) & ~scores.isneginf().all(-1, keepdim=True)
            edited = edited.masked_fill(empty, 0.0).reshape(taken.shape)
        result: Tensor = func(edited, *args[1:], **{name: value for name, value in kwargs.items() if name != "input"})
        with torch._C.DisableTorchFunction():
            return result.view(scores.shape).masked_fill(empty, 0.0).view(taken.shape)

    def _with_zeros(self, mask: Tensor) -> Tensor:
        """A float mask with -inf where it masks by the lowest finite number. Else a row whose visible keys are all cut would
        attend to the masked ones. Rows that see no key anyway stay as they are."""
        if self._mask is None or self._mask[0] is not mask:  # all layers have the same
            low = mask <= torch.finfo(mask.dtype).min / 2
            self._mask = mask, mask.masked_fill(low & ~low.all(-1, keepdim=True), -torch.inf)
        return self._mask[1]

    def _rows(self, plan: CallPlan, count: int, keys: int) -> tuple[int, int]:
        """The place of the first of `count` queries, and how many tokens the tower has so far."""
        tower = plan.call.tower
        cached = self._before.get(tower)
        if plan.call.problem:  # of its tokens nothing is known, and heads alone are edited
            return 0, count
        if (columns := plan.call.columns) is not None:  # a cache may count keys that are no tokens, or not
            total = keys - (plan.call.keys - len(columns))
        else:
            total = (count if plan.call.crosses else max(count, keys)) if cached is None else cached + count
        if total < tower.shape[1]:
            raise ValueError(
                f"model must run on the {tower.shape[1]} tokens of tower '{tower.name}' of va.intervene's inputs at once, "
                f"and then on tokens behind them; got {total}"
            )
        return total - count, total


def check_not_explained() -> None:
    """ValueError within a run of `explain`."""
    around = RUNNING.get()
    if around is not None and around.explains:
        raise ValueError("model must not be edited while explain runs it; got va.intervene within. Enter it outside")


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
        of_tokens = plan.keys.of(0, call.source.shape[1], call.source.shape[1], batch, device)
        key_groups = of_tokens
        if call.columns is not None:
            key_groups = of_tokens.new_full((batch, keys), -1).index_copy(1, call.columns.to(device), of_tokens)
    else:
        # The keys are the last ones of all, or, in a cache of fixed length, the first places of it.
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


def _as_mask(query: Tensor, query_groups: Tensor, key_groups: Tensor, group_bias: Tensor) -> Tensor:
    """The bias of each query and key, (B, H, N, M), by torch's functions."""
    table = group_bias.to(query.dtype).expand(len(query), *group_bias.shape[-3:])
    return columns_of_groups(rows_of_groups(table, query_groups), key_groups)


def _with_heads(plan: CallPlan, output: Tensor, start: int) -> Tensor:
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
    if plan.sees is not None:
        plan.sees(output)
    return output


def _cached(arguments: Sequence[Any]) -> int | None:
    """How many tokens a cache among a module's arguments has; None without one."""
    for argument in arguments:
        count = getattr(argument, "get_seq_length", None)
        if callable(count):
            return int(count())
    return None
