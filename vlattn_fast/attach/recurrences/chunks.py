"""A linear recurrence in plain PyTorch, for readers that need its state: chunks of tokens as maps, a state between them."""

from __future__ import annotations

import torch
from torch import Tensor


def recurred(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, chunk: int = 64) -> Tensor:
    """o_t = S_t^T q_t, (B, H, N, Dv), with S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T; log_decay is (B, H, N)."""
    state, outputs = (key[:, :, :0].mT @ value[:, :, :0]), [value[:, :, :0]]
    parts = (tensor.split(chunk, 2) for tensor in (query, key, value, log_decay))
    for q, k, v, decay in zip(*parts, strict=True):
        since = decay.cumsum(-1)
        within = (since[..., None] - since[..., None, :]).tril().exp().tril()
        outputs.append((q @ k.mT * within) @ v + since[..., None].exp() * (q @ state))
        left = since[..., -1:]
        state = left[..., None].exp() * state + (k * (left - since)[..., None].exp()).mT @ v
    return torch.cat(outputs, 2)
