"""Masks of every kind and shape, alone and joined: every operator that has them gives the formula, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ops.properties import Turn, calls, check, every_choice

LOWEST = torch.finfo(torch.float32).min
WITHOUT = {
    "paged_attention_statistics": "requests have lengths and a window",
    "congruence_loss": "it masks tokens, not pairs",
    "stacked_cross_attention": "it has lengths",
    "maxsim": "it masks tokens, not pairs",
    "recurrent_step": "a recurrence is causal",
    "relevancy_residual": "it adds token by token",
    ("score_attention", "sdpa"): "it has masks of keys alone: tests/ops/test_sdpa.py",
}


def visible(*shape: int) -> Tensor:
    """Most pairs; of the second query none."""
    seen = torch.rand(shape) < 0.7
    seen[..., 1 % shape[-2], :] = False
    return seen


def hidden(*shape: int) -> Tensor:
    return torch.randn(shape).masked_fill(~visible(*shape), -torch.inf)


def real(batch: int, keys: int) -> Tensor:
    """Padding between the first sample's keys and after them; all keys of the second."""
    mask = (torch.arange(keys) % 3 != 1).repeat(batch, 1)
    mask[0, -2:] = mask[1] = False
    return mask


SHAPES = ("", "N1", "1M", "1NM", "B1N1", "H1M", "1HNM", "BHNM")  # that broadcast to (B, H, N, M)


def shaped(shape: str, **sizes: int) -> dict[str, Tensor]:
    size = [{**sizes, "1": 1}[letter] for letter in shape]
    return {"attn_mask": torch.randn(size) if len(shape) % 2 else torch.rand(size) < 0.7}


MASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "all": lambda B, H, N, M: {"attn_mask": hidden(N, M), "key_mask": real(B, M), "is_causal": True},
    "bool": lambda B, H, N, M: {"attn_mask": visible(B, 1, N, M)},
    "float": lambda B, H, N, M: {"attn_mask": hidden(B, 1, N, M)},
    "bool, strided": lambda B, H, N, M: {"attn_mask": visible(N, 2 * M)[:, ::2]},
    "float, transposed": lambda B, H, N, M: {"attn_mask": hidden(M, N).mT},
    "float, expanded": lambda B, H, N, M: {"attn_mask": torch.randn(B, 1, 1, M).expand(B, 1, N, M)},
    "finite numbers over a row": lambda B, H, N, M: {"attn_mask": torch.where(visible(N, M), torch.randn(N, M), LOWEST)},
    "keys": lambda B, H, N, M: {"key_mask": real(B, M)},
    "keys of each sample": lambda B, H, N, M: {"key_mask": torch.arange(M) % torch.tensor([[2], [3]]) == 0},
    "causal": lambda B, H, N, M: {"is_causal": True},
    "keys and causal": lambda B, H, N, M: {"key_mask": real(B, M), "is_causal": True},
    "no pair": lambda B, H, N, M: {"attn_mask": torch.zeros(N, M, dtype=torch.bool)},
    **{f"shape {shape}": partial(shaped, shape) for shape in SHAPES},
}


@every_choice(list(MASKS), without=WITHOUT)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, in the interpreter: finfo.min log2(e)
@pytest.mark.usefixtures("small_tiles")
def test_masks(backend: str, operator: str, turn: Turn) -> None:
    for call, name in turn.meet(calls(operator, backend)):
        (b, h, n, _), m = call.tensors["query"].shape, call.tensors["key"].shape[2]
        if "H" in name and (operator == "indexer_divergence" or "other heads" in call.title):
            continue  # a mean over heads has one mask for all
        call = replace(call, name=f"{call.name}, {name}", options={**call.options, **MASKS[name](B=b, H=h, N=n, M=m)})
        assert not any(x.isnan().any() for x in check(call, backend).values()), call.title
