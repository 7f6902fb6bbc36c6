"""A SCAN training batch: the similarity of 128 images with 128 captions, the triplet loss with its hardest negatives, backward.

Bound: SDPA over the same pairs, forward and backward. Published: a Python loop over the captions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.benchmarks._formula import ends
from vlattn_fast.benchmarks._measure import Benchmark, Problem, Tensors, Variant, backends, backward, without_output
from vlattn_fast.benchmarks._workloads import Sizes
from vlattn_fast.benchmarks.stacked_cross_attention import OPTIONS, all_pairs, floor, inputs, packed, published_similarity
from vlattn_fast.nn.matching_losses import triplet_loss
from vlattn_lab.timed.workloads import SCAN_BATCH


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    tensors, lengths = inputs(sizes, device, dtype)
    words, diagonal = packed(tensors, lengths), torch.eye(len(lengths), dtype=torch.bool, device=device)
    arguments: dict[str, Any] = {"caption_lengths": lengths, **OPTIONS["SCAN"]}

    def step(similarity: Any, t: Tensors) -> Tensors:
        leaves = {name: x.detach().requires_grad_() for name, x in t.items()}
        scores = similarity(leaves["images"], leaves["captions"])
        torch.autograd.grad(triplet_loss(scores, diagonal), list(leaves.values()))
        return {"similarity": scores.detach()}

    def truth(t: Tensors) -> Tensors:  # for a few images: the loss couples all pairs
        return {"similarity": va.reference.stacked_cross_attention(t["images"], t["captions"], **arguments)}

    def published(images: Tensor, captions: Tensor) -> Tensor:
        return published_similarity(images, captions, lengths, OPTIONS["SCAN"])

    variants = {
        name: Variant(partial(step, partial(va.stacked_cross_attention, **arguments, backend=name)))
        for name in backends("stacked_cross_attention", {**tensors, **arguments})
    }
    variants["published"] = Variant(partial(step, published))
    plain = backward(("images", "words"), ("grad_output",))(all_pairs)
    variants["SDPA"] = Variant(without_output(lambda _: plain(words)))
    return Problem(tensors, variants, "SDPA", truth, _part, 0, floor(sizes, len(words["words"]), dtype, both=True))


def _part(name: str, x: Tensor) -> Tensor:
    return x if name == "captions" else ends(x)


BENCHMARKS = [Benchmark(__name__, "similarity, triplet loss, backward", SCAN_BATCH, build, torch.float32)]
