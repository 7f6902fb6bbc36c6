"""The logits of a call, tile by tile, and the gradients of what they are made of.

Scores that are sums over hidden units (additive, Hadamard) run unit by unit, so that no (i, M, A) block exists. Their cost
is memory traffic: each step of a unit is one pass over the tile, in place, with the keys of the unit side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_choice
from vlattn_fast._ground.groups import columns_of_groups, sums_of_groups
from vlattn_fast._ground.score_kinds import KINDS
from vlattn_fast._ground.tensors import compute_dtype, expand_heads, fold_heads, unit_vectors
from vlattn_fast.backends.inputs import Attention, named
from vlattn_fast.backends.streaming._forward_mode import Named, differentiates, outputs_and_gradients
from vlattn_fast.backends.streaming._tiles import Tiling, mask_tile

Tile = tuple[slice, slice, slice]  # batch, heads and query rows


class Logits:
    """The masked logits of a call, in tiles (b, h, i, M) in the dtype of sums."""

    def __init__(self, x: Attention) -> None:
        self.attention, self.dtype, self.key = x, compute_dtype(x.query), expand_heads(x.key, x.query.shape[1])
        self.shape = (*x.query.shape[:3], self.key.shape[2])

    def tiles(self) -> Iterator[Tile]:
        tiling = Tiling.of(self.key, *self.shape)
        return ((b, h, i) for b, i in tiling.query_tiles() for h in tiling.heads())

    def of(self, tile: Tile) -> Tensor:
        return self._masked(tile, self._parts(tile))

    def _parts(self, tile: Tile) -> Named:
        """What the logits of a tile are made of."""
        (b, h, _), x = tile, self.attention
        parts = {"query": x.query[tile].to(self.dtype), "key": self.key[b, h].to(self.dtype)}
        if x.vector is not None:
            parts["vector"] = x.vector[h].to(self.dtype)
        if x.row_bias is not None and x.key_groups is not None:  # 0 for a key without a group
            parts["row_bias"] = columns_of_groups(x.row_bias[tile], x.key_groups[b])
        return parts

    def _score(self, x: Named) -> Tensor:
        kind, query, scale = self.attention.score, x["query"], self.attention.scale
        if kind == "dot":
            return (query * scale) @ x["key"].mT
        return score_tile(kind, query, x["key"], x.get("vector"), self.attention.parameter) * scale

    def _masked(self, tile: Tile, x: Named) -> Tensor:
        score = x["score"] if "score" in x else self._score(x)
        return mask_tile(self.attention, score, self.shape, *tile, x.get("row_bias"))

    def add_gradients(
        self,
        sums: Sums,
        tile: Tile,
        rows: Callable[..., Sequence[Tensor]],
        others: Named,
        by_rows: Sequence[Tensor | None] | Callable[[Sequence[Tensor]], Sequence[Tensor | None]],
    ) -> Sequence[Tensor]:
        """Returns rows(logits, **others), and adds the gradients of their product with `by_rows` by what `sums` has."""
        x = self._parts(tile) | others
        units = {name: x.pop(name) for name in ("query", "key", "vector")} if "vector" in x else {}
        if units:
            x["score"] = self._score(units)

        def run(leaves: Named) -> Sequence[Tensor]:
            tensors = x | leaves
            return rows(self._masked(tile, tensors), **{name: tensors[name] for name in others})

        leaves = {name: y for name, y in x.items() if name == "score" or name in sums}
        outputs, gradients = outputs_and_gradients(run, leaves, by_rows)
        if units:
            slopes = _slopes_of_units(self.attention.score, gradients.pop("score") * self.attention.scale, *units.values())
            gradients |= dict(zip(units, slopes, strict=True))
        row_bias, groups = self.attention.row_bias, self.attention.key_groups
        if row_bias is not None and groups is not None and "row_bias" in gradients:
            gradients["row_bias"] = sums_of_groups(gradients["row_bias"].mT, groups[tile[0]], row_bias.shape[3]).mT
        sums.add(tile, gradients)
        return outputs


class Sums:
    """The gradients of some arguments of an operator, to which tiles add; of keys and values with a head for each of the
    query's."""

    def __init__(self, inputs: Any, *names: str) -> None:
        self.names, heads = names, inputs.attention.query.shape[1]
        self._tensors: dict[str, Tensor] = {name: x for name, x in named(inputs).items() if name in names and x is not None}
        self._sums = dict[str, Tensor]()
        for name, x in self._tensors.items():
            shape = (x.shape[0], heads, *x.shape[2:]) if name in _OF_KEYS else x.shape
            dtype = compute_dtype(x) if name in (*_OF_KEYS, "vector") else x.dtype  # of a row there is one tile
            self._sums[name] = torch.zeros(shape, dtype=dtype, device=x.device)

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def add(self, tile: Tile, gradients: Named) -> None:
        b, h, _ = tile
        for name, x in gradients.items():
            self._sums[name][(h,) if name == "vector" else (b, h) if name in _OF_KEYS else tile] += x

    def result(self) -> tuple[Tensor | None, ...]:
        """In the dtypes of the tensors; None for None."""
        gradients = {name: fold_heads(self._sums[name], x.shape[1]).to(x.dtype) for name, x in self._tensors.items()}
        return tuple([gradients.get(name) for name in self.names])


_OF_KEYS = "key", "value"


def score_tile(kind: str, q: Tensor, k: Tensor, vector: Tensor | None, parameter: float) -> Tensor:
    """The scores of a tile. `vector` (h, A) belongs to the kinds that sum over hidden units."""
    if kind == "cosine":
        return _cosine(q, k, parameter)
    if KINDS[kind].of == "product":
        return q @ k.mT if kind == "dot" else _ACTIVATIONS[kind](q @ k.mT, parameter)
    assert vector is not None
    units = _Units(kind, q, k, vector)
    score, unit, ones = units.new_tile().zero_(), units.buffer(), vector.new_zeros(vector.shape[0])
    for a in range(q.shape[-1]):
        if units.factored[a]:
            score.addcdiv_(-2 * vector[:, None, None, a], units.one_plus_exp(a, unit))
            ones += vector[:, a]  # the 1 in 1 - 2 / (1 + e^2x e^2y)
        else:
            score.addcmul_(units.activation(a, unit), vector[:, None, None, a])
    return score.add_(ones[:, None, None]) if any(units.factored) else score


def _slopes_of_units(kind: str, grad: Tensor, q: Tensor, k: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (b, h, i, A), k (b, h, M, A) and the vector (h, A) from that of the scores (b, h, i, M): autograd would
    save a tile for each unit."""
    units = _Units(kind, q, k, vector)
    buffer, second, total = units.buffer(), units.buffer(), grad.sum((0, 2, 3))
    grad_q, grad_k, grad_vector = torch.empty_like(q), torch.empty_like(k), torch.empty_like(vector)
    for a in range(q.shape[-1]):
        if units.factored[a]:
            # with r = 1 / (1 + e^2x e^2y) the unit is 1 - 2 r and its slope 4 r (1 - r)
            unit = units.one_plus_exp(a, buffer).reciprocal_()
            by_unit = torch.mul(grad, unit, out=second)
            grad_vector[:, a] = total - 2 * by_unit.sum((0, 2, 3))
            grad_product = torch.addcmul(by_unit, by_unit, unit, value=-1.0, out=buffer).mul_(4.0)
        else:
            unit = units.activation(a, buffer)
            grad_vector[:, a] = torch.mul(grad, unit, out=second).sum((0, 2, 3))
            grad_product = units.slope(unit, buffer).mul_(grad)
        grad_q[..., a], grad_k[..., a] = units.sums(a, grad_product, second)
    grad_q *= vector[:, None]
    grad_k *= vector[:, None]
    return grad_q, grad_k, grad_vector


class _Units:
    """The hidden units of a tile, one at a time in a buffer (b, h, i, M).

    `factored` says which of them are tanh(x + y) = 1 - 2 / (1 + e^2x e^2y), with exponentials once a query and a key. Only in
    float64, whose tanh takes as long as four passes: in float32 this gains nothing in the backward pass, and where |x + y| is
    small, scores and the vector's gradient have up to twelve times the error of tanh, which has the digits of small numbers.
    """

    def __init__(self, kind: str, q: Tensor, k: Tensor, vector: Tensor) -> None:
        check_choice("kind", kind, ("additive", "hadamard_tanh", "hadamard_sigmoid"))
        self.kind, self.q, self.keys = kind, q, k.mT.contiguous()
        self.factored = [False] * q.shape[-1]
        if kind == "additive" and q.dtype == torch.float64 and q.device.type == "cpu" and q.numel() and k.numel():
            self.factored = (_factors(q, k) & vector.isfinite().all(0)).tolist()
            self.exp_q, self.exp_keys = torch.exp(2 * q), torch.exp(2 * self.keys)
            self.ones = q.new_ones(k.shape[-2])

    def new_tile(self) -> Tensor:
        return self.q.new_empty(*self.q.shape[:-1], self.keys.shape[-1])

    def buffer(self) -> Tensor | None:
        """A tile for `out=`, which has no tangents: None in forward mode."""
        return None if differentiates() else self.new_tile()

    def one_plus_exp(self, a: int, out: Tensor | None) -> Tensor:
        return torch.addcmul(self.ones, self.exp_q[..., a, None], self.exp_keys[..., a, None, :], out=out)

    def activation(self, a: int, out: Tensor | None) -> Tensor:
        combine = torch.add if self.kind == "additive" else torch.mul
        unit = combine(self.q[..., a, None], self.keys[..., a, None, :], out=out)
        return unit.sigmoid_() if self.kind == "hadamard_sigmoid" else unit.tanh_()

    def slope(self, unit: Tensor, out: Tensor | None) -> Tensor:
        """The derivative of a unit by what the activation acts on; `out` may be the unit."""
        first = unit if self.kind == "hadamard_sigmoid" else unit.new_ones(())
        return torch.addcmul(first, unit, unit, value=-1.0, out=out)

    def sums(self, a: int, grad: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients (b, h, i) and (b, h, M) of the unit's queries and keys from that of their sum or product."""
        if self.kind == "additive":
            return grad.sum(-1), grad.sum(-2)
        by_q = torch.mul(grad, self.keys[..., a, None, :], out=buffer).sum(-1)
        return by_q, torch.mul(grad, self.q[..., a, None], out=buffer).sum(-2)


def _factors(q: Tensor, k: Tensor) -> Tensor:
    """(A) for which units 1 - 2 / (1 + e^2x e^2y) has the digits of float64 that count, from the least and largest x and y.

    No exponential overflows; some |x + y| is more than 2^-5, as units near 0 lose digits to the 1; and some is less than 7, as
    slopes beyond are what is left of 1 - tanh^2.
    """
    (least_q, most_q), (least_k, most_k) = (torch.aminmax(x, dim=-2) for x in (q, k))  # (b, h, A)
    corners = torch.stack([least_q + least_k, least_q + most_k, most_q + least_k, most_q + most_k]).abs()
    single = torch.stack([least_q, most_q, least_k, most_k]).abs().amax(0)
    fit = (single <= 170.0) & (corners.amax(0) <= 170.0) & (corners.amax(0) >= 2.0**-5) & (corners.amin(0) <= 7.0)
    return fit.all(0).all(0)


_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {  # of a product and the kind's number
    "dot_relu": lambda x, p: torch.relu(x),
    "dot_leaky_relu": lambda x, p: torch.where(x > 0, x, p * x),
    "dot_tanh": lambda x, p: torch.tanh(x),
    "dot_sigmoid": lambda x, p: torch.sigmoid(x),
    "dot_softcap": lambda x, p: torch.tanh(x * p),
}


def _cosine(q: Tensor, k: Tensor, eps: float) -> Tensor:
    """q . k / max(|q| |k|, eps) by unit vectors, so that no product of norms overflows."""
    (unit_q, norm_q), (unit_k, norm_k) = unit_vectors(q, eps), unit_vectors(k, eps)
    cosine, clamps = unit_q @ unit_k.mT, norm_q[..., :, None] * norm_k[..., None, :] < eps
    acts = eps > 0.0 and (clamps.device.type != "cpu" or bool(clamps.any()))  # or may: only on a CPU does looking cost nothing
    return torch.where(clamps, q @ k.mT / eps, cosine) if acts else cosine
