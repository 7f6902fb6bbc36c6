"""The published rules on stored maps, for any model: every softmax of a forward pass is kept, with the module that takes it.

Nothing of the package is used. Attention of transformers is "literal" (cases.py), torch's is written out here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tests.helpers.interpret.cases import one_sample

Score = Callable[[Any], Tensor]
SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax)


@dataclass(frozen=True)
class Place:
    """Where a tower lies, and what of it is read.

    Args:
        prefix: of the paths of the modules that take its softmaxes.
        row: (B, N) weights of the rows that are read.
        real: bool (B, N), False = padding.
        sums: of each layer the module fed with x, and the one fed with y = x + o, for "weighted".
        pool: prefix of the pooling head's path.
    """

    prefix: str
    row: Tensor
    real: Tensor | None = None
    sums: tuple[tuple[str, str], ...] = ()
    pool: str | None = None


def layer_sums(layers: str, count: int, stream: str, summed: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{layers}.{i}{stream and '.'}{stream}", f"{layers}.{i}.{summed}") for i in range(count))


@dataclass
class Kept(TorchFunctionMode):
    """Every softmax over four dimensions, (B, H, N, M), by the path of the module."""

    model: nn.Module
    maps: list[tuple[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.paths = [""]
        self.names = {module: name for name, module in self.model.named_modules()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            with self:
                return literal(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            with self:
                return literal_multihead(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in SOFTMAX and result.ndim == 4:
            self.maps.append((self.paths[-1], result))
        return result

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def leave(*_: Any) -> None:
            self.paths.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(lambda m, a: self.paths.append(self.names.get(m, self.paths[-1]))),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def literal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    one_head = query.ndim == 3
    if one_head:
        query, key, value = query[:, None], key[:, None], value[:, None]
        attn_mask = attn_mask[:, None] if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    output = scores.softmax(-1) @ value
    return output[:, 0] if one_head else output


def literal_multihead(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    bias_k: None,
    bias_v: None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """F.multi_head_attention_forward, (N, B, C), whose bool masks say which keys are masked."""
    assert not (add_zero_attn or kwargs.get("use_separate_proj_weight"))
    projected = zip((query, key, value), in_proj_weight.chunk(3), in_proj_bias.chunk(3), strict=True)
    q, k, v = ((x @ w.T + b).unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x, w, b in projected)
    total = q.new_zeros(q.shape[0], num_heads, q.shape[2], k.shape[2])
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if mask is not None:
            mask = mask.unflatten(0, (-1, num_heads)) if mask.ndim == 3 else mask
            total = total.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else total + mask
    output = literal(q, k, v, total).permute(2, 0, 1, 3).flatten(2)
    return output @ out_proj_weight.T + out_proj_bias, None


def rows_of(
    model: nn.Module, inputs: dict[str, Any], score: Score, places: dict[str, Place], method: str = "gradient"
) -> dict[str, Tensor]:
    """The relevancy row (B, N) of each tower by one method."""
    return rows_by_method(model, inputs, score, places, (method,))[method]


def rows_by_method(
    model: nn.Module, inputs: dict[str, Any], score: Score, places: dict[str, Place], methods: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """By each method the relevancy row (B, N) of each tower: one forward pass with stored maps, their gradients, and full matrix
    products, a sample at a time."""
    kept = Kept(model)
    streams: dict[str, list[Tensor]] = {}
    handles = []
    for place in places.values():
        for path in dict.fromkeys(path for pair in place.sums for path in pair):
            into = streams.setdefault(path, [])
            handles.append(
                model.get_submodule(path).register_forward_pre_hook(
                    lambda m, a, k, into=into: into.append(a[0] if a else k["hidden_states"]), with_kwargs=True
                )
            )
    switches = hasattr(model, "set_attn_implementation")
    before = model.config._attn_implementation if switches else None
    if switches:
        model.set_attn_implementation("literal")
    try:
        with kept.watching():
            scores = score(model(**inputs))
    finally:
        for handle in handles:
            handle.remove()
        if switches:
            model.set_attn_implementation(before)

    results: dict[str, dict[str, Tensor]] = {method: {} for method in methods}
    for name, place in places.items():
        maps = [found for path, found in kept.maps if path.startswith(place.prefix) and path != place.pool]
        assert maps, [path for path, _ in kept.maps]
        pools = [found for path, found in kept.maps if path == place.pool]
        xs, ys = (
            ([at for path in dict.fromkeys(paths) for at in streams[path]] for paths in zip(*place.sums, strict=True))
            if (place.sums)
            else ([], [])
        )
        wanted = [*maps, *ys, *pools]
        grads = torch.autograd.grad(scores.sum(), wanted, retain_graph=True, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]
        map_grads, y_grads, pool_grads = grads[: len(maps)], grads[len(maps) : len(maps) + len(ys)], grads[len(maps) + len(ys) :]
        batch, size = maps[0].shape[0], maps[0].shape[-1]
        for method in methods:
            result = maps[0].new_zeros(batch, size)
            for b in range(batch):
                real = torch.ones(size, dtype=torch.bool) if place.real is None else place.real[b].bool()
                row = place.row[b].to(result)[None]
                row = row if pools else row[:, real]
                result[b, real] = one_sample(
                    method,
                    0,
                    [a[b][:, real][:, :, real] for a in maps],
                    [g[b][:, real][:, :, real] for g in map_grads],
                    *([t[b][real] for t in ts] for ts in (xs, ys, y_grads)),
                    row,
                    (pools[0][b][:, :, real], pool_grads[0][b][:, :, real]) if pools else None,
                )
            results[method][name] = result.detach()
    return results


def beside(row: Tensor, place: Place) -> Tensor:
    """What of a row lies beside the identity."""
    return row - place.row.to(row) if row.shape == place.row.shape else row


def error(got: Tensor, want: Tensor, place: Place, method: str) -> float:
    """The largest difference as a share of the largest value beside the identity (which rollout scales, and two methods lack)."""
    assert got.shape == want.shape and got.dtype == want.dtype
    signal = beside(want, place) if method == "gradient" else want
    assert signal.abs().max() > 1e-4 * want.abs().max(), "a map without a signal"
    return float((got - want).abs().max() / signal.abs().max())
