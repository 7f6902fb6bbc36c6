"""Attention sinks: one more logit in the softmax's sum of each head, whose probability no value gets (Xiao et al., ICLR 2024).

softmax over [logits, sink] is the softmax over the logits times what the sink leaves to the keys, and its log-sum-exp is that of
both. So a sink only needs what every kernel returns, (out, lse), and autograd does the rest. B batch, H heads, N queries. The
sink's logit is broadcastable to (B, H, N), e.g. (H, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from vlattn_fast._ground.tensors import as_dtype, compute_dtype


def with_sink(out: Tensor, lse: Tensor, logit: Tensor) -> Tensor:
    """Returns the output (B, H, N, Dv) of attention with a sink, from output and log-sum-exp (B, H, N) of attention without one.
    torch's function modes intercept the call, as they intercept functions of torch."""
    if has_torch_function((out, lse, logit)):
        return handle_torch_function(with_sink, (out, lse, logit), out, lse, logit)
    share = as_dtype(share_of_keys(lse, logit), compute_dtype(out))
    return as_dtype(out * share[..., None], out.dtype)


def share_of_keys(lse: Tensor, logit: Tensor) -> Tensor:
    """Returns sum_j e^s_j / (sum_j e^s_j + e^sink), (B, H, N); 0 for a query without a visible key, even if its sink is -inf."""
    x = _above_sink(lse, logit)
    # The gradient is a share times 1 minus it, which has no digits if the share rounds to 1: the smaller share is taken.
    return torch.where(x > 0, 1 - (-x).sigmoid(), x.sigmoid())


def lse_with_sink(lse: Tensor, logit: Tensor) -> Tensor:
    """Returns log(e^lse + e^sink), (B, H, N): the sink for a query without a visible key."""
    x, logit = _above_sink(lse, logit), as_dtype(logit, lse.dtype)
    # torch's own second derivatives, if the two are far apart, are NaN for logaddexp and without digits for logsigmoid
    smaller = torch.exp(torch.where(x > 0, -x, x)).log1p()
    return smaller + torch.where(x > 0, lse, torch.where(torch.isneginf(logit), -torch.inf, logit))


def _above_sink(lse: Tensor, logit: Tensor) -> Tensor:
    """Returns lse - sink, (B, H, N); -inf for a query without a visible key, even if its sink is -inf."""
    return torch.where(torch.isneginf(lse), -torch.inf, lse - as_dtype(logit, lse.dtype))
