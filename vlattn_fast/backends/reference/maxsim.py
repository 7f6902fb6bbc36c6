"""Late interaction, or MaxSim: ColBERT (Khattab and Zaharia, SIGIR 2020, eq. 3), ColPali (Faysse et al., ICLR 2025, eq. 1).

With whole maps, on any device, differentiated by plain autograd; 16-bit input is computed in float32.
Shapes: queries (A, N, D), documents (B, M, D), masks bool, True = a real token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, product, real_tokens


def maxsim(queries: Tensor, documents: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None) -> Tensor:
    """Computes the formula of vlattn_fast.maxsim; the same arguments and shapes, without `backend`."""
    dtype = compute_dtype(queries)
    if query_mask is None:
        query_mask = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
    if document_mask is None:
        document_mask = torch.ones(documents.shape[:2], dtype=torch.bool, device=documents.device)
    queries, documents = real_tokens(queries, query_mask).to(dtype), real_tokens(documents, document_mask).to(dtype)
    if documents.shape[1] == 0:
        return (queries.sum((1, 2))[:, None] + documents.sum((1, 2))) * 0.0
    scores = product(queries[:, None], documents.mT)  # q_ai . d_bj, (A, B, N, M)
    scores = torch.where(document_mask[:, None], scores, -torch.inf)
    largest = scores.max(-1).values  # (A, B, N); the gradient goes to the first
    counts = query_mask[:, None] & document_mask.any(1)[:, None]  # an empty document matches nothing
    return torch.where(counts, largest, 0.0).sum(-1)
