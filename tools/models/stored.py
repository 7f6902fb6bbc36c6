"""The published procedure on stored maps, for any model: what `va.explain` must equal.

A forward pass with eager attention keeps its maps, and one backward pass gives their gradients. The rule is Chefer, Gur, Wolf
(ICCV 2021), equations 5 and 6, for one row. Nothing of the package makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tools.models.mixers import Mixed, Mixers

SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax)
PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__, torch.einsum, functional.linear}


class Double(TorchFunctionMode):
    """Where a model asks for float32, as in norms, routers and softmaxes, it gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        return func(*map(_double, args), **{name: _double(value) for name, value in (kwargs or {}).items()})


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

    def of_size(self, size: int) -> list[Tensor | Mixed]:
        """The maps of `size` tokens."""
        return [m for m in self.maps if (m.map if isinstance(m, Mixed) else m).shape[-2:] == (size, size)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in SOFTMAX and result.ndim == 4:
            self.maps.append(result)
        if func is Tensor.__getitem__ and self.maps and args[0] is self.maps[-1]:  # without the sink's column
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


def stored_rows(maps: Sequence[Tensor | Mixed], scores: Tensor, rows: Tensor) -> Tensor:
    """The rows (B, N) of R = (I + Abar_L) ... (I + Abar_1) that `rows` (B, N) weigh, from maps (B, H, N, N), first to last. That
    of a layer with a convolution in front of its values is Abar times the convolution's, whose rows sum to one."""
    flat = [part for m in maps for part in ((m.map, m.before) if isinstance(m, Mixed) else (m,)) if part is not None]
    gradients = iter(torch.autograd.grad(scores.sum(), flat, allow_unused=True, retain_graph=True))
    means = list[list[Tensor]]()
    for m in maps:
        means.append([_mean(m.map if isinstance(m, Mixed) else m, next(gradients))])
        if isinstance(m, Mixed) and m.before is not None:
            means[-1].append(_mean(m.before, next(gradients), m.of_values))
    carried = rows[:, None]
    for mean, *before in reversed(means):
        step = carried @ mean
        for each in before:
            total = each.sum(-1, keepdim=True)
            itself = torch.eye(each.shape[-1]).expand_as(each)
            step = step @ torch.where(total == 0, itself, each / total.masked_fill(total == 0, 1.0))
        carried = carried + step
    return carried[:, 0].detach()


def _mean(stored: Tensor, gradient: Tensor | None, heads: Tensor | None = None) -> Tensor:
    """The mean over the heads, or some of them, of relu(A * dA)."""
    products = (torch.zeros_like(stored) if gradient is None else stored * gradient).clamp(min=0).detach()
    return (products if heads is None else products[:, heads]).mean(1)


def stored_rows_between(
    encoder: Sequence[Tensor], decoder: Sequence[Tensor], cross: Sequence[Tensor], scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Relevancy of the decoder's tokens (B, T) and of the encoder's (B, N) for the rows that `rows` (B, T) weigh: equations 5
    to 10 of the paper; the entry of the row itself is zero. Each layer of the decoder attends to itself, then to the encoder."""
    gradients = torch.autograd.grad(scores.sum(), [*encoder, *decoder, *cross], allow_unused=True)
    of_maps = [*encoder, *decoder, *cross]
    means = [
        (torch.zeros_like(one) if gradient is None else (one * gradient).clamp(min=0)).mean(1).detach()
        for one, gradient in zip(of_maps, gradients, strict=True)
    ]
    within = torch.eye(rows.shape[1]).expand(len(rows), -1, -1)
    of_keys = torch.eye(cross[0].shape[-1]).expand(len(rows), -1, -1)
    for mean in means[: len(encoder)]:
        of_keys = of_keys + mean @ of_keys
    between = torch.zeros(len(rows), within.shape[-1], of_keys.shape[-1])
    for inside, across in zip(means[len(encoder) :][: len(decoder)], means[len(encoder) + len(decoder) :], strict=True):
        within, between = within + inside @ within, between + inside @ between
        between = between + _normalized(within).transpose(1, 2) @ across @ _normalized(of_keys)
    decoded, encoded = (rows[:, None] @ within)[:, 0], (rows[:, None] @ between)[:, 0]
    return decoded.masked_fill(rows == 1, 0.0), encoded


def _normalized(relevancy: Tensor) -> Tensor:
    """Equations 8 and 9."""
    eye = torch.eye(relevancy.shape[-1])
    beside = relevancy - eye
    total = beside.sum(-1, keepdim=True)
    return beside / total.masked_fill(total == 0, 1.0) + eye
