"""The carrier that passes through the attention calls of one tower.

A carrier (B, 1, N) is handed from call to call. In the backward pass its cotangent is the relevancy that is carried back, from
the end of the tower, where it is the row that is read, to the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.interpret.relevancy.attention_call import AttentionCall
from vlattn_fast.interpret.relevancy.through_call import Through, relevancy_through


class Recursion(NamedTuple):
    """carried <- carried * a + (carried * b) Abar through one attention call, as `relevancy_attention` takes it.

    Args:
        rule: Abar is mean_h relu(A * dA) ("gradient") or mean_h A ("attention").
        row_normalize: each row of Abar is divided by its sum.
        residual_weight, attention_weight: a and b.
    """

    rule: str
    row_normalize: bool = False
    residual_weight: float = 1.0
    attention_weight: float = 1.0


class Carriers:
    """The carriers of one tower, in front of its layers and behind the last call."""

    def __init__(self) -> None:
        self.entering: list[list[Tensor]] = []  # in front of each layer; one tensor a chunk in front of the first
        self.behind: list[Tensor] = []  # behind the last call, one a chunk
        self._before: Tensor | None = None  # in front of the call that runs; None = the first
        self.dtype = torch.float32
        self.without_gradients: str | None = None  # the first module that called attention in a part that turns gradients off
        self.below: Callable[[Tensor], Tensor] | None = None  # what another tower brings into the first carrier, see connectors

    def through(self, call: AttentionCall, recursion: Recursion) -> Tensor:
        """The output (B, H, N, Dv) of a self-attention call, through which the carrier goes, too."""
        if not call.chunk:
            self._before = self.leaving() if self.behind else None
            self.behind = []
            if call.begins_layer or not self.entering:
                self.entering.append([] if self._before is None else [self._before])
        before = self._of_tokens(call.query)
        output, carrier = relevancy_through(
            call.query, call.key, call.value, before, call.masks, **recursion._asdict(), mesh=call.mesh
        )
        carrier = carrier.to(self.dtype)
        if not carrier.requires_grad and self.without_gradients is None:
            self.without_gradients = call.path
        self.behind.append(carrier)
        return output

    def into_probes(self, call: AttentionCall, output: Tensor, recursion: Recursion) -> Tensor:
        """`output` of a pooling head's call. The carrier is that of its queries, which are learnt: there is no residual term."""
        before = self.behind[-1].to(call.query.device, compute_dtype(call.query))
        options = call.masks, recursion.rule, recursion.row_normalize, 0.0, 1.0, call.mesh
        output, carrier = Through.apply(output, before, call.query, call.key, call.value, *options)
        self.behind = [carrier]
        return output

    def _of_tokens(self, query: Tensor) -> Tensor:
        """The carrier of the query's tokens, in front of the attention."""
        size = query.shape[2]
        if self._before is None:
            carrier = torch.zeros(query.shape[0], 1, size, dtype=self.dtype, device=query.device, requires_grad=True)
            self.entering[0].append(carrier)
            return carrier if self.below is None else carrier + self.below(carrier)
        carrier = self._before
        if carrier.shape[2] != size:
            carrier = carrier.narrow(2, sum(out.shape[2] for out in self.behind), size)
        return carrier.to(query.device, compute_dtype(query))  # layers of a model may have several devices and dtypes

    @property
    def before(self) -> Tensor:
        """The carrier in front of the last call."""
        return self.entering[0][0] if self._before is None else self._before

    def leaving(self) -> Tensor:
        """The carrier (B, 1, N) behind the last layer that ran."""
        return torch.cat(self.behind, 2) if len(self.behind) > 1 else self.behind[0]
