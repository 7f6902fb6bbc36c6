"""One attention call: its output, rows of its map, and relevancy through it.

A call is torch's scaled_dot_product_attention, with its options as `masks`, and maybe with a softcap and a sink. Or it ran
already: a module wrote it out, or it is this package's score_attention, with any score function, whose query and key are the
features that the core score takes. Relevancy through a dot product takes the operators; through any other core score it takes
their kernels (vlattn_fast.ops.core_scores).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.attach.events import attention
from vlattn_fast.attach.tensor_parallel import local, mean_over, on_mesh
from vlattn_fast.interpret.relevancy.tracking.token_positions import Moved
from vlattn_fast.ops._sinks import share_of_keys
from vlattn_fast.ops.attention_map import attention_map
from vlattn_fast.ops.core_scores import core_logits, core_lse, core_map, core_step
from vlattn_fast.ops.relevancy_attention import relevancy_attention
from vlattn_fast.ops.relevancy_step import relevancy_step
from vlattn_fast.ops.score_attention import lse_of
from vlattn_fast.scores import Core, softcapped


class Recursion(NamedTuple):
    """carried <- carried * a + (carried * b) Abar through one attention call, as `relevancy_attention` takes it."""

    rule: str  # Abar is mean_h relu(A * dA) ("gradient") or mean_h A ("attention")
    row_normalize: bool = False  # each row of Abar is divided by its sum
    residual_weight: float = 1.0  # a
    attention_weight: float = 1.0  # b

    @property
    def parallel(self) -> tuple[float, float]:
        """The weights of the row after one of two mixers over the same tokens, and of r Abar' of the other one: the sum is
        r + r (Abar + Abar'), by rollout (r + r A + r A') / 3."""
        return (2 / 3, 1 / 3) if 0 < self.residual_weight < 1 else (1.0, self.attention_weight)


@dataclass(frozen=True, eq=False)
class TracedCall:
    """One attention call of a model.

    Attributes:
        is_mixing: it has no softmax, so queries and keys are the same tokens, and all of them; see `mixing_call`.
    """

    is_mixing: ClassVar[bool] = False

    path: str  # of the module that calls
    query: Tensor  # (B, H, N, D), as the operators take it; keys and values of grouped-query attention have fewer heads
    key: Tensor
    value: Tensor
    # The options of the call. A sink is (H,), and an argument of the operators; or that of a score, broadcastable to (B, H, N).
    masks: dict[str, Any]
    score: str = "dot"  # the core score (see vlattn_fast.scores), with its vector and parameter
    vector: Tensor | None = None
    parameter: float = 0.0
    ran: Tensor | None = None  # the output (B, H, N, Dv) of a call that ran already
    by_hand: bool = False  # a module wrote it out, as a softmax and its product with values
    lse: Tensor | None = None  # the log-sum-exp (B, H, N) without the sink, if it is known
    mesh: Any = None  # the processes that share its heads; None = all heads are here
    calls: int = 0  # the calls that its queries came through, as bits
    key_calls: int = 0  # and its keys
    number: int = -1  # among all calls of the run
    layer: int = 0  # its number in the tower, from 0: that of the block that calls
    parallel: bool = False  # it takes the same tokens as the last call, and the model adds the outputs of both
    chunk: bool = False  # it takes a further part of the sequence in the module of the last call
    output: Any = None  # (B, H, N, Dv), the output with which the model continued, of a call that is cached for the backward pass
    token_positions: Moved | None = None  # the positions of its tokens, unless they are all of its tower's, in order
    dropout_p: float = 0.0  # of the probabilities; its relevancy is that without dropout
    columns: Tensor | None = None  # int64, the columns of the tokens among the M keys; None = all keys are tokens
    left_out: Tensor | None = None  # bool (B, M), True = a key whose column of Abar is zero, see `_without_left_out`

    @property
    def part(self) -> str:
        """Why the call only has a part of the maps, the end of "models in which ..."; "" = it has all."""
        return "a module attends in chunks" if self.chunk else "" if self.mesh is None else "processes share the heads"

    @property
    def tokens(self) -> int:
        """How many of the keys are tokens."""
        return self.key.shape[2] if self.columns is None else len(self.columns)

    def at_tokens(self, rows: Tensor) -> Tensor:
        """(..., M) without the columns of keys that are not tokens."""
        return rows if self.columns is None else rows.index_select(-1, self.columns.to(rows.device))

    def over_keys(self, values: Tensor, others: float) -> Tensor:
        """Values (B, N) of the tokens for all keys (B, M), with one value for the `others`."""
        if self.columns is None:
            return values
        every = values.new_full((len(values), self.key.shape[2]), others)
        return every.index_copy(1, self.columns.to(every.device), values)

    def computed(self) -> Tensor:
        """(B, H, N, Dv), as the model asked for it."""
        if self.ran is not None:
            return self.ran
        dropout = {"dropout_p": self.dropout_p} if self.dropout_p else {}
        return attention(self.query, self.key, self.value, {**self.masks, **dropout})

    def logits(self, query: Tensor) -> Tensor:
        """The scores (B, H, R, M) of some queries (B, H, R, D) with all keys, before the masks."""
        kind, parameter, scale = self.score, self.parameter, self._scale()
        if (softcap := self.masks.get("softcap")) is not None:
            kind, parameter, scale = softcapped(scale, softcap)
        return core_logits(Core(kind, query, self.key, self.vector, parameter), scale)

    def sink(self) -> Tensor | None:
        """One more logit of each row, before the softmax: broadcastable to (B, H, N)."""
        sink: Tensor | None = self.masks.get("sink")
        return sink[:, None] if sink is not None and sink.ndim == 1 else sink

    def through(self, carrier: Tensor, recursion: Recursion) -> tuple[Tensor, Tensor]:
        """The output and the carrier (B, 2 T, N), see `Carriers`: cotangents r and s become r * a + (r * b) Abar and
        s * a + (r * b) Abar."""
        query, key, value, masks = self.query, self.key, self.value, self.masks
        mask = masks["attn_mask"]
        # The operator gives a mask no gradient, and takes as many keys as queries.
        has_rest = self.columns is not None or self.left_out is not None
        if self.ran is not None or has_rest or (mask is not None and mask.requires_grad):
            return Through.apply(self.computed(), carrier, carrier, self, recursion)
        with torch.no_grad():
            a, b = self.weights(recursion)
        both, kept = carrier.unflatten(1, (2, -1)).sum(1), weighted(carrier, a)
        if self.mesh is not None:
            (query, key, value), masks, both, b = on_mesh(self.mesh, (query, key, value), masks, both, b)
        options = recursion._replace(residual_weight=0.0, attention_weight=b)._asdict()
        output, step = relevancy_attention(query, key, value, both, **options, **masks)
        if self.mesh is not None:
            output, step = local(output), local(step)
        return output, kept + nn.functional.pad(step, (0, 0, 0, step.shape[1]))

    def weights(self, recursion: Recursion) -> tuple[Any, Any]:
        """a and b of the recursion. Rollout divides I + mean_h A by its row sum, which is not 2 if a sink takes a part."""
        a, b = recursion.residual_weight, recursion.attention_weight
        if recursion.rule == "gradient" or not a or (self.sink() is None and self.left_out is None):
            return a, b
        return (self.over_row_sum(),) * 2

    def over_row_sum(self) -> Any:
        """1 / sum_j (I + Abar)_ij with Abar of rule "attention", (B, N): a half if all of a row goes to keys."""
        if self.left_out is not None:
            every, rest = self._row_sums()
            return 1 / (1 + every.masked_fill(rest == 0, 0.0))
        if (sink := self.sink()) is None:
            return 0.5
        return 1 / (1 + mean_over(self.mesh, share_of_keys(self._lse(), sink).mean(1)))

    def _lse(self, **masks: Any) -> Tensor:
        """The log-sum-exp (B, H, N) of the keys' logits, with some masks of the call replaced."""
        options = {name: value for name, value in {**self._options(), **masks}.items() if name != "sink"}
        if self.ran is not None:
            return core_lse(Core(self.score, self.query, self.key, self.vector, self.parameter), **options)
        return lse_of(self.query, self.key, **{**options, "scale": self._scale()})

    # --- keys that are left out ---

    def _row_sums(self) -> tuple[Tensor, Tensor]:
        """sum_j mean_h A_ij over all keys, and over those that are not left out: (B, N) each."""
        assert self.left_out is not None
        keys, lse, sink = self.masks.get("key_mask"), self._lse(), self.sink()
        rest = self._lse(key_mask=~self.left_out if keys is None else keys & ~self.left_out)
        shares = (lse > -torch.inf).to(lse) if sink is None else share_of_keys(lse, sink)
        rest_shares = (rest - lse).exp().masked_fill(rest == -torch.inf, 0.0)
        return shares.mean(1), (shares * rest_shares).mean(1)

    def scaled_to_rest(self, rows: Tensor) -> Tensor:
        """Weights (B, T, N) of rows of mean_h A, times f of `_without_left_out`."""
        if self.left_out is None:
            return rows
        every, rest = self._row_sums()
        return rows * (every / rest).masked_fill(rest == 0, 0.0)[:, None].to(rows)

    def rest_of_columns(self, rows: Tensor) -> Tensor:
        """(B, ..., M) with zeros at the keys that are left out."""
        if self.left_out is None:
            return rows
        return rows.masked_fill(self.left_out.view(len(rows), *(1,) * (rows.ndim - 2), -1), 0.0)

    def _without_left_out(self, relevancy: Tensor, grad_output: Tensor | None, recursion: Recursion) -> Tensor:
        """relevancy @ Abar whose columns s_j = 1 are left out:

            Abar_ij = mean_h relu(A * dA)_ij (1 - s_j)         rule "gradient"; a row is divided by its sum, if at all, afterwards
            Abar_ij = f_i mean_h A_ij (1 - s_j)                rule "attention"
            f_i = sum_k mean_h A_ik / sum_k mean_h A_ik (1 - s_k), 0 if nothing is left

        dA = dO V^T, so values of zero make columns of zeros. f takes two passes of the log-sum-exp, and no map.
        """
        if recursion.rule == "gradient":
            return self._without_values()._step(relevancy, grad_output, recursion)
        scaled = self.scaled_to_rest(relevancy)
        return self.rest_of_columns(replace(self, left_out=None)._step(scaled, None, recursion))

    def _without_values(self) -> TracedCall:
        """The call whose keys that are left out have values of zero instead."""
        assert self.left_out is not None
        return replace(self, value=self.value.masked_fill(self.left_out[:, None, :, None], 0.0), left_out=None)

    # --- maps ---

    def mean_map(self, grad_output: Tensor) -> Tensor:
        """Abar = mean_h relu(A * dA), (B, N, M), for all keys."""
        if self.left_out is not None:
            return self._without_values().mean_map(grad_output)
        if (core := self._core()) is None:
            tensors, options = on_mesh(self.mesh, (self.query, self.key, self.value, grad_output), self._options())
            return local(attention_map(*tensors, rule="gradient", **options))
        return mean_over(self.mesh, core_map(core, self.value, grad_output, rule="gradient", lse=self.lse, **self._options()))

    def step(self, relevancy: Tensor, grad_output: Tensor | None, recursion: Recursion) -> Tensor:
        """relevancy @ Abar, (B, T, N) -> (B, T, M), for the keys that are tokens. Sums of rows go over all keys."""
        return self.at_tokens(self._step(relevancy, grad_output, recursion))

    def added(self, relevancy: Tensor, grad_output: Tensor | None, recursion: Recursion, at: Moved | None = None) -> Tensor:
        """The last term of r <- a r + (b r) Abar, for b r; zeros if the score does not depend on the call. Flat vectors with the
        positions `at` of its tokens."""
        rows = relevancy if at is None else at.pick(relevancy, at.queries)
        if grad_output is None and recursion.rule == "gradient":
            step = rows.new_zeros(*rows.shape[:2], self.tokens)
        else:
            grad = None if grad_output is None else grad_output.to(self.value.dtype)
            step = self.step(rows.to(self.query.device, compute_dtype(self.query)), grad, recursion).to(relevancy)
        return step if at is None else at.spread(step, at.keys)

    def share_of_others(self) -> Tensor:
        """The share of the attention that keys take which are not tokens, a mean over the batch, heads and queries."""
        with torch.no_grad():
            every = torch.full_like(self.query[:, 0, None, :, 0], 1 / self.query.shape[2])
            taken = self._step(every, None, Recursion("attention"))
            return (taken.sum() - self.at_tokens(taken).sum()) / len(taken)

    def _step(self, relevancy: Tensor, grad_output: Tensor | None, recursion: Recursion) -> Tensor:
        """relevancy @ Abar for all keys."""
        if self.left_out is not None:
            return self._without_left_out(relevancy, grad_output, recursion)
        rule, row_normalize = recursion.rule, recursion.row_normalize
        if (core := self._core()) is None:
            tensors = self.query, self.key, self.value, grad_output
            placed, options, relevancy = on_mesh(self.mesh, tensors, self._options(), relevancy)
            return local(relevancy_step(relevancy, *placed, rule=rule, row_normalize=row_normalize, **options))
        if self.mesh is not None and row_normalize:
            raise ValueError(f"method must not normalize rows if processes share heads with {core.kind} scores; got 'weighted'")
        options = {"rule": rule, "row_normalize": row_normalize, "lse": self.lse, **self._options()}
        return mean_over(self.mesh, core_step(relevancy, core, self.value, grad_output, **options))

    # --- for the backward pass ---

    def detached(self) -> TracedCall:
        return replace(self, query=self.query.detach(), key=self.key.detach(), value=self.value.detach())

    def apart(self) -> tuple[tuple[Tensor | None, ...], Callable[..., TracedCall]]:
        """The tensors that relevancy needs, which autograd keeps, and the call that is made of them again."""

        def together(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> TracedCall:
            return replace(rest, query=query, key=key, value=value, masks={**rest.masks, "attn_mask": mask})

        nothing, masks = self.query.new_empty(0), {**self.masks, "attn_mask": None}
        rest = replace(self, query=nothing, key=nothing, value=nothing, masks=masks)
        return (self.query, self.key, self.value, self.masks["attn_mask"]), together

    def for_training(self, higher_order: bool) -> TracedCall:
        """The call from which its map is computed again while the model trains: dA = dO V^T is a constant, unless
        `higher_order`."""
        query, key, value = self.query, self.key, self.value
        if len({query.dtype, key.dtype, value.dtype}) > 1:  # autocast casts them within the attention
            query, key, value = (x.to(self.output.dtype) for x in (query, key, value))
        return replace(self, query=query, key=key, value=value if higher_order else value.detach())

    # --- scores ---

    def _scale(self) -> float:
        scale: float | None = self.masks["scale"]
        return self.query.shape[-1] ** -0.5 if scale is None else scale

    def _core(self) -> Core | None:
        """The core score; None = a dot product, as the operators take it."""
        sink: Tensor | None = self.masks.get("sink")
        if self.score == "dot" and (sink is None or sink.ndim == 1):
            return None
        return Core(self.score, self.query, self.key, self.vector, self.parameter)

    def _options(self) -> dict[str, Any]:
        """The options of the call as the operators take them, without gradients of what is added to the scores."""
        added = {name: self.masks.get(name) for name in ("attn_mask", "group_bias")}
        return {**self.masks, **{name: None if x is None else x.detach() for name, x in added.items()}}


def as_factor(weight: Any, rows: Tensor) -> Any:
    """a or b, a number or (B, N), as a factor of relevancy vectors (B, T, N)."""
    return weight[:, None].to(rows) if isinstance(weight, Tensor) else weight


def weighted(rows: Tensor, weight: Any, at: Moved | None = None, places: Tensor | None = None) -> Tensor:
    """Relevancy vectors (B, T, N) times a or b, a number or (B, N); flat ones with the positions `at` of a call are so at those
    of its queries, or at `places`."""
    if at is not None:
        return at.scaled(rows, weight, places)
    return rows * as_factor(weight, rows)


class Through(torch.autograd.Function):
    """The identity on the output of an attention call that ran. Its backward pass turns the relevancy of the queries into that of
    the keys, whose carrier is `before`, and leaves a part where it is, in the carrier `now` of the queries; None = they are
    no tokens. The carriers are flat if the call has its tokens at other positions."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, before: Tensor, now: Tensor | None, call: TracedCall, recursion: Recursion
    ) -> tuple[Tensor, Tensor]:
        tensors, ctx.together = call.apart()
        ctx.save_for_backward(*tensors)
        ctx.recursion, ctx.sizes = recursion, (before.shape[2], None if now is None else now.shape[2])
        at = call.token_positions
        shape = *before.shape[:2], call.query.shape[2] if now is None or at is None else at.count
        # A copy, since the model may write into it.
        return output.clone(), before.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, relevancy: Tensor) -> tuple[Tensor | None, ...]:
        call: TracedCall = ctx.together(*ctx.saved_tensors)
        recursion: Recursion = ctx.recursion
        (a, b), (keys, queries) = call.weights(recursion), ctx.sizes
        at = None if queries is None else call.token_positions
        grad_output = grad if recursion.rule == "gradient" else None
        added = call.added(weighted(relevancy.chunk(2, 1)[0], b, at), grad_output, recursion, at).repeat(1, 2, 1)
        kept = None if queries is None else weighted(relevancy, a, at)[..., :queries]
        return grad, added[..., :keys], kept, None, None
