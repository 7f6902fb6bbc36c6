"""The similarity of every query with every document by late interaction (ColBERT, ColPali).

Bound: plain SDPA from all query tokens to the tokens of every document: the same pairs, but SDPA writes a vector a token where
the similarity keeps one number. Published: all products by einsum, then the maximum and the sum, as colpali-engine and PyLate
have it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast.benchmarks._formula import whole
from vlattn_fast.benchmarks._measure import (
    Benchmark,
    Pass,
    Problem,
    Tensors,
    Variant,
    finished,
    in_bfloat16,
    operator_problem,
    randoms,
    taking,
)
from vlattn_fast.benchmarks._workloads import COLBERT, COLPALI, Sizes

EMBEDDINGS = ("queries", "documents")


def inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Unit embeddings."""
    randn = randoms(device, dtype)
    shapes = {"queries": (sizes["A"], sizes["N"]), "documents": (sizes["B"], sizes["M"])}
    return {name: F.normalize(randn(*shape, sizes["D"]), dim=-1) for name, shape in shapes.items()}


def published_similarity(t: Tensors) -> Tensor:
    scores = torch.einsum("and,bmd->abnm", t["queries"], t["documents"])
    return scores.amax(3).sum(2).to(t["grad_similarity"].dtype)


def all_pairs(t: Tensors) -> Tensor:
    """Every query token attends to every document: (B, 1, A N, D)."""
    documents = t["documents"][:, None]
    return F.scaled_dot_product_attention(t["queries"].flatten(0, 1).expand(len(documents), 1, -1, -1), documents, documents)


def floor(sizes: Sizes, dtype: torch.dtype, both: bool) -> list[Pass]:
    """One matrix product; each embedding read once. Backward a query token and a document exchange a row: none."""
    queries, documents = sizes["A"] * sizes["N"], sizes["B"] * sizes["M"]
    read = (queries + documents) * sizes["D"] * dtype.itemsize
    forward = Pass(2 * queries * documents * sizes["D"], read, 0)
    return [forward, Pass(4 * queries * sizes["B"] * sizes["D"], 2 * read, 0)] if both else [forward]


def build(both: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    tensors = inputs(sizes, device, dtype)
    randn = randoms(device, torch.promote_types(dtype, torch.float32))
    tensors["grad_similarity"] = randn(sizes["A"], sizes["B"])
    bound_tensors = tensors | {"grad_output": all_pairs(tensors)}
    finish, bound = finished(both, EMBEDDINGS, ("grad_similarity",)), finished(both, EMBEDDINGS, ("grad_output",))(all_pairs)
    baselines = {"published": Variant(finish(published_similarity))}
    least = floor(sizes, dtype, both)
    return operator_problem(
        "maxsim", taking(*EMBEDDINGS), tensors, finish, 0, lambda _: bound(bound_tensors), whole, 0, least, baselines=baselines
    )


BENCHMARKS = [
    Benchmark(__name__, "forward+backward" if both else "forward", workload, partial(build, both))
    for workload in (COLBERT, COLPALI)
    for both in (False, True)
]
# forward alone: the published products are rounded to bfloat16, where tokens tie, and its gradient goes to all of these
BENCHMARKS += in_bfloat16(BENCHMARKS[-2])
