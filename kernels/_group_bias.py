"""A bias for each query and group of keys, which is added to logits: row_bias (B, H, N, G), and the group of each key.

Tokens of a kind stand together, so nearly every tile has keys of one group, and the bias is a number a row. `prepared` tells these
tiles by two numbers: word_j has how often the group has changed up to key j, and the group. A tile whose first and last key have
the same word has one group. In another tile each pair reads its bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_GROUPS = 32  # whose sums a program keeps in registers


def prepared(row_bias: Tensor, key_groups: Tensor) -> tuple[Tensor, Tensor]:
    """What kernels read beside row_bias.

    words (B, M) int64: the number of the run of equal groups in which a key stands, times 2^32, and as low 32 bits its group, or
    -1 for no group and for numbers that are not a group. masked (B, H, G) int32: whether some query's bias for the group is -inf.
    """
    batch, heads, rows, groups = row_bias.shape
    words, masked = key_groups.new_empty(key_groups.shape), key_groups.new_empty((batch, heads, groups), dtype=torch.int32)
    if batch > 0:
        block = min(MOST_GROUPS, 1 << (groups - 1).bit_length())
        _prepare_kernel[(batch * (1 + heads),)](
            p_groups=key_groups.contiguous(),
            p_bias=row_bias,
            p_words=words,
            p_masked=masked,
            B=batch,
            N=rows,
            M=words.shape[1],
            G=groups,
            BLOCK_G=block,
            BLOCK=4096,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return words, masked


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
def _prepare_kernel(
    p_groups, p_bias, p_words, p_masked, B, N, M, G, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr
):
    """`prepared`: words by the first B programs, one a sample, and what is masked by the others, one a head."""
    i = tl.program_id(0).to(tl.int64)
    if i < B:
        runs = 0
        for start in range(0, M, BLOCK):
            o_kv = start + tl.arange(0, BLOCK)
            b_group = _known(tl.load(p_groups + i * M + o_kv, mask=o_kv < M, other=-1), G)
            b_before = _known(tl.load(p_groups + i * M + tl.maximum(o_kv - 1, 0), mask=o_kv < M, other=-1), G)
            b_change = (b_group != b_before).to(tl.int32)
            b_run = runs + tl.cumsum(b_change, axis=0)
            runs += tl.sum(b_change, axis=0)
            tl.store(p_words + i * M + o_kv, (b_run.to(tl.int64) << 32) | (b_group & 0xFFFFFFFF), mask=o_kv < M)
    else:
        i_bh = i - B
        for first in range(0, G, BLOCK_G):
            o_g = first + tl.arange(0, BLOCK_G)
            b_masked = tl.zeros([BLOCK_G], dtype=tl.int32)
            for start in range(0, N, BLOCK // BLOCK_G):
                o_q = start + tl.arange(0, BLOCK // BLOCK_G)
                m_row = (o_q < N)[:, None] & (o_g < G)[None, :]
                b_bias = tl.load(p_bias + (i_bh * N + o_q)[:, None] * G + o_g[None, :], mask=m_row, other=0.0)
                b_masked = tl.maximum(b_masked, tl.max((b_bias == float("-inf")).to(tl.int32), axis=0))
            tl.store(p_masked + i_bh * G + o_g, b_masked, mask=o_g < G)


@triton.jit
def _known(b_group, G):
    return tl.where((b_group >= 0) & (b_group < G), b_group, -1)


@triton.jit
def group_of(word):
    """The group of a key, -1 for none."""
    return word.to(tl.int32)


@triton.jit
def ends_of(masks, start, M, BLOCK: tl.constexpr):
    """The words of the first and the last key of the tile of BLOCK keys that begins at `start`."""
    last = tl.minimum(start + BLOCK, M) - 1
    return tl.load(masks.p_words + tl.minimum(start, last)), tl.load(masks.p_words + last)


@triton.jit
def add_group_bias(b_log2, masks, start, o_q, o_kv, N, M, KEY_MAJOR: tl.constexpr, FLOAT: tl.constexpr):
    """Logits [q,kv], or KEY_MAJOR [kv,q], and the bias of each pair: -inf where that is -inf, whatever the score is.

    start: the first key. FLOAT: there is a float mask, whose -inf stays.
    """
    p_rows = masks.p_bias + tl.minimum(o_q, N - 1).to(tl.int64) * masks.num_groups  # [q]
    first, last = ends_of(masks, start, M, o_kv.shape[0])
    if first == last:
        b_log2 = _added(b_log2, _along(_bias_of_rows(p_rows, group_of(first)), KEY_MAJOR), FLOAT)
    else:
        b_group = group_of(tl.load(masks.p_words + tl.minimum(o_kv, M - 1)))  # [kv]
        group = next_group(b_group, -1)
        while group < masks.num_groups:
            m_group = (b_group == group)[:, None] if KEY_MAJOR else (b_group == group)[None, :]
            b_log2 = tl.where(m_group, _added(b_log2, _along(_bias_of_rows(p_rows, group), KEY_MAJOR), FLOAT), b_log2)
            group = next_group(b_group, group)
    return b_log2


@triton.jit
def next_group(b_group, group):
    """The lowest of the groups that is above `group`, or a number that no group reaches."""
    return tl.min(tl.where(b_group > group, b_group, 2147483647), axis=0)


@triton.jit
def _bias_of_rows(p_rows, group):
    """The bias [q] of each query for the keys of one group, 0 for those of none."""
    return tl.where(group >= 0, tl.load(p_rows + tl.maximum(group, 0).to(tl.int64)), 0.0)


@triton.jit
def _along(b_row, KEY_MAJOR: tl.constexpr):
    """[q] as [q,1], or KEY_MAJOR [1,q]."""
    return b_row[None, :] if KEY_MAJOR else b_row[:, None]


@triton.jit
def powers(b_s, b_scale, b_shift, masks, start, o_q, N, KEY_MAJOR: tl.constexpr):
    """2^(b_s scale + bias - shift) of a tile [q,kv], or KEY_MAJOR [kv,q], whose keys have one group that masks no pair.

    b_scale: of rows, [row,1]. b_shift: of queries, [q,1] or KEY_MAJOR [1,q]. The bias costs no instruction a pair.
    """
    b_bias = row_bias_of(masks, start, o_q, N)
    return tl.exp2(b_s * b_scale - (b_shift - _along(b_bias, KEY_MAJOR)))


@triton.jit
def row_bias_of(masks, start, o_q, N):
    """The bias [q] in base 2 of queries for the group of key `start`."""
    p_rows = masks.p_bias + tl.minimum(o_q, N - 1).to(tl.int64) * masks.num_groups
    return in_base_2(_bias_of_rows(p_rows, group_of(tl.load(masks.p_words + start))))


@triton.jit
def is_plain(masks, start, M, BLOCK: tl.constexpr):
    """Whether the keys of a tile have one group, which masks no pair."""
    first, last = ends_of(masks, start, M, BLOCK)
    group = group_of(first)
    return (first == last) & ((group < 0) | (tl.load(masks.p_masked + tl.maximum(group, 0).to(tl.int64)) == 0))


@triton.jit
def in_base_2(b_bias):
    """A natural bias in base 2. A number may be finite in base e and not in base 2: it becomes the largest."""
    b_base2 = b_bias * 1.4426950408889634
    b_base2 = tl.where((b_base2 < -3.4028234e38) & (b_bias > float("-inf")), -3.4028234e38, b_base2)
    return tl.where((b_base2 > 3.4028234e38) & (b_bias < float("inf")), 3.4028234e38, b_base2)


@triton.jit
def _added(b_log2, b_bias, FLOAT: tl.constexpr):
    """Logits in base 2 and a natural bias."""
    b_sum = b_log2 + in_base_2(b_bias)
    if FLOAT:  # both may be the largest
        b_sum = tl.where(b_sum < -3.4028234e38, -3.4028234e38, b_sum)
        b_sum = tl.where(b_log2 == float("-inf"), float("-inf"), b_sum)
    return tl.where(b_bias == float("-inf"), float("-inf"), b_sum)


@triton.jit
def add_group_sums(b_sums, b_x, masks, start, o_kv, M, first_group):
    """b_sums [q,BLOCK_G], and the sums of b_x [q,kv] over the keys of each group from the first on. start: the first key."""
    o_g = first_group + tl.arange(0, b_sums.shape[1])
    first, last = ends_of(masks, start, M, o_kv.shape[0])
    if first == last:
        b_sums += tl.where((o_g == group_of(first))[None, :], tl.sum(b_x, axis=1)[:, None], 0.0)
    else:
        b_group = group_of(tl.load(masks.p_words + tl.minimum(o_kv, M - 1)))  # [kv]
        group = next_group(b_group, -1)
        while group < masks.num_groups:
            b_sum = tl.sum(tl.where((b_group == group)[None, :], b_x, 0.0), axis=1)
            b_sums += tl.where((o_g == group)[None, :], b_sum[:, None], 0.0)
            group = next_group(b_group, group)
    return b_sums


@triton.jit
def store_group_sums(p, masks, i_bh, o_q, N, first_group, b_sums):
    """b_sums of `add_group_sums` for rows of head i_bh."""
    G = masks.num_groups
    o_g = first_group + tl.arange(0, b_sums.shape[1])
    offsets = (i_bh * N + o_q)[:, None] * G + o_g[None, :]
    tl.store(p + offsets, b_sums, mask=(o_q < N)[:, None] & (o_g < G)[None, :])
