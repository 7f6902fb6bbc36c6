"""r Abar of `relevancy_step` on Hopper, tried in Gluon: warp groups, their registers, copies and waits are written out.

    out_j = sum_i r_i relu(P_ij dP_ij)      P_ij = 2^(scale_log2 q_i k_j - shift_i), shift = log2(e) lse      dP_ij = dO_i v_j

A program has the keys of two groups of warps, and a third group that copies tiles of queries, of dO, and of shift and r into
STAGES of shared memory. `full` and `empty` are mbarriers of a stage. bfloat16, rule "gradient", lse given, no masks, and whole
tiles: docs/gluon.md says what came of it. kernels/relevancy_attention.py has the same formula in Triton.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK_Q = 64
KEYS_OF_A_GROUP = {True: 64, False: 128}  # by AHEAD: two tiles of scores, or one, lie in registers
# Four warps for each of three groups: together they have the 65,536 registers of an SM, and the consumers most of them
REGISTERS, OF_A_CONSUMER = 168, 240
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # Triton 3.6's name


def step(
    relevancy: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, lse: Tensor, scale: float, ahead: bool
) -> Tensor:
    """r Abar (B, M) of relevancy (B, N): the mean over heads."""
    (batch, heads, num_q, size), num_kv, keys = query.shape, key.shape[2], 2 * KEYS_OF_A_GROUP[ahead]
    assert num_q % (2 * BLOCK_Q) == 0 and num_kv % keys == 0, f"tokens must fill tiles; got {num_q} queries, {num_kv} keys"
    out = torch.empty(batch, heads, num_kv, device=query.device)
    _gluon_kernel[(num_kv // keys, batch * heads)](
        *_arguments(relevancy, query, key, value, grad_output, lse, scale, out),
        D=size,
        BLOCK_Q=BLOCK_Q,
        BLOCK_KV=keys // 2,
        STAGES=3,
        REGISTERS=OF_A_CONSUMER,
        AHEAD=ahead,
        num_warps=4,
        maxnreg=REGISTERS,
        enable_fp_fusion=True,
    )
    return out.mean(1)


def _arguments(
    relevancy: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, lse: Tensor, scale: float, out: Tensor
) -> tuple[Any, ...]:
    """The arguments of the kernel: tensors, heads, queries, keys, and the scale in base 2."""
    tensors = query, key, value, grad_output, lse * math.log2(math.e), relevancy, out
    return *tensors, query.shape[1], query.shape[2], key.shape[2], scale * math.log2(math.e)


@gluon.jit
def _produce(p_q, p_grad, p_shift, p_r, queries, grads, shifts, rows, full, empty, tiles):
    STAGES: gl.constexpr = queries.shape[0]
    BLOCK_Q: gl.constexpr = queries.shape[1]
    D: gl.constexpr = queries.shape[2]
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    o_tile = gl.arange(0, BLOCK_Q, gl.SliceLayout(1, tile))[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, tile))[None, :]
    o_row = gl.arange(0, BLOCK_Q, row)
    for j in range(tiles):
        stage = j % STAGES
        mbarrier.wait(empty.index(stage), (j // STAGES & 1) ^ 1)
        async_load(queries.index(stage), p_q + o_tile)
        async_load(grads.index(stage), p_grad + o_tile)
        async_load(shifts.index(stage), p_shift + o_row)
        async_load(rows.index(stage), p_r + o_row)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        p_q += BLOCK_Q * D
        p_grad += BLOCK_Q * D
        p_shift += BLOCK_Q
        p_r += BLOCK_Q


@gluon.jit
def _products(queries, grads, keys, values, full, j, zeros):
    STAGES: gl.constexpr = queries.shape[0]
    stage = j % STAGES
    mbarrier.wait(full.index(stage), j // STAGES & 1)
    fence_async_shared()
    s = warpgroup_mma(queries.index(stage), keys.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(grads.index(stage), values.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _add(b_sum, s, dp, shifts, rows, empty, j, scale_log2):
    STAGES: gl.constexpr = shifts.shape[0]
    stage = j % STAGES
    layout: gl.constexpr = gl.SliceLayout(1, b_sum.type.layout)
    b_shift = shifts.index(stage).load(layout)
    b_r = rows.index(stage).load(layout)
    mbarrier.arrive(empty.index(stage))
    b_p = gl.exp2(s * scale_log2 - b_shift[:, None])
    return b_sum + gl.maximum(b_p * dp, 0.0) * b_r[:, None]


@gluon.jit
def _consume(
    group, queries, grads, shifts, rows, keys, values, full, empty, turns, p_out, tiles, scale_log2, AHEAD: gl.constexpr
):
    """The sums of one group's keys over all tiles of queries.

    AHEAD: the products of the next tile are issued before the exponentials of this one. Two tiles a round, since a product in
    flight cannot move to other registers. Else the groups take turns: one has the tensor cores while the other has exponentials.
    """
    BLOCK_Q: gl.constexpr = queries.shape[1]
    BLOCK_KV: gl.constexpr = keys.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    zeros = gl.zeros([BLOCK_Q, BLOCK_KV], gl.float32, layout)
    b_sum = zeros  # [q,kv]: its rows are added after the loop
    b_k = keys.index(group)
    b_v = values.index(group)
    if AHEAD:
        s, dp = _products(queries, grads, b_k, b_v, full, 0, zeros)
        for j in range(0, tiles - 2, 2):
            s, dp = warpgroup_mma_wait(0, [s, dp])
            next_s, next_dp = _products(queries, grads, b_k, b_v, full, j + 1, zeros)
            b_sum = _add(b_sum, s, dp, shifts, rows, empty, j, scale_log2)
            next_s, next_dp = warpgroup_mma_wait(0, [next_s, next_dp])
            s, dp = _products(queries, grads, b_k, b_v, full, j + 2, zeros)
            b_sum = _add(b_sum, next_s, next_dp, shifts, rows, empty, j + 1, scale_log2)
        s, dp = warpgroup_mma_wait(0, [s, dp])
        next_s, next_dp = _products(queries, grads, b_k, b_v, full, tiles - 1, zeros)
        b_sum = _add(b_sum, s, dp, shifts, rows, empty, tiles - 2, scale_log2)
        next_s, next_dp = warpgroup_mma_wait(0, [next_s, next_dp])
        b_sum = _add(b_sum, next_s, next_dp, shifts, rows, empty, tiles - 1, scale_log2)
    else:
        for j in range(tiles):
            mbarrier.wait(turns.index(group), (j & 1) ^ 1 ^ group)  # group 0 begins
            s, dp = _products(queries, grads, b_k, b_v, full, j, zeros)
            s, dp = warpgroup_mma_wait(0, [s, dp])
            mbarrier.arrive(turns.index(1 - group))
            b_sum = _add(b_sum, s, dp, shifts, rows, empty, j, scale_log2)
    o_kv = group * BLOCK_KV + gl.arange(0, BLOCK_KV, gl.SliceLayout(0, layout))
    gl.store(p_out + o_kv, gl.sum(b_sum, axis=0))


@gluon.jit
def _gluon_kernel(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_shift,
    p_r,
    p_out,
    H,
    N,
    M,
    scale_log2,
    D: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """The sums of 2 BLOCK_KV keys of one head."""
    kind: gl.constexpr = p_q.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_Q, D], kind)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    i_bh = gl.program_id(1).to(gl.int64)
    i_kv = gl.program_id(0) * 2 * BLOCK_KV
    keys = gl.allocate_shared_memory(kind, [2, BLOCK_KV, D], shared)
    values = gl.allocate_shared_memory(kind, [2, BLOCK_KV, D], shared)
    queries = gl.allocate_shared_memory(kind, [STAGES, BLOCK_Q, D], shared)
    grads = gl.allocate_shared_memory(kind, [STAGES, BLOCK_Q, D], shared)
    shifts = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], plain)
    rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)  # threads of the producer
        mbarrier.init(empty.index(i), count=2)  # groups of consumers
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_kv = gl.arange(0, BLOCK_KV, gl.SliceLayout(1, tile))
    o_d = gl.arange(0, D, gl.SliceLayout(0, tile))
    for group in gl.static_range(2):
        o_keys = (i_bh * M + i_kv + group * BLOCK_KV) * D + (o_kv[:, None] * D + o_d[None, :])
        async_load(keys.index(group), p_k + o_keys)
        async_load(values.index(group), p_v + o_keys)
    async_copy.commit_group()
    async_copy.wait_group(0)
    tiles = N // BLOCK_Q
    p_q += i_bh * N * D
    p_grad += i_bh * N * D
    p_shift += i_bh * N
    p_r += i_bh // H * N
    p_out += i_bh * M + i_kv
    gl.warp_specialize(
        [
            (_consume, (0, queries, grads, shifts, rows, keys, values, full, empty, turns, p_out, tiles, scale_log2, AHEAD)),
            (_consume, (1, queries, grads, shifts, rows, keys, values, full, empty, turns, p_out, tiles, scale_log2, AHEAD)),
            (_produce, (p_q, p_grad, p_shift, p_r, queries, grads, shifts, rows, full, empty, tiles)),
        ],
        [4, 4],
        [REGISTERS, 24],
    )
