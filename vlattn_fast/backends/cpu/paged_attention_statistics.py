"""paged_attention_statistics by csrc/cpu/paged_attention_statistics.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_stride
from vlattn_fast.backends.cpu.score_attention import plain_score
from vlattn_fast.backends.inputs import PagedAttentionStatisticsInputs
from vlattn_fast.backends.native import DTYPES, address, kernel

_forward = kernel("paged_attention_statistics_forward")


def forward(inputs: PagedAttentionStatisticsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mass (T, H, G), entropy, maximum (T, H), received (R, H, M), max_logit, lse (T, H); empty if `statistics` does not name
    them."""
    query, cache, asked = unit_stride(inputs.query), inputs.key_cache, inputs.statistics.split()
    (tokens, heads, size), (blocks, key_heads, block_size, _) = query.shape, cache.shape
    requests, columns = inputs.block_table.shape
    # of tokens of no request, and keys after a length
    beyond = {"mass": 0.0, "entropy": 0.0, "maximum": 0.0, "received": 0.0, "max_logit": -torch.inf, "lse": -torch.inf}
    shapes = {"mass": (tokens, heads, inputs.num_groups), "received": (requests, heads, columns * block_size)}
    outputs = {
        name: query.new_full(shapes.get(name, (tokens, heads)) if name in asked else (0,), fill, dtype=torch.float32)
        for name, fill in beyond.items()
    }
    table, lengths, starts = (x.to(torch.int64).contiguous() for x in (inputs.block_table, inputs.lengths, inputs.query_starts))
    groups = None if inputs.key_groups is None else inputs.key_groups.to(torch.int64).contiguous()
    stride_block, stride_head, stride_place, stride_d = cache.stride()
    _forward(
        dtype=DTYPES[query.dtype],
        T=tokens,
        H=heads,
        Hkv=key_heads,
        D=size,
        R=requests,
        blocks=blocks,
        block_size=block_size,
        columns=columns,
        window=inputs.window,
        scale=inputs.scale,
        score=plain_score(inputs.score, inputs.parameter),
        query=query.data_ptr(),
        query_stride_t=query.stride(0),
        query_stride_h=query.stride(1),
        cache=cache.data_ptr(),
        stride_block=stride_block,
        stride_head=stride_head,
        stride_place=stride_place,
        stride_d=stride_d,
        table=table.data_ptr(),
        lengths=lengths.data_ptr(),
        starts=starts.data_ptr(),
        groups=address(groups),
        K=0 if groups is None else groups.shape[1],
        G=inputs.num_groups,
        **{name: x.data_ptr() for name, x in outputs.items() if name in asked},
    )
    mass, entropy, maximum, received, max_logit, lse = outputs.values()
    return mass, entropy, maximum, received, max_logit, lse
