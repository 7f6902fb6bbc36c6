"""A bias for each query and group of keys, which is added to logits: row_bias (B, H, N, G), and the group of each key.

Tokens of a kind stand together, so the keys of most tiles have one group. The bias is a number a row there: it is added to what
is subtracted from the logits of a row anyway, and costs no instruction a pair. Two numbers tell such a tile: word_j has how often
the group has changed up to key j, and the group. All keys between two keys of the same word have one group. In other tiles a loop
goes over the groups that are there. It stands in a branch, so the products of the loop over tiles still run ahead.

In kernels a group's number is one more than the caller's, and 0 is no group, whose bias is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_GROUPS = 32  # whose sums a program keeps in registers
PADDED = tl.constexpr(128)  # rows are padded to a multiple of it, as many as the largest tile has: tiles load them without a mask


class GroupBias(NamedTuple):
    """The tensors that kernels read beside row_bias, by `prepared`.

    bias (B, H, 1 + G, padded N) in base 2; masked (B, H, 1 + G) int32: whether it is -inf for some query. words (B, M) int64: the
    number of the run of equal groups in which a key stands, times 2^32, and the group.
    """

    bias: Tensor
    masked: Tensor
    words: Tensor


def prepared(row_bias: Tensor, key_groups: Tensor) -> GroupBias:
    batch, heads, rows, groups = row_bias.shape
    padded = rows + -rows % PADDED.value
    bias = row_bias.new_empty((batch, heads, 1 + groups, padded), dtype=torch.float32)
    masked, words = key_groups.new_empty(bias.shape[:3], dtype=torch.int32), key_groups.new_empty(key_groups.shape)
    if batch > 0:
        _group_bias_kernel[(batch * (1 + heads * (1 + groups)),)](
            p_groups=key_groups.contiguous(),
            p_rows=row_bias.contiguous(),
            p_words=words,
            p_bias=bias,
            p_masked=masked,
            B=batch,
            N=rows,
            NP=padded,
            M=words.shape[1],
            G=groups,
            BLOCK=2048,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return GroupBias(bias, masked, words)


def gradient_blocks(row_bias: Tensor | None) -> tuple[Tensor | None, list[tuple[Tensor | None, int, int]]]:
    """The gradient of row_bias, (B, H, N, G) float32, and for each launch the gradient, its first group, and BLOCK_G of them.

    A launch computes all else again. Without a bias there is one, and BLOCK_G is 0.
    """
    if row_bias is None:
        return None, [(None, 0, 0)]
    grad = torch.zeros_like(row_bias, dtype=torch.float32, memory_format=torch.contiguous_format)
    groups = row_bias.shape[3]
    if groups == 0:
        return grad, [(None, 0, 0)]
    block = min(MOST_GROUPS, 1 << (groups - 1).bit_length())
    return grad, [(grad, first, block) for first in range(0, groups, block)]


@triton.jit
def _group_bias_kernel(p_groups, p_rows, p_words, p_bias, p_masked, B, N, NP, M, G, BLOCK: tl.constexpr):
    """`GroupBias`: words by the first B programs, one a sample; bias and masked by the others, one a head and group."""
    i = tl.program_id(0).to(tl.int64)
    if i < B:
        runs = 0
        for start in range(0, M, BLOCK):
            o_kv = start + tl.arange(0, BLOCK)
            b_group = _numbered(tl.load(p_groups + i * M + o_kv, mask=o_kv < M, other=-1), G)
            b_before = _numbered(tl.load(p_groups + i * M + tl.maximum(o_kv - 1, 0), mask=o_kv < M, other=-1), G)
            b_change = (b_group != b_before).to(tl.int32)
            b_run = runs + tl.cumsum(b_change, axis=0)
            runs += tl.sum(b_change, axis=0)
            tl.store(p_words + i * M + o_kv, (b_run.to(tl.int64) << 32) | b_group, mask=o_kv < M)
    else:
        i_bhg = i - B
        i_bh, group = i_bhg // (1 + G), i_bhg % (1 + G)
        b_masked = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, NP, BLOCK):
            o_q = start + tl.arange(0, BLOCK)
            m_row = tl.where(group > 0, o_q < N, False)
            b_bias = tl.load(p_rows + (i_bh * N + o_q) * G + (group - 1), mask=m_row, other=0.0).to(tl.float32)
            b_masked |= (b_bias == float("-inf")).to(tl.int32)
            b_base2 = b_bias * 1.4426950408889634
            # a number may be finite in base e and not in base 2: it becomes the largest
            b_base2 = tl.where((b_base2 < -3.4028234e38) & (b_bias > float("-inf")), -3.4028234e38, b_base2)
            b_base2 = tl.where((b_base2 > 3.4028234e38) & (b_bias < float("inf")), 3.4028234e38, b_base2)
            tl.store(p_bias + i_bhg * NP + o_q, b_base2, mask=o_q < NP)
        tl.store(p_masked + i_bhg, tl.max(b_masked, axis=0))


@triton.jit
def _numbered(b_group, G):
    """int64 groups as kernels number them."""
    return tl.where((b_group >= 0) & (b_group < G), b_group + 1, 0)


@triton.jit
def groups_of_tile(masks, start, M, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """The first and the last group of the tile of BLOCK keys that begins at `start`, how often the group changes, and whether
    one of the two masks a query. Zeros without a group bias.

    The branch is always taken. It keeps the compiler from copying the numbers to shared memory ahead of time.
    """
    first, last, masked = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)
    if MASK >= 3:
        if M > 0:
            first = tl.load(masks.p_words + start)
            last = tl.load(masks.p_words + (tl.minimum(start + BLOCK, M) - 1))
            masked = tl.load(masks.p_masked + first.to(tl.int32).to(tl.int64))
            masked |= tl.load(masks.p_masked + last.to(tl.int32).to(tl.int64))
    return first.to(tl.int32), last.to(tl.int32), (last >> 32).to(tl.int32) - (first >> 32).to(tl.int32), masked != 0


@triton.jit
def groups_of_keys(masks, o_kv, M):
    """The group of each key; beyond the keys that of the last one."""
    return tl.load(masks.p_words + tl.minimum(o_kv, M - 1)).to(tl.int32)


@triton.jit
def next_group(b_group, group):
    """The lowest of the groups that is above `group`, or a number that no group reaches."""
    return tl.min(tl.where(b_group > group, b_group, 2147483647), axis=0)


@triton.jit
def row_bias_of(masks, group, o_q, N):
    """The bias [q] in base 2 of queries for the keys of one group."""
    NP = tl.cdiv(N, PADDED) * PADDED
    return tl.load(masks.p_bias + group.to(tl.int64) * NP + o_q)


@triton.jit
def add_group_bias(b_log2, masks, start, o_q, o_kv, N, M, KEY_MAJOR: tl.constexpr, FLOAT: tl.constexpr):
    """Logits [q,kv], or KEY_MAJOR [kv,q], and the bias of each pair: -inf where that is -inf, whatever the score is.

    start: the first key. FLOAT: there is a float mask, whose -inf stays.
    """
    first, _, changes, _ = groups_of_tile(masks, start, M, o_kv.shape[0], 3)
    if changes == 0:
        b_log2 = _added(b_log2, row_bias_of(masks, first, o_q, N), KEY_MAJOR, FLOAT)
    else:
        b_group = groups_of_keys(masks, o_kv, M)
        group = next_group(b_group, -1)
        while group <= masks.num_groups:
            m_group = (b_group == group)[:, None] if KEY_MAJOR else (b_group == group)[None, :]
            b_log2 = tl.where(m_group, _added(b_log2, row_bias_of(masks, group, o_q, N), KEY_MAJOR, FLOAT), b_log2)
            group = next_group(b_group, group)
    return b_log2


@triton.jit
def _added(b_log2, b_row, KEY_MAJOR: tl.constexpr, FLOAT: tl.constexpr):
    b_bias = b_row[None, :] if KEY_MAJOR else b_row[:, None]
    b_sum = b_log2 + b_bias
    if FLOAT:  # both may be the largest number
        b_sum = tl.where(b_sum < -3.4028234e38, -3.4028234e38, b_sum)
        b_sum = tl.where(b_log2 == float("-inf"), float("-inf"), b_sum)
    return tl.where(b_bias == float("-inf"), float("-inf"), b_sum)


@triton.jit
def add_group_sums(b_sums, b_x, masks, of_tile, o_kv, M, first_group):
    """b_sums [q,BLOCK_G], and the sums of b_x [q,kv] over the keys of each group of the caller's from the first on.

    of_tile: of `groups_of_tile`.
    """
    o_g = first_group + 1 + tl.arange(0, b_sums.shape[1])
    first, last, changes, _ = of_tile
    if changes == 0:
        b_sums += tl.where((o_g == first)[None, :], tl.sum(b_x, axis=1)[:, None], 0.0)
    elif changes == 1:
        m_first = (groups_of_keys(masks, o_kv, M) == first)[None, :]
        b_sums += tl.where((o_g == first)[None, :], tl.sum(tl.where(m_first, b_x, 0.0), axis=1)[:, None], 0.0)
        b_sums += tl.where((o_g == last)[None, :], tl.sum(tl.where(m_first, 0.0, b_x), axis=1)[:, None], 0.0)
    else:
        b_group = groups_of_keys(masks, o_kv, M)
        group = next_group(b_group, -1)
        while group <= masks.num_groups:
            b_sum = tl.sum(tl.where((b_group == group)[None, :], b_x, 0.0), axis=1)
            b_sums += tl.where((o_g == group)[None, :], b_sum[:, None], 0.0)
            group = next_group(b_group, group)
    return b_sums


@triton.jit
def chosen_bias(masks, of_tile, o_q, o_kv, N, M, KEY_MAJOR: tl.constexpr):
    """The bias of each pair of a tile of two groups that stand one behind the other, [q,kv] or KEY_MAJOR [kv,q]."""
    first, last, _, _ = of_tile
    m_first = groups_of_keys(masks, o_kv, M) == first  # [kv]
    b_first, b_last = row_bias_of(masks, first, o_q, N), row_bias_of(masks, last, o_q, N)
    if KEY_MAJOR:
        return tl.where(m_first[:, None], b_first[None, :], b_last[None, :])
    else:
        return tl.where(m_first[None, :], b_first[:, None], b_last[:, None])


@triton.jit
def store_group_sums(p, masks, i_bh, o_q, N, first_group, b_sums):
    """b_sums of `add_group_sums` for rows of head i_bh."""
    G = masks.num_groups
    o_g = first_group + tl.arange(0, b_sums.shape[1])
    offsets = (i_bh * N + o_q)[:, None] * G + o_g[None, :]
    tl.store(p + offsets, b_sums, mask=(o_q < N)[:, None] & (o_g < G)[None, :])
