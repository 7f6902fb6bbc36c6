"""Method "glimpse": layers and heads weighted by the gradient (Shen 2025, arXiv 2506.18985, equations 5 to 13).

The authors' code is not public. This reading of the paper agrees with two reimplementations by others. For one score z, with
g = dz/dA of each head h in each layer l, l counted from 0:

- G_h = relu(g_h * A_h) (5), the weight of a head w_h = softmax_h(sum_ij G_h / sum_ij relu(g_h) / 0.5) (6),
- E = sum_h w_h G_h, each row divided by its sum (7),
- the weight of a layer a_l = n_l s_l / sum_k n_k s_k, n_l = sum_ij |sum_h g_h| (8), s_l = softmax_l(0.2 (l + 1)) (9, 10),
- R <- R + (I + a_l E_l) R from the first layer to the last (11 to 13).

So a relevancy vector r becomes r (2 I + a_l E_l). Here it is r + a_l r E_l / 2: all vectors lack the same factor, 2 to the number
of layers.

The paper leaves some points open. Here sums over i and j leave padding out, and include pairs that a causal mask masks, as dz/dA
has them. Layers are those from `start_layer` on, and s_l takes their own numbers. After a pooling head, r is the row of its E.
The score of an answer's token is its log-probability, as everywhere in `explain`; the paper takes its logit. The weights of an
answer's tokens, by confidence and by their part in the prompt (equations 14 to 18), are not used: each token has its own vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import not_zero, over_sums
from vlattn_fast.interpret.adapters.adapter import Tower
from vlattn_fast.interpret.relevancy.cached_calls import CachedCalls, rows_of_maps
from vlattn_fast.interpret.relevancy.method import BackwardPass
from vlattn_fast.interpret.relevancy.mixing_call import check_softmax
from vlattn_fast.interpret.relevancy.traced_call import TracedCall


class Glimpse(CachedCalls):
    """Adds maps, weighted by gradients: r <- r + a r E / 2, E = sum_h w_h relu(A * dA), rows over their sums (after Shen 2025).

    It costs one forward and one backward pass. Rows of maps are computed again, a few queries at a time, twice a layer: for the
    layer's weights, and for r. Layers are weighted with a, heads with w, both from gradients (arXiv 2506.18985, equations 5 to
    13).

    Examples:
        >>> import vlattn_fast as va
        >>> va.methods.Glimpse(of="logit")  # pass it as va.explain(..., method=...)
        <method glimpse(of=logit)>
    """

    name = "glimpse"
    holds_start = True
    temperature, depth = 0.5, 0.2  # lambda and lambda_d of the paper

    def _check(self, call: TracedCall) -> None:
        super()._check(call)
        check_softmax(self.name, call)

    def check_between(self, entries: Sequence[Tower | None]) -> None:
        raise ValueError("method='glimpse' does not support towers that attend to one another. Pass another method=")

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        for tower in backward.towers:
            if tower.positions.is_flat:
                raise ValueError(
                    f"method must not weight layers if tokens move; got 'glimpse' and tower '{tower.name}', whose layers have "
                    "its tokens in another order or number. Pass another method="
                )
        calls = [self.from_layer(tower) for tower in backward.towers]
        pools = [[] if tower.pool is None else [tower.pool] for tower in backward.towers]
        grads = iter(self.gradients(backward, [call for part in zip(calls, pools, strict=True) for call in (*part[0], *part[1])]))
        rows = []
        for tower, start, tower_calls, pool in zip(backward.towers, backward.starts, calls, pools, strict=True):
            real = backward.real(tower)
            call_grads, pool_grads = [next(grads) for _ in tower_calls], [next(grads) for _ in pool]
            for call, grad in zip(pool, pool_grads, strict=True):
                start = _carried(call, grad, start, self._weights(call, grad, start, None, real)[0])
            weights = [self._weights(call, grad, start, real, real) for call, grad in zip(tower_calls, call_grads, strict=True)]
            norms = [norm.to(start.device) for _, norm in weights]  # layers may have several devices
            layer_shares = self._layers(torch.stack(norms))
            row, contribution = start, start if pool else torch.zeros_like(start)
            for call, grad, (heads, _), share in reversed([*zip(tower_calls, call_grads, weights, layer_shares, strict=True)]):
                step = share[:, None, None].to(row) / 2 * _carried(call, grad, row, heads).to(row)
                row, contribution = row + step, contribution + step
            rows.append(row)
            backward.contribution[tower] = contribution
        return rows

    def _weights(
        self, call: TracedCall, grad: Tensor | None, like: Tensor, queries: Tensor | None, keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The weights (B, H) of the heads, and n (B,) of the layer. `queries` (B, N) and `keys` (B, M): which are real; None =
        all."""
        batch, heads, count = call.query.shape[:3]
        like = like.to(call.query.device)
        reached, slopes, norm = like.new_zeros(batch, heads), like.new_zeros(batch, heads), like.new_zeros(batch)
        every = like.new_ones(batch, 1, count)
        query_weights = every[:, 0] if queries is None else queries.to(every)
        key_weights = like.new_ones(batch, call.key.shape[2]) if keys is None else call.over_keys(keys.to(every), 1.0)
        for index, maps, slope in rows_of_maps(call, grad, every, True):
            assert slope is not None
            slope = slope * query_weights.gather(1, index)[:, None, :, None] * key_weights[:, None, None]
            reached += (slope * maps).relu().sum((2, 3))
            slopes += slope.relu().sum((2, 3))
            norm += slope.sum(1).abs().sum((1, 2))
        return (reached / not_zero(slopes) / self.temperature).softmax(-1), norm

    def _layers(self, norms: Tensor) -> Tensor:
        """The weights (L, B) of the layers from n (L, B): with no gradient anywhere, only by their depth."""
        numbers = torch.arange(len(norms), dtype=norms.dtype, device=norms.device)
        by_depth = (self.depth * numbers).softmax(0)[:, None]  # what all numbers have in common drops out
        weighted = torch.where(norms.sum(0) > 0, norms, 1.0) * by_depth
        return weighted / weighted.sum(0)


def _carried(call: TracedCall, grad: Tensor | None, row: Tensor, heads: Tensor) -> Tensor:
    """row (B, 1, N) times E (B, N, M) of the call, whose heads have weights (B, H)."""
    row = row.to(call.query.device)
    result = row.new_zeros(row.shape[0], 1, call.key.shape[2])
    for index, maps, slopes in rows_of_maps(call, grad, row, True):
        assert slopes is not None
        edges = torch.einsum("bh,bhrm->brm", heads, (maps * slopes).relu())
        result += row.gather(2, index.unsqueeze(1)) @ over_sums(edges)
    return call.at_tokens(result)
