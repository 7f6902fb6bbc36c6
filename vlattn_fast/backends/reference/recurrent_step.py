"""The map of a linear recurrence, and relevancy through it, with whole maps.

With its queries, keys and gates held fixed a recurrence is linear in the values: o_t = sum_{s <= t} A_ts v_s, with one number
A_ts per head. So it has a map, like attention: Zimerman, Ali, Wolf, "Explaining Modern Gated-Linear RNNs via a Unified Implicit
Attention Formulation", ICLR 2025, section 3; only for Mamba: Ali, Zimerman, Wolf, "The Hidden Attention of Mamba Models", 2024.
The map of the delta rule is our reading: the papers have none.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T                                                          without beta
    S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T                            with beta (delta rule)
    o_t = S_t^T q_t + d_t v_t                                                                    S_t (Dk, Dv)

Shapes: query (B, Hq, N, Dk), key (B, Hk, N, Dk), value and grad_output (B, H, N, Dv), gates (B, H, N); A (B, H, N, N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.checks import check_choice
from vlattn_fast._ground.tensors import compute_dtype, expand_heads, over_sums, product
from vlattn_fast.backends.reference.relevancy_attention import RULES, head_mean


def recurrent_map(
    query: Tensor, key: Tensor, *, log_decay: Tensor | None = None, beta: Tensor | None = None, diagonal: Tensor | None = None
) -> Tensor:
    """Computes the map A (B, H, N, N) of a linear recurrence with fixed queries, keys and gates: o_t = sum_{s <= t} A_ts v_s.

    Memory is that of the map, O(B H N^2). To carry relevancy through a recurrence in O(N), use `vlattn_fast.recurrent_step`.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key = torch.randn(2, 1, 2, 5, 8)
        >>> A = va.reference.recurrent_map(query, key, log_decay=-torch.rand(1, 2, 5))
        >>> A.shape, bool((A.triu(1) == 0).all())
        (torch.Size([1, 2, 5, 5]), True)

    The recurrence is S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t + d_t v_t, with a_t = exp(log_decay_t). With beta it is
    the delta rule, which writes beta_t k_t (v_t - S^T k_t)^T, S the decayed state, instead of k_t v_t^T.

    Args:
        query, key: (B, Hq, N, Dk) and (B, Hk, N, Dk), as they enter the recurrence: scaled and normalised. Hq and Hk divide H.
        log_decay: (B, H, N), or (B, H, N, Dk) for a gate per key feature. Default: 0, no decay.
        beta: (B, H, N), how much of a value is written. Default: no delta rule.
        diagonal: (B, H, N), what goes from a token's value straight to its output. Default: 0.

    Returns:
        A in the dtype of sums, float32 for 16-bit inputs. H is the number of heads of the gates, without gates the larger of
        Hq and Hk. A later token has 0, even if an input is NaN. NaN in a token's query fills its row, NaN in its key its
        column, and what the recurrence carries past a NaN is NaN.
    """
    dtype, num_heads = compute_dtype(query), heads_of(query, key, log_decay, beta, diagonal)
    query, key = (expand_heads(x, num_heads).to(dtype) for x in (query, key))
    log_decay, beta = (None if x is None else x.to(dtype) for x in (log_decay, beta))
    whole, _ = sweep(query[:, :, :0], query, key, log_decay, beta)
    return whole if diagonal is None else whole + torch.diag_embed(diagonal.to(dtype))


def sweep(rows: Tensor, query: Tensor, key: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """Takes the states z of queries through tokens, from the last to the first: A_ts = w_s z_t . k_s, w_s = beta_s or 1.

    rows (..., R, Dk) are the states of later queries, query and key (..., N, Dk) those of the tokens; log_decay (..., N) or
    (..., N, Dk), beta (..., N). Returns the columns of A (..., N + R, N), and all states before the first token (..., N + R, Dk).
    """
    decay = None if log_decay is None else (log_decay if log_decay.dim() == key.dim() else log_decay[..., None]).exp()
    weight = None if beta is None else beta[..., None]
    queries, keys, decays, weights = ([] if x is None else x.split(1, -2) for x in (query, key, decay, weight))
    columns = []
    for s in reversed(range(query.shape[-2])):
        rows = torch.cat([queries[s], rows], -2)  # z_s = q_s
        dots = product(rows, keys[s].mT)
        if beta is not None:
            dots = dots * weights[s]
            rows = rows - dots * keys[s]  # z <- z - beta_s (z . k_s) k_s
        columns.append(F.pad(dots, (0, 0, s, 0)))
        if decay is not None:
            rows = rows * decays[s]  # z <- diag(a_s) z
    return torch.cat(columns[::-1], -1) if columns else rows.new_zeros(*rows.shape[:-1], 0), rows


def recurrent_step(
    relevancy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    diagonal: Tensor | None = None,
    rule: str = "gradient",
    row_normalize: bool = False,
) -> Tensor:
    """Computes the formula of vlattn_fast.recurrent_step: relevancy @ Abar, (B, T, N) -> (B, T, N).

    Abar = mean_h relu(A * dA), or the mean of the rows of |A| divided by their sums.
    """
    check_choice("rule", rule, RULES)
    num_heads = heads_of(query, key, value, log_decay, beta, diagonal)
    query = expand_heads(query, num_heads)
    each = recurrent_map(query, key, log_decay=log_decay, beta=beta, diagonal=diagonal)
    abar = mean_of_heads(each, value, grad_output, rule, row_normalize)
    return product(relevancy.to(abar.dtype), abar).to(relevancy.dtype)


def mean_of_heads(each: Tensor, value: Tensor | None, grad_output: Tensor | None, rule: str, row_normalize: bool) -> Tensor:
    """Abar (B, i, N) of the last rows of the maps, (B, H, i, N), with these rows of grad_output."""
    if rule == "attention":
        return head_mean(over_sums(each.abs()), None, row_normalize)
    if value is None or grad_output is None:
        raise ValueError("value and grad_output must be given for rule='gradient'; got None")
    grad_each = product(grad_output.to(each.dtype), value.to(each.dtype).mT)  # dA_ts = dO_t . v_s
    return head_mean(each, torch.tril(grad_each, each.shape[3] - each.shape[2]), row_normalize)


def heads_of(*tensors: Tensor | None) -> int:
    """Returns the number of heads of a call, which those of query and key divide."""
    return max(x.shape[1] for x in tensors if x is not None)
