"""A call through which tokens reach one another without a softmax: a recurrence, maybe after a short convolution, or the
convolution alone. For relevancy it works like an attention call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast._ground.tensors import compute_dtype, over_sums
from vlattn_fast.attach.recurrences.reading import Convolution
from vlattn_fast.interpret.relevancy.traced_call import Recursion, TracedCall
from vlattn_fast.ops.recurrent_step import recurrent_step

_GATES = ("log_decay", "beta", "diagonal")


@dataclass(frozen=True, eq=False)
class MixingCall(TracedCall):
    """One call of a recurrence or of a convolution. Its query, key and value are those of the map; of only a convolution, whose
    channels are heads with Dv = 1, all three are the values (B, C, N, 1)."""

    is_mixing: ClassVar[bool] = True

    mixer: Any = None  # its map, a Recurrence or a Convolution
    # In front of the values: a banded map of its own, with rows that sum to one. It neither makes nor loses relevancy.
    convolution: Convolution | None = None
    run: Callable[[Tensor], Tensor] | None = None  # the output for other values
    differentiable: bool = False  # what the score's gradient makes of the convolution has a gradient, too

    def over_row_sum(self) -> Any:
        return 0.5  # by rule "attention" the rows are divided by their sums

    def mean_map(self, grad_output: Tensor) -> Tensor:
        eye = torch.eye(self.tokens, dtype=compute_dtype(self.query), device=self.query.device)
        return self._step(eye.expand(len(self.query), -1, -1), grad_output, Recursion("gradient"))

    def rows_of_heads(self, start: Tensor, grad_output: Tensor | None) -> Tensor:
        """start (B, 1, N) @ relu(A_h * dA_h) of each head, (B, H, N); without a gradient @ |A_h|, its rows over their sums."""
        (batch, heads), rule = self.value.shape[:2], "attention" if grad_output is None else "gradient"
        rows = self._of_map(start.repeat_interleave(heads, 0), grad_output, Recursion(rule), apart=True)
        return self._through_convolution(rows.view(batch, heads, -1), grad_output, rule)

    # --- the map ---

    def _step(self, relevancy: Tensor, grad_output: Tensor | None, recursion: Recursion) -> Tensor:
        relevancy = relevancy.to(self.query.device)
        return self._through_convolution(self._of_map(relevancy, grad_output, recursion), grad_output, recursion.rule)

    def _of_map(self, relevancy: Tensor, grad_output: Tensor | None, recursion: Recursion, apart: bool = False) -> Tensor:
        """relevancy (B, T, N) @ Abar of the map; `apart`: (B * H, T, N), each head's row times its own."""
        by_gradient = recursion.rule == "gradient"
        if isinstance(self.mixer, Convolution):
            taps = [*self._taps(self.mixer, grad_output[..., 0] if by_gradient and grad_output is not None else None)]
            if not by_gradient:
                taps = [*over_sums(torch.stack(taps, -1)).unbind(-1)]
            band = torch.stack([tap.flatten(0, 1) if apart else tap.mean(1) for tap in taps], -1)
            return through_band(relevancy, over_sums(band) if recursion.row_normalize else band)
        gates = [getattr(self.mixer, name) for name in _GATES]
        tensors = self.query, self.key, *((self.value, grad_output) if by_gradient else (None, None)), *gates
        dtype, heads = compute_dtype(self.value), self.value.shape[1] if apart else None
        query, key, value, grad_output, *gates = (None if x is None else _each(x.to(dtype), heads) for x in tensors)
        assert query is not None and key is not None
        options: dict[str, Any] = {**dict(zip(_GATES, gates, strict=True)), "rule": recursion.rule}
        options["row_normalize"] = recursion.row_normalize
        if not self.mixer.reads_before:
            return recurrent_step(relevancy, query, key, value, grad_output, **options)
        # Each token becomes two: one that reads the state, and one after it that writes to it.
        options |= {"log_decay": _in_turn(options["log_decay"], "w"), "diagonal": _in_turn(options["diagonal"], "r")}
        relevancy, query, key = (_in_turn(x, of) for x, of in ((relevancy, "r"), (query, "r"), (key, "w")))
        value = None if value is None else _in_turn(value, "rw")
        grad_output = None if grad_output is None else _in_turn(grad_output, "r")
        return recurrent_step(relevancy, query, key, value, grad_output, **options).unflatten(-1, (-1, 2)).sum(-1)

    def _through_convolution(self, relevancy: Tensor, grad_output: Tensor | None, rule: str) -> Tensor:
        """relevancy (B, T, N) @ Abar of the convolution before it."""
        if self.convolution is None:
            return relevancy
        grad = None
        if rule == "gradient":
            assert grad_output is not None
            grad = self._value_gradient(grad_output).transpose(2, 3).flatten(1, 2)  # (B, H * Dv, N), the channels' order
        band = over_sums(torch.stack([tap.mean(1) for tap in self._taps(self.convolution, grad)], -1))
        itself = functional.pad(torch.zeros_like(band[..., 1:]), (0, 1), value=1.0)
        return through_band(relevancy, torch.where(band.sum(-1, keepdim=True) == 0, itself, band))

    def _value_gradient(self, grad_output: Tensor) -> Tensor:
        """The score's gradient at the values: the function is linear in them, and runs once more."""
        assert self.run is not None
        with torch.enable_grad():
            value = self.value.detach().requires_grad_()
            output = self.run(value)
            grad_output = grad_output.to(output.dtype)
            (grad,) = torch.autograd.grad(output, value, grad_output, create_graph=self.differentiable)
        return grad

    def _taps(self, convolution: Convolution, grad: Tensor | None) -> Iterator[Tensor]:
        """relu(K * dK) of the gradient at the output (B, C, N), else |K|, tap by tap: the entries (B, C, N) of each token u for
        token u - W + 1, then for the next one, up to itself. Padding, whose values are all zero, has none."""
        value, weight = (x.to(compute_dtype(convolution.value)) for x in (convolution.value, convolution.weight))
        value = value.detach() if grad is not None and not self.differentiable else value
        if grad is not None and convolution.projection is not None:
            grad = torch.einsum("bvn,vc->bcn", grad.to(value), convolution.projection.to(value))
        gate = torch.ones_like(value) if convolution.gate is None else convolution.gate.to(value)
        gate = gate if grad is None else gate * grad.to(gate)
        width, count = weight.shape[1], value.shape[2]
        for tap in range(width):
            earlier = functional.pad(value, (width - 1 - tap, 0))[..., :count]
            if grad is not None:
                yield (gate * weight[:, tap, None] * earlier).relu()
            else:
                yield (gate * weight[:, tap, None]).abs() * (earlier != 0).any(1, keepdim=True)

    # --- for the backward pass ---

    def detached(self) -> MixingCall:
        parts = {name: getattr(self, name).detach() for name in ("query", "key", "value")}
        return replace(self, **parts, mixer=_detached(self.mixer), convolution=_detached(self.convolution), ran=None)

    def apart(self) -> tuple[tuple[Tensor | None, ...], Callable[..., TracedCall]]:
        return (), self.detached

    def for_training(self, higher_order: bool) -> MixingCall:
        return replace(self, differentiable=higher_order, value=self.value if higher_order else self.value.detach(), ran=None)


def check_softmax(method: str, call: TracedCall) -> None:
    """ValueError for a call without one, by a method that has no rule for it."""
    if call.is_mixing:
        raise ValueError(
            "method must support recurrences and short convolutions, such as 'gradient' and 'rollout'; got "
            f"{method!r} and '{call.path}', which has no softmax"
        )


def _each(tensor: Tensor, heads: int | None) -> Tensor:
    """(B * heads, 1, N, ..), each head separately, of a tensor (B, H', N, ..) whose H' divide the heads; None = as it is."""
    if heads is None:
        return tensor
    return tensor.repeat_interleave(heads // tensor.shape[1], 1).flatten(0, 1)[:, None]


def _detached(mixer: Any) -> Any:
    """A map, of constants."""
    if mixer is None:
        return None
    return replace(mixer, **{name: value.detach() for name, value in vars(mixer).items() if isinstance(value, Tensor)})


def _in_turn(tensor: Tensor, of: str) -> Tensor:
    """(B, H, 2 N, ...) of (B, H, N, ...): each entry at the token that reads ("r" is in `of`) and at that which writes ("w")."""
    return torch.stack([tensor if one in of else torch.zeros_like(tensor) for one in "rw"], 3).flatten(2, 3)


def through_band(relevancy: Tensor, taps: Tensor) -> Tensor:
    """relevancy (B, T, N) @ the map whose row u has `taps` (B, N, W) at the tokens u - W + 1 to u."""
    width, count = taps.shape[-1], relevancy.shape[-1]
    by_taps = [
        functional.pad((relevancy * taps[:, None, :, w])[..., width - 1 - w :], (0, min(width - 1 - w, count)))
        for w in range(width)
    ]
    return torch.stack(by_taps).sum(0).to(relevancy.dtype)
