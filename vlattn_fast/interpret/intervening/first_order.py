"""The gradient with respect to a bias between groups of tokens that are known only after the forward pass, in the same pass.

A bias of zero changes no output: the forward pass needs no groups. The backward pass of each attention call takes them, and
gives sum A (dA - sum_j A dA) over the pairs of each two groups together with the gradients of query, key and value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.groups import sums_of_groups
from vlattn_fast.attach.events import SCORE_ATTENTION
from vlattn_fast.backends.inputs import ScoreAttentionBackwardInputs, ScoreAttentionInputs, named, schema_of
from vlattn_fast.interpret.intervening.editing import token_groups
from vlattn_fast.interpret.intervening.grouping import Groups
from vlattn_fast.interpret.intervening.plans import CallPlan, Plans
from vlattn_fast.interpret.intervening.token_sets import TokenSet
from vlattn_fast.interpret.intervening.traced_model import NotesCalls
from vlattn_fast.interpret.relevancy.traced_call import TracedCall
from vlattn_fast.ops.score_attention import score_attention_by

_BACKWARD = torch.ops.vlattn.score_attention_backward
Sets = Mapping[str, TokenSet]
_ARGUMENTS, _OF_BACKWARD = (list(schema_of(kind).types) for kind in (ScoreAttentionInputs, ScoreAttentionBackwardInputs))


class GroupGradient:
    """One attention call, and the results of its backward pass for the groups."""

    def __init__(self, call: TracedCall) -> None:
        (self.batch, self.heads, self.queries, _), self.keys = call.query.shape, call.key.shape[2]
        self.device = call.query.device
        self.leaf = torch.zeros((), requires_grad=True)  # has a gradient if the score depends on the call
        self.asked: list[Groups] = []  # of the queries and of the keys, which count for its effects
        self.groups: list[Tensor] = []  # and those of its queries and its keys
        self.effects: Tensor | None = None  # (B, H, Gq, Gk)

    def output(self, call: TracedCall) -> Tensor:
        """(B, H, N, Dv), with a bias of zero, so that the backend is one that takes biases."""
        every: dict[str, Any] = {
            "query_groups": torch.zeros(self.queries, dtype=torch.int64, device=self.device),
            "key_groups": torch.full((self.keys,), -1, device=self.device),
            "group_bias": torch.zeros(self.heads, 1, 1, device=self.device),
        }
        tensors = {"query": call.query, "key": call.key, "value": call.value}
        return score_attention_by(
            lambda inputs: _Biased.apply(self, self.leaf, *named(inputs).values()), **tensors, **call.masks, **every
        )

    def ask(self, plan: CallPlan, queries: Groups, keys: Groups) -> None:
        """Sets the groups, before the backward pass."""
        plan.queries, plan.keys, self.asked = queries, keys, [queries, keys]
        sizes = self.batch, self.queries, self.keys
        self.groups = [groups.contiguous() for groups in token_groups(plan, sizes, 0, self.queries, self.device)]

    def biases(self, row_bias: Tensor, key_groups: Tensor) -> tuple[Tensor, Tensor]:
        """The biases of the operator; unchanged if no groups are set."""
        if not self.asked:
            return row_bias, key_groups
        return row_bias.new_zeros(*row_bias.shape[:3], self.asked[1].members.shape[1]), self.groups[1]

    def note(self, row_effects: Tensor) -> None:
        """Sums the gradient of row_bias over the groups of queries. Few queries are packed per key head."""
        if self.asked:
            rows = row_effects.reshape(self.batch, self.heads, self.queries, -1)
            self.effects = sums_of_groups(rows, self.groups[0], self.asked[0].members.shape[1])

    def by_sets(self) -> Tensor:
        """(B, H, F, T), the effects summed over the groups of keys that are in each set, and over those of queries."""
        query_members, key_members = (groups.members.to(self.device) for groups in self.asked)
        if self.effects is None:
            return torch.zeros(self.batch, self.heads, len(key_members), len(query_members), device=self.device)
        sums = torch.where(query_members[:, :, None], self.effects[:, :, None], 0.0).sum(3)
        return torch.where(key_members[:, None], sums[:, :, None], 0.0).sum(4)


class _Biased(torch.autograd.Function):
    """The operator score_attention, whose backward pass takes other groups."""

    @staticmethod
    def forward(ctx: Any, call: GroupGradient, leaf: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = SCORE_ATTENTION(*args)
        x = dict(zip(_ARGUMENTS, args, strict=True)) | {"out": out, "lse": lse}
        ctx.names = [name for name, value in x.items() if isinstance(value, Tensor)]
        ctx.save_for_backward(*[x[name] for name in ctx.names])
        ctx.options = {name: value for name, value in x.items() if name not in ctx.names}
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        x = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | ctx.options
        x["row_bias"], x["key_groups"] = ctx.call.biases(x["row_bias"], x["key_groups"])
        x |= {"grad_out": torch.zeros_like(x["out"]) if grad_out is None else grad_out, "grad_lse": grad_lse}
        *grads, _, row_effects = _BACKWARD(*[x[name] for name in _OF_BACKWARD])
        ctx.call.note(row_effects)
        by_name = dict(zip(("query", "key", "value"), grads, strict=True))
        return None, torch.zeros(()), *map(by_name.get, _ARGUMENTS)


class KeepsCalls(NotesCalls):
    """Notes the attention calls of the towers, and stores what their gradients need."""

    needs_score = True

    def __init__(self) -> None:
        super().__init__()
        self.biased: list[GroupGradient] = []
        self.takes_all = True  # no call needs another run of the model for its bias

    def output(self, call: TracedCall) -> Tensor:
        if call.is_mixing:  # no softmax, so no bias
            return call.computed()
        mask, biased = call.masks["attn_mask"], GroupGradient(call)
        self.biased.append(biased)
        if call.ran is not None or (mask is not None and mask.requires_grad):
            self.takes_all = False
            return call.computed()
        return biased.output(call)

    def for_plans(self, plans: Plans, chosen: Sequence[CallPlan], queries: Sets, keys: Sets) -> list[GroupGradient]:
        """The calls of the plans `chosen`, which compute their effects between these sets in the backward pass."""
        query_groups, key_groups = Groups(list(queries.values()), as_keys=False), Groups(list(keys.values()), as_keys=True)
        numbers = {id(plan): number for number, plan in enumerate(plans.calls)}
        calls = [self.biased[numbers[id(plan)]] for plan in chosen]
        for call, plan in zip(calls, chosen, strict=True):
            call.ask(plan, query_groups, key_groups)
        return calls
