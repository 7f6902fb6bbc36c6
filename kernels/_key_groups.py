"""Groups of keys, over which attention_statistics sums: as numbers, and for a few groups as 1s and 0s."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.kernels._tiles import cdiv, dot

FEW_GROUPS = 4


def few(num_groups: int) -> int:
    """How many groups are summed one by one; 0 if a product sums all of them."""
    return num_groups if num_groups <= FEW_GROUPS else 0


def as_members(key_groups: Tensor, num_groups: int) -> Tensor:
    """(B, G, M) float32: 1 if a key is in a group, else 0.

    M is padded to a multiple of 128, as many as the largest tile has, so that tiles are loaded without a mask.
    """
    batch, num_kv = key_groups.shape
    length = num_kv + -num_kv % 128
    members = key_groups.new_empty((batch, num_groups, length), dtype=torch.float32)
    if members.numel() > 0:
        grid = (cdiv(length, 256) * batch,)
        _members_kernel[grid](
            p_groups=key_groups,
            p_members=members,
            M=num_kv,
            length=length,
            stride_groups=key_groups.stride(0),
            FEW=num_groups,
            BLOCK_KV=256,
            num_warps=8,  # a thread for each key: a warp then stores whole sectors
            enable_fp_fusion=True,
        )
    return members


@triton.jit
def _members_kernel(p_groups, p_members, M, length, stride_groups, FEW: tl.constexpr, BLOCK_KV: tl.constexpr):
    """member_gj = 1 where key j is in group g, else 0; 0 for padding. One program per sample and BLOCK_KV keys."""
    blocks = tl.cdiv(length, BLOCK_KV)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_kv = tl.program_id(0) % blocks * BLOCK_KV + tl.arange(0, BLOCK_KV)
    b_group = tl.load(p_groups + i_b * stride_groups + o_kv, mask=o_kv < M, other=-1)
    for g in tl.static_range(FEW):
        tl.store(p_members + (i_b * FEW + g) * length + o_kv, tl.where(b_group == g, 1.0, 0.0), mask=o_kv < length)


@triton.jit
def dot_members(b_x, b_member, HALF: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """b_x @ b_member for float32 b_x and a boolean b_member.

    SPLIT into two HALF numbers it is exact to 2^-24 for weights in [0, 1] in float16, and to 2^-17 of any number in bfloat16.
    """
    b_ones = b_member.to(tl.float32)
    if SPLIT:
        b_high = b_x.to(HALF)  # and what it lacks; a product of either with 1 or 0 is exact
        b_low = (b_x - b_high.to(tl.float32)).to(HALF)
        b_ones = b_ones.to(HALF)
        return dot(b_high, b_ones, PRECISION) + dot(b_low, b_ones, PRECISION)
    else:
        return dot(b_x, b_ones, PRECISION)


@triton.jit
def member(p_members, o_kv, M, g: tl.constexpr):
    """[kv] of `as_members`. A product with 1 or 0 takes one instruction, a selection two."""
    return tl.load(p_members + g * (tl.cdiv(M, 128) * 128) + o_kv)


@triton.jit
def groups_of(p_groups, o_kv, M, G):
    """The group of each key. It is -1 for no group and for numbers that are not a group."""
    b_group = tl.load(p_groups + o_kv, mask=o_kv < M, other=-1)
    return tl.where((b_group >= 0) & (b_group < G), b_group, -1).to(tl.int32)
