"""What the Triton kernels share: tiles of a matrix, matrix products, masks, counter dropout, and how a launch sees tensors.

Words: p_ pointer, o_ offsets, m_ mask, b_ block in registers, i_ program index (64 bit). BLOCK_Q query rows, BLOCK_KV keys,
BLOCK_D features, powers of two. Strides count elements; the last one is 1 (`unit_stride`). Logits named `log2` are in base 2:
scale * LOG2_E is folded in; an lse without that name is natural.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast._tensors import additive

LOG2_E = 1.4426950408889634


def block_size(size: int, smallest: int = 16) -> int:
    """The power of two that holds `size`, at least what a matrix instruction takes."""
    return max(smallest, triton.next_power_of_2(size))


def input_precision() -> str:
    """How `dot` multiplies float32: in full precision unless the user has allowed tf32, by torch's old switches (allow_tf32,
    set_float32_matmul_precision) or by its new ones (fp32_precision, which answers for the old ones too). Triton's interpreter
    multiplies the raw bits of bfloat16 operands: there they are widened first, which changes no product."""
    if triton.knobs.runtime.interpret:
        return "widen"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def mask_arguments(
    attn_mask: Tensor | None, key_mask: Tensor | None, like: Tensor, num_keys: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int, int, int], dict[str, int | bool]]:
    """The tensors, the strides of attn_mask (broadcast ones 0) and the constants that `mask_logits` wants for query `like`
    (B,H,N,D); where a mask is absent, `like` stands in for it and is not read."""
    kind, strides, mask = 0, (0, 0, 0, 0), like
    if attn_mask is not None:
        kind, mask = (1, attn_mask) if attn_mask.dtype == torch.bool else (2, additive(attn_mask, torch.float32))
        b, h, i, j = mask.expand(*like.shape[:3], num_keys).stride()
        strides = (b, h, i, j)
    seen = like if key_mask is None else key_mask.contiguous()
    return (mask, seen), strides, {"MASK": kind, "KEY_MASK": key_mask is not None}


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b summed in float32; PRECISION as input_precision says."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_tile(p, stride_row, o_row, o_col, num_rows, num_cols):
    """[rows, cols] of a matrix, zeros outside."""
    offsets = o_row.to(tl.int64)[:, None] * stride_row + o_col[None, :]
    return tl.load(p + offsets, mask=(o_row < num_rows)[:, None] & (o_col < num_cols)[None, :], other=0.0)


@triton.jit
def store_tile(p, stride_row, o_row, o_col, num_rows, num_cols, b):
    offsets = o_row.to(tl.int64)[:, None] * stride_row + o_col[None, :]
    tl.store(p + offsets, b.to(p.dtype.element_ty), mask=(o_row < num_rows)[:, None] & (o_col < num_cols)[None, :])


@triton.jit
def mask_logits(
    b_log2,
    p_mask,
    stride_mask_q,
    stride_mask_kv,
    p_key_mask,
    o_q,
    o_kv,
    N,
    M,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Base-2 logits [q,kv] with hidden pairs, and those outside of N x M, at -inf; both pointers already at their batch and
    head. MASK: 0 none, 1 bool, 2 float32 (added, natural), whose -inf alone hides: a finite value never does."""
    m_pair = (o_q < N)[:, None] & (o_kv < M)[None, :]
    visible = m_pair
    if MASK != 0:
        offsets = o_q.to(tl.int64)[:, None] * stride_mask_q + o_kv.to(tl.int64)[None, :] * stride_mask_kv
        if MASK == 1:
            visible = visible & (tl.load(p_mask + offsets, mask=m_pair, other=0) != 0)
        else:
            b_mask = tl.load(p_mask + offsets, mask=m_pair, other=0.0)
            visible = visible & (b_mask != float("-inf"))
            b_log2 += b_mask * 1.4426950408889634
            # finite in base e, not always in base 2: such a value is held at the largest number (no maximum, it would lose NaN)
            b_log2 = tl.where(b_log2 < -3.4028234e38, -3.4028234e38, b_log2)
            b_log2 = tl.where((b_mask > 2.35e38) & (b_mask < float("inf")), 3.4028234e38, b_log2)
    if KEY_MASK:
        visible = visible & (tl.load(p_key_mask + o_kv, mask=o_kv < M, other=0) != 0)[None, :]
    if CAUSAL:
        visible = visible & (o_kv[None, :] <= o_q[:, None])
    return tl.where(visible, b_log2, float("-inf"))


OWN_LSE, GIVEN_LSE = tl.constexpr(4096.0), tl.constexpr(16384.0)  # limits of `is_coarse`


@triton.jit
def is_coarse(b_lse, LIMIT: tl.constexpr):
    """Whether a natural log-sum-exp is so far from 0 that its rounding shows in exp(logit - lse), as in rows that a float mask
    of -1e5 or finfo.min covers: probabilities come from the largest logit and the sum there. The limit is lower for our own lse
    than for one that a caller gives (streaming has the same), which may count keys that are not here."""
    return (tl.abs(b_lse) >= LIMIT) & (tl.abs(b_lse) < float("inf"))


@triton.jit
def natural_lse(b_max, b_sum, MASK: tl.constexpr):
    """log sum exp from the largest base-2 logit and the sum of the powers less it; -inf for a row without a visible key."""
    empty = b_sum == 0.0
    b_lse = (b_max + tl.log2(tl.where(empty, 1.0, b_sum))) * 0.6931471805599453
    if MASK == 2:  # `mask_logits` holds float masks there
        b_lse = tl.where(tl.abs(b_max) >= 3.4028234e38, b_max, b_lse)
    return tl.where(empty, float("-inf"), b_lse)


@triton.jit
def relu(b_x):
    """max(x, 0), and NaN where x is NaN."""
    return tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def key_range(
    i_q, M, MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr
):
    """Of the i_q-th block of queries: keys below the first number need no `mask_logits`, a multiple of BLOCK_KV, and none from
    the second on is seen."""
    end = tl.minimum(M, (i_q + 1) * BLOCK_Q) if CAUSAL else M
    if MASK != 0 or KEY_MASK:
        free = end * 0
    else:
        free = (tl.minimum(M, i_q * BLOCK_Q + 1) if CAUSAL else M) // BLOCK_KV * BLOCK_KV
    return free, end


@triton.jit
def below_max(b_s, b_max, scale_log2, FOLDED: tl.constexpr):
    """Logits [q,kv] less the largest of their row [q], in base 2. Where they are not FOLDED they are bare products, scaled only
    here: this rounds what is small, and the largest gives exactly 0 whatever the compiler fuses. It wants scale_log2 > 0."""
    b_x = b_s - b_max[:, None]
    if not FOLDED:
        b_x *= scale_log2
    return b_x


@triton.jit
def block_and_head(num_blocks, H, GROUP):
    """Of a grid of (B * H * num_blocks,): the block's number, b * H + h, b, h, and the key head that h reads; GROUP query
    heads share one. Neighbouring programs share a head, so its keys stay in the cache."""
    i = tl.program_id(0).to(tl.int64)
    i_bh = i // num_blocks
    i_h = i_bh % H
    return (i % num_blocks).to(tl.int32), i_bh, i_bh // H, i_h, i_h // GROUP


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def keep_factor(p_seed, dropout_p, threshold, i_bh, o_q, o_kv, N):
    """[q,kv]: 1/(1-p) for kept pairs, 0 for dropped ones, threshold = p 2^32: the counter hash of streaming/_dropout.py."""
    seed = tl.load(p_seed)
    row = i_bh * N + o_q
    low = _mix((row & 0xFFFFFFFF).to(tl.uint32))
    high = _mix(((row >> 32) + (seed & 0xFFFFFFFF)).to(tl.uint32))
    row_key = _mix(low ^ high ^ _mix(((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)))
    column = _mix(o_kv.to(tl.uint32) + 0x9E3779B9)
    word = _mix(row_key[:, None] ^ column[None, :])
    return tl.where(word.to(tl.int64) >= threshold, 1.0 / (1.0 - dropout_p), 0.0)
