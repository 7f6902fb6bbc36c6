"""The parameters with which a module computes its queries and keys: rows of weights and biases, which `rescale` multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlattn_fast.attach.events import AttentionEvent

# children that project the query and the key, by the names that models give them
PAIRS = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"), ("to_q", "to_k"), ("wq", "wk"), ("q", "k"))
# all queries, then all keys, then all values; other orders are not supported
FUSED = ("qkv", "c_attn", "qkv_proj", "in_proj", "Wqkv")


class _Part(NamedTuple):
    """A weight or bias, and which of its dimensions has the rows of a linear map, from index `first` on."""

    parameter: Tensor
    dim: int
    first: int


class _Rows(NamedTuple):
    """`num_rows` rows of a linear map: their index in its weight and bias, and the map if it is a module."""

    parts: tuple[_Part, ...]
    num_rows: int
    module: nn.Module | None = None

    def rescale(self, factors: Tensor) -> None:
        """Multiplies each of len(factors) heads by its factor."""
        row_factors = factors.repeat_interleave(self.num_rows // len(factors))
        for x, dim, first in self.parts:
            all_factors = row_factors.new_ones(x.shape[dim])
            all_factors[first : first + self.num_rows] = row_factors
            x.mul_(_on_device_of(x, all_factors.unflatten(0, [-1 if d == dim else 1 for d in range(x.ndim)])))

    def norms(self, output: Tensor, size: int) -> Tensor:
        """Returns the norms of the heads in the map's output, (B, H, N)."""
        first = self.parts[0].first
        rows = output[..., first : first + self.num_rows]
        return rows.unflatten(-1, (-1, size)).norm(dim=-1).transpose(-1, -2)


def _on_device_of(like: Tensor, x: Tensor) -> Tensor:
    """Returns x on the device of `like`; on each of its processes if that is a DTensor."""
    x = x.to(like.device)
    if not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


class Projections:
    """The projections with which a module computes its queries and keys.

    rows: from the numbers of rows of query and key in a fused weight, which the weight does not tell, to those of both. It is
    called anew for each use: wrappers such as fully_shard replace parameters by other tensors, which views would miss.
    """

    def __init__(self, rows: Callable[[int, int], tuple[_Rows, _Rows]]) -> None:
        self._rows = rows
        self._counts: tuple[int, int] | None = None
        self._heads = self._key_heads = 0

    @property
    def is_checked(self) -> bool:
        return self._counts is not None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def modules(self) -> set[nn.Module]:
        return {rows.module for rows in self._rows(0, 0) if rows.module is not None}

    def parameters(self) -> Iterator[Tensor]:
        return (part.parameter for rows in self._rows(0, 0) for part in rows.parts)

    @property
    def are_whole(self) -> bool:
        """Returns whether all are parameters, weights (rows, columns) and biases (rows)."""
        parts = [(part.parameter, ndim) for rows in self._rows(0, 0) for part, ndim in zip(rows.parts, (2, 1), strict=False)]
        return all(isinstance(x, nn.Parameter) and x.ndim == ndim for x, ndim in parts)

    def is_frozen(self, path: str) -> bool:
        """Returns whether all parts are frozen. Raises ValueError if only some are."""
        trained = {parameter.requires_grad for parameter in self.parameters()}
        if len(trained) > 1:
            raise ValueError(
                f"the weights and biases that make query and key of '{path}' must all be trained or all be frozen for QKClip; "
                "got some of each"
            )
        return trained == {False}

    def check(self, path: str, call: AttentionEvent, outputs: dict[nn.Module, Tensor]) -> None:
        """Raises ValueError, at the first call, if a factor of the projections is not a factor of the logits. Zeros do not tell,
        and need no factor."""
        if self._counts is not None or not call.query.any() or not call.key.any():
            return
        (_, heads, _, size), key_heads = call.query.shape, call.key.shape[1]
        for shared in range(1, heads + 1):  # models may expand the heads of keys before they attend
            counts = heads * size, key_heads // shared * size
            query, key = self._rows(*counts)
            fits = _fits(query, call.query, outputs, 1) & _fits(key, call.key, outputs, shared)
            if key_heads % shared == 0 and bool(fits):
                self._counts, self._heads, self._key_heads = counts, heads, key_heads // shared
                return
        raise misfit(path)

    def fit(self, call: AttentionEvent, outputs: dict[nn.Module, Tensor]) -> Tensor:
        """Returns whether a factor of the projections is a factor of a later call's logits: a bool on the call's device, without
        waiting."""
        assert self._counts is not None  # since the first call was checked
        query, key = self._rows(*self._counts)
        return _fits(query, call.query, outputs, 1) & _fits(key, call.key, outputs, call.key.shape[1] // self._key_heads)

    def rescale(self, gamma: Tensor) -> None:
        """Multiplies the logits of each head by gamma (H,)."""
        assert self._counts is not None  # since the module has been called
        query, key = self._rows(*self._counts)
        key_factors = gamma.view(self._key_heads, -1).amin(1).sqrt()
        key.rescale(key_factors)
        query.rescale(gamma / key_factors.repeat_interleave(self._heads // self._key_heads))


def misfit(path: str) -> ValueError:
    return ValueError(
        f"the heads of '{path}' must be its projections, turned by rotary embeddings or times a number, for QKClip; got "
        "others (a norm of queries and keys cancels every factor, and bounds the logits by itself; attention of a sequence in "
        "pieces, and fused weights in which heads of query and key take turns, are not supported)"
    )


def _fits(rows: _Rows, attended: Tensor, outputs: dict[nn.Module, Tensor], shared: int) -> Tensor:
    """Returns whether the attended heads, (B, H, N, D), have the norms of the projected ones, except for one factor."""
    size, no = attended.shape[3], attended.new_zeros((), dtype=torch.bool)
    if rows.num_rows * shared != attended.shape[1] * size:
        return no
    if rows.module is None:  # nn.MultiheadAttention, which has nothing in between
        return ~no
    output = outputs.get(rows.module)
    if output is None:
        return no
    before, after = rows.norms(output, size).repeat_interleave(shared, -2), attended.norm(dim=-1)
    if before.numel() != after.numel() or after.numel() == 0:
        return no
    before, after = before.reshape(after.shape).double(), after.double()
    expected = before * (after.sum() / before.sum())
    return ((after - expected).abs() <= 0.03 * expected + 1e-3 * after.amax()).all()


def projections_of(module: nn.Module) -> Projections | None:
    """Returns the projections of an attention module; None for other modules."""
    if isinstance(module, nn.MultiheadAttention):
        return Projections(partial(_multihead_rows, module))
    children = dict(module.named_children())
    for names in PAIRS:
        query, key = (children.get(name) for name in names)
        if _is_linear(query) and _is_linear(key):
            return Projections(partial(_pair_rows, query, key))
    fused = next((children[name] for name in FUSED if _is_linear(children.get(name))), None)
    return None if fused is None else Projections(partial(_fused_rows, fused))


def _pair_rows(query: Any, key: Any, *_: int) -> tuple[_Rows, _Rows]:
    return _rows(query, 0, _size(query)), _rows(key, 0, _size(key))


def _fused_rows(module: Any, queries: int, keys: int) -> tuple[_Rows, _Rows]:
    return _rows(module, 0, queries), _rows(module, queries, keys)


def _multihead_rows(module: nn.MultiheadAttention, *_: int) -> tuple[_Rows, _Rows]:
    size = module.embed_dim
    weights: Any = [_Part(x, 0, 0) for x in (module.q_proj_weight, module.k_proj_weight) if x is not None]
    if not weights:
        weights = [_Part(module.in_proj_weight, 0, first) for first in (0, size)]
    bias = module.in_proj_bias
    biases = [() if bias is None else (_Part(bias, 0, first),) for first in (0, size)]
    return _Rows((weights[0], *biases[0]), size), _Rows((weights[1], *biases[1]), size)


def _rows(module: Any, first: int, count: int) -> _Rows:
    bias = () if module.bias is None else (_Part(module.bias, 0, first),)
    return _Rows((_Part(module.weight, int(_is_transposed(module)), first), *bias), count, module)


def _size(module: Any) -> int:
    """Returns the number of rows."""
    return int(module.nf if _is_transposed(module) else module.out_features)


def faults_of(model: nn.Module, projections: dict[nn.Module, Projections]) -> dict[nn.Module, str]:
    """Returns, for each module of `projections` that cannot be rescaled by itself, the reason."""
    users: dict[Any, set[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, part in (*module._parameters.items(), *module._modules.items()):
            users.setdefault(part, set()).add((module, name))
    faults = {}
    for module, its_projections in projections.items():
        if not its_projections.are_whole:
            faults[module] = "be parameters of a linear map in its shape, which parametrizations and FSDP 1 replace"
        elif any(len(users[part]) > 1 for part in (*its_projections.parameters(), *its_projections.modules())):
            faults[module] = "have no other user, whom their factors would reach as well"
    return faults


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module | None) -> bool:
    """Returns whether the weight is (in, out), as in transformers' Conv1D."""
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__)
