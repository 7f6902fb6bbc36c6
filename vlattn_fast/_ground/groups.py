"""Groups of tokens: a row of a table for each token, and sums over the tokens of each group.

groups (B, N) holds the index of each token's group; out-of-range indices, such as -1, mean "no group".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MEMBERS = 1 << 22  # the elements of a membership, at most: 16 MB in float32


def rows_of_groups(table: Tensor, groups: Tensor) -> Tensor:
    """(B, H, G, K) and (B, N): the row of each token's group, (B, H, N, K), and zeros for a token without one."""
    batch, heads, num_groups, columns = table.shape
    first = torch.arange(batch * heads, device=table.device).view(batch, heads, 1) * (num_groups + 1)
    index = first + _index(groups, num_groups)[:, None]
    rows = F.pad(table, (0, 0, 0, 1)).flatten(0, 2).index_select(0, index.flatten())  # gather takes three times as long
    return rows.view(batch, heads, groups.shape[1], columns)


def columns_of_groups(table: Tensor, groups: Tensor) -> Tensor:
    """(B, H, N, G) and (B, M): the column of each token's group, (B, H, N, M), and zeros for a token without one."""
    padded, index = F.pad(table, (0, 1)), _index(groups, table.shape[3])
    return padded.gather(3, index[:, None, None].expand(-1, table.shape[1], table.shape[2], -1))


def mask_of_groups(query: Tensor, query_groups: Tensor, key_groups: Tensor, group_bias: Tensor) -> Tensor:
    """The bias (B, H, N, M) of each query (B, H, N, *) and key by their groups (B, N) and (B, M), from (B, H, Gq, Gk)."""
    table = group_bias.to(query.dtype).expand(len(query), *group_bias.shape[-3:])
    return columns_of_groups(rows_of_groups(table, query_groups), key_groups)


def _index(groups: Tensor, num_groups: int) -> Tensor:
    """Returns the groups, and for a token without one the index after the last, at which a table is padded with zeros."""
    return torch.where((groups >= 0) & (groups < num_groups), groups, num_groups)


def sums_of_groups(rows: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """(B, H, N, K) and (B, N): the sum of the rows of each group, (B, H, G, K).

    A product with the membership, instead of scatter_add, adds in a fixed order. Its zeros would make NaN of another group's Inf
    and NaN, so these are counted apart.
    """
    sums = _products(rows, groups, num_groups)
    if sums.device.type == "cpu" and sums.isfinite().all():  # here a look at the data is free
        return sums
    finite = rows.isfinite()
    parts = torch.where(finite, rows, 0.0), rows.isnan(), rows.isposinf(), rows.isneginf()
    counted = _products(torch.cat([part.to(rows.dtype) for part in parts], -1), groups, num_groups)
    sums, nan, above, below = counted.chunk(4, -1)
    limit = torch.where(above > 0, torch.inf, 0.0) - torch.where(below > 0, torch.inf, 0.0)
    return torch.where(nan > 0, torch.nan, sums + limit)


def _products(rows: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    step = max(1, _MEMBERS // max(1, groups.numel()))
    parts = []
    for g in range(0, max(1, num_groups), step):
        index = torch.arange(g, min(g + step, num_groups), device=groups.device)
        parts.append((groups[:, None, None, :] == index[:, None]).to(rows.dtype) @ rows)
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]
