"""Method "attention": the row of mean_h A in the last layer that is read. It takes no gradient."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vlattn_fast._ground.tensors import expand_heads
from vlattn_fast.attach.tensor_parallel import mean_over
from vlattn_fast.interpret.relevancy.attention_call import Attended
from vlattn_fast.interpret.relevancy.last_attention import LastAttentionMethod, times_map


class RawAttention(LastAttentionMethod):
    name = "attention"
    needs_score = False

    def read(
        self, start: Tensor, attended: Attended, grad: Tensor | None, real: Callable[[], tuple[Tensor | None, Tensor | None]]
    ) -> Tensor:
        key = expand_heads(attended.key.to(start.dtype), attended.query.shape[1])
        query = attended.query.to(start.dtype)
        return times_map(start, query, key, attended.masks, lambda attention: mean_over(attended.mesh, attention.mean(1)))
