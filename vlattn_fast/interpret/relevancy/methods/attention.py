"""Method "attention": the explained token's row of mean_h A in the last layer, without a gradient."""

from __future__ import annotations

from torch import Tensor

from vlattn_fast.attach.tensor_parallel import mean_over
from vlattn_fast.interpret.relevancy.last_attention import LastAttentionMethod, Real, times_map
from vlattn_fast.interpret.relevancy.method import check_sinks
from vlattn_fast.interpret.relevancy.mixing_call import MixingCall
from vlattn_fast.interpret.relevancy.sink_detection import KEEP
from vlattn_fast.interpret.relevancy.traced_call import Recursion, TracedCall


class Attention(LastAttentionMethod):
    """Takes the explained token's row of mean_h A in the last layer. No gradient.

    It costs one forward pass. If towers attend to one another, it takes the last attention of the explained tower to itself and
    to each other tower.

    Examples:
        >>> import vlattn_fast as va
        >>> va.methods.Attention(sinks="remove")  # pass it as va.explain(..., method=...)
        <method attention(sinks=remove)>
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

    def vector(self, start: Tensor, call: TracedCall, grad: Tensor | None, real: Real) -> Tensor:
        if isinstance(call, MixingCall):
            return call.step(start, None, Recursion("attention"))
        return times_map(start, call, lambda attention: mean_over(call.mesh, attention.mean(1)))
