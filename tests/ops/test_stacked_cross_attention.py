"""stacked_cross_attention and damsm_similarity: the formula against numbers and loops, every backend against the formula."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.compare import LargestAllocation, as_dtype, bytes_of, outputs_and_grads
from tests.helpers.ops.backends import F64, HALVES, LOW, core, each, finest, on
from tests.helpers.ops.stacked_cross_attention_cases import RAGGED, check, tensors
from tests.helpers.ops.tile_edges import covering
from vlattn_fast import damsm_similarity, stacked_cross_attention
from vlattn_fast.backends import reference
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.backends.streaming import stacked_cross_attention as streaming
from vlattn_fast.ops.stacked_cross_attention import AGGREGATIONS, DIRECTIONS, FIRST_NORMS
from vlattn_fast.scores import Additive, Distance, General, Hadamard

FAST = ("streaming", "cpu", "triton")
NAN = float("nan")
TILE_ELEMENTS = 200  # streaming crosses several tiles on both sides


@pytest.mark.parametrize(
    "aggregation, pooled",
    [("sum", 6 / 10**0.5), ("mean", 3 / 10**0.5), ("max", 3 / 10**0.5), ("logsumexp", 3 / 10**0.5 + math.log(2) / 6)],
)
@pytest.mark.parametrize("first_norm, smooth", [(None, 5), ("clipped", 5), ("l2norm", 5), ("l1norm", 7)])
def test_reference_by_hand(first_norm, smooth, aggregation, pooled):
    # regions are the axes, words (3/5, 4/5) and (4/5, 3/5): s is the words themselves. Its columns have l2 norm 1 and l1
    # norm 7/5, so x = s, or 5/7 s. With smooth = 5 ln 3, or 7 ln 3, the logits are 3 ln 3 and 4 ln 3: weights 1/4 and 3/4,
    # a = (1/4, 3/4), cos = (3/20 + 12/20) / sqrt(10/16) = 3 / sqrt(10), the same for the other word.
    images = torch.eye(2, dtype=torch.float64)[None]
    captions = torch.tensor([[[0.6, 0.8], [0.8, 0.6], [NAN, NAN]]], dtype=torch.float64)
    got = reference.stacked_cross_attention(
        images, captions, torch.tensor([2]), first_norm=first_norm, smooth=smooth * math.log(3), aggregation=aggregation
    )
    assert got.shape == (1, 1) and got.item() == pytest.approx(pooled, abs=1e-7)  # eps 1e-8 in the norms


def test_damsm_by_hand():
    # regions are the axes, words (ln 3, 0) and (0, 0). Softmax over WORDS: column 1 is (3/4, 1/4), column 2 (1/2, 1/2).
    # gamma1 = 4 ln 3: the first word's logits differ by ln 3, weights (3/4, 1/4), cos = (3/4) / sqrt(10/16) = 3 / sqrt(10);
    # a softmax over regions first would give 9/10. The zero word has cosine 0.
    images = torch.eye(2, dtype=torch.float64)[None]
    captions = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]], dtype=torch.float64)
    want = math.log(math.exp(5 * 3 / 10**0.5) + 1)
    for function in (damsm_similarity, reference.damsm_similarity):
        assert function(images, captions, gamma1=4 * math.log(3), gamma2=5.0).item() == pytest.approx(want, abs=1e-12)


def naive(images, captions, words, regions, direction, first_norm, smooth, aggregation, lambda_lse):
    """SCAN eq. 1-8 number by number."""
    out = np.zeros((len(images), len(captions)))
    for i, j in np.ndindex(*out.shape):
        image, caption = images[i][: regions[i]], captions[j][: words[j]]
        q, c = (caption, image) if direction == "t2i" else (image, caption)
        x = np.array([[np.dot(a, b) for b in c] for a in q])
        for k in range(len(c)):
            column = x[:, k].copy()
            if first_norm and "clipped" in first_norm:
                column = np.array([v if v >= 0 else 0.1 * v for v in column])
            if first_norm == "softmax":
                column = np.exp(column) / sum(np.exp(column))
            elif first_norm and "l2" in first_norm:
                column = column / (math.sqrt(sum(column**2)) + 1e-8)
            elif first_norm and "l1" in first_norm:
                column = column / (sum(abs(column)) + 1e-8)
            x[:, k] = column
        r = []
        for k in range(len(q)):
            weight = np.exp(smooth * x[k]) / sum(np.exp(smooth * x[k]))
            a = sum(weight[p] * c[p] for p in range(len(c)))
            r.append(np.dot(q[k], a) / max(math.sqrt(np.dot(q[k], q[k])) * math.sqrt(np.dot(a, a)), 1e-8))
        out[i, j] = {
            "logsumexp": math.log(sum(math.exp(lambda_lse * v) for v in r)) / lambda_lse,
            "max": max(r),
            "sum": sum(r),
            "mean": sum(r) / len(r),
        }[aggregation]
    return out


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("first_norm", FIRST_NORMS)
def test_reference_matches_loops(first_norm: str | None, direction: str) -> None:
    images, captions = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(4, 6, 7, dtype=torch.float64)
    words, regions = torch.tensor([6, 1, 3, 5]), torch.tensor([5, 1, 4])
    for aggregation in AGGREGATIONS:
        options = dict(direction=direction, first_norm=first_norm, smooth=1.7, aggregation=aggregation, lambda_lse=3.0)
        got = reference.stacked_cross_attention(images, captions, words, regions, **options)
        want = naive(images.numpy(), captions.numpy(), words.tolist(), regions.tolist(), **options)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


EVERY = list(product(FIRST_NORMS, AGGREGATIONS, DIRECTIONS))
PAIRS = covering(FIRST_NORMS, AGGREGATIONS, DIRECTIONS)
EACH_TWICE = [(norm, AGGREGATIONS[i % 4], DIRECTIONS[i % 2]) for i, norm in enumerate(FIRST_NORMS * 2)]  # in both directions


@each("options", streaming=EVERY, cpu=PAIRS, triton=EACH_TWICE)
def test_first_norms_aggregations_and_directions(backend: str, options: tuple[str | None, str, str]) -> None:
    first_norm, aggregation, direction = options
    fixed = dict(first_norm=first_norm, aggregation=aggregation, direction=direction, smooth=4.0, lambda_lse=3.0)
    check(backend, tensors(dtype=finest(backend)), **fixed, **RAGGED)


SCORES: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {  # parameters, and the score that they make
    "scaled dot": ((), lambda: "scaled_dot"),
    "cosine": ((), lambda: "cosine"),
    "general": (("weight",), General),
    "biased general": (("weight", "bias"), General),
    "biased general of the query": (("weight", "bias"), partial(General, projects="query")),
    "hadamard": (("vector", "weight", "bias"), Hadamard),
    "hadamard relu": (("vector",), partial(Hadamard, activation="relu", offset=0.5)),
}
OF_SIZES = covering(SCORES, (3, 12, 16), DIRECTIONS)  # with 3 streaming takes no Gram matrix; only 16 fills vectors


@each("case", streaming=OF_SIZES, cpu=OF_SIZES)
def test_scores_that_are_products_of_features(backend: str, case: tuple[str, int, str]) -> None:
    name, size, direction = case
    names, score = SCORES[name]
    shapes = {"weight": (size, size), "bias": (size,), "vector": (size,)}
    inputs = tensors(size=size) | {each: torch.randn(shapes[each], dtype=F64) for each in names}
    check(backend, as_dtype(inputs, finest(backend)), score=score, direction=direction, **RAGGED)


def test_a_zero_vector_has_no_cosine() -> None:
    inputs = tensors(dtype=torch.float32)
    inputs["images"][0, 2] = 0.0
    inputs["captions"] *= 1e-20
    for backend in ("streaming", "cpu"):
        check(backend, inputs, score=lambda: "cosine")


@on(*FAST)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_lengths(direction: str, backend: str) -> None:
    check(backend, tensors(dtype=finest(backend)), direction=direction)
    check(backend, tensors(size=3, dtype=finest(backend)), direction=direction)  # streaming takes no Gram matrix


@pytest.mark.parametrize(
    "first_norm, smooth, direction",
    [("clipped_l2norm", 9.0, "t2i"), ("softmax", 4.0, "t2i"), ("l1norm", 9.0, "i2t"), (None, 2.0, "i2t")],
)
@each("dtype", streaming=LOW, cpu=LOW, triton=core("triton")[1:])
def test_low_precision_is_computed_in_float32(
    backend: str, dtype: torch.dtype, first_norm: str | None, smooth: float, direction: str
) -> None:
    options = dict(direction=direction, first_norm=first_norm, smooth=smooth)
    # with few words all similarities of a column may be negative; its clipped norm is then next to nothing and rules the errors
    for lengths in ((20, 11), (3, 1)):
        got = check(backend, tensors((2, 2), 36, lengths[0], 40, dtype), caption_lengths=lengths, **options)
        assert got["out0"].dtype == torch.float32 and got["grad images"].dtype == dtype


@on(*FAST)
@pytest.mark.parametrize("dtype", HALVES)
def test_small_numbers_in_half_precision(dtype: torch.dtype, backend: str) -> None:
    """Where float16 has few bits."""
    tiny = {name: x * 2.0**-11 for name, x in tensors((2, 1), 9, 7, 40, dtype).items()}
    check(backend, tiny, first_norm=None, smooth=1e5)


@on(*FAST)
@pytest.mark.parametrize("real", (36, 9, 5))  # each by itself, or the worst would cover for the others
def test_short_attended_vectors(real: int, backend: str) -> None:
    """Contexts around zero, weights nearly uniform, |a| about |c| / 1000: where a float32 Gram matrix, or <q, a> as a sum of
    scores, loses several times what the plain formula loses."""
    inputs = tensors((1, 4), 36, 8, 64)
    inputs["images"][0, :real] -= inputs["images"][0, :real].mean(0)
    check(backend, as_dtype(inputs, torch.float32), image_lengths=(real,), first_norm=None, smooth=0.01)


@on(*FAST)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_features_with_a_common_part(direction: str, backend: str) -> None:
    """All nearly parallel, as features behind a ReLU are. A turn of a vector is then a small part of its products."""
    unit, common = partial(torch.nn.functional.normalize, dim=-1), 10.0
    axis = unit(torch.randn(64, dtype=F64))
    inputs = {name: unit(x + common * axis) for name, x in tensors((2, 3), 36, 9, 64).items()}
    check(backend, as_dtype(inputs, torch.float32), direction=direction)


@on(*FAST)
def test_one_context(backend: str) -> None:
    """Its mean is itself, and the queries have no part of it in common."""
    check(backend, tensors((2, 1), 63, 1, 65, torch.float32), direction="i2t", first_norm=None)


@each(
    "case",
    streaming=product(FIRST_NORMS, (F64, torch.float32)),
    cpu=product(FIRST_NORMS, (torch.float32,)),
    triton=product(FIRST_NORMS, (torch.float32,)),
)
def test_zero_vectors(backend: str, case: tuple[str | None, torch.dtype]) -> None:
    first_norm, dtype = case
    inputs = tensors((2, 4), 4, 3, 12, dtype)
    inputs["images"][0], inputs["images"][1, 2], inputs["captions"][1], inputs["captions"][2, 0] = 0, 0, 0, 0
    inputs["captions"][3, 0] *= 1e-10  # not zero, but below the cosine's 1e-8
    check(backend, inputs, direction=DIRECTIONS[FIRST_NORMS.index(first_norm) % 2], first_norm=first_norm)


@on(*FAST)
def test_a_short_context_among_others(backend: str) -> None:
    """Its column is divided by 1e-8, so what rounding makes of the softmax's mean, which is 0, must not reach it."""
    inputs = tensors((2, 4), 4, 3, 12, torch.float32)
    inputs["captions"][::2, 0], inputs["captions"][1::2, 0] = 0.0, inputs["captions"][1::2, 0] * 1e-10
    check(backend, inputs, direction="i2t", first_norm="l2norm")


@on(*FAST)
@pytest.mark.parametrize("first_norm", ("l2norm", "clipped_l1norm"))
def test_vectors_around_eps(first_norm: str, backend: str) -> None:
    """Contexts so short that 1e-8 is about half of the columns' norms, and that the cosine's clamp acts on half of the sets."""
    inputs = tensors((2, 4), 4, 3, 12, torch.float32)
    inputs["captions"] *= torch.tensor([3e-9, 1e-8, 3e-8, 1e-7])[:, None, None] * torch.tensor([0.5, 1.0, 2.0])[:, None]
    check(backend, inputs, direction="i2t", first_norm=first_norm)


@on(*FAST)
def test_the_best_queries_share_the_gradient(backend: str) -> None:
    """Equal words are nearest to four equal regions, whose weights of 1/4 are exact: equal cosines in any order of sums."""
    inputs = {name: (4.0 * x).round().abs() / 4.0 for name, x in tensors((2, 3), 4, 8, 16, torch.float32).items()}
    inputs["images"][:] = inputs["images"][:, :1]
    inputs["captions"][:, 4:] *= -1.0
    inputs["captions"][:, :4] = 1.0
    grad = outputs_and_grads(partial(stacked_cross_attention, aggregation="max", backend=backend), inputs)["grad captions"]
    formula = partial(reference.stacked_cross_attention, aggregation="max")
    exact = outputs_and_grads(formula, as_dtype(inputs, torch.float64))["grad captions"]
    assert (exact[:, :4].norm(dim=-1) > 1e-2).all()
    torch.testing.assert_close(exact[:, 1:4], exact[:, :1].expand(-1, 3, -1))
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)


@on(*FAST)
def test_damsm(backend: str) -> None:
    check(backend, tensors(dtype=finest(backend)), "damsm_similarity", gamma1=4.0, gamma2=5.0, **RAGGED)


@on(*FAST)
@pytest.mark.parametrize("smooth, aggregation", [(0.0, "logsumexp"), (-3.0, "max"), (1e4, "mean")])
def test_any_smooth(smooth: float, aggregation: str, backend: str) -> None:
    check(backend, tensors((2, 3), 5, 6, dtype=finest(backend)), smooth=smooth, aggregation=aggregation, first_norm="clipped")


@pytest.mark.parametrize("budget", [1, 60, 500, 1 << 20])
def test_tiles_of_streaming_cover_every_pair_once(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", budget)
    query, context = torch.empty(5, 3, 4), torch.empty(7, 2, 4)
    seen = torch.zeros(5, 7)
    for x, tiles_y in streaming._tile_pairs(query, context):
        for y in tiles_y:
            seen[y, x] += 1
            assert seen[y, x].numel() * 3 * (2 + 1) <= max(budget, 9)  # the contexts and their mean
    assert (seen == 1).all()
    check("streaming", tensors(), **RAGGED)


@pytest.mark.parametrize("direction, features", [("i2t", 4), ("t2i", 16)])  # through the attended vectors, the Gram matrix
@pytest.mark.slow
def test_memory_does_not_grow_with_the_pairs(direction, features, monkeypatch):
    budget = 4096
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", budget)
    for count in (16, 64):
        inputs = tensors((count, count), 9, 8, features, torch.float32)
        with LargestAllocation() as record:
            outputs_and_grads(partial(stacked_cross_attention, direction=direction, backend="streaming"), inputs)
        # a whole map has count^2 * 72 elements, all attended vectors at least count^2 * 8 * features
        assert record.bytes <= max(8 * budget, bytes_of(inputs["images"]), 4 * count**2), record.by
        assert record.peak <= 20 * 8 * budget + 4 * (bytes_of(*inputs.values()) + 4 * count**2)


IM, CA, LEN = torch.randn(2, 3, 4), torch.randn(5, 6, 4), torch.tensor([6, 1, 2, 3, 4])
BAD_INPUT = {
    "lengths swapped": ((IM, CA, torch.tensor([3, 3])), {}, ValueError, "one entry for each of the 5 captions"),
    "length too large": ((IM, CA, LEN + 1), {}, ValueError, r"caption_lengths must lie in \[0, 6\]"),
    "negative length": ((IM, CA, None, torch.tensor([3, -1])), {}, ValueError, r"image_lengths must lie in \[0, 3\]"),
    "lambda_lse zero": ((IM, CA), dict(lambda_lse=0.0), ValueError, "lambda_lse must be greater than 0"),
    "score": ((IM, CA), dict(score="additive"), ValueError, "score must be one of .* It has parameters"),
    "score of no features": ((IM, CA), dict(score=Additive(torch.ones(4))), ValueError, "score must be a product of features of"),
    "score of pairs": ((IM, CA), dict(score=Distance(1.0)), ValueError, "score must be a product of features of"),
    "parameters of a score": ((IM, CA), dict(score=General(torch.ones(3, 4))), ValueError, "weight must have shape"),
    "kernel of a score": ((IM, CA), dict(score="cosine", backend="triton"), ValueError, "compute no score but a dot product"),
}


@pytest.mark.parametrize("arguments, options, error, words", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(arguments, options, error, words):
    with pytest.raises(error, match=words):
        stacked_cross_attention(*arguments, **options)


@pytest.mark.parametrize("options, words", [(dict(gamma1=None), "gamma1 must be a real"), (dict(gamma2=0), "gamma2 must be gre")])
def test_damsm_bad_input(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        damsm_similarity(IM, CA, **options)


def test_lambda_is_only_asked_of_logsumexp_and_smooth_may_be_zero():
    assert stacked_cross_attention(IM, CA, aggregation="mean", lambda_lse=0.0).shape == (2, 5)
    uniform = stacked_cross_attention(IM, CA, smooth=0.0, aggregation="max")
    want = torch.nn.functional.cosine_similarity(CA[None], IM.mean(1)[:, None, None], dim=-1).amax(-1)
    torch.testing.assert_close(uniform, want)
