"""Statistics of requests whose keys lie in a paged cache: the newest token of each, and the second half of a prompt.

Bound: plain SDPA over the gathered keys, in which the query heads of a key head are rows of its one block of queries, so that
keys are read once. Gathered: each request's keys copied out of the cache, and the statistics of the stored map, as a server
without this operator has to do it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast.backends.reference.paged_attention_statistics import STATISTICS
from vlattn_fast.benchmarks import _measure
from vlattn_fast.benchmarks._formula import whole
from vlattn_fast.benchmarks._measure import Benchmark, Pass, Problem, Tensors, Variant, operator_problem, randoms
from vlattn_fast.benchmarks._workloads import PAGED_ANSWERS, PAGED_PROMPT, Sizes

BLOCK_SIZE, GROUPS = 16, 3


def requests(sizes: Sizes, device: torch.device) -> Tensors:
    """Blocks in any order, as many keys for each request, and three groups of keys."""
    count, columns = sizes["R"], -(-sizes["M"] // BLOCK_SIZE)
    order = torch.randperm(count * columns, generator=torch.Generator().manual_seed(0)).to(device)
    return {
        "block_table": order.view(count, columns).to(torch.int32),
        "lengths": torch.full((count,), sizes["M"], dtype=torch.int32, device=device),
        "query_starts": torch.arange(count + 1, dtype=torch.int32, device=device) * sizes["N"],
        "key_groups": torch.arange(sizes["M"], device=device).remainder(GROUPS).expand(count, -1).contiguous(),
    }


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    randn, of, tokens, length = randoms(device, dtype), requests(sizes, device), sizes["N"], sizes["M"]
    heads, size = sizes["Hkv"] * sizes["shared"], sizes["D"]
    cache = randn(of["block_table"].numel(), BLOCK_SIZE, sizes["Hkv"], size)  # as vLLM keeps it
    tensors = {"tokens": randn(sizes["R"] * tokens, heads, size), "cache": cache.transpose(1, 2)}
    named = {**of, "num_groups": GROUPS, "statistics": STATISTICS}

    def arguments(t: Tensors) -> dict[str, object]:
        return {"query": t["tokens"], "key_cache": t["cache"], **named}

    def operands(t: Tensors) -> tuple[Tensor, Tensor]:
        """Queries (R, Hkv, shared * N, D), and keys (R, Hkv, M, D), which no query head repeats."""
        keys = t["cache"][of["block_table"].long()].transpose(1, 2).flatten(2, 3)[:, :, :length]
        query = t["tokens"].unflatten(1, (sizes["Hkv"], -1)).unflatten(0, (-1, tokens))  # (R, N, Hkv, shared, D)
        return query.permute(0, 2, 3, 1, 4).flatten(2, 3), keys

    seen = torch.ones(tokens, length, dtype=torch.bool, device=device).tril(length - tokens)

    def gathered(t: Tensors) -> dict[str, Tensor]:
        query, keys = operands(t)
        logits = (query @ keys.mT / size**0.5).to(torch.promote_types(dtype, torch.float32))
        logits = logits.unflatten(2, (-1, tokens)).flatten(1, 2).masked_fill(~seen, -torch.inf)  # (R, H, N, M)
        prob = logits.softmax(-1)
        members = F.one_hot(of["key_groups"], GROUPS).to(prob.dtype)[:, None]
        entropy, lse = torch.special.entr(prob).sum(-1), logits.logsumexp(-1)
        rows = {"mass": prob @ members, "entropy": entropy, "maximum": prob.amax(-1), "max_logit": logits.amax(-1), "lse": lse}
        named = {name: x.transpose(1, 2).flatten(0, 1) for name, x in rows.items()}
        room = of["block_table"].shape[1] * BLOCK_SIZE
        return named | {"received": F.pad(prob.sum(2), (0, room - length))}

    def bound(t: Tensors) -> dict[str, Tensor]:
        query, keys = sdpa_operands
        mask = None if tokens == 1 else seen.repeat(sizes["shared"], 1)
        return {"out": F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask)}

    sdpa_operands = operands(tensors)
    pairs, maps = sizes["R"] * heads * tokens * length, sizes["R"] ** 2 * heads * tokens * length
    floor = [Pass(2 * pairs * size, (tensors["tokens"].numel() + cache.numel()) * dtype.itemsize, pairs)]
    baselines = {"gathered": Variant(_measure.forward(gathered), 3)}
    run = _measure.forward(bound)
    return operator_problem(
        "paged_attention_statistics", arguments, tensors, _measure.forward, 3, run, whole, maps, floor, baselines=baselines
    )


BENCHMARKS = [Benchmark(__name__, "forward", workload, build) for workload in (PAGED_ANSWERS, PAGED_PROMPT)]
