"""The published procedure on stored maps, for any model: what `va.explain` must equal.

A forward pass with eager attention keeps its maps, and one backward pass gives their gradients. The rule is Chefer, Gur, Wolf
(ICCV 2021), equations 5 and 6, for one row. Nothing of the package makes it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tools.tiny_models.mixers import Mixed, Mixers

SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax)
PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__, torch.einsum, functional.linear}


class Double(TorchFunctionMode):
    """Where a model asks for float32, as in norms, routers and softmaxes, it gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        return func(*map(_double, args), **{name: _double(value) for name, value in (kwargs or {}).items()})


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """A context in which models are made and run in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Double():
            yield
    finally:
        torch.set_default_dtype(before)


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Maps(TorchFunctionMode):
    """Keeps the maps of a run of `model`: (B, H, N, M) of attention, and those of recurrences.

    Args:
        cut: what attention gives is a constant, so that no gradient goes from a token to another through attention.
    """

    def __init__(self, model: nn.Module, cut: bool = False) -> None:
        super().__init__()
        self.cut, self.maps = cut, list[Tensor | Mixed]()
        self._mixers = Mixers(model, self.maps.append, cut)
        self._of_maps: dict[int, Tensor] = {}  # by id; held, so that no new tensor takes the id

    def __enter__(self) -> Maps:
        self._mixers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._mixers.__exit__(*error)

    @property
    def mixes(self) -> bool:
        """Whether some layer has no softmax."""
        return any(isinstance(one, Mixed) for one in self.maps)

    def with_size(self, size: int) -> list[Tensor | Mixed]:
        """The maps of `size` tokens."""
        return [m for m in self.maps if (m.maps[0] if isinstance(m, Mixed) else m).shape[-2:] == (size, size)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward and not self.cut:
            with self:
                return written_out(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in SOFTMAX and result.ndim == 4:
            self.maps.append(result)
        cuts_last = func is Tensor.__getitem__ and self.maps and args[0] is self.maps[-1]
        if cuts_last and result.shape[-1] == args[0].shape[-1] - 1:  # without the sink's column
            self.maps[-1] = self._of_maps[id(result)] = result
        if not self.cut or not isinstance(result, Tensor):
            return result
        if func is torch.logsumexp:  # of logits, for a sink's share
            return result.detach()
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        if func in SOFTMAX and (result.ndim == 4 or (result.ndim == 3 and result.shape[1] == result.shape[2])):
            self._of_maps[id(result)] = result
        elif held := [one for one in tensors if id(one) in self._of_maps]:
            if func in PRODUCTS:
                return result.detach()
            if result.numel() == held[0].numel() and result.shape[-2:] == held[0].shape[-2:]:
                self._of_maps[id(result)] = result  # dropout, casts, views
        return result


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: int,
    heads: int,
    weight: Tensor,
    bias: Tensor,
    *options: Any,
    attn_mask: Tensor | None = None,
    **further: Any,
) -> tuple[Tensor, Tensor]:
    """torch's multi_head_attention_forward, tokens first, with a map of its own. No option but a mask is in use."""
    *_, projection, projection_bias = options
    parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
    q, k, v = (functional.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x, w, b in parts)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if attn_mask is None else scores + attn_mask.view(scores.shape)
    weights = torch.softmax(scores, -1)
    output = (weights @ v).permute(2, 0, 1, 3).flatten(2)
    return functional.linear(output, projection, projection_bias), weights.mean(1)


def stored_rows(maps: Sequence[Tensor | Mixed], scores: Tensor, rows: Tensor) -> Tensor:
    """The rows (B, N) of R = (I + Abar_L) ... (I + Abar_1) that `rows` (B, N) weigh, from maps (B, H, N, N), first to last. That
    of a layer with a convolution in front of its values is Abar times the convolution's, whose rows sum to one. The maps of
    attention and of a recurrence beside it are added."""
    layers = [(m.maps, m.before) if isinstance(m, Mixed) else ([m], []) for m in maps]
    flat = [one for layer in layers for part in layer for one in part]
    gradients = iter(torch.autograd.grad(scores.sum(), flat, allow_unused=True, retain_graph=True))
    means = [[_mean(part, [next(gradients) for _ in part]) for part in layer if part] for layer in layers]
    with_next = [*(_stand_beside(*pair) for pair in itertools.pairwise(maps)), False]
    carried = behind = rows[:, None]
    for (mean, *before), beside in zip(reversed(means), reversed(with_next), strict=True):
        behind = behind if beside else carried  # behind both
        step = behind @ mean
        for each in before:
            total = each.sum(-1, keepdim=True)
            itself = torch.eye(each.shape[-1]).expand_as(each)
            step = step @ torch.where(total == 0, itself, each / total.masked_fill(total == 0, 1.0))
        carried = carried + step
    return carried[:, 0].detach()


def _stand_beside(one: Tensor | Mixed, another: Tensor | Mixed) -> bool:
    """Whether the second map depends in no way on the output that the first one gave."""
    if isinstance(one, Mixed) == isinstance(another, Mixed):
        return False
    first, second = (m.maps[0] if isinstance(m, Mixed) else m for m in (one, another))
    return torch.autograd.grad(second.sum(), first, allow_unused=True, retain_graph=True)[0] is None


def _mean(stored: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """The mean over the heads of relu(A * dA), of all maps together."""
    products = [torch.zeros_like(a) if d is None else a * d for a, d in zip(stored, gradients, strict=True)]
    return torch.cat(products, 1).clamp(min=0).mean(1).detach()


def stored_rows_between(
    encoder: Sequence[Tensor],
    decoder: Sequence[tuple[str, Tensor]],
    size: int,
    scores: Tensor,
    rows: Tensor,
    by_layer: bool = False,
) -> tuple[Tensor, Tensor]:
    """Relevancy of the decoder's tokens (B, T) and of the encoder's (B, N) for the rows that `rows` (B, T) weigh: equations 5
    to 10 of the paper; the entry of the row itself is zero.

    Args:
        decoder: its maps as they ran: "self" (B, H, T, T); "cross" (B, H, T, N); or of one softmax over both, "before", the
            encoder's keys first, or "behind" them its own, to which equations 5 and 6 apply.
        size: N.
        by_layer: the keys in the decoder's layer i are those of the encoder's layer i, else those behind the encoder.
    """
    every_map = [*encoder, *(one for _, one in decoder)]
    gradients = torch.autograd.grad(scores.sum(), every_map, allow_unused=True)
    means = [
        (torch.zeros_like(one) if gradient is None else (one * gradient).clamp(min=0)).mean(1).detach()
        for one, gradient in zip(every_map, gradients, strict=True)
    ]
    within = torch.eye(rows.shape[1]).expand(len(rows), -1, -1)
    behind = [torch.eye(size).expand(len(rows), -1, -1)]
    for mean in means[: len(encoder)]:
        behind.append(behind[-1] + mean @ behind[-1])
    between = torch.zeros(len(rows), within.shape[-1], size)
    for layer, ((kind, _), mean) in enumerate(zip(decoder, means[len(encoder) :], strict=True)):
        key_rows = behind[layer if by_layer else -1]
        if kind == "cross":
            between = between + _normalized(within).transpose(1, 2) @ mean @ _normalized(key_rows)
            continue
        inside = {"self": mean, "before": mean[..., size:], "behind": mean[..., : rows.shape[1]]}[kind]
        across = {"self": None, "before": mean[..., :size], "behind": mean[..., rows.shape[1] :]}[kind]
        within, between = within + inside @ within, between + inside @ between
        between = between if across is None else between + across @ key_rows
    decoded, encoded = (rows[:, None] @ within)[:, 0], (rows[:, None] @ between)[:, 0]
    return decoded.masked_fill(rows == 1, 0.0), encoded


def _normalized(relevancy: Tensor) -> Tensor:
    """Equations 8 and 9."""
    eye = torch.eye(relevancy.shape[-1])
    beside = relevancy - eye
    total = beside.sum(-1, keepdim=True)
    return beside / total.masked_fill(total == 0, 1.0) + eye
