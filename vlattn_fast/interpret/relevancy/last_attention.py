"""Methods that only use the last attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from vlattn_fast._ground.groups import columns_of_groups
from vlattn_fast._ground.tensors import compute_dtype, expand_heads, masked_logits
from vlattn_fast.attach.session import in_layers, split_path
from vlattn_fast.interpret.relevancy.method import BackwardPass, Method
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall
from vlattn_fast.interpret.relevancy.two_modalities import last_between, vectors_between

Keys = tuple[TowerTrace, TracedCall]  # the tower whose tokens keys of a call are, with the call's columns
Real = Callable[[], tuple[Tensor | None, Tensor | None]]


class LastAttentionMethod(Method):
    """A method that uses the last attention of a tower to itself, and to each tower that it attends to."""

    def vector(self, start: Tensor, call: TracedCall, grad: Tensor | None, real: Real) -> Tensor:
        """The relevancy vector (B, 1, M) of a call, from the weights `start` (B, 1, N) of the explained positions, and the
        score's gradient at the call's output (B, H, N, D), None without one. `real` gives the real queries (B, N) and the
        real keys (B, M); None = all."""
        raise NotImplementedError

    def attend(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        output, (layers, index) = call.computed(), split_path(call.path)
        last = not in_layers(call.path) or index == len(tower.model.get_submodule(layers)._modules) - 1
        last = last or bool(tower.cached)  # layers may run again
        if last and tower.pooling_path is None:
            return self._leaf(tower, call, output)
        return output if self.needs_score else self._cut(tower, output)

    def pool(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        return self._leaf(tower, call, call.computed())

    def _leaf(self, tower: TowerTrace, call: TracedCall, output: Tensor) -> Tensor:
        """`output`, where the graph starts, unless the gradients of several calls are used."""
        output = (output if tower.keeps else output.detach()).requires_grad_()
        tower.cached = [replace(call.detached(), output=output)]
        tower.enters_gradient(output)
        return output

    def edges(self, tower: TowerTrace) -> list[GradientEdge]:
        return tower.edges(-1)

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        for tower in backward.towers:
            if not tower.cached:
                raise ValueError(f"model must call the last attention of tower '{tower.name}'; got no call")
        last = [tower.cached[0] for tower in backward.towers]
        ends = zip(backward.towers, backward.starts, last, self._gradients(backward, last), strict=True)
        return [self._vector(backward, tower, [(tower, call)], start, grad) for tower, start, call, grad in ends]

    def between(self, backward: BackwardPass) -> list[Tensor]:
        calls = backward.reaching_calls()
        attended = [call.attention for call in calls]
        grads = self._gradients(backward, attended)

        def vector(tower: TowerTrace, source: TowerTrace, start: Tensor) -> Tensor:
            last = last_between(calls, tower, source)
            # The tokens of the tower and of others may be keys of one call; those of the source come first here.
            other_parts = [call for call in calls if call.number == calls[last].number and call is not calls[last]]
            keys = [(call.source, call.attention) for call in (calls[last], *other_parts)]
            return self._vector(backward, tower, keys, start, grads[last]).to(start)

        return vectors_between(backward, vector)

    def _gradients(self, backward: BackwardPass, calls: Sequence[TracedCall]) -> Sequence[Tensor | None]:
        for tower in [*backward.towers, *backward.attended]:
            if tower.calls.chunked and not tower.pooled:  # the last call only has a part of the sequence
                raise ValueError(
                    "method must carry relevancy through the layers if a module attends in chunks; got "
                    f"{self.name!r} and '{tower.calls.path}'"
                )
        return backward.gradients([call.output for call in calls]) if self.needs_score else [None] * len(calls)

    @torch.no_grad()
    def _vector(
        self, backward: BackwardPass, tower: TowerTrace, keys: Sequence[Keys], start: Tensor, grad: Tensor | None
    ) -> Tensor:
        """The relevancy vector over the first of `keys`, those of one call."""
        (source, call), at = keys[0], None
        if tower.positions.reorders and tower is source:
            at = tower.positions.call(call.token_positions)

        def real() -> tuple[Tensor | None, Tensor | None]:
            queries, masks = None if tower.pooled else backward.real(tower), [backward.real(of) for of, _ in keys]
            if at is not None:
                queries, masks[0] = at.real(queries, masks[0], tower.positions.entered)
            every = None
            for mask, (_, columns) in zip(masks, keys, strict=True):
                if mask is not None:
                    seen_columns = columns.over_keys(mask.to(call.key.device), True)
                    every = seen_columns if every is None else every & seen_columns
            return queries, every

        start = start.to(call.query.device)
        if at is None:
            return self.vector(start, call, grad, real)
        part = start if tower.pooled else at.pick(start, at.queries)
        return at.spread(self.vector(part, call, grad, real), at.keys)


def times_map(start: Tensor, call: TracedCall, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """start (B, 1, N) @ combine(A) over the tokens; combine takes some rows of A (B, H, R, M), those with a weight, to
    (B, R, M)."""
    result = torch.zeros(start.shape[0], 1, call.key.shape[2], dtype=start.dtype, device=start.device)
    start = call.scaled_to_rest(start)
    for index in weighted_queries(start):
        result += start.gather(2, index.unsqueeze(1)) @ combine(attention_rows(call, index).to(start))
    return call.at_tokens(call.rest_of_columns(result))


def weighted_queries(start: Tensor) -> list[Tensor]:
    """Query indices (B, R) of every non-zero entry of start (B, 1, N): one row if each sample has one, else 128 at a time."""
    batch, _, count = start.shape
    if count == 0 or batch == 0:
        return []
    if bool(((start != 0).sum(-1) <= 1).all()):
        return [start.abs().argmax(-1)]
    return [part.expand(batch, -1) for part in torch.arange(count, device=start.device).split(128)]


def attention_rows(call: TracedCall, index: Tensor) -> Tensor:
    """Rows `index` (B, R) of the attention probabilities: (B, H, R, M); fully masked rows are zero."""
    dtype = compute_dtype(call.query)
    call = replace(call, query=call.query.to(dtype), key=expand_heads(call.key.to(dtype), call.query.shape[1]))
    (batch, heads, size, _), count, masks = call.query.shape, call.key.shape[2], call.masks

    def rows(values: Tensor) -> Tensor:  # of (B, H', N, *)
        return values.gather(2, index[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))

    scores, mask, bias = call.logits(rows(call.query)), masks["attn_mask"], masks.get("group_bias")
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]  # torch takes (N, M) and (H, N, M) as well
        mask = rows(mask.expand(batch, mask.shape[1], size, count))
    if bias is not None:  # of each query
        bias = columns_of_groups(rows(bias), masks["key_groups"])
    causal = index[:, None, :, None] if masks["is_causal"] else None
    logits = masked_logits(scores, mask, masks.get("key_mask"), causal, bias)
    if (sink := call.sink()) is not None:
        logits = torch.cat([logits, rows(sink.to(logits.dtype).expand(batch, heads, size)[..., None])], -1)
    fully_masked = torch.isneginf(logits).all(-1, keepdim=True)
    return logits.softmax(-1).masked_fill(fully_masked, 0.0)[..., :count].to(scores.dtype)
