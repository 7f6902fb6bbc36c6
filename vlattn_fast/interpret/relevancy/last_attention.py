"""Methods that read the last attention alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from vlattn_fast.attach.session import in_layers, split_path
from vlattn_fast.interpret.records.record import Tower
from vlattn_fast.interpret.relevancy.attention_call import AttentionCall
from vlattn_fast.interpret.relevancy.method import BackwardPass, Method
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.two_modalities import last_between, rows_between

Real = Callable[[], tuple[Tensor | None, Tensor | None]]


class LastAttentionMethod(Method):
    """A method that reads the last attention of a tower to itself, and to each tower that it attends to."""

    kept: dict[TowerTrace, AttentionCall]  # the last attention of each tower to itself

    def read(self, start: Tensor, call: AttentionCall, grad: Tensor | None, real: Real) -> Tensor:
        """The row (B, 1, M) of an attention call.

        Args:
            start: (B, 1, N), the weights of the rows that are read, on the call's device.
            grad: (B, H, N, D), the gradient of the score at the call's output; None = the score does not depend on it, or
                the method takes no gradient.
            real: says which queries (B, N) and which keys (B, M) are real; None = all.
        """
        raise NotImplementedError

    def check_between(self, start_layer: int, records: Sequence[Tower | None]) -> None:
        """It reads the last attention, wherever `explain` starts."""

    def attend(self, tower: TowerTrace, call: AttentionCall) -> Tensor:
        output = call.computed()
        if tower.pooling_path is not None or not _is_last(tower, call.path):
            return output
        return self._leaf(tower, call, output)

    def pool(self, tower: TowerTrace, call: AttentionCall) -> Tensor:
        return self._leaf(tower, call, call.computed())

    def _leaf(self, tower: TowerTrace, call: AttentionCall, output: Tensor) -> Tensor:
        """`output`, where the graph starts: only the gradient at it is used, unless those of several calls are."""
        output = (output if tower.keeps else output.detach()).requires_grad_()
        query, key, value = call.query.detach(), call.key.detach(), call.value.detach()
        self.kept[tower] = replace(call, query=query, key=key, value=value, output=output)
        tower.enters_gradient(output)
        return output

    def edges(self, tower: TowerTrace, start_layer: int) -> list[GradientEdge]:
        return tower.edges(-1)

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        _check_whole(backward, self.name)
        for tower in backward.towers:
            if tower not in self.kept:
                raise ValueError(f"model must call the last attention of tower '{tower.name}'; got no call")
        last = [self.kept[tower] for tower in backward.towers]
        grads = self._gradients(backward, last)
        ends = zip(backward.towers, backward.starts, last, grads, strict=True)
        return [self._read(backward, tower, tower, start, call, grad) for tower, start, call, grad in ends]

    def between(self, backward: BackwardPass) -> list[Tensor]:
        _check_whole(backward, self.name)
        calls = backward.reaching_calls()
        attended = [call.attention for call in calls]
        grads = self._gradients(backward, attended)

        def read(tower: TowerTrace, source: TowerTrace, start: Tensor) -> Tensor:
            last = last_between(calls, tower, source)
            return self._read(backward, tower, source, start, attended[last], grads[last]).to(start)

        return rows_between(backward, read)

    def _gradients(self, backward: BackwardPass, calls: Sequence[AttentionCall]) -> Sequence[Tensor | None]:
        return backward.gradients([call.output for call in calls]) if self.needs_score else [None] * len(calls)

    @torch.no_grad()
    def _read(
        self,
        backward: BackwardPass,
        tower: TowerTrace,
        source: TowerTrace,
        start: Tensor,
        call: AttentionCall,
        grad: Tensor | None,
    ) -> Tensor:
        device = call.query.device

        def real() -> tuple[Tensor | None, Tensor | None]:
            keys = backward.real(source)
            queries = None if tower.pooled else backward.real(tower)
            return (None if queries is None else queries.to(device)), (None if keys is None else keys.to(device))

        return self.read(start.to(device), call, grad, real)


def _check_whole(backward: BackwardPass, name: str) -> None:
    """ValueError for attention in chunks: the last call has a part of the sequence alone."""
    for tower in [*backward.towers, *backward.attended]:
        if tower.chunked and not tower.pooled:
            raise ValueError(
                "method must be one that carries relevancy through the layers where a module attends in chunks; got "
                f"{name!r} and '{tower.path}'"
            )


def _is_last(tower: TowerTrace, path: str) -> bool:
    """Whether the attention at `path` is in the last layer of its list."""
    layers, index = split_path(path)
    return not in_layers(path) or index == len(list(tower.model.get_submodule(layers).children())) - 1


def times_map(start: Tensor, call: AttentionCall, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """start (B, 1, N) @ combine(A), where combine takes some rows of A (B, H, R, M) to (B, R, M).

    Only rows with a weight are computed.
    """
    result = torch.zeros(start.shape[0], 1, call.key.shape[2], dtype=start.dtype, device=start.device)
    for index in _rows_to_read(start):
        result += start.gather(2, index.unsqueeze(1)) @ combine(_attention_rows(call, index))
    return result


def _rows_to_read(start: Tensor, chunk: int = 128) -> list[Tensor]:
    """Query indices (B, R) of every non-zero entry of start (B, 1, N): one row where each sample has one, else chunks."""
    batch, _, count = start.shape
    if count == 0 or batch == 0:
        return []
    if bool(((start != 0).sum(-1) <= 1).all()):
        return [start.abs().argmax(-1)]
    return [part.expand(batch, -1) for part in torch.arange(count, device=start.device).split(chunk)]


def _attention_rows(call: AttentionCall, index: Tensor) -> Tensor:
    """Rows `index` (B, R) of the attention probabilities: (B, H, R, M); fully masked rows are zero."""
    (batch, heads, size, dim), count, masks = call.query.shape, call.key.shape[2], call.masks
    scores = call.logits(call.query.gather(2, index[:, None, :, None].expand(-1, heads, -1, dim)))
    mask = masks["attn_mask"]
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]  # torch takes (N, M) and (H, N, M) as well
        mask = mask.expand(batch, mask.shape[1], size, count)
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, count))
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if masks.get("key_mask") is not None:
        scores = scores.masked_fill(~masks["key_mask"][:, None, None], -torch.inf)
    if masks["is_causal"]:
        later = torch.arange(count, device=index.device) > index[:, None, :, None]
        scores = scores.masked_fill(later, -torch.inf)
    fully_masked = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(fully_masked, 0.0)
