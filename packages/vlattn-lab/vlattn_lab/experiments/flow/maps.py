"""The maps of every attention call of a run, and their gradients, which fused attention never stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlattn_fast.models import CLIPMapper
from vlattn_lab.experiments.flow.samples import Asked


@dataclass(frozen=True)
class Map:
    """One call: finished logits and the gradient dA of their softmax A, (B, H, N, M), and Σ out · d out of each head, (B, H)."""

    logits: Tensor
    gradient: Tensor
    head: Tensor


class _Calls(TorchFunctionMode):
    """Keeps the arguments and the output of each attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []  # logits, value, output

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.scaled_dot_product_attention:
            with torch.no_grad():
                output = output if output.requires_grad else output.requires_grad_()  # of a frozen encoder
                self.calls.append((_logits(*args, **(kwargs or {})), args[2], output))
        return output


def _logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """(B, H, N, M), of which torch's function takes the softmax."""
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        hidden = torch.zeros_like(logits).masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask
        logits = logits + hidden
    return logits


def stored_maps(model: CLIPMapper, asked: Asked) -> dict[tuple[str, int], Map]:
    """The maps of a run, by the name of `PAIRS` and the layer. The score is that of `va.attribute_edges`: the answer's logit."""
    with _Calls() as seen, torch.enable_grad():
        score = asked.read(model(**asked.inputs).logits).amax(-1).sum()
    gradients = torch.autograd.grad(score, [output for _, _, output in seen.calls])
    maps = {}
    for place, (logits, value, output), gradient in zip(_places(model), seen.calls, gradients, strict=True):
        maps[place] = Map(logits, gradient @ value.detach().mT, (output.detach() * gradient).sum((-2, -1)))
    return maps


def _places(model: CLIPMapper) -> list[tuple[str, int]]:
    """The pair and the layer of each call, in the order in which they run."""
    encoders: tuple[Any, Any] = (model.vision, model.text)
    vision, text = (len(part.encoder.layers) for part in encoders)
    towers = [("vision", layer) for layer in range(vision)] + [("text", layer) for layer in range(text)]
    return towers + [(pair, text + layer) for layer in range(len(model.layers)) for pair in ("text", "cross")]
