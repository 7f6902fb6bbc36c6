"""Method "attention": the row of mean_h A in the last layer that is read. It takes no gradient."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from vlattn_fast._ground.tensors import expand_heads
from vlattn_fast.attach.tensor_parallel import mean_over
from vlattn_fast.interpret.relevancy.last_attention import LastAttentionMethod, Real, times_map
from vlattn_fast.interpret.relevancy.method import check_sinks
from vlattn_fast.interpret.relevancy.mixing_call import MixingCall
from vlattn_fast.interpret.relevancy.sink_detection import KEEP
from vlattn_fast.interpret.relevancy.traced_call import Recursion, TracedCall


class Attention(LastAttentionMethod):
    """The row of mean_h A in the last layer. It takes no gradient.

    Between towers it reads the last attention of t to itself and to i.
    """

    name = "attention"
    by_layer = True
    needs_score = False

    def __init__(self, *, sinks: str = KEEP) -> None:
        """
        Args:
            sinks: see `Gradient`.

        Raises:
            ValueError: `sinks` is neither "keep" nor "remove".
        """
        self.sinks = check_sinks(sinks)
        super().__init__()

    def read(self, start: Tensor, call: TracedCall, grad: Tensor | None, real: Real) -> Tensor:
        if isinstance(call, MixingCall):
            return call.step(start, None, Recursion("attention"))
        key = expand_heads(call.key.to(start.dtype), call.query.shape[1])
        call = replace(call, query=call.query.to(start.dtype), key=key)
        return times_map(start, call, lambda attention: mean_over(call.mesh, attention.mean(1)))
