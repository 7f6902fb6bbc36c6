"""Helpers of all Triton kernels: tiles of a matrix, matrix products, masks, dropout, and the arguments of a launch.

Names: i_ is a program index (64 bits), o_ are offsets, m_ is a boolean mask, p_ a pointer, b_ a block in registers, t_ a
`Tile`. BLOCK_Q counts query rows, BLOCK_KV keys, BLOCK_D features; all are powers of two. N and M are the numbers of queries
and keys. Strides count elements. The last stride is 1 (`aligned`). Logits are in base 2: scale * LOG2_E is multiplied in, so
that exp2 gives the powers (where not, `below_max` does it). A log-sum-exp named `lse` is natural, one named `shift` is in
base 2.

A kernel takes what belongs together as one tuple: a tensor with its strides (`Heads`), the masks (`MaskPointers`), as x all
that the kernels of an operator share, and as C the constants of a call and its launch (`launched`), for each of which it is
compiled. C of an operator with attn_mask has MASK (see `GROUP_BIAS`), KEY_MASK and CAUSAL. Triton 3.6 assigns and compares no
tuple that holds None, takes no nested targets, and makes a tensor of each constant that is assigned: C is passed on. In loops
it forgets constants, such as strides of 1, of the tuples in a tuple, unless this tuple has a constant behind them:
`ScoreCall` of _scores.py has `end`, and other kernels unpack x before.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from vlattn_fast._ground.named import by_name
from vlattn_fast._ground.tensors import cast_float_mask
from vlattn_fast.backends.inputs import Attention
from vlattn_fast.kernels._configurations import Config, multiplies_biases
from vlattn_fast.kernels._group_bias import (
    BOOL_MASK,
    FLOAT_MASK,
    GROUP_BIAS,
    GROUP_PRODUCT,
    MULTIPLIED,
    RUNS,
    BiasProduct,
    add_group_bias,
    chosen_rows,
    groups_of_tile,
    members_of,
    of_keys,
    of_queries,
    prepared,
    prepared_product,
    row_bias_of,
    seeing_queries,
    seen_keys,
    seen_tiles,
    special_logits,
    tile_at,
    unforeseen,
)

LOG2_E = 1.4426950408889634
OLD_TRITON = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))
INTERPRETED = triton.knobs.runtime.interpret  # Triton reads it, too, where a kernel is defined, not where it is called
COMPILED = tl.constexpr(not INTERPRETED)
# row vectors of a backward pass are padded to a multiple of it; every tile of queries there divides it
ROW_MULTIPLE = tl.constexpr(64)
FEATURES = tl.constexpr(64)  # of a part of `wide` rows
CACHED = tl.constexpr(1 << 23)  # numbers that programs beside one another read again: 16 MB in 16 bits, a third of an H200's L2
PROGRAMS = 2 * 132  # that keys are split for at most: two for each SM of an H200, on every GPU
FEWEST_PARTS, FEWEST_KEYS = 4, 256  # below, joining the parts takes as long as is gained


def block_size(size: int, smallest: int = 16) -> int:
    """The power of two that holds `size`. A matrix instruction needs at least `smallest`."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size`. triton.cdiv gives the same on the host, but takes as long as an allocation."""
    return -(-size // block)


def padded_rows(size: int) -> int:
    """`size` up to a multiple of ROW_MULTIPLE."""
    return cdiv(size, ROW_MULTIPLE.value) * ROW_MULTIPLE.value


def pad_rows(rows: Tensor, value: float = 0.0) -> Tensor:
    """(..., N) -> (..., padded N), contiguous. Kernels load such vectors without a mask."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % ROW_MULTIPLE.value), value=value).contiguous()


def edge_block(length: int, block: int, is_causal: bool) -> int:
    """The size of the last tile of a loop over `length` in steps of `block`: a power of two that holds what is left.

    577 tokens, for example, are 9 tiles of 64 and one of 16. Along the diagonal of a causal mask all tiles have the same size.
    """
    rest = length % block
    return block if is_causal or rest == 0 else min(block, block_size(rest))


def keys_of_a_part(programs: int, num_q: int, num_k: int, config: dict[str, int]) -> int:
    """How many keys a program takes of those of few queries, so that there are more programs; 0: all. `config` has the tiles.

    `programs` are those that take all keys. The answer depends on no device, so that bits repeat.
    """
    if num_q > config["BLOCK_Q"]:  # several tiles
        return 0
    parts = min(PROGRAMS // programs, num_k // FEWEST_KEYS)
    return 0 if parts < FEWEST_PARTS else cdiv(cdiv(num_k, parts), config["BLOCK_KV"]) * config["BLOCK_KV"]


def input_precision(dtype: torch.dtype = torch.float32) -> str:
    """How `dot` multiplies operands of `dtype`, which matters for float32: in tf32 if the user has allowed it, else in bf16x6.

    That is as precise as float32, and runs on tensor cores: each operand is a sum of three bfloat16 numbers, and of the nine
    products between them six count. On FMA units Triton's products wait for shared memory, mostly in bank conflicts.
    torch has old switches for it (allow_tf32, set_float32_matmul_precision) and a new one (fp32_precision). The new one also
    answers for the old ones; its getter takes a twentieth of the time of torch.backends.cuda.matmul. Triton's interpreter
    multiplies the raw bits of bfloat16 operands, so "widen" converts them to float32 first. That changes no product.
    """
    if INTERPRETED:
        return "widen"
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" else "bf16x6"


def aligned(x: Tensor) -> Tensor:
    """`x` with a last stride of 1. Rows of a multiple of 8 features begin at multiples of 8, as `rows_of` expects.

    It is copied if that is not so. Triton finds by itself what is divisible by 16; heads of 72 features are not.
    """
    needed = alignment(x.shape, x.stride())
    return x if needed and x.data_ptr() % needed == 0 else x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=1024)
def alignment(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """The number of bytes that must divide a tensor's address, else `aligned` copies it; 0 if it always copies."""
    size = shape[-1]
    if stride[-1] != 1 and size > 1:
        return 0
    if size % 8 != 0:
        return 1
    # the stride of a dimension of size 1 leads nowhere
    return 0 if any(n > 1 and step % 8 != 0 for n, step in zip(shape[:-1], stride[:-1], strict=True)) else 16


class Heads(NamedTuple):
    """A tensor (B, H, N, D) with a last stride of 1. Strides count elements."""

    p: Tensor
    stride_b: int
    stride_h: int
    stride_n: int


def heads_of(x: Tensor, stride: tuple[int, ...] | None = None) -> Heads:
    """`x` with its strides, which the caller may have read."""
    stride_b, stride_h, stride_n, _ = x.stride() if stride is None else stride
    return _new_heads(p=x, stride_b=stride_b, stride_h=stride_h, stride_n=stride_n)


class MaskPointers(NamedTuple):
    """attn_mask with its strides, 0 where it is broadcast, and the key padding mask (B, M). Any tensor stands in if absent.

    Beside a group bias what is `prepared` with the strides of samples and heads, and the number of groups; else zeros.
    """

    p: Tensor
    stride_b: int = 0
    stride_h: int = 0
    stride_n: int = 0
    stride_m: int = 0
    p_keys: Tensor | int = 0
    p_bias: Tensor | int = 0
    bias_stride_b: int = 0
    bias_stride_h: int = 0
    p_masked: Tensor | int = 0
    masked_stride_b: int = 0
    p_words: Tensor | int = 0
    num_groups: int = 0


class Tile(NamedTuple):
    """A block of rows, and where they lie: the matrix, the stride of its rows, which rows, and which of them are there."""

    b: Any
    p: Any
    stride: Any
    o_row: Any
    m_row: Any


class Pairs(NamedTuple):
    """A tile of pairs of a head: its masks, the first key, the queries and the keys, and how many of both there are."""

    masks: MaskPointers
    start: Any
    o_q: Any
    o_kv: Any
    N: Any
    M: Any


_new_heads, _new_masks = by_name(Heads), by_name(MaskPointers)


def masks_and_kind(x: Attention, like: Tensor) -> tuple[MaskPointers, int]:
    """The masks, and the constant MASK. `like` is the query (B, H, N, D), which stands in for absent masks."""
    attn_mask, row_bias, key_groups = x.attn_mask, x.row_bias, x.key_groups
    if attn_mask is None and x.key_mask is None and row_bias is None:
        return _new_masks(p=like, p_keys=like), 0
    of_pairs: dict[str, Any] = {"p": like}
    of_bias: dict[str, Any] = {}
    kind = 0
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        mask = attn_mask if is_bool else cast_float_mask(attn_mask, torch.float32)
        b, h, n, m = mask.expand(*like.shape[:3], x.key.shape[2]).stride()
        of_pairs = {"p": mask, "stride_b": b, "stride_h": h, "stride_n": n, "stride_m": m}
        kind = (BOOL_MASK if is_bool else FLOAT_MASK).value
    if row_bias is not None and key_groups is not None and row_bias.shape[3] > 0:  # without groups no key has one
        bias, masked, words = prepared(row_bias, key_groups)
        of_bias = _of_bias(bias, masked, words) | {"masked_stride_b": masked.stride(0), "num_groups": row_bias.shape[3]}
        kind += GROUP_BIAS.value
    return _new_masks(**of_pairs, p_keys=like if x.key_mask is None else x.key_mask.contiguous(), **of_bias), kind


def _of_bias(bias: Tensor, masked: Tensor, words: Tensor) -> dict[str, Any]:
    stride_b, stride_h, *_ = bias.stride()
    return {"p_bias": bias, "bias_stride_b": stride_b, "bias_stride_h": stride_h, "p_masked": masked, "p_words": words}


def masks_and_product(x: Attention, like: Tensor, multiplied: bool) -> tuple[MaskPointers, int, BiasProduct | None]:
    """`masks_and_kind`, and what a product takes that adds the bias to its logits. None: it may not, as without `multiplied`."""
    row_bias, key_groups = x.row_bias, x.key_groups
    if (
        row_bias is None
        or key_groups is None
        or not multiplied
        or x.score != "dot"
        or x.attn_mask is not None
        or like.dtype == torch.float32
        or OLD_TRITON
        or not multiplies_biases()
        or not 0 < row_bias.shape[3] <= MULTIPLIED.value
        or not 2.0**-40 < abs(x.scale) < 2.0**40
    ):
        return *masks_and_kind(x, like), None
    (bias, masked, words), product = prepared_product(row_bias, key_groups, like.dtype, x.scale)
    keys = like if x.key_mask is None else x.key_mask.contiguous()
    masks = _new_masks(p=like, p_keys=keys, **_of_bias(bias, masked, words), num_groups=row_bias.shape[3])
    return masks, GROUP_PRODUCT.value, product


def launched(call: dict[str, Any], config: Config | None = None, **constants: Any) -> dict[str, Any]:
    """The named arguments of a launch, with its configuration. What of it, and of the constants, `C` has fields for stands there.

    The constants of `C` are wrapped one by one: Triton 3.6 knows those of a tuple by that. Under a group bias it fails to compile
    loops of several stages for sm_90, silently in its pass for them; 3.9 compiles them, and none between was tried. A product and
    a sum become one instruction, which Triton 3.10 only does on request.
    """
    options, wrapped = _wrapped(call["C"], *(config or {}).items(), *constants.items())
    return {**call, **options, "C": wrapped}


@functools.lru_cache(maxsize=1024, typed=True)  # tuples of two classes may be equal
def _wrapped(constants: Any, *named: tuple[str, Any]) -> tuple[dict[str, Any], Any]:
    """The options of a launch, and its constants."""
    filled = constants._replace(**{name: x for name, x in named if name in constants._fields})
    options = {name: x for name, x in named if name not in constants._fields} | {"enable_fp_fusion": True}
    if OLD_TRITON and getattr(constants, "MASK", 0) >= GROUP_BIAS.value:
        options["num_stages"] = 1
    return options, type(constants)(*map(tl.constexpr, filled))


class Dropout(NamedTuple):
    """threshold = probability 2^32"""

    p_seed: Tensor
    probability: float
    threshold: int


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b, summed in float32. `PRECISION` is `input_precision()`."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def round_tf32(b):
    """Rounded to the nearest of 10 mantissa bits.

    The matrix unit would cut off, which is a bias: no sum averages it out.
    """
    # half of the last bit that stays is added, and the 13 bits behind it are cleared
    b_rounded = ((b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(b == b, b_rounded, b)  # the bits of a GPU's NaN, 0x7fffffff, would turn into -0


@triton.jit
def within(o, size):
    """Which offsets are below `size`; all, without a comparison, where that is None."""
    if size is None:
        return tl.full(o.shape, True, dtype=tl.int1)
    else:
        return o < size


@triton.jit
def load_tile(p, stride_row, o_row, o_col, num_rows, num_cols):
    """[rows, cols] of a matrix, zeros outside. num_rows: see `within`."""
    return load_where(p, stride_row, o_row, o_col, within(o_row, num_rows), num_cols)


@triton.jit
def load_where(p, stride_row, o_row, o_col, m_row, num_cols):
    """[rows, cols] of a matrix, zeros in rows without m_row."""
    # 64 bits: a row times its stride may exceed 2^31
    offsets = o_row.to(tl.int64)[:, None] * stride_row + o_col[None, :]
    return tl.load(p + offsets, mask=m_row[:, None] & (o_col < num_cols)[None, :], other=0.0)


@triton.jit
def aligned_step(stride, SIZE: tl.constexpr):
    """A stride of an `aligned` tensor, or an offset in it, which is divisible by 8 where SIZE is.

    A division says so: the compiler takes a hint of `tl.multiple_of` neither on an argument nor in a function.
    """
    return stride // 8 * 8 if SIZE % 8 == 0 else stride


@triton.jit
def dense_step(stride, SIZE: tl.constexpr):
    """As `aligned_step`, of a tensor without gaps. Where 16 divides SIZE it divides the strides, and launches say so."""
    return stride if SIZE % 16 == 0 else aligned_step(stride, SIZE)


@triton.jit
def rows_at(p, offset, SIZE: tl.constexpr):
    """p + offset, the rows of a head in an `aligned` tensor."""
    return p + aligned_step(offset, SIZE)


@triton.jit
def head_at(x, i_b, i_h, SIZE: tl.constexpr):
    """The rows of head i_h of sample i_b in `Heads` x."""
    return rows_at(x.p, i_b * x.stride_b + i_h * x.stride_h, SIZE)


@triton.jit
def store_head(x, i_b, i_h, o_row, o_col, num_rows, num_cols, b_sums):
    offset = dense_step(i_b * x.stride_b + i_h * x.stride_h, num_cols)
    store_sums(x.p + offset, dense_step(x.stride_n, num_cols), o_row, o_col, num_rows, num_cols, b_sums)


@triton.jit
def extended(b_tuple, b):
    """A tuple of blocks, and one more."""
    return b_tuple + (b,)


@triton.constexpr_function
def wide(dtype, size):
    """Whether products take so many features in parts, FEATURES at a time: in float32, if there are more than 128.

    A whole tile that is the same in all products of a loop keeps registers for its three summands in bfloat16, which leaves room
    for tiles of 16 x 16 alone. These took 1.6 to 4 times as many instructions a pair, for the sums of rows alone 14 times.
    """
    return dtype == tl.float32 and size > 128


@triton.jit
def rows_of(p, stride_row, o_row, m_row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The tile [rows,SIZE] of the matrix at `rows_at`, zeros in rows without m_row; in vectors, where SIZE is a multiple of 8."""
    step = aligned_step(stride_row, SIZE)
    return Tile(load_where(p, step, o_row, tl.arange(0, BLOCK), m_row, SIZE), p, step, o_row, m_row)


@triton.jit
def tile_of(p, stride_row, o_row, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """`rows_of` so many rows (see `within`)."""
    return rows_of(p, stride_row, o_row, within(o_row, num_rows), SIZE, BLOCK)


@triton.jit
def head_tile(x, i_b, i_h, o_row, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a head of `Heads` x."""
    return tile_of(head_at(x, i_b, i_h, SIZE), x.stride_n, o_row, num_rows, SIZE, BLOCK)


@triton.jit
def key_tile(p, stride_row, p_key_mask, o_kv, M, SIZE: tl.constexpr, BLOCK: tl.constexpr, KEY_MASK: tl.constexpr):
    """Keys or values [kv,SIZE]; those of padding are zeros, whatever stands there.

    The factor of padding in a product is 0, and 0 times NaN or infinity is NaN.
    """
    return rows_of(p, stride_row, o_kv, real_tokens(p_key_mask, o_kv, M, KEY_MASK), SIZE, BLOCK)


@triton.jit
def part_of(t, start, SIZE: tl.constexpr):
    """FEATURES of a tile [x,SIZE] that is `wide`, from memory, or else the tile.

    The compiler drops a tile that nothing else reads.
    """
    if wide(t.b.dtype, t.b.shape[1]):
        return load_where(t.p, t.stride, t.o_row, tl.arange(0, FEATURES) + start, t.m_row, SIZE)
    else:
        return t.b


@triton.jit
def row_products(x, y, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """x y^T [x,y] of tiles [x,SIZE] and [y,SIZE]."""
    if wide(x.b.dtype, x.b.shape[1]):
        # the parts of x are read again for each tile of y: what stays in registers would be its three summands
        b_products = tl.zeros([x.b.shape[0], y.b.shape[0]], dtype=tl.float32)
        for start in range(0, SIZE, FEATURES):
            b_products += dot(part_of(x, start, SIZE), tl.trans(part_of(y, start, SIZE)), PRECISION)
        return b_products
    else:
        return dot(x.b, tl.trans(y.b), PRECISION)


@triton.jit
def zero_sums(dtype, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr = False):
    """Zeros [ROWS,SIZE] for `add_products`, as a tuple: one for each part of tiles [y,BLOCK]. dtype, EACH: see `first_sums`."""
    if wide(dtype, BLOCK):
        b_sums = ()
        for _ in tl.static_range(0, SIZE, FEATURES):
            b_sums = extended(b_sums, tl.zeros([ROWS, FEATURES], dtype=tl.float32))
        return b_sums
    else:
        return (first_sums(dtype, ROWS, BLOCK, EACH),)


@triton.constexpr_function
def has_wgmma():
    """Whether it is for sm_90. Triton's interpreter runs what that runs."""
    return INTERPRETED or (cuda_capability_geq(9) and not cuda_capability_geq(10))


@triton.jit
def first_sums(dtype, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr = False):
    """Zeros [ROWS,COLUMNS] for sums of products of `dtype`. The compiler does not know them on sm_90, if `dtype` has 16 bits.

    A loop's last product may be in flight when the loop ends (wgmma). Triton writes known zeros where a path without tiles joins
    the loop's end: between the product and its wait. ptxas then makes every product of the kernel wait for the one before
    (C7515, "wgmma.mma_async instructions are serialized").
    EACH number is unknown, or all are the same unknown one. That costs less: such a tile begins in the layout of products, the
    other goes there through shared memory. But Triton 3.6 makes copies of one number between a product and its wait, too.
    """
    b = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if COMPILED and dtype != tl.float32 and has_wgmma():
        if EACH or OLD_TRITON:
            b = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=False, pack=1)
        else:
            zero = tl.inline_asm_elementwise(
                "mov.b32 $0, 0;", "=f,r", [tl.num_programs(0)], dtype=tl.float32, is_pure=True, pack=1
            )
            b = tl.full([ROWS, COLUMNS], zero, dtype=tl.float32)
    return b


@triton.jit
def add_products(b_sums, b_x, y, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """b_sums + b_x y of b_x [x,y] and a tile y [y,SIZE]."""
    b_new = ()
    for i in tl.static_range(len(b_sums)):
        # rounded to the dtype of y: matrix units take two operands of one dtype
        b_new = extended(b_new, b_sums[i] + dot(b_x.to(y.b.dtype), part_of(y, i * FEATURES, SIZE), PRECISION))
    return b_new


@triton.jit
def rows_times_sums(x, b_sums, SIZE: tl.constexpr):
    """The sums [x] of the products of a tile x [x,SIZE] and b_sums."""
    b = tl.sum(part_of(x, 0, SIZE).to(tl.float32) * b_sums[0], axis=1)
    for i in tl.static_range(1, len(b_sums)):
        b += tl.sum(part_of(x, i * FEATURES, SIZE).to(tl.float32) * b_sums[i], axis=1)
    return b


@triton.jit
def store_sums(p, stride_row, o_row, o_col, num_rows, num_cols, b_sums):
    """o_col: the columns of a tile that holds all."""
    for i in tl.static_range(len(b_sums)):
        o_part = o_col if len(b_sums) == 1 else tl.arange(0, FEATURES) + i * FEATURES
        store_tile(p, stride_row, o_row, o_part, num_rows, num_cols, b_sums[i])


@triton.jit
def real_tokens(p_mask, o, size, MASKED: tl.constexpr):
    """Which of the tokens `o` of a sample are real, and not padding."""
    m = within(o, size)
    if MASKED:
        m = m & (tl.load(p_mask + o, mask=m, other=0) != 0)
    return m


@triton.jit
def store_tile(p, stride_row, o_row, o_col, num_rows, num_cols, b):
    offsets = o_row.to(tl.int64)[:, None] * stride_row + o_col[None, :]
    tl.store(p + offsets, b.to(p.dtype.element_ty), mask=(o_row < num_rows)[:, None] & (o_col < num_cols)[None, :])


@triton.jit
def masks_at(masks, i_b, i_h, M):
    """The masks of head i_h of sample i_b."""
    p = masks.p + (i_b * masks.stride_b + i_h * masks.stride_h)
    p_bias = masks.p_bias + (i_b * masks.bias_stride_b + i_h * masks.bias_stride_h)
    p_masked = masks.p_masked + (i_b * masks.masked_stride_b + i_h * (1 + masks.num_groups))
    of_bias = p_bias, masks.bias_stride_b, masks.bias_stride_h, p_masked, masks.masked_stride_b
    of_groups = masks.p_words + i_b * (M + RUNS + 1), masks.num_groups
    strides = masks.stride_b, masks.stride_h, masks.stride_n, masks.stride_m
    return MaskPointers(p, *strides, masks.p_keys + i_b * M, *of_bias, *of_groups)


@triton.jit
def seeing_queries_of_heads(masks, i_b, first_head, HEADS: tl.constexpr, start, N, M, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """`seeing_queries` of HEADS heads that one loop takes: those that see something in some head. masks: of all heads."""
    first_q, end_q = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32) + N
    if MASK >= GROUP_BIAS:
        first_q, end_q, _, _ = seeing_queries(masks_at(masks, i_b, first_head, M), start, N, M, BLOCK, MASK)
        for h in range(1, HEADS):
            first, end, gap, resume = seeing_queries(masks_at(masks, i_b, first_head + h, M), start, N, M, BLOCK, MASK)
            first_q, end_q = tl.minimum(first_q, first), tl.maximum(end_q, end)
    return first_q, end_q, end_q, end_q


@triton.jit
def groups_of_heads(masks, i_b, first_head, HEADS: tl.constexpr, start, M, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """`groups_of_tile` of HEADS heads that one loop takes; the last number is whether a group masks a query in some head."""
    first, last, changes, masked = groups_of_tile(masks_at(masks, i_b, first_head, M), start, M, BLOCK, MASK)
    if MASK >= GROUP_BIAS:
        for h in range(1, HEADS):
            _, _, _, masked_here = groups_of_tile(masks_at(masks, i_b, first_head + h, M), start, M, BLOCK, MASK)
            masked = masked | masked_here
    return first, last, changes, masked


@triton.jit
def add_mask(b_log2, pairs, MASK: tl.constexpr, KEY_MAJOR: tl.constexpr = False):
    """Logits [q,kv], or KEY_MAJOR [kv,q], under attn_mask: -inf where it masks. Pairs beyond N x M have the mask of the last row
    or key.

    A float mask is natural and is added, to logits in base 2. Only its -inf masks a pair: a finite value is data, however large.
    Loads have no conditions of their own, which would cost as much as the loads.
    """
    masks, _, o_q, o_kv, N, M = pairs
    if MASK == GROUP_BIAS or MASK == GROUP_BIAS + BOOL_MASK:  # before a bool mask, which masks also NaN
        b_log2 = add_group_bias(b_log2, pairs, KEY_MAJOR, False)
    if MASK % GROUP_BIAS != 0:
        o_n, o_m = tl.minimum(o_q, N - 1).to(tl.int64) * masks.stride_n, tl.minimum(o_kv, M - 1).to(tl.int64) * masks.stride_m
        p = (masks.p + o_m[:, None]) + o_n[None, :] if KEY_MAJOR else (masks.p + o_n[:, None]) + o_m[None, :]
        b_mask = tl.load(p)
        if MASK % GROUP_BIAS == BOOL_MASK:
            b_log2 = tl.where(b_mask != 0, b_log2, float("-inf"))
        else:
            b_log2 += b_mask * 1.4426950408889634  # log2(e)
            # a value may be finite in base e and not in base 2: it is clamped to the largest number (a maximum would lose NaN)
            b_log2 = tl.where(b_log2 < -3.4028234e38, -3.4028234e38, b_log2)
            b_log2 = tl.where((b_mask > 2.35e38) & (b_mask < float("inf")), 3.4028234e38, b_log2)
            b_log2 = tl.where(b_mask == float("-inf"), float("-inf"), b_log2)
    if MASK == GROUP_BIAS + FLOAT_MASK:
        b_log2 = add_group_bias(b_log2, pairs, KEY_MAJOR, True)
    return b_log2


@triton.jit
def mask_logits(b_log2, pairs, MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr, KEY_MAJOR: tl.constexpr = False):
    """Logits of `add_mask` with the masks applied. Masked pairs and those outside of N x M become -inf."""
    masks, _, o_q, o_kv, N, M = pairs
    visible = of_queries(o_q < N, KEY_MAJOR) & of_keys(o_kv < M, KEY_MAJOR)
    if KEY_MASK:
        visible = visible & of_keys(tl.load(masks.p_keys + o_kv, mask=o_kv < M, other=0) != 0, KEY_MAJOR)
    if CAUSAL:
        visible = visible & (of_keys(o_kv, KEY_MAJOR) <= of_queries(o_q, KEY_MAJOR))
    b_log2 = add_mask(b_log2, pairs, MASK, KEY_MAJOR)
    return tl.where(visible, b_log2, float("-inf"))  # last: outside stands the mask of other pairs, which may be NaN


@triton.jit
def mask_tile(b_log2, pairs, C: tl.constexpr, EDGE: tl.constexpr, KEY_MAJOR: tl.constexpr = False):
    """As `mask_logits`. Tiles that are not at the EDGE lie within the keys and below the diagonal.

    KEY_MAJOR, of a loop over queries whose last row stands for those beyond it, pairs outside of N x M and padding of keys
    stay: P of such a row is 0, and such a key is dropped after the loop.
    """
    if KEY_MAJOR:
        if C.MASK != 0 and C.MASK != GROUP_PRODUCT:
            b_log2 = add_mask(b_log2, pairs, C.MASK, True)
        if C.CAUSAL and EDGE:
            b_log2 = tl.where(pairs.o_kv[:, None] <= pairs.o_q[None, :], b_log2, float("-inf"))
    elif EDGE:
        b_log2 = mask_logits(b_log2, pairs, C.MASK, C.KEY_MASK, C.CAUSAL)
    else:
        b_log2 = add_mask(b_log2, pairs, C.MASK)
        if C.KEY_MASK:
            b_log2 = tl.where((tl.load(pairs.masks.p_keys + pairs.o_kv) != 0)[None, :], b_log2, float("-inf"))
    return b_log2


@triton.jit
def with_bias(b_x, b_parts, x, i_b, start, C: tl.constexpr):
    """Products [q,kv] of a tile of keys, and the bias over their scale, where a product adds it."""
    if C.MASK == GROUP_PRODUCT:
        b_x += dot(b_parts, tl.trans(members_of(x.product, i_b, start, x.M, b_x.shape[1])), C.PRECISION)
    return b_x


@triton.jit
def at_head(pairs, head):
    """`Pairs` with the masks of one head, from those of all; head: its sample, its number, and more. None: they are of one."""
    if head is None:
        return pairs
    else:
        masks, start, o_q, o_kv, N, M = pairs
        i_b, i_h, _, _ = head
        return Pairs(masks_at(masks, i_b, i_h, M), start, o_q, o_kv, N, M)


@triton.jit
def power_tile(b_s, b_scale, b_shift, pairs, special, groups, C: tl.constexpr, EDGE: tl.constexpr, head=None):
    """2^(logit - shift) [q,kv] of scores, by `mask_tile`. The scale is of rows, the shift of queries [q].

    head: of tiles [kv,q], KEY_MAJOR, see `at_head`. groups: of `groups_of_tile`. A bias that is the same for all keys costs no
    instruction a pair: the shift takes it. special: of `special_groups`; a power [kv,q] is divided by the total of queries there.
    """
    KEY_MAJOR: tl.constexpr = head is not None
    MASKED: tl.constexpr = C.CAUSAL and EDGE if KEY_MAJOR else EDGE or C.KEY_MASK
    if C.MASK == GROUP_PRODUCT:
        if special != 0:
            of_head = at_head(pairs, head)  # here: what it computes is not for tiles without a special bias
            b_logit = special_logits(b_s, b_scale, of_head, special, KEY_MAJOR, C.PRECISION)
            b_logit = mask_tile(b_logit, of_head, C, EDGE, KEY_MAJOR)
            b_p = tl.exp2(b_logit - of_queries(b_shift, KEY_MAJOR))
            if KEY_MAJOR:
                _, _, p_total, o_total = head
                b_p *= tl.div_rn(1.0, tl.load(p_total + unforeseen(o_total, C.PRECISION)))[None, :]
        else:
            b_logit = mask_tile(b_s * b_scale[:, None], pairs, C, EDGE, KEY_MAJOR)
            b_p = tl.exp2(b_logit - of_queries(b_shift, KEY_MAJOR))
        return b_p
    elif C.MASK == GROUP_BIAS and not MASKED:
        pairs = at_head(pairs, head)
        masks, _, o_q, _, N, _ = pairs
        first, last, changes, masked = groups
        if (changes == 0) & (not masked):
            b_p = tl.exp2(b_s * b_scale[:, None] - of_queries(b_shift - row_bias_of(masks, first, o_q, N), KEY_MAJOR))
        elif (changes == 1) & (not masked):
            b_first, b_last = b_shift - row_bias_of(masks, first, o_q, N), b_shift - row_bias_of(masks, last, o_q, N)
            b_p = tl.exp2(b_s * b_scale[:, None] - chosen_rows(pairs, first, b_first, b_last, KEY_MAJOR))
        else:
            b_logit = mask_tile(b_s * b_scale[:, None], pairs, C, EDGE, KEY_MAJOR)
            b_p = tl.exp2(b_logit - of_queries(b_shift, KEY_MAJOR))
        return b_p
    else:
        b_logit = mask_tile(b_s * b_scale[:, None], at_head(pairs, head), C, EDGE, KEY_MAJOR)
        return tl.exp2(b_logit - of_queries(b_shift, KEY_MAJOR))


OWN_LSE, CALLER_LSE = tl.constexpr(4096.0), tl.constexpr(16384.0)  # limits of `is_coarse`


@triton.jit
def is_coarse(b_lse, LIMIT: tl.constexpr):
    """Whether a natural log-sum-exp is so far from 0 that its rounding shows in exp(logit - lse).

    Float masks of -1e5 or finfo.min make such rows. Their probabilities are computed from the largest logit and the sum instead.
    LIMIT is lower for an lse that was computed here, whose sums can be computed again. The caller's lse may count keys that are
    not here, so it is used as far as it is right to 1e-3, as in streaming (`lse_is_lost`) and csrc/cpu (LARGEST_CALLER_LSE).
    """
    return (tl.abs(b_lse) >= LIMIT) & (tl.abs(b_lse) < float("inf"))


@triton.jit
def natural_lse(b_max, b_sum, MASK: tl.constexpr):
    """log sum exp from the largest base-2 logit and the sum of exp2(logit - largest); -inf for a fully masked row."""
    empty = b_sum == 0.0  # no key: a largest logit has the term 1
    b_lse = (b_max + tl.log2(tl.where(empty, 1.0, b_sum))) * 0.6931471805599453
    if MASK >= FLOAT_MASK:  # `mask_logits` clamps there; a largest logit beside NaN says nothing
        b_lse = tl.where((tl.abs(b_max) >= 3.4028234e38) & (b_sum == b_sum), b_max, b_lse)
    return tl.where(empty, float("-inf"), b_lse)


@triton.jit
def row_shift(p_lse, o_q, N):
    """A natural log-sum-exp [q] in base 2; +inf for fully masked rows and beyond N, since exp2(logit - inf) = 0."""
    b = tl.load(p_lse + o_q, mask=o_q < N, other=float("inf")) * 1.4426950408889634
    return tl.where(b == float("-inf"), float("inf"), b)


@triton.jit
def relu(b_x):
    """max(x, 0), and NaN where x is NaN."""
    return tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def map_of(b_p, b_dp, o, size):
    """relu(P dP) [row,o], and 0 where `within` says no: dP is NaN in the padding beside an infinite gradient or value."""
    b_map = relu(b_p * b_dp)
    return b_map if size is None else tl.where((o < size)[None, :], b_map, 0.0)


@triton.jit
def key_range(i_q, M, ALL_EDGE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """For the i_q-th block of queries: the keys at which the edge tiles begin and end.

    Tiles of BLOCK_KV keys before the first number lie within the keys and below the diagonal, and need no masks for these. With
    ALL_EDGE it is 0. No query of the block sees keys from the second number on.
    """
    end = tl.minimum(M, (i_q + 1) * BLOCK_Q) if CAUSAL else M
    if ALL_EDGE:
        edge = end * 0
    else:
        edge = (tl.minimum(M, i_q * BLOCK_Q + 1) if CAUSAL else M) // BLOCK_KV * BLOCK_KV
    return edge, end


class Range(NamedTuple):
    """Keys or queries of two loops over tiles: from begin to end, which need no masks for the edge, and at the edge, in tiles of
    BLOCK_EDGE. seen: of `seen_keys` or `seeing_queries`."""

    begin: Any
    end: Any
    edge: Any
    edge_end: Any
    seen: Any


@triton.jit
def keys_of_queries(i_q, o_q, masks, N, M, C: tl.constexpr):
    """The `Range` of keys for the i_q-th block of queries o_q."""
    whole, end = key_range(i_q, M, False, C.CAUSAL, C.BLOCK_Q, C.BLOCK_KV)
    return Range(0, whole, whole, end, seen_keys(masks, o_q, N, M, C.MASK))


@triton.jit
def queries_of_keys(i_kv, seeing, N, C: tl.constexpr, APART: tl.constexpr = True):
    """The `Range` of queries for the i_kv-th block of keys: those that see all of it, and at the edge those on the diagonal, or
    else the last tile, which may be smaller. Unless the diagonal is APART, the first loop has it as well."""
    if C.CAUSAL:
        # queries before `edge` see none of these keys, and from `whole` on they see the last one
        edge = i_kv * C.BLOCK_KV // C.BLOCK_Q * C.BLOCK_Q
        whole = tl.minimum(N, tl.cdiv((i_kv + 1) * C.BLOCK_KV - 1, C.BLOCK_Q) * C.BLOCK_Q)
        return Range(whole if APART else edge, N, edge, whole, seeing)
    else:
        edge = N // C.BLOCK_Q * C.BLOCK_Q
        return Range(0, edge, edge, N, seeing)


@triton.jit
def steps_of(of, EDGE: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """The steps of one of the loops of a `Range`, over tiles of BLOCK rows or over those at the EDGE."""
    first, last = of.edge if EDGE else of.begin, of.edge_end if EDGE else of.end
    return seen_tiles(of.seen, first, last, C.BLOCK_EDGE if EDGE else BLOCK, C.MASK)


@triton.jit
def keys_at(step, steps, EDGE: tl.constexpr, C: tl.constexpr):
    """The first key of the tile of a step, and all of them."""
    start = tile_at(step, steps, C.MASK)
    return start, start + tl.arange(0, C.BLOCK_EDGE if EDGE else C.BLOCK_KV)


@triton.jit
def below_max(b_s, b_max, scale_log2, FOLDED: tl.constexpr):
    """Logits [q,kv] minus the largest of their row [q], in base 2.

    Where the scale is not FOLDED in, the logits are bare products and are scaled only here. Then the difference is exact where it
    is small, and it is exactly 0 for the largest, whatever the compiler fuses. This needs scale_log2 > 0.
    """
    b_x = b_s - b_max[:, None]
    if not FOLDED:
        b_x *= scale_log2
    return b_x


@triton.jit
def block_and_head(num_blocks, H, GROUP):
    """For a grid of (B * H * num_blocks,): the number of the block, b * H + h, b, h, and the key head of h.

    GROUP query heads share a key head. Neighbouring programs work on one head, so its keys stay in the cache.
    """
    i = tl.program_id(0).to(tl.int64)  # offsets are products of these numbers
    i_bh = i // num_blocks
    i_h = i_bh % H
    return (i % num_blocks).to(tl.int32), i_bh, i_bh // H, i_h, i_h // GROUP


@triton.jit
def heads_in_turn(num_blocks, H, GROUP, elements):
    """`block_and_head` where the first blocks of a head take longest: those of many heads come first, and the short ones last.

    The heads' keys and values, or what else blocks of a head read again, of `elements` each, together stay in the cache.
    """
    i = tl.program_id(0).to(tl.int64)
    heads = (tl.num_programs(0) // num_blocks).to(tl.int64)
    parts = tl.minimum(tl.cdiv(heads * elements, CACHED), heads)
    together = tl.cdiv(heads, tl.maximum(parts, 1))  # of each part: the last one has fewer heads, but not only a few
    i_first = i // (num_blocks * together) * together
    i = i % (num_blocks * together)
    width = tl.minimum(together, heads - i_first)
    i_bh = i_first + i % width
    i_h = i_bh % H
    return (i // width).to(tl.int32), i_bh, i_bh // H, i_h, i_h // GROUP


@triton.jit
def rows_and_head(num_blocks, H, GROUP, elements, CAUSAL: tl.constexpr):
    """`block_and_head` of blocks of queries. The last rows of causal heads come first: they see most keys and take longest."""
    if CAUSAL:
        i_q, i_bh, i_b, i_h, i_hk = heads_in_turn(num_blocks, H, GROUP, elements)
        return num_blocks - 1 - i_q, i_bh, i_b, i_h, i_hk
    else:
        return block_and_head(num_blocks, H, GROUP)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def keep_factor(dropout, i_bh, o_q, o_kv, N):
    """[q,kv]: 1 / (1 - p) for kept pairs, 0 for dropped ones. The hash is that of streaming/_dropout.py."""
    seed = tl.load(dropout.p_seed)
    # rows and the seed have 64 bits, and the hash 32: low and high words are mixed apart, once a row
    row = i_bh * N + o_q
    low = _mix((row & 0xFFFFFFFF).to(tl.uint32))
    high = _mix(((row >> 32) + (seed & 0xFFFFFFFF)).to(tl.uint32))
    row_key = _mix(low ^ high ^ _mix(((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)))
    column = _mix(o_kv.to(tl.uint32) + 0x9E3779B9)
    word = _mix(row_key[:, None] ^ column[None, :])
    # 64 bits: word and threshold have 32 without a sign
    return tl.where(word.to(tl.int64) >= dropout.threshold, 1.0 / (1.0 - dropout.probability), 0.0)
