"""A bias for each query and group of keys, which is added to logits: row_bias (B, H, N, G), and the group of each key.

Tokens of a kind stand together, so the keys of most tiles have one group. The bias is a number a row there: it is added to what
is subtracted from the logits of a row anyway, and costs no instruction a pair. Two numbers tell such a tile: word_j has how often
the group has changed up to key j, and the group. All keys between two keys of the same word have one group. In other tiles a loop
goes over the groups that are there. It stands in a branch, so the products of the loop over tiles still run ahead.

Tiles whose groups are masked for all queries of a program are not visited: before the first run of keys that is visible to some
query, after the last one, and in the longest gap between. A loop goes over the other tiles as if they were contiguous, since a
branch around its products would keep copies from running ahead.

In kernels a group's number is one more than the caller's, and 0 is no group, whose bias is 0.

A product adds the bias to dot products in 16 bits, of up to MULTIPLIED groups and without attn_mask (`GROUP_PRODUCT`):
logits += parts @ members^T. A row of members has ones for the group of its key, a row of parts the bias of its query, divided by
the scale, as a sum of two numbers of 16 bits or more. A bias that such numbers do not hold is special: -inf, which masks a pair
whatever the score is, NaN, and what is large. Its part is 0, and a branch adds it, which only blocks of queries with a special
bias take. A product of dS and members sums dS by groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# the constant MASK of a kernel: 0 without attn_mask, else one of the first two, and the third more beside a group bias
BOOL_MASK, FLOAT_MASK, GROUP_BIAS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
GROUP_PRODUCT = tl.constexpr(6)  # instead of the third: a product adds the bias
MOST_GROUPS = 32  # whose sums a program keeps in registers
MULTIPLIED = tl.constexpr(8)  # groups of a product, at most
SLOTS = tl.constexpr(16)  # numbers in a row of a product's factor, its least
BLOCK_OF_ROWS = tl.constexpr(64)
LARGEST_BIAS, LARGEST_PART = tl.constexpr(64.0), tl.constexpr(32768.0)  # two parts of 8 bits err by 5e-4 then
RUNS = tl.constexpr(64)  # of equal groups, which `seen_keys` reads; it takes all keys behind them for seen
PADDED = tl.constexpr(128)  # rows are padded to a multiple of it, as many as the largest tile has: tiles load them without a mask


class GroupBias(NamedTuple):
    """The tensors that kernels read in addition to row_bias, by `prepared`.

    bias (B, H, 1 + G, padded N) in base 2; masked (B, H, 1 + G) int32: whether it is -inf for some query. words
    (B, M + RUNS + 1) int64: of each key the number of its run of equal groups, times 2^32, and the
    group; after them of each run its first key, M after the last run, times 2^32, and the group.
    """

    bias: Tensor
    masked: Tensor
    words: Tensor


class BiasProduct(NamedTuple):
    """The factors of the product that adds a bias, and what it leaves out.

    parts (B, H, padded N, SLOTS) and members (B, padded M, SLOTS): in slot s < G * (SLOTS // G) the part s // G of the bias for
    group s % G, and 1 or 0; else zeros. special (B, H, padded N / BLOCK_OF_ROWS) int32, of each block of queries: a bit for
    each group whose bias is special for some query, and 16 bits higher for each that is masked from all of them.
    """

    parts: Tensor
    members: Tensor
    special: Tensor


def prepared(row_bias: Tensor, key_groups: Tensor) -> GroupBias:
    batch, heads, rows, groups = row_bias.shape
    num_keys, padded = key_groups.shape[1], rows + -rows % PADDED.value
    bias = row_bias.new_empty((batch, heads, 1 + groups, padded), dtype=torch.float32)
    masked = key_groups.new_empty(bias.shape[:3], dtype=torch.int32)
    words = key_groups.new_empty((batch, num_keys + RUNS.value + 1))
    _launch(row_bias, key_groups, GroupBias(bias, masked, words), None, batch * (1 + heads * (1 + groups)), BLOCK=2048)
    return GroupBias(bias, masked, words)


def prepared_product(row_bias: Tensor, key_groups: Tensor, dtype: torch.dtype, scale: float) -> tuple[GroupBias, BiasProduct]:
    """For logits that are products times this scale. The bias in `GroupBias` is the special one: it is there in blocks of PADDED
    queries of which some has a special bias, and is 0 for others; masked is nothing."""
    batch, heads, rows, groups = row_bias.shape
    num_keys, padded = key_groups.shape[1], rows + -rows % PADDED.value
    padded_keys = num_keys + -num_keys % PADDED.value
    special = key_groups.new_empty((batch, heads, padded // BLOCK_OF_ROWS.value), dtype=torch.int32)
    bias = row_bias.new_empty((batch, heads, 1 + groups, padded), dtype=torch.float32)
    of_bias = GroupBias(bias, special, key_groups.new_empty((batch, num_keys + RUNS.value + 1)))
    parts = row_bias.new_empty((batch, heads, padded, SLOTS.value), dtype=dtype)
    product = BiasProduct(parts, row_bias.new_empty((batch, padded_keys, SLOTS.value), dtype=dtype), special)
    programs = batch * (1 + (padded_keys + heads * padded) // PADDED.value)
    _launch(row_bias, key_groups, of_bias, product, programs, 1.0 / scale, BLOCK=1024)
    return of_bias, product


def _launch(
    row_bias: Tensor,
    key_groups: Tensor,
    of_bias: GroupBias,
    product: BiasProduct | None,
    programs: int,
    factor: float = 1.0,
    *,
    BLOCK: int,
) -> None:
    batch, _, rows, groups = row_bias.shape
    if batch > 0:
        _group_bias_kernel[(programs,)](
            p_groups=key_groups.contiguous(),
            p_rows=row_bias.contiguous(),
            p_words=of_bias.words,
            p_bias=of_bias.bias,
            p_masked=of_bias.masked,
            product=product,
            factor=None if product is None else factor,
            B=batch,
            N=rows,
            NP=of_bias.bias.shape[3],
            M=key_groups.shape[1],
            G=groups,
            BLOCK=BLOCK,
            num_warps=8 if product is None else 4,
            enable_fp_fusion=True,
        )


def gradient_blocks(row_bias: Tensor | None, mask: int = 0) -> tuple[Tensor | None, list[tuple[Tensor | None, int, int]]]:
    """The gradient of row_bias, (B, H, N, G) float32, and for each launch the gradient, its first group, and BLOCK_G of them.

    A launch computes all else again. Without a bias there is one, and BLOCK_G is 0. mask: the constant MASK.
    """
    if row_bias is None:
        return None, [(None, 0, 0)]
    grad = torch.zeros_like(row_bias, dtype=torch.float32, memory_format=torch.contiguous_format)
    groups = row_bias.shape[3]
    if groups == 0:
        return grad, [(None, 0, 0)]
    block = SLOTS.value if mask == GROUP_PRODUCT.value else min(MOST_GROUPS, 1 << (groups - 1).bit_length())
    return grad, [(grad, first, block) for first in range(0, groups, block)]


@triton.jit
def _group_bias_kernel(p_groups, p_rows, p_words, p_bias, p_masked, product, factor, B, N, NP, M, G, BLOCK: tl.constexpr):
    """`GroupBias`: words by the first B programs, one a sample; bias and masked by the others, one a head and group. Beside a
    `BiasProduct` these are for PADDED keys of a sample, or PADDED queries of a head."""
    i = tl.program_id(0).to(tl.int64)
    if i < B:
        runs = 0
        p_words += i * (M + RUNS + 1)
        for start in range(0, M, BLOCK):
            o_kv = start + tl.arange(0, BLOCK)
            b_group = _numbered(tl.load(p_groups + i * M + o_kv, mask=o_kv < M, other=-1), G)
            b_before = _numbered(tl.load(p_groups + i * M + tl.maximum(o_kv - 1, 0), mask=o_kv < M, other=-1), G)
            b_change = (b_group != b_before).to(tl.int32)
            b_run = runs + tl.cumsum(b_change, axis=0)
            runs += tl.sum(b_change, axis=0)
            tl.store(p_words + o_kv, (b_run.to(tl.int64) << 32) | b_group, mask=o_kv < M)
            m_first = ((b_change > 0) | (o_kv == 0)) & (b_run <= RUNS) & (o_kv < M)
            tl.store(p_words + M + b_run, (o_kv.to(tl.int64) << 32) | b_group, mask=m_first)
        o_r = tl.arange(0, 2 * RUNS)
        behind = tl.full([2 * RUNS], 0, tl.int64) + M
        tl.store(p_words + M + o_r, behind << 32, mask=(o_r > (runs if M > 0 else -1)) & (o_r <= RUNS))
    elif product is None:
        i_bhg = i - B
        i_bh, group = i_bhg // (1 + G), i_bhg % (1 + G)
        b_masked = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, NP, BLOCK):
            o_q = start + tl.arange(0, BLOCK)
            m_row = tl.where(group > 0, o_q < N, False)
            b_bias = tl.load(p_rows + (i_bh * N + o_q) * G + (group - 1), mask=m_row, other=0.0).to(tl.float32)
            b_masked |= (b_bias == float("-inf")).to(tl.int32)
            tl.store(p_bias + i_bhg * NP + o_q, _in_base_2(b_bias), mask=o_q < NP)
        tl.store(p_masked + i_bhg, tl.max(b_masked, axis=0))
    else:
        i = i - B
        blocks = tl.cdiv(M, PADDED)
        if i < B * blocks:
            _store_members(product.members, p_groups, i // blocks, i % blocks, M, G)
        else:
            i = i - B * blocks
            blocks = NP // PADDED
            _store_parts(product.parts, p_rows, p_bias, p_masked, i // blocks, i % blocks, factor, N, NP, G)


@triton.jit
def _in_base_2(b_bias):
    b_base2 = b_bias * 1.4426950408889634
    # a number may be finite in base e and not in base 2: it becomes the largest
    b_base2 = tl.where((b_base2 < -3.4028234e38) & (b_bias > float("-inf")), -3.4028234e38, b_base2)
    return tl.where((b_base2 > 3.4028234e38) & (b_bias < float("inf")), 3.4028234e38, b_base2)


@triton.jit
def _store_members(p_members, p_groups, i_b, i_kv, M, G):
    """Members of the i_kv-th PADDED keys of a sample: the slots of a key's group have ones."""
    o_kv, o_s = i_kv * PADDED + tl.arange(0, PADDED), tl.arange(0, SLOTS)
    b_group = tl.load(p_groups + i_b * M + o_kv, mask=o_kv < M, other=-1)
    b_member = (b_group[:, None] == (o_s % G)[None, :]) & (o_s < SLOTS // G * G)[None, :]
    offsets = (i_b * tl.cdiv(M, PADDED) * PADDED + o_kv)[:, None] * SLOTS + o_s[None, :]
    tl.store(p_members + offsets, b_member.to(tl.float32).to(p_members.dtype.element_ty))


@triton.jit
def _store_parts(p_parts, p_rows, p_bias, p_special, i_bh, i_q, factor, N, NP, G):
    """Parts of the i_q-th PADDED queries of a head, the special bias, if there is one, and the bits that say for whom."""
    o_q, o_s = i_q * PADDED + tl.arange(0, PADDED), tl.arange(0, SLOTS)
    b_slot, b_part = o_s % G, o_s // G
    m_slot = (o_s < SLOTS // G * G)[None, :] & (o_q < N)[:, None]
    b_bias = tl.load(p_rows + (i_bh * N + o_q)[:, None] * G + b_slot[None, :], mask=m_slot, other=0.0).to(tl.float32)  # [q,slot]
    b_x = b_bias * factor
    m_plain = (tl.abs(b_bias) <= LARGEST_BIAS) & (tl.abs(b_x) <= LARGEST_PART)  # not NaN
    b_x = tl.where(m_plain, b_x, 0.0)
    b_high = b_x.to(p_parts.dtype.element_ty)
    b_rest = b_x - b_high.to(tl.float32)
    b_middle = b_rest.to(p_parts.dtype.element_ty)
    b_low = (b_rest - b_middle.to(tl.float32)).to(p_parts.dtype.element_ty)
    b_tail = tl.where((b_part == 1)[None, :], b_middle, tl.where((b_part == 2)[None, :], b_low, 0.0))
    b_part_of = tl.where((b_part == 0)[None, :], b_high, b_tail)
    tl.store(p_parts + (i_bh * NP + o_q)[:, None] * SLOTS + o_s[None, :], b_part_of)
    b_bit = tl.where(o_s < G, 2 << o_s, 0)[None, :]  # as groups are numbered in kernels
    b_special = tl.where(m_plain, 0, b_bit)
    b_seen = tl.where((b_bias == float("-inf")) | (o_q >= N)[:, None], 0, b_bit)
    p_special += i_bh * (NP // BLOCK_OF_ROWS) + i_q * (PADDED // BLOCK_OF_ROWS)
    some = 0
    for block in tl.static_range(PADDED // BLOCK_OF_ROWS):
        m_block = (tl.arange(0, PADDED) // BLOCK_OF_ROWS == block)[:, None]
        special = _any_bits(tl.where(m_block, b_special, 0))
        hidden = (2 << G) - 2 - _any_bits(tl.where(m_block, b_seen, 0))
        tl.store(p_special + block, special | hidden << 16)
        some |= special
    if some != 0:
        b_large = tl.where(m_plain, 0.0, _in_base_2(b_bias))
        p_bias += i_bh * (1 + G) * NP
        tl.store(p_bias + (1 + o_s).to(tl.int64)[None, :] * NP + o_q[:, None], b_large, mask=(o_s < G)[None, :])


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _any_bits(b_x):
    """The bits of any number of [q,slot]."""
    return tl.reduce(tl.reduce(b_x, 1, _or), 0, _or)


@triton.jit
def _numbered(b_group, G):
    """int64 groups as kernels number them."""
    return tl.where((b_group >= 0) & (b_group < G), b_group + 1, 0)


@triton.jit
def groups_of_tile(masks, start, M, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """The first and the last group of the tile of BLOCK keys that begins at `start`, how often the group changes, and whether
    one of the two masks a query. Zeros without a group bias, and where a product adds it.

    The branch is always taken. It keeps the compiler from copying the numbers to shared memory ahead of time.
    """
    first, last, masked = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)
    if MASK >= GROUP_BIAS and MASK != GROUP_PRODUCT:
        if M > 0:
            first = tl.load(masks.p_words + start)
            last = tl.load(masks.p_words + (tl.minimum(start + BLOCK, M) - 1))
            masked = tl.load(masks.p_masked + first.to(tl.int32).to(tl.int64))
            masked |= tl.load(masks.p_masked + last.to(tl.int32).to(tl.int64))
    return first.to(tl.int32), last.to(tl.int32), (last >> 32).to(tl.int32) - (first >> 32).to(tl.int32), masked != 0


@triton.jit
def seen_keys(masks, o_q, N, M, MASK: tl.constexpr):
    """The keys that the queries o_q see: none before the first number, none from the second on, and none from the third to the
    fourth."""
    first, end, gap, resume = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32) + M, tl.full([], 0, tl.int32), 0
    if MASK >= GROUP_BIAS:
        resume = first
        b_group, b_start, b_end, unknown = _runs(masks, M)
        if tl.max(tl.load(masks.p_masked + b_group), axis=0) != 0:
            NP = tl.cdiv(N, PADDED) * PADDED
            p = masks.p_bias + (b_group.to(tl.int64) * NP)[:, None] + o_q[None, :]
            b_bias = tl.load(p, mask=(o_q < N)[None, :], other=float("-inf"))  # [run,q]
            m_seen = (tl.max((b_bias != float("-inf")).to(tl.int32), axis=1) > 0) & (b_start < b_end)
            first, end, gap, resume = _seen_runs(m_seen, b_start, b_end, unknown, end, M)
    return first, end, gap, resume


@triton.jit
def _runs(masks, M):
    """Group, first key and the key behind the last one of each run, and from which key on runs are unknown."""
    o_r = tl.arange(0, RUNS)
    p_runs = masks.p_words + M
    b_run = tl.load(p_runs + o_r)
    b_group, b_start = b_run.to(tl.int32), (b_run >> 32).to(tl.int32)
    b_end = (tl.load(p_runs + o_r + 1) >> 32).to(tl.int32)
    unknown = (tl.load(p_runs + RUNS) >> 32).to(tl.int32)
    return b_group, b_start, b_end, unknown


@triton.jit
def _seen_runs(m_seen, b_start, b_end, unknown, end, M):
    """`seen_keys`, by which runs some query sees."""
    o_r = tl.arange(0, RUNS)
    gap, resume = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    first = tl.minimum(tl.min(tl.where(m_seen, b_start, unknown), axis=0), unknown)
    end = tl.where(unknown < M, end, tl.max(tl.where(m_seen, b_end, 0), axis=0))
    b_length = tl.where(m_seen | (b_start < first) | (b_end > end), 0, b_end - b_start)
    length, run = tl.max(b_length, axis=0), tl.argmax(b_length, axis=0)
    if length > 0:  # the gap around the longest hidden run
        gap = tl.max(tl.where(m_seen & (o_r < run), b_end, 0), axis=0)
        resume = tl.min(tl.where(m_seen & (o_r > run), b_start, unknown), axis=0)
    return first, end, gap, resume


@triton.jit
def sees_tile(masks, start, o_q, N, M, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """Whether some of the queries o_q may see something of the tile of BLOCK keys that begins at `start`."""
    first, last, changes, masked = groups_of_tile(masks, start, M, BLOCK, MASK)
    may_see = tl.full([], 1, tl.int32)
    if masked & (changes <= 1):
        NP = tl.cdiv(N, PADDED) * PADDED
        b_first = tl.load(masks.p_bias + first.to(tl.int64) * NP + o_q, mask=o_q < N, other=float("-inf"))
        b_last = tl.load(masks.p_bias + last.to(tl.int64) * NP + o_q, mask=o_q < N, other=float("-inf"))
        may_see = tl.max(((b_first != float("-inf")) | (b_last != float("-inf"))).to(tl.int32), axis=0)
    return may_see > 0


@triton.jit
def seeing_queries(masks, start, N, M, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """The queries that see something of the tile of BLOCK keys which begins at `start`, as `seen_keys` says it of keys. All may,
    where the tile has more than two runs. Gaps are not looked for."""
    first_q, end_q = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32) + N
    first, last, changes, masked = groups_of_tile(masks, start, M, BLOCK, MASK)
    if MASK >= GROUP_BIAS:
        if masked & (changes <= 1):
            first_q, end_q = end_q, first_q
            for row in range(0, N, 1024):
                o_q = row + tl.arange(0, 1024)
                p = masks.p_bias + o_q
                NP = tl.cdiv(N, PADDED) * PADDED
                b_first = tl.load(p + first.to(tl.int64) * NP, mask=o_q < N, other=float("-inf"))
                b_last = tl.load(p + last.to(tl.int64) * NP, mask=o_q < N, other=float("-inf"))
                m_seeing = (b_first != float("-inf")) | (b_last != float("-inf"))
                first_q = tl.minimum(first_q, tl.min(tl.where(m_seeing, o_q, N), axis=0))
                end_q = tl.maximum(end_q, tl.max(tl.where(m_seeing, o_q + 1, 0), axis=0))
    return first_q, end_q, end_q, end_q


class Steps(NamedTuple):
    """A loop over tiles from begin to end, of so many keys or queries each; from the step `gap` on, so many keys are skipped."""

    begin: Any
    end: Any
    size: Any
    gap: Any
    skipped: Any


@triton.jit
def seen_tiles(seen, start, end, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """`Steps` over the tiles from start to end that are `seen_keys`."""
    if MASK == GROUP_PRODUCT:
        first, last, gap, resume, some = seen
        skipped = tl.full([], 0, tl.int32)
        if some:
            first, end, gap, skipped = _seen_tiles(first, last, gap, resume, start, end, BLOCK)
        else:
            first, gap = start + skipped, end + skipped
        return Steps(first, end + 0, BLOCK, gap, skipped)
    elif MASK >= GROUP_BIAS:
        first, last, gap, resume = seen
        first, end, gap, skipped = _seen_tiles(first, last, gap, resume, start, end, BLOCK)
        return Steps(first, end, BLOCK, gap, skipped)
    else:
        return Steps(start, end, BLOCK, 0, 0)


@triton.jit
def _seen_tiles(first, last, gap, resume, start, end, BLOCK: tl.constexpr):
    start += tl.maximum(first - start, 0) // BLOCK * BLOCK
    end = start + tl.cdiv(tl.maximum(tl.minimum(end, last) - start, 0), BLOCK) * BLOCK
    gap = start + tl.cdiv(tl.maximum(gap - start, 0), BLOCK) * BLOCK
    resume = start + tl.maximum(tl.minimum(resume, end) - start, 0) // BLOCK * BLOCK
    skipped = tl.maximum(resume - gap, 0)
    return start, end - skipped, gap, skipped


@triton.jit
def tile_at(step, steps, MASK: tl.constexpr):
    """Where the tile of a step begins."""
    if MASK >= GROUP_BIAS:
        return step + tl.where(step >= steps.gap, steps.skipped, 0)
    else:
        return step


@triton.jit
def of_queries(b, KEY_MAJOR: tl.constexpr):
    """Numbers [q] beside a tile [q,kv], or KEY_MAJOR [kv,q]."""
    return b[None, :] if KEY_MAJOR else b[:, None]


@triton.jit
def of_keys(b, KEY_MAJOR: tl.constexpr):
    """Numbers [kv] beside such a tile."""
    return b[:, None] if KEY_MAJOR else b[None, :]


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
def add_group_bias(b_log2, pairs, KEY_MAJOR: tl.constexpr, FLOAT: tl.constexpr):
    """Logits [q,kv], or KEY_MAJOR [kv,q], and the bias of each pair: -inf where that is -inf, whatever the score is.

    pairs: `Pairs`. FLOAT: there is a float mask, whose -inf stays.
    """
    masks, start, o_q, o_kv, N, M = pairs
    first, _, changes, _ = groups_of_tile(masks, start, M, o_kv.shape[0], GROUP_BIAS)
    if changes == 0:
        b_log2 = _added(b_log2, row_bias_of(masks, first, o_q, N), KEY_MAJOR, FLOAT)
    else:
        b_group = groups_of_keys(masks, o_kv, M)
        group = next_group(b_group, -1)
        while group <= masks.num_groups:
            b_sum = _added(b_log2, row_bias_of(masks, group, o_q, N), KEY_MAJOR, FLOAT)
            b_log2 = tl.where(of_keys(b_group == group, KEY_MAJOR), b_sum, b_log2)
            group = next_group(b_group, group)
    return b_log2


@triton.jit
def _added(b_log2, b_row, KEY_MAJOR: tl.constexpr, FLOAT: tl.constexpr):
    b_bias = of_queries(b_row, KEY_MAJOR)
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
def add_sums_of_all_groups(b_sums, b_x, masks, o_kv, M):
    """As `add_group_sums`, of tiles about which nothing is known."""
    b_group = tl.where(o_kv < M, groups_of_keys(masks, o_kv, M), 0)
    o_g = 1 + tl.arange(0, b_sums.shape[1])
    for group in range(1, masks.num_groups + 1):
        b_sum = tl.sum(tl.where((b_group == group)[None, :], b_x, 0.0), axis=1)
        b_sums += tl.where((o_g == group)[None, :], b_sum[:, None], 0.0)
    return b_sums


@triton.jit
def chosen_rows(pairs, first, b_first, b_last, KEY_MAJOR: tl.constexpr):
    """For each pair of a tile of two groups that stand one behind the other, [q,kv] or KEY_MAJOR [kv,q], the number [q] of its
    query for the group of its key."""
    m_first = of_keys(groups_of_keys(pairs.masks, pairs.o_kv, pairs.M) == first, KEY_MAJOR)
    return tl.where(m_first, of_queries(b_first, KEY_MAJOR), of_queries(b_last, KEY_MAJOR))


@triton.jit
def store_group_sums(p, masks, i_bh, o_q, N, first_group, b_sums):
    """b_sums of `add_group_sums` for rows of head i_bh."""
    G = masks.num_groups
    o_g = first_group + tl.arange(0, b_sums.shape[1])
    offsets = (i_bh * N + o_q)[:, None] * G + o_g[None, :]
    tl.store(p + offsets, b_sums, mask=(o_q < N)[:, None] & (o_g < G)[None, :])


@triton.jit
def store_sums_of_product(p, masks, i_bh, row, N, b_sums):
    """As `store_group_sums`, of all groups, and of the queries from `row` on."""
    G = masks.num_groups
    o_row, o_g = tl.arange(0, b_sums.shape[0]), tl.arange(0, b_sums.shape[1])
    p += (i_bh * N + row) * G
    tl.store(p + (o_row.to(tl.int64)[:, None] * G + o_g[None, :]), b_sums, mask=(o_row < N - row)[:, None] & (o_g < G)[None, :])


@triton.jit
def seen_keys_of_product(masks, hidden, M):
    """`seen_keys`, and whether they are not all. hidden: of `special_groups`."""
    first, end, gap = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32) + M, tl.full([], 0, tl.int32)
    resume = first
    if hidden != 0:
        b_group, b_start, b_end, unknown = _runs(masks, M)
        m_seen = ((hidden >> b_group) & 1 == 0) & (b_start < b_end)
        first, end, gap, resume = _seen_runs(m_seen, b_start, b_end, unknown, end, M)
    return first, end, gap, resume, hidden != 0


@triton.jit
def special_groups(product, i_bh, row, N, BLOCK: tl.constexpr):
    """Bits of the groups whose bias is special for some of the BLOCK queries from `row` on, and of those that all of them do not
    see."""
    p = product.special + i_bh * (tl.cdiv(N, PADDED) * (PADDED // BLOCK_OF_ROWS)) + row // BLOCK_OF_ROWS
    some = tl.load(p)
    every = some
    for i in tl.static_range(1, BLOCK // BLOCK_OF_ROWS):
        bits = tl.load(p + i)
        some, every = some | bits, every & bits
    return some & 0xFFFF, every >> 16


@triton.jit
def parts_of(product, i_bh, row, N, BLOCK: tl.constexpr):
    """[q,SLOTS] of `BiasProduct` for the BLOCK queries from `row` on."""
    p = product.parts + i_bh * (tl.cdiv(N, PADDED) * PADDED) * SLOTS + (tl.full([], 0, tl.int64) + row) * SLOTS
    return tl.load(p + (tl.arange(0, BLOCK)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]))


@triton.jit
def members_of(product, i_b, start, M, BLOCK: tl.constexpr):
    """[kv,SLOTS] of `BiasProduct` for the BLOCK keys from `start` on."""
    p = product.members + i_b * (tl.cdiv(M, PADDED) * PADDED) * SLOTS + (tl.full([], 0, tl.int64) + start) * SLOTS
    return tl.load(p + (tl.arange(0, BLOCK)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]))


@triton.jit
def unforeseen(o, PRECISION: tl.constexpr):
    """Numbers that the compiler does not know, so that it prepares nothing for a branch that is hardly taken."""
    if PRECISION == "widen":
        return o
    else:
        o = o.to(tl.int32)
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [o], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def special_logits(b_s, b_scale, pairs, special, KEY_MAJOR: tl.constexpr, PRECISION: tl.constexpr):
    """Logits [q,kv], or KEY_MAJOR [kv,q], of scores and the scale of each row, and the special bias of the groups of these bits.

    Groups do not loop: the compiler computes addresses anew in a loop that holds another one. The first instructions are none of
    a branch without a special bias: they would be computed in front of both, apart from what follows.
    """
    special, o_q = unforeseen(special, PRECISION), unforeseen(pairs.o_q, PRECISION)
    b_group = groups_of_keys(pairs.masks, unforeseen(pairs.o_kv, PRECISION), pairs.M)
    b_log2 = b_s * b_scale[:, None]
    for group in tl.static_range(1, MULTIPLIED + 1):
        if special & (1 << group) != 0:
            b_rest = row_bias_of(pairs.masks, tl.full([], group, tl.int32), o_q, pairs.N)
            b_log2 = tl.where(of_keys(b_group == group, KEY_MAJOR), _added(b_log2, b_rest, KEY_MAJOR, False), b_log2)
    return b_log2


@triton.jit
def seeing_queries_of_product(masks, product, first_head, HEADS: tl.constexpr, start_kv, N, M, BLOCK: tl.constexpr):
    """`seeing_queries` of HEADS heads that one loop takes, in whole blocks: those that see something in some head."""
    first_word, last_word = tl.load(masks.p_words + start_kv), tl.load(masks.p_words + (tl.minimum(start_kv + BLOCK, M) - 1))
    groups = (1 << first_word.to(tl.int32)) | (1 << last_word.to(tl.int32))
    groups = tl.where((last_word >> 32) - (first_word >> 32) <= 1, groups << 16, 1)  # bit 0 is never hidden
    blocks = tl.cdiv(N, PADDED) * (PADDED // BLOCK_OF_ROWS)
    end = tl.full([], 0, tl.int32)
    first = end + blocks
    for start in range(0, blocks, 32):
        o_block = start + tl.arange(0, 32)
        m_seeing = o_block < 0
        for h in tl.static_range(HEADS):
            p = product.special + (first_head + h) * blocks + o_block
            b_hidden = tl.load(p, mask=o_block < blocks, other=-1)
            m_seeing = m_seeing | (b_hidden & groups != groups)
        first = tl.minimum(first, tl.min(tl.where(m_seeing, o_block, blocks), axis=0))
        end = tl.maximum(end, tl.max(tl.where(m_seeing, o_block + 1, 0), axis=0))
    first, end = first * BLOCK_OF_ROWS, end * BLOCK_OF_ROWS
    return first, end, end, end, (first > 0) | (end < N)


@triton.jit
def groups_of_rows(x, masks, i_bh, first, o_q, MASK: tl.constexpr):
    """Of a tile of queries from `first` on: its `special_groups`, the keys that it sees, and with a product the bias of its rows,
    [q,slot]."""
    special, b_parts = tl.full([], 0, tl.int32), 0  # nothing: Triton 3.6 returns no None
    if MASK == GROUP_PRODUCT:
        special, hidden = special_groups(x.product, i_bh, first, x.N, o_q.shape[0])
        seen = seen_keys_of_product(masks, hidden, x.M)
        b_parts = parts_of(x.product, i_bh, first, x.N, o_q.shape[0])
    else:
        seen = seen_keys(masks, o_q, x.N, x.M, MASK)
    return special, seen, b_parts
