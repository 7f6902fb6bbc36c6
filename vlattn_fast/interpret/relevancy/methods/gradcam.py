"""Method "gradcam": the row of relu(mean_h w_h A_h) in the last layer with w_h = mean_ij dA_h (Chefer et al. 2021)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import expand_heads
from vlattn_fast.attach.tensor_parallel import mean_over
from vlattn_fast.interpret.relevancy.last_attention import LastAttentionMethod, Real, times_map
from vlattn_fast.interpret.relevancy.mixing_call import check_softmax
from vlattn_fast.interpret.relevancy.traced_call import TracedCall


class GradCam(LastAttentionMethod):
    """The row of relu(mean_h w_h A_h) in the last layer, w_h = mean_ij dA_h; `start_layer` has no effect.

    mean_ij dA_h = (sum_i dO_i).(sum_j v_j) / (N M) needs no map.
    """

    name = "gradcam"

    def read(self, start: Tensor, call: TracedCall, grad: Tensor | None, real: Real) -> Tensor:
        """The mean leaves padding out. It includes pairs that a causal mask masks, as in the published code."""
        check_softmax(self.name, call)
        real_queries, real_keys = real()
        dtype, heads = start.dtype, call.query.shape[1]
        grad = (torch.zeros_like(call.output) if grad is None else grad).to(dtype)
        key, value = (expand_heads(tensor.to(dtype), heads) for tensor in (call.key, call.value))
        queries = torch.ones_like(start[:, 0]) if real_queries is None else real_queries.to(grad)
        keys = key.new_ones(key.shape[0], key.shape[2]) if real_keys is None else call.among_keys(real_keys.to(grad))
        gradient_sum = torch.einsum("bhnd,bn->bhd", grad, queries)
        value_sum = torch.einsum("bhmd,bm->bhd", value, keys)
        pairs = (queries.sum(-1) * keys.sum(-1)).clamp(min=1)
        weights = (gradient_sum * value_sum).sum(-1) / pairs[:, None]

        def combine(attention: Tensor) -> Tensor:
            mean = torch.einsum("bh,bhnm->bnm", weights, attention).div(heads)
            return mean_over(call.mesh, mean).relu()

        return times_map(start, replace(call, query=call.query.to(dtype), key=key), combine)
