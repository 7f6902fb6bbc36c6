"""Biases of pairs of token groups, and gates of heads, in the public calls of attention.

Kernels do not see the queries' groups: they take row_bias (B, H, N, G), the bias of each query by the group of the key. Two
operators, each the gradient of the other, convert between group_bias and row_bias, so a bias has derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import FLOAT_DTYPES, check_device, check_tensor, describe, readable
from vlattn_fast._ground.groups import rows_of_groups, sums_of_groups
from vlattn_fast._ground.tensors import as_dtype, cast_float_mask, compute_dtype
from vlattn_fast.backends.inputs import Attention, GroupRowsInputs, GroupSumsInputs
from vlattn_fast.dispatch.call import AttentionArguments
from vlattn_fast.ops._registration import define, differentiable

_NAMES = "query_groups", "key_groups", "group_bias"


def check_groups(x: AttentionArguments) -> None:
    """query_groups, key_groups and group_bias come together and fit query and key."""
    query = x.query
    if x.group_bias is None and x.query_groups is None and x.key_groups is None:
        return
    for name in _NAMES:
        if getattr(x, name) is None:
            raise ValueError(f"{name} must be given if one of query_groups, key_groups and group_bias is; got None")
    bias: Any = x.group_bias
    check_tensor("group_bias", bias, shape="(H, Gq, Gk) or (B, H, Gq, Gk)")
    check_device("group_bias", bias, "query", query)
    if bias.dtype not in FLOAT_DTYPES:
        raise TypeError(f"group_bias must be floating point (added; -inf masks); got {describe(bias)}")
    shape, full = tuple(bias.shape), tuple(query.shape[:2])
    if len(shape) not in (3, 4) or shape[:-2] != full[4 - len(shape) :] or 0 in shape[-2:]:
        raise ValueError(
            f"group_bias must have shape (H, Gq, Gk) or (B, H, Gq, Gk) with (B, H) = {full}, Gq > 0 and Gk > 0; "
            f"got {describe(bias)}"
        )
    check_token_groups("query_groups", x.query_groups, query, query.shape[2], "N")
    check_token_groups("key_groups", x.key_groups, query, x.key.shape[2], "M")


def check_token_groups(name: str, groups: Any, query: Tensor, tokens: int, size: str) -> None:
    """`groups` is int64 of shape (tokens) or (B, tokens). `size`: the letter of that number."""
    check_tensor(name, groups, shape=f"({size}) or (B, {size})")
    if groups.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 (-1 = no group); got {describe(groups)}")
    check_rows(name, groups, query, tokens, size)


def check_head_gate(gate: Any, query: Tensor) -> None:
    """head_gate (H,) or (B, H) has a factor for each head of query (B, H, N, D), or is None."""
    if gate is None:
        return
    check_tensor("head_gate", gate, shape="(H,) or (B, H)")
    if gate.dtype not in FLOAT_DTYPES:
        raise TypeError(f"head_gate must be floating point; got {describe(gate)}")
    check_rows("head_gate", gate, query, query.shape[1], "H")


def check_rows(name: str, x: Tensor, query: Tensor, length: int, size: str) -> None:
    """`x` has the shape (length) or (B, length), and query's device. `size`: the letter of the length."""
    check_device(name, x, "query", query)
    full = query.shape[0], length
    if x.dim() not in (1, 2) or tuple(x.shape) != full[2 - x.dim() :]:
        raise ValueError(f"{name} must have shape ({size}) or (B, {size}) with (B, {size}) = {full}; got {describe(x)}")


def check_range(name: str, groups: Tensor, num_groups: int) -> None:
    """Raises ValueError unless `groups` holds indices of groups, or -1. Checks only values that no device makes it wait for."""
    if groups.device.type != "cpu" or groups.numel() == 0 or not readable(groups):
        return
    low, high = (int(x) for x in groups.aminmax())
    if low < -1 or high >= num_groups:
        raise ValueError(f"{name} must hold values from -1 (no group) to below {num_groups}; got values from {low} to {high}")


def check_ranges(query_groups: Tensor | None, key_groups: Tensor | None, group_bias: Tensor | None) -> None:
    """`check_range` of the groups of queries and keys, which come with a bias."""
    if query_groups is not None and key_groups is not None and group_bias is not None:
        check_range("query_groups", query_groups, group_bias.shape[-2])
        check_range("key_groups", key_groups, group_bias.shape[-1])


def resolve_groups(key_groups: Tensor | None, num_groups: int | None) -> int:
    """Returns the number of groups of keys. Uses values of key_groups if that waits for no device, or if no other argument tells
    the number."""
    if key_groups is None:
        return 0
    if not readable(key_groups):
        if num_groups is None:
            raise ValueError(
                "num_groups must be an integer if the values of key_groups are not available (torch.compile and other traces, "
                "torch.func.vmap, CUDA graph capture, meta and fake tensors); got None"
            )
        return num_groups
    if num_groups is not None and key_groups.device.type != "cpu":
        return num_groups
    low, high = _range(key_groups)
    if low < -1 or (num_groups is not None and high >= num_groups):
        limit = "the number of groups" if num_groups is None else f"num_groups = {num_groups}"
        raise ValueError(f"key_groups must hold values from -1 (no group) to below {limit}; got values from {low} to {high}")
    return high + 1 if num_groups is None else num_groups


def _range(groups: Tensor) -> tuple[int, int]:
    """The least and the largest value."""
    if groups.numel() == 0:
        return -1, -1
    low, high = groups.aminmax()
    if groups.device.type == "cpu":
        return int(low), int(high)
    return tuple(torch.stack([low, high]).tolist())  # one transfer


def group_bias_inputs(
    query: Tensor, query_groups: Tensor | None, key_groups: Tensor | None, group_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Returns row_bias (B, H, N, G) and key_groups (B, M), as backends take them, or None and None."""
    if group_bias is None or query_groups is None or key_groups is None:
        return None, None
    check_ranges(query_groups, key_groups, group_bias)
    batch, dtype = query.shape[0], compute_dtype(query)
    table = cast_float_mask(group_bias, dtype).expand(batch, *group_bias.shape[-3:]).contiguous()
    query_groups, key_groups = (groups.expand(batch, -1).contiguous() for groups in (query_groups, key_groups))
    return _rows_op(GroupRowsInputs(table, groups=query_groups)), key_groups


def bias_arguments(x: Attention) -> dict[str, Tensor | None]:
    """Returns arguments of public calls that give an operator this row_bias (B, H, N, G): each query is a group. Empty without
    one."""
    if x.row_bias is None:
        return {}
    query_groups = torch.arange(x.row_bias.shape[2], device=x.row_bias.device)
    return {"query_groups": query_groups, "key_groups": x.key_groups, "group_bias": x.row_bias}


def gated(out: Tensor, gate: Tensor) -> Tensor:
    """The output (B, H, N, Dv) times the gates of the heads, (H,) or (B, H)."""
    return as_dtype(out * as_dtype(gate, compute_dtype(out))[..., None, None], out.dtype)


def _rows_fake(inputs: GroupRowsInputs) -> Tensor:
    table, groups = inputs
    return table.new_empty(*table.shape[:2], groups.shape[1], table.shape[3])


def _sums_fake(inputs: GroupSumsInputs) -> Tensor:
    rows, _, num_groups = inputs
    return rows.new_empty(*rows.shape[:2], num_groups, rows.shape[3])


_rows_op = define("group_rows", GroupRowsInputs, "Tensor", lambda inputs: rows_of_groups(*inputs), _rows_fake)
_sums_op = define("group_sums", GroupSumsInputs, "Tensor", lambda inputs: sums_of_groups(*inputs), _sums_fake)


def _save_rows(ctx: Any, inputs: GroupRowsInputs, output: Tensor) -> None:
    ctx.save_for_backward(inputs.groups)
    ctx.num_groups = inputs.table.shape[2]


def _save_sums(ctx: Any, inputs: GroupSumsInputs, output: Tensor) -> None:
    ctx.save_for_backward(inputs.groups)


def _to_table(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    (groups,) = ctx.saved_tensors
    return {"table": _sums_op(GroupSumsInputs(rows=grad, groups=groups, num_groups=ctx.num_groups))}


def _to_rows(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    (groups,) = ctx.saved_tensors
    return {"rows": _rows_op(GroupRowsInputs(table=grad, groups=groups))}


def _linear(operator: Callable[..., Tensor], field: str) -> Callable[..., Tensor | None]:
    """The jvp of an operator that is linear in this field."""
    return lambda inputs, tangents, outputs: operator(inputs._replace(**{field: tangents[field]}))


differentiable("group_rows", _to_table, _save_rows, _linear(_rows_op, "table"))
differentiable("group_sums", _to_rows, _save_sums, _linear(_sums_op, "rows"))
