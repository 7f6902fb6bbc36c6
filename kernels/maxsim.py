"""maxsim in Triton: the largest product of each query token with the tokens of each document; forward and backward.

Shapes: queries (A, N, D), documents (B, M, D); similarity (A, B), places (A, B, N). L = A N query tokens lie one after the other.
Roofline: tensor cores, one product forward; gradients are gathered, one row for each pair of a query token and a document.
Trick: a maximum of every BLOCK_KV-th product, and where it stood, stay in registers: nothing is exchanged between threads before
the loop ends. Query tokens are sorted by the place that they chose in a document, so that the sum of each place has an order: no
atomics. Measured on an H100, before they were sorted: docs/operators/maxsim.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.backends.inputs import MaxsimBackwardInputs, MaxsimInputs
from vlattn_fast.kernels._configurations import configuration
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._tiles import block_size, cdiv, input_precision, launched, real_tokens, row_products, store_tile, tile_of


class Constants(NamedTuple):
    """D: features. MASKED: whether documents have a mask."""

    D: int
    BLOCK_D: int
    MASKED: bool
    PRECISION: str
    BLOCK_Q: int = 0
    BLOCK_KV: int = 0


class Sets(NamedTuple):
    """queries (L, D) and documents (B, M, D), contiguous; p_mask (B, M) of the documents. L = A N."""

    p_queries: Tensor
    p_documents: Tensor
    p_mask: Tensor
    N: int
    M: int
    B: int
    L: int


@on_device
def forward(inputs: MaxsimInputs) -> tuple[Tensor, Tensor]:
    """similarity (A, B), and the indices of the largest products, int32 (A, B, N), -1 for none."""
    queries, documents, query_mask, document_mask = inputs.queries, inputs.documents, inputs.query_mask, inputs.document_mask
    shape = num_queries, num_documents, tokens = queries.shape[0], documents.shape[0], queries.shape[1]
    largest = queries.new_zeros(shape, dtype=torch.float32)
    places = queries.new_full(shape, -1, dtype=torch.int32)
    if largest.numel() > 0 and documents.shape[1] > 0:
        call = _arguments(queries, documents, document_mask)
        config = configuration("maxsim", "largest", **_facts(queries, documents))
        grid = (cdiv(num_queries * tokens, config["BLOCK_Q"]) * num_documents,)
        _largest_kernel[grid](**launched(call, config), p_largest=largest, p_places=places)
    if query_mask is not None:
        places = torch.where(query_mask[:, None], places, -1)
    return torch.where(places < 0, 0.0, largest).sum(-1), places


@on_device
def backward(inputs: MaxsimBackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of queries and documents; places: the indices from `forward`."""
    queries, documents, places = inputs.queries, inputs.documents, inputs.places.contiguous()
    grad_q = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    grad_d = torch.zeros_like(documents, memory_format=torch.contiguous_format)
    if places.numel() == 0 or documents.shape[1] == 0:
        return grad_q, grad_d
    call = _arguments(queries, documents, None) | {"p_weight": inputs.grad_similarity.to(torch.float32).contiguous()}
    facts, rows = _facts(queries, documents), queries.shape[0] * queries.shape[1]
    config = configuration("maxsim", "query_gradient", **facts)
    _query_gradient_kernel[(cdiv(rows, config["BLOCK_Q"]),)](**launched(call, config), p_places=places, p_grad=grad_q)
    config = configuration("maxsim", "document_gradient", **facts)
    blocks, chosen = cdiv(documents.shape[1], config["BLOCK_KV"]), places.transpose(0, 1).flatten(1).sort(stable=True)  # (B, L)
    edges = config["BLOCK_KV"] * torch.arange(blocks + 1, dtype=torch.int32, device=places.device)
    begins = torch.searchsorted(chosen.values, edges.expand(documents.shape[0], -1).contiguous(), out_int32=True)
    call |= {"p_begins": begins, "p_places": chosen.values, "p_tokens": chosen.indices}
    _document_gradient_kernel[(blocks * documents.shape[0],)](**launched(call, config), p_grad=grad_d)
    return grad_q, grad_d


def _arguments(queries: Tensor, documents: Tensor, mask: Tensor | None) -> dict[str, object]:
    """The named arguments that all kernels here share. The queries stand in for an absent mask."""
    queries, documents = queries.contiguous(), documents.contiguous()
    (num_queries, tokens, size), (num_documents, keys, _) = queries.shape, documents.shape
    p_mask = queries if mask is None else mask.contiguous()
    x = Sets(queries, documents, p_mask, N=tokens, M=keys, B=num_documents, L=num_queries * tokens)
    constants = Constants(D=size, BLOCK_D=block_size(size), MASKED=mask is not None, PRECISION=input_precision())
    return {"x": x, "C": constants}


def _facts(queries: Tensor, documents: Tensor) -> dict[str, object]:
    """Returns the metadata of a launch that choose its configuration."""
    return {"dtype": queries.dtype, "M": documents.shape[1], "size": queries.shape[2]}


@triton.jit
def _largest_kernel(x, p_largest, p_places, C: tl.constexpr):
    """The largest product of a tile of query tokens i with the tokens j of one document, and the first j that has it.

    S_ij = q_i . d_j over real j; largest_i = max_j S_ij (NaN where one is NaN), place_i = -1 in a document without real tokens.
    In the loop a column of the tile has a maximum of its own; the columns are compared at the end.
    """
    p_queries, p_documents, p_mask, N, M, B, L = x
    i = tl.program_id(0)
    i_b = (i % B).to(tl.int64)  # neighbours read the same query tokens
    o_q = (i // B) * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    t_q = tile_of(p_queries, C.D, o_q, L, C.D, C.BLOCK_D)  # [q,D]
    p_document = p_documents + i_b * M * C.D
    b_best = tl.full([C.BLOCK_Q, C.BLOCK_KV], float("-inf"), dtype=tl.float32)
    b_first = tl.full([C.BLOCK_Q, C.BLOCK_KV], -1, dtype=tl.int32)
    for start in range(0, M, C.BLOCK_KV):
        o_kv = start + tl.arange(0, C.BLOCK_KV)
        t_k = tile_of(p_document, C.D, o_kv, M, C.D, C.BLOCK_D)
        b_s = row_products(t_q, t_k, C.D, C.PRECISION)  # [q,kv]
        m_kv = real_tokens(p_mask + i_b * M, o_kv, M, C.MASKED)
        b_better = (b_s > b_best) | ((b_s != b_s) & (b_best == b_best)) | (b_first < 0)
        b_better = b_better & m_kv[None, :]
        b_best = tl.where(b_better, b_s, b_best)
        b_first = tl.where(b_better, o_kv[None, :], b_first)
    b_nan = b_best != b_best
    b_any_nan = tl.max(b_nan.to(tl.int32), axis=1) > 0
    b_largest = tl.max(tl.where(b_nan | (b_first < 0), float("-inf"), b_best), axis=1)
    b_has = tl.where(b_any_nan[:, None], b_nan, b_best == b_largest[:, None]) & (b_first >= 0)
    b_place = tl.min(tl.where(b_has, b_first, 2147483647), axis=1)
    b_place = tl.where(b_place == 2147483647, -1, b_place)
    b_largest = tl.where(b_any_nan, float("nan"), b_largest)
    o_out = ((o_q // N).to(tl.int64) * B + i_b) * N + o_q % N
    tl.store(p_largest + o_out, b_largest, mask=o_q < L)
    tl.store(p_places + o_out, b_place, mask=o_q < L)


@triton.jit
def _query_gradient_kernel(x, p_places, p_weight, p_grad, C: tl.constexpr):
    """d q_i = sum_b weight_ab d_b,place_abi of a tile of query tokens i, document by document."""
    p_queries, p_documents, p_mask, N, M, B, L = x
    o_q = tl.program_id(0).to(tl.int64) * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_d = tl.arange(0, C.BLOCK_D)
    o_a, o_i = o_q // N, o_q % N
    b_grad = tl.zeros([C.BLOCK_Q, C.BLOCK_D], dtype=tl.float32)
    for i_b in range(0, B):
        b_place = tl.load(p_places + (o_a * B + i_b) * N + o_i, mask=o_q < L, other=-1)
        b_weight = tl.load(p_weight + o_a * B + i_b, mask=o_q < L, other=0.0)
        o_row = tl.where(b_place < 0, 0, b_place) + (i_b * M).to(tl.int64)
        m_row = (b_place >= 0)[:, None] & (o_d < C.D)[None, :]
        b_row = tl.load(p_documents + o_row[:, None] * C.D + o_d[None, :], mask=m_row, other=0.0)
        b_grad += tl.where(m_row, b_row.to(tl.float32) * b_weight[:, None], 0.0)
    store_tile(p_grad, C.D, o_q, o_d, L, C.D, b_grad)


@triton.jit
def _document_gradient_kernel(x, p_begins, p_places, p_tokens, p_weight, p_grad, C: tl.constexpr):
    """d d_j = sum over a and i with place_abi = j of weight_ab q_ai, of a tile of tokens j of one document b. places (B, L) are
    sorted, tokens (B, L) are those of the queries that have them, and begins (B, blocks + 1) says where a tile's begin. A turn
    takes BLOCK_Q of them, whichever of the tile they chose, so that one token that all chose is no chain of single loads."""
    p_queries, p_documents, p_mask, N, M, B, L = x
    blocks = tl.cdiv(M, C.BLOCK_KV)
    i = tl.program_id(0)
    i_b = (i // blocks).to(tl.int64)
    o_kv, o_d = (i % blocks) * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV), tl.arange(0, C.BLOCK_D)
    p_begin = p_begins + i_b * (blocks + 1) + i % blocks
    begin, end = tl.load(p_begin), tl.load(p_begin + 1)
    b_grad = tl.zeros([C.BLOCK_KV, C.BLOCK_D], dtype=tl.float32)
    for start in range(begin, end, C.BLOCK_Q):
        o_q = start + tl.arange(0, C.BLOCK_Q)
        b_place = tl.load(p_places + i_b * L + o_q, mask=o_q < end, other=-1)
        b_token = tl.load(p_tokens + i_b * L + o_q, mask=o_q < end, other=0)
        b_weight = tl.load(p_weight + b_token // N * B + i_b, mask=o_q < end, other=0.0)
        m_row = (o_q < end)[:, None] & (o_d < C.D)[None, :]
        b_row = tl.load(p_queries + b_token[:, None] * C.D + o_d[None, :], mask=m_row, other=0.0).to(tl.float32)
        b_row *= b_weight[:, None]
        b_chose = o_kv[None, :] == b_place[:, None]  # [q,kv]; no product, in which one NaN would reach all tokens
        b_grad += tl.sum(tl.where(b_chose[:, :, None], b_row[:, None, :], 0.0), axis=0)
    store_tile(p_grad + i_b * M * C.D, C.D, o_kv, o_d, M, C.D, b_grad)
