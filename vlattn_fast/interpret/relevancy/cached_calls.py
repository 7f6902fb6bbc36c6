"""Methods that use rows of every layer's map after the one backward pass: the calls are cached, and no map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer
from vlattn_fast._ground.tensors import expand_heads
from vlattn_fast.interpret.relevancy.last_attention import attention_rows, weighted_queries
from vlattn_fast.interpret.relevancy.method import BackwardPass, Method
from vlattn_fast.interpret.relevancy.mixing_call import MixingCall
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall
from vlattn_fast.interpret.relevancy.two_modalities import vectors_between


class CachedCalls(Method):
    """A method that caches the self-attention calls of each tower, and that of its pooling head. A subclass defines `combine` or
    `carry`."""

    def __init__(self, *, start_layer: int = 0, freeze: Sequence[str] | None = None, of: str | None = None) -> None:
        """
        Args:
            start_layer: see `Gradient`.
            freeze, of: see `Method`.

        Raises:
            TypeError, ValueError: an option has a wrong type or value.
        """
        check_integer("start_layer", start_layer)
        self.start_layer = start_layer
        super().__init__(freeze=freeze, of=of)

    def attend(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        self._check(call)
        output = self.watched(tower, call.computed())
        tower.cached.append(replace(call.detached(), output=output))
        return output

    def pool(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        self._check(call)
        output = self.watched(tower, call.computed())
        tower.pool = replace(call.detached(), output=output)
        return output

    def cross(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        self._check(call)
        return super().cross(tower, call)

    def _check(self, call: TracedCall) -> None:
        """ValueError if a call only has a part of the maps."""
        if call.part:
            raise ValueError(f"{self.asked} does not support models in which {call.part}; got attention '{call.path}'")

    @property
    def asked(self) -> str:
        """What the caller asks for, as an error shows it."""
        return f"method={self.name!r}"

    def gradients(self, backward: BackwardPass, calls: Sequence[TracedCall]) -> list[Tensor | None]:
        """The gradient at the output of each call; None without one."""
        outputs = [call.output for call in calls if call.output is not None]
        return backward.gradients(outputs) if self.needs_score else [None] * len(outputs)

    # --- rows ---

    def combine(self, rows: Sequence[Tensor]) -> Tensor:
        """The row (B, M) of a tower, from the rows (B, H, M) of its layers' maps: relu(A * dA) of a method that takes gradients,
        else A."""
        raise NotImplementedError(f"{type(self).__name__} must define `combine`, or what calls it: `carry` and `between`")

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        blocks = [[[call] for call in self.from_layer(tower)] for tower in backward.towers]
        return [self.combine(rows)[:, None] for rows in self.rows_of_towers(backward, blocks)]

    def between(self, backward: BackwardPass) -> list[Tensor]:
        """The rows of every call from a tower to itself, or to one that it attends to, count for the second."""
        calls = backward.reaching_calls()
        grads = self.gradients(backward, [call.attention for call in calls])

        def vector(tower: TowerTrace, source: TowerTrace, start: Tensor) -> Tensor:
            rows = [
                self.rows_of_call(call.attention, start, grad).to(start)
                for call, grad in zip(calls, grads, strict=True)
                if call.tower is tower and call.source is source
            ]
            return self.combine(rows)[:, None] if rows else start.new_zeros(*start.shape[:2], source.size)

        return vectors_between(backward, vector)

    def rows_of_towers(self, backward: BackwardPass, blocks: Sequence[Sequence[Sequence[TracedCall]]]) -> list[list[Tensor]]:
        """The explained token's rows (B, H, M) of the maps of `blocks`, of one call each or of several, for each of
        `backward.towers`. For a pooling head they are first multiplied by the head's own map."""
        pools = [[] if tower.pool is None else [tower.pool] for tower in backward.towers]
        in_order = [
            call for tower_blocks, pool in zip(blocks, pools, strict=True) for block in (*tower_blocks, pool) for call in block
        ]
        grads = iter(self.gradients(backward, in_order))
        by_tower = []
        for tower, start, tower_blocks, pool in zip(backward.towers, backward.starts, blocks, pools, strict=True):
            block_grads = [[(call, next(grads)) for call in block] for block in tower_blocks]
            for call in pool:
                start = self._in_positions(tower, call, start, next(grads)).mean(1, keepdim=True)
            by_tower.append([self._of_block(tower, block, start) for block in block_grads])
        return by_tower

    def _of_block(self, tower: TowerTrace, block: Sequence[tuple[TracedCall, Tensor | None]], start: Tensor) -> Tensor:
        """The rows (B, H, M) of the one call of a block. For several calls, one after the other, the relevancy vector (B, 1, M)
        of what they add to the residual stream: start @ ((I + A_2) (I + A_1) - I), with the mean over the heads of each."""
        if len(block) == 1:
            ((call, grad),) = block
            return self._in_positions(tower, call, start, grad).to(start)
        row, contribution = start, torch.zeros_like(start)  # summed by itself: a small one has no digits beside `start`
        for call, grad in reversed(block):
            step = self._in_positions(tower, call, row, grad).mean(1, keepdim=True).to(start)
            row, contribution = row + step, contribution + step
        return contribution

    def rows_of_call(self, call: TracedCall, start: Tensor, grad: Tensor | None) -> Tensor:
        """The rows (B, H, M) of a call's maps over its tokens, from the weights `start` (B, 1, N)."""
        start = start.to(call.query.device)
        if isinstance(call, MixingCall):
            if self.needs_score and grad is None:
                return start.new_zeros(start.shape[0], call.value.shape[1], call.tokens)
            return call.rows_of_heads(start, grad)
        start = start if self.needs_score else call.scaled_to_rest(start)
        rows = start.new_zeros(start.shape[0], call.query.shape[1], call.key.shape[2])
        for index, maps, slopes in rows_of_maps(call, grad, start, self.needs_score):
            maps = maps if slopes is None else (maps * slopes).relu()
            rows += torch.einsum("br,bhrm->bhm", start[:, 0].gather(1, index), maps)
        return call.at_tokens(call.rest_of_columns(rows))

    def from_layer(self, tower: TowerTrace) -> list[TracedCall]:
        """The calls of layer `start_layer` (-1 = the last) and later ones."""
        first = tower.first_layer(self.start_layer)
        return [call for call in tower.cached if call.layer >= first]

    def _in_positions(self, tower: TowerTrace, call: TracedCall, start: Tensor, grad: Tensor | None) -> Tensor:
        """`rows_of_call`; if the tower's tokens move, from flat weights to flat vectors (1, H, positions)."""
        if not tower.positions.reorders:
            return self.rows_of_call(call, start, grad)
        at = tower.positions.call(call.token_positions)
        part = start if call is tower.pool else at.pick(start, at.queries)
        return at.spread(self.rows_of_call(call, part, grad), at.keys)


@torch.no_grad()
def rows_of_maps(
    call: TracedCall, grad: Tensor | None, start: Tensor, needs_grad: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The queries (B, R) that have a weight in `start` (B, 1, N), a few at a time, and their rows (B, H, R, M) of A and of
    dA = dO V^T, in the dtype of `start`; None for dA without gradients. Nothing if the score does not depend on the call."""
    if needs_grad and grad is None:
        return
    heads, dtype = call.query.shape[1], start.dtype
    key, value = (expand_heads(tensor.to(dtype), heads) for tensor in (call.key, call.value))
    call = replace(call, query=call.query.to(dtype), key=key)
    for index in weighted_queries(start):
        if grad is None:
            yield index, attention_rows(call, index), None
        else:
            picked = grad.to(dtype).gather(2, index[:, None, :, None].expand(-1, heads, -1, grad.shape[3]))
            yield index, attention_rows(call, index), picked @ value.mT
