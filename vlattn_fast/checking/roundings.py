"""The formula with other roundings: its error when it is not exact by luck."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


class OtherRoundings(TorchDispatchMode):
    """Moves half of the numbers that each operation of torch gives, forward and backward, to a neighbour in their dtype.

    Plain formulas are exact by luck on round numbers: equal logits give P = 1 / M to the last bit, a single key gives P = 1, and
    differences then cancel to 0. Another order of the same sums lacks this luck, and so does the formula under this mode.
    Where the formula had no luck, the mode makes its error two to three times as large. Zeros stay zero and equal numbers
    stay equal, so masks and ties stay. Without `keeps_ties` equal numbers may become different: some CPUs sum the columns
    at the edge of a matrix product in another order than the inner columns, and equal keys get logits an ulp apart.

    A softmax and its logarithm are as in streaming kernels, P = exp(logit - lse), with lse rounded to the dtype of sums. In calls
    of 16 bits (`dtype`) the backward pass takes delta = sum(dO * O) from the rounded output, as in FlashAttention.
    """

    def __init__(self, seed: str, dtype: torch.dtype, keeps_ties: bool = True) -> None:
        super().__init__()
        self.chance, self.dtype, self.keeps_ties = random.Random(seed), dtype, keeps_ties

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return result  # a view, or an operation in place
        if func is torch.ops.aten.clone.default:
            return result  # a copy is exact
        if func is torch.ops.aten._softmax.default:
            sums = torch.promote_types(args[0].dtype, torch.float32)
            result = (result * torch.exp(-self._error_of_lse(args[0], args[1], sums))).to(result.dtype)
        if func is torch.ops.aten._log_softmax.default:
            result = (result - self._error_of_lse(args[0], args[1], result.dtype)).to(result.dtype)
        if func is torch.ops.aten._log_softmax_backward_data.default:  # grad - P sum grad, with P = exp(log P)
            prob = torch.exp(args[1])
            result = result - (self._to_neighbours(prob) - prob) * args[0].sum(args[2], keepdim=True)
        if func is torch.ops.aten._softmax_backward_data.default and self.dtype.itemsize == 2:
            summed = (args[0] * args[1]).abs().sum(args[2], keepdim=True).to(self.dtype)
            error = args[1] * (self._to_neighbours(summed) - summed)  # of delta in the gradient of the logits, P (dP - delta)
            result = result + error.to(args[0].dtype)
        if isinstance(result, Tensor):
            return self._to_neighbours(result)
        if isinstance(result, (tuple, list)):
            return type(result)(self._to_neighbours(x) if isinstance(x, Tensor) else x for x in result)
        return result

    def _error_of_lse(self, logits: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        exact = torch.logsumexp(logits.double(), dim, keepdim=True)
        off = self._to_neighbours(exact.to(dtype)).double() - exact
        # Beside finite masks of -1e9, lse holds no digit of the logits; no kernel may use it so.
        return torch.where(exact.abs() < 1e4, off, 0.0)

    def _to_neighbours(self, x: Tensor) -> Tensor:
        """`x` with half of its numbers a step up or down, chosen by their magnitude, or by their index without `keeps_ties`."""
        if not x.is_floating_point() or x.numel() == 0 or x._is_zerotensor():  # autograd's zeros have no memory to read
            return x
        of = x.abs().view(INTEGERS[x.dtype.itemsize]) if self.keeps_ties else torch.arange(x.numel(), device=x.device)
        top = of.long() * (2 * self.chance.getrandbits(62) + 1) + self.chance.getrandbits(63) >> 62  # of all bits
        away = ((top == 0).double() - (top == 1).double()).view(x.shape)  # each a quarter
        wide, eps, least = x.double(), torch.finfo(x.dtype).eps, torch.finfo(x.dtype).smallest_normal
        step = wide.abs().clamp(min=least) * eps  # numbers below the least normal one, of float16 6e-5, are as far apart as there
        neighbours = (wide + wide.sign() * away * step).to(x.dtype)
        return torch.where(neighbours.isfinite() & (away != 0), neighbours, x)  # the largest number has none beyond it


def unluckiest(formulas: Sequence[Mapping[str, Tensor]], exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The variant of each output with the largest error: a formula of few numbers has no error under some roundings."""

    def error(x: Tensor, truth: Tensor) -> float:
        return float((x.detach().double() - truth.detach()).nan_to_num(0.0, 0.0, 0.0).square().sum())

    return {name: max((formula[name] for formula in formulas), key=partial(error, truth=truth)) for name, truth in exact.items()}
