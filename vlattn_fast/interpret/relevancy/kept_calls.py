"""Methods that read rows of every layer's map after the one backward pass: the calls are kept, and no map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import expand_heads
from vlattn_fast.interpret.relevancy.last_attention import attention_rows, rows_to_read
from vlattn_fast.interpret.relevancy.method import BackwardPass, Method
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall


class KeptCalls(Method):
    """A method that keeps the calls of each tower to itself, and that of its pooling head."""

    kept: dict[TowerTrace, list[TracedCall]]
    pools: dict[TowerTrace, TracedCall]

    def attend(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        if call.chunk or call.mesh is not None:
            why = "a module attends in chunks" if call.chunk else "processes share the heads"
            raise ValueError(f"{self.asked} must be left out where {why}; got attention '{call.path}'")
        output = self.watched(tower, call.computed())
        self.kept.setdefault(tower, []).append(_detached(call, output))
        return output

    def pool(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        if call.mesh is not None:
            raise ValueError(f"{self.asked} must be left out where processes share the heads; got attention '{call.path}'")
        output = self.watched(tower, call.computed())
        self.pools = {**getattr(self, "pools", {}), tower: _detached(call, output)}
        return output

    @property
    def asked(self) -> str:
        """The argument of `explain` that asks for the method, as an error shows it."""
        return f"method={self.name!r}"

    def gradients(self, backward: BackwardPass, calls: Sequence[TracedCall]) -> list[Tensor | None]:
        """The gradient at the output of each call; None without one."""
        outputs = [call.output for call in calls if call.output is not None]
        return backward.gradients(outputs) if self.needs_score else [None] * len(outputs)


@torch.no_grad()
def rows_of_maps(
    call: TracedCall, grad: Tensor | None, start: Tensor, needs_grad: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The queries (B, R) that have a weight in `start` (B, 1, N), a few at a time, and their rows (B, H, R, M) of A and of
    dA = dO V^T, in the dtype of `start`; None for dA without gradients. Nothing where the score does not depend on the call."""
    if needs_grad and grad is None:
        return
    heads, dtype = call.query.shape[1], start.dtype
    key, value = (expand_heads(tensor.to(dtype), heads) for tensor in (call.key, call.value))
    call = replace(call, query=call.query.to(dtype), key=key)
    for index in rows_to_read(start):
        if grad is None:
            yield index, attention_rows(call, index), None
        else:
            picked = grad.to(dtype).gather(2, index[:, None, :, None].expand(-1, heads, -1, grad.shape[3]))
            yield index, attention_rows(call, index), picked @ value.mT


def _detached(call: TracedCall, output: Tensor) -> TracedCall:
    return replace(call, query=call.query.detach(), key=call.key.detach(), value=call.value.detach(), output=output)
