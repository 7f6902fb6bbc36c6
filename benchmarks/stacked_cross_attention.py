"""The similarity of every image with every caption: SCAN (t2i, clipped l2 norm, LogSumExp) and DAMSM.

Bound: plain SDPA from the real words of all captions to the regions of every image: the same pairs, but SDPA writes a vector a
word where the similarity keeps one number. Published: a Python loop over the captions, each against the whole batch of images.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast.benchmarks import _measure
from vlattn_fast.benchmarks._formula import ends
from vlattn_fast.benchmarks._measure import Benchmark, Pass, Problem, Tensors, Variant, operator_problem, randoms
from vlattn_fast.benchmarks._workloads import DAMSM, SCAN, Sizes

OPTIONS: dict[str, dict[str, Any]] = {
    "SCAN": {"first_norm": "clipped_l2norm", "smooth": 9.0, "lambda_lse": 6.0},
    "DAMSM": {"first_norm": "softmax", "smooth": 4.0, "lambda_lse": 5.0},
}
MOST_PAIRS = 2048  # most pairs for the formula, which takes a pair at a time in Python


def inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensor]:
    """Unit embeddings, and the captions' lengths, on the host as a data loader has them."""
    randn = randoms(device, dtype)
    longest, generator = sizes["T"], torch.Generator().manual_seed(1)
    lengths = torch.randint(max(longest // 4, 1), longest + 1, (sizes["captions"],), generator=generator)
    images, captions = randn(sizes["images"], sizes["R"], sizes["D"]), randn(sizes["captions"], sizes["T"], sizes["D"])
    return {"images": F.normalize(images, dim=-1), "captions": F.normalize(captions, dim=-1)}, lengths


def packed(tensors: Tensors, lengths: Tensor) -> Tensors:
    """The bound's inputs: the images, the words (W, D) without padding, and a cotangent."""
    words = torch.cat([caption[:length] for caption, length in zip(tensors["captions"], lengths.tolist(), strict=True)])
    images = tensors["images"]
    return {"images": images, "words": words, "grad_output": words.expand(len(images), 1, -1, -1)}


def published_similarity(images: Tensor, captions: Tensor, lengths: Tensor, options: dict[str, Any]) -> Tensor:
    columns = []
    for caption, length in zip(captions, lengths.tolist(), strict=True):
        words = caption[None, :length].expand(len(images), -1, -1)
        scores = images @ words.mT  # (images, regions, words)
        if options["first_norm"] == "softmax":
            scores = torch.softmax(scores, dim=2)
        else:
            scores = F.leaky_relu(scores, 0.1)
            scores = scores / (scores.square().sum(dim=2, keepdim=True).sqrt() + 1e-8)
        weights = torch.softmax(options["smooth"] * scores.mT, dim=-1)
        attended = weights @ images
        cosine = (words * attended).sum(-1) / (words.norm(dim=-1) * attended.norm(dim=-1)).clamp(min=1e-8)
        columns.append(torch.logsumexp(options["lambda_lse"] * cosine, dim=1) / options["lambda_lse"])
    return torch.stack(columns, dim=1)


def all_pairs(t: Tensors) -> Tensor:
    """Every word attends to every image: (images, 1, W, D)."""
    images = t["images"][:, None]
    return F.scaled_dot_product_attention(t["words"].expand(len(images), 1, -1, -1), images, images)


def floor(sizes: Sizes, words: int, dtype: torch.dtype, both: bool) -> list[Pass]:
    """Two matrix products (backward: four) and one exponential a pair of word and region; each embedding read once (twice)."""
    regions = sizes["images"] * sizes["R"]
    forward = Pass(4 * regions * words * sizes["D"], (regions + words) * sizes["D"] * dtype.itemsize, regions * words)
    return [forward, Pass(2 * forward.flops, 2 * forward.bytes, forward.exps)] if both else [forward]


def build(kind: str, both: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    tensors, lengths = inputs(sizes, device, dtype)
    options = OPTIONS[kind]
    randn = randoms(device, torch.promote_types(dtype, torch.float32))
    tensors["grad_similarity"] = randn(sizes["images"], sizes["captions"])
    words = packed(tensors, lengths)

    arguments = _measure.taking("images", "captions", caption_lengths=lengths, **options)

    def loop(t: Tensors) -> Tensor:
        return published_similarity(t["images"], t["captions"], lengths, options).to(t["grad_similarity"].dtype)

    # a caption's gradient is a sum over all images, and only a part of the images is compared
    finish = _measure.finished(both, ("images", "captions"), ("grad_similarity",), not_compared=("captions",))
    plain = _measure.finished(both, ("images", "words"), ("grad_output",))
    bound, least = plain(all_pairs), floor(sizes, len(words["words"]), dtype, both)
    baselines = {"published": Variant(finish(loop))}
    problem = operator_problem(
        "stacked_cross_attention", arguments, tensors, finish, 0, lambda _: bound(words), _part, 0, least, baselines=baselines
    )
    not_run, left_out = {}, ["reference compiled"]  # a loop of thousands of pairs is no graph
    if sizes["images"] * sizes["captions"] > MOST_PAIRS:
        left_out.append("reference")
        not_run["reference"] = f"the formula runs one pair at a time; measured up to {MOST_PAIRS} pairs"
    variants = {name: variant for name, variant in problem.variants.items() if name not in left_out}
    return problem._replace(variants=variants, not_run=not_run)


def _part(name: str, x: Tensor) -> Tensor:
    return x if name == "captions" else ends(x)


BENCHMARKS = [
    Benchmark(__name__, "forward+backward" if both else "forward", workload, partial(build, kind, both), torch.float32)
    for workload, kind in ((SCAN, "SCAN"), (DAMSM, "DAMSM"))
    for both in (False, True)
]
