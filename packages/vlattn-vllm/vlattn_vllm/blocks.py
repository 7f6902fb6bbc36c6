"""The keys of vLLM's paged cache, as the operator takes them.

On a GPU a token's key lies in front of its value. On a CPU the engine's kernels lay the keys of a block out as their instruction
set wants them: one behind the other, transposed, or in tiles. No field says how. So the engine itself writes numbered keys into
a block, and their order is read there. An order with strides is a view of the cache. Any other order is undone for the blocks of
the requests that ask, and for these alone.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

_DIGITS = 128  # numbers that every floating type holds exactly


def keys_in_blocks(kv_cache: Tensor, isa: str | None, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """(key cache (blocks, Hkv, block size, D), block table), a view of the cache where its order has strides.

    kv_cache: (blocks, Hkv, block size, 2 * D). By an instruction set `isa`: a block's keys and then its values; None on GPUs.
        Of latent attention, which has no values: (blocks, block size, D).
    """
    if kv_cache.dim() == 3:
        return kv_cache[:, None], block_table
    blocks, heads, size, both = kv_cache.shape
    head_dim = both // 2
    if isa is None:
        return kv_cache[..., :head_dim], block_table
    order, strides = _order(isa, kv_cache.dtype, size, head_dim)
    if strides is not None:
        shape = blocks, heads, size, head_dim
        return kv_cache.as_strided(shape, (*kv_cache.stride()[:2], *strides)), block_table
    used, table = block_table.unique(return_inverse=True)
    keys = kv_cache[used].flatten(2)[..., order]
    return keys.unflatten(2, (size, head_dim)), table


def tokens_as_blocks(keys: Tensor, block_table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cache (blocks, Hkv, 1, D), block table (R, P)) in which these positions (R, P) are all keys of a request, without a copy.

    keys, block_table: of `keys_in_blocks`.
    """
    (blocks, heads, size, head_dim), (of_block, of_head, of_place, of_feature) = keys.shape, keys.stride()
    unit = math.gcd(of_block, of_place)  # from one view of a key to the next, of which few are keys
    count = 1 + ((blocks - 1) * of_block + (size - 1) * of_place) // unit
    view = keys.as_strided((count, heads, 1, head_dim), (unit, of_head, 1, of_feature))
    return view, (block_table.long().gather(1, positions // size) * of_block + positions % size * of_place) // unit


def contents(kv_cache: Tensor, isa: str | None, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the keys and the values (tokens, Hkv, D) of some blocks. kv_cache, isa: as above."""
    used = kv_cache[blocks]
    size, head_dim = used.shape[2], used.shape[3] // 2
    if isa is None:
        halves = used.split(head_dim, 3)
    else:
        flat = used.flatten(2).split(size * head_dim, 2)
        orders = [_order(isa, used.dtype, size, head_dim, of_values)[0] for of_values in (False, True)]
        halves = tuple(half[..., order].unflatten(2, (size, head_dim)) for half, order in zip(flat, orders, strict=True))
    keys, values = (half.transpose(1, 2).flatten(0, 1) for half in halves)
    return keys, values


@cache
def _order(
    isa: str, dtype: torch.dtype, size: int, head_dim: int, of_values: bool = False
) -> tuple[Tensor, tuple[int, int] | None]:
    """Where number (token, feature) of a block lies (size * head_dim), and its strides if it has any."""
    numbers = torch.arange(size * head_dim)
    source, power = torch.zeros_like(numbers), 1
    written = _values_written if of_values else _written
    while power < len(numbers):
        source += written((numbers // power % _DIGITS).to(dtype).view(size, 1, head_dim), isa).long() * power
        power *= _DIGITS
    order = torch.empty_like(numbers)
    order[source] = numbers
    if not torch.equal(source.sort().values, numbers):
        raise RuntimeError(f"the cache of the instruction set {isa!r} with {dtype} has no order that could be read")
    table = order.view(size, head_dim)
    strides = int(table[1, 0]), int(table[0, 1])
    lies = torch.arange(size)[:, None] * strides[0] + torch.arange(head_dim) * strides[1]
    return order, strides if torch.equal(table, lies) else None


def _written(key: Tensor, isa: str) -> Tensor:
    """The keys' half of a block, into which the engine wrote `key` (block size, 1, D)."""
    return _in_block(key, torch.zeros_like(key), isa)[:, :, : len(key)].flatten()


def _values_written(value: Tensor, isa: str) -> Tensor:
    return _in_block(torch.zeros_like(value), value, isa)[:, :, len(value) :].flatten()


def _in_block(key: Tensor, value: Tensor, isa: str) -> Tensor:
    from vllm import _custom_ops as ops

    size, _, head_dim = key.shape
    block = torch.zeros(1, 1, 2 * size, head_dim, dtype=key.dtype)
    halves: Any = block.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, torch.arange(size), isa)
    return block
