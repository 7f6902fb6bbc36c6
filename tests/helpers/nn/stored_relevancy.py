"""The published way to train on relevancy: every layer's map is stored, and plain autograd does the rest."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

STORED = "stored_maps"
MAPS: list[Tensor] = []  # of all layers, in the order in which they ran
Terms = list[tuple[Tensor, Tensor]]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """transformers' attention contract; the map (B, H, N, M) is appended to `MAPS`."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    MAPS.append((scores if mask is None else scores + mask).softmax(-1))
    return (MAPS[-1] @ value).transpose(1, 2).contiguous(), MAPS[-1]


def _register() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.masking_utils import eager_mask

    transformers.AttentionInterface.register(STORED, attention)
    transformers.AttentionMaskInterface.register(STORED, eager_mask)


_register()


@contextlib.contextmanager
def terms(model: Any, wanted: bool) -> Iterator[Terms]:
    """The residual stream and the branch behind each attention of a ViT that runs within."""
    sums: Terms = []
    streams: list[Tensor] = []
    handles = []
    for layer in model.vit.layers if wanted else ():
        handles.append(layer.register_forward_pre_hook(lambda _, args: streams.append(args[0])))
        handles.append(layer.attention.register_forward_hook(lambda _, args, output: sums.append((streams[-1], _first(output)))))
    yield sums
    for handle in handles:
        handle.remove()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def stored_row(maps: Sequence[Tensor], sums: Terms, score: Tensor, row: Tensor, method: str, higher_order: bool) -> Tensor:
    """The row (B, N) from `row` (B, 1, N): Chefer et al. 2021, rollout, or the contributions of both terms of each sum."""
    branches = [branch for _, branch in sums]
    grads = torch.autograd.grad(score, [*maps, *branches], retain_graph=True, create_graph=higher_order)
    slopes, of_branches = grads[: len(maps)], grads[len(maps) :]
    for number in reversed(range(len(maps))):
        if method == "rollout":
            row = (row + row @ maps[number].mean(1)) / 2
            continue
        abar = (maps[number] * slopes[number]).relu().mean(1)
        if method == "gradient":
            row = row + row @ abar
            continue
        stream, branch = ((x * of_branches[number]).sum(-1).abs() for x in sums[number])
        both = stream + branch
        around = torch.where(both == 0, 0.5, stream / both.masked_fill(both == 0, 1.0))[:, None]
        total = abar.sum(-1, keepdim=True)
        row = row * around + (row * (1 - around)) @ (abar / total.masked_fill(total == 0, 1.0))
    return row[:, 0]
