"""Method "gradcam": the row of relu(mean_h w_h A_h) in the last layer with w_h = mean_ij dA_h (Chefer et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import expand_heads
from vlattn_fast.attach.tensor_parallel import mean_over
from vlattn_fast.interpret.relevancy.last_attention import Keys, LastAttentionMethod, Real, times_map
from vlattn_fast.interpret.relevancy.method import NORMS, BackwardPass
from vlattn_fast.interpret.relevancy.mixing_call import check_softmax
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall


class GradCam(LastAttentionMethod):
    """Takes the explained token's row of relu(mean_h w_h A_h) in the last layer, w_h = mean_ij dA_h.

    It costs one forward and one backward pass: mean_ij dA_h = (sum_i dO_i).(sum_j v_j) / (N M) needs no map. The weights w_h are
    not a property of the function that the model computes: adding a constant c to all values of a head, and subtracting it again
    with the bias after it, leaves each output unchanged, but shifts w_h by (sum_i dO_i).c / N. If no entry of the mean is above
    0, relu leaves zeros, and `explain` warns. If towers attend to one another, it takes the last attention of the explained
    tower to itself and to each other tower (Chefer, Gur, Wolf, ICCV 2021).

    Examples:
        >>> import vlattn_fast as va
        >>> va.methods.GradCam(of="logit")  # pass it as va.explain(..., method=...)
        <method gradcam(of=logit)>
    """

    name = "gradcam"
    default_freeze = (NORMS,)

    def vector(self, start: Tensor, call: TracedCall, grad: Tensor | None, real: Real) -> Tensor:
        """The mean leaves padding out. It includes pairs that a causal mask masks, as in the published code."""
        check_softmax(self.name, call)
        real_queries, real_keys = real()
        dtype, heads = start.dtype, call.query.shape[1]
        grad = (torch.zeros_like(call.output) if grad is None else grad).to(dtype)
        key, value = (expand_heads(tensor.to(dtype), heads) for tensor in (call.key, call.value))
        queries = torch.ones_like(start[:, 0]) if real_queries is None else real_queries.to(grad)
        keys = key.new_ones(key.shape[0], key.shape[2]) if real_keys is None else real_keys.to(grad)
        gradient_sum = torch.einsum("bhnd,bn->bhd", grad, queries)
        value_sum = torch.einsum("bhmd,bm->bhd", value, keys)
        pairs = (queries.sum(-1) * keys.sum(-1)).clamp(min=1)
        weights = (gradient_sum * value_sum).sum(-1) / pairs[:, None]

        def combine(attention: Tensor) -> Tensor:
            mean = torch.einsum("bh,bhnm->bnm", weights, attention).div(heads)
            return mean_over(call.mesh, mean).relu()

        return times_map(start, call, combine)

    def _vector(
        self, backward: BackwardPass, tower: TowerTrace, keys: Sequence[Keys], start: Tensor, grad: Tensor | None
    ) -> Tensor:
        row = super()._vector(backward, tower, keys, start, grad)
        if bool(((row == 0).all(-1) & (start != 0).any(-1).to(row.device)).any()):
            backward.remarks.append(
                "A map of 'gradcam' is all zeros: the mean of its heads, weighted with their mean gradients, is not above 0 "
                "anywhere. Pass another method, such as 'gradient'"
            )
        return row
