"""stacked_cross_attention and damsm_similarity: the reference against numbers, streaming against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compare import LargestAllocation, assert_all_close_to, bytes_of
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from vlattn_fast import damsm_similarity, reference, stacked_cross_attention
from vlattn_fast.ops.stacked_cross_attention import AGGREGATIONS, DIRECTIONS, FIRST_NORMS
from vlattn_fast.streaming import _tiles
from vlattn_fast.streaming import stacked_cross_attention as streaming

NAN = float("nan")
# fewer contexts than features take the Gram matrix, more take the attended vectors
SIZES = {"gram": (4, 5, 7, 6, 12), "direct": (3, 4, 5, 6, 3)}
OP = torch.ops.vlattn.stacked_cross_attention.default
BACKWARD_OP = torch.ops.vlattn.stacked_cross_attention_backward.default
OPTIONS = ("t2i", "clipped_l2norm", 9.0, "logsumexp", 6.0, "streaming")


def make(sizes, dtype=torch.float64, seed=0, normalize=True):
    """images (Bi,R,D) and captions (Bc,T,D)."""
    num_images, num_captions, regions, words, features = sizes
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, regions, features, generator=generator, dtype=torch.float64)
    captions = torch.randn(num_captions, words, features, generator=generator, dtype=torch.float64)
    if normalize:
        images, captions = (torch.nn.functional.normalize(x, dim=-1) for x in (images, captions))
    return images.to(dtype), captions.to(dtype)


def make_lengths(count, longest, seed=0, low=1):
    return torch.randint(low, longest + 1, (count,), generator=torch.Generator().manual_seed(seed))


def run(function, images, captions, *lengths, weight=None, **options):
    """similarity and the gradients of images and captions under a fixed cotangent."""
    images, captions = (x.detach().clone().requires_grad_() for x in (images, captions))
    similarity = function(images, captions, *lengths, **options)
    if weight is None:
        weight = torch.randn(similarity.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad((similarity * weight.to(similarity.dtype)).sum(), [images, captions])
    return similarity.detach(), *grads


def assert_equal(got, want, tolerance=1e-10):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


def assert_as_accurate(images, captions, *lengths, what, **options):
    """Outputs and gradients; returns what the operator gave."""
    ours, formula = (
        lambda images, captions, fn=fn: fn(images, captions, *lengths, **options)
        for fn in (stacked_cross_attention, reference.stacked_cross_attention)
    )
    cotangent = torch.randn(len(images), len(captions), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return assert_all_close_to(ours, formula, {"images": images, "captions": captions}, [cotangent], what=what)


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


@pytest.fixture
def small_tiles(monkeypatch):
    """Every call crosses several tiles on both sides."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 200)


# ------------------------------------------------------------------------------------------------ the reference


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


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("first_norm", FIRST_NORMS)
def test_reference_matches_naive_loops(first_norm, direction):
    images, captions = make((3, 4, 5, 6, 7), normalize=False)
    words, regions = torch.tensor([6, 1, 3, 5]), torch.tensor([5, 1, 4])
    for aggregation in AGGREGATIONS:
        options = dict(direction=direction, first_norm=first_norm, smooth=1.7, aggregation=aggregation, lambda_lse=3.0)
        got = reference.stacked_cross_attention(images, captions, words, regions, **options)
        want = naive(images.numpy(), captions.numpy(), words.tolist(), regions.tolist(), **options)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


# ------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("first_norm", FIRST_NORMS)
def test_matches_reference(first_norm, aggregation, direction, small_tiles):
    options = dict(direction=direction, first_norm=first_norm, aggregation=aggregation, smooth=4.0, lambda_lse=3.0)
    for sizes in SIZES.values():
        images, captions = make(sizes)
        words, regions = make_lengths(sizes[1], sizes[3]), make_lengths(sizes[0], sizes[2], seed=1)
        for lengths in ((), (words,), (words, regions)):
            want = run(reference.stacked_cross_attention, images, captions, *lengths, **options)
            assert_equal(run(stacked_cross_attention, images, captions, *lengths, **options, backend="streaming"), want)


@pytest.mark.parametrize("budget", [1, 60, 500, 1 << 20])
def test_tiles_cover_every_pair_once(budget, monkeypatch):
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", budget)
    query, context = torch.empty(5, 3, 4), torch.empty(7, 2, 4)
    seen = torch.zeros(5, 7)
    for x, tiles_y in streaming._tile_pairs(query, context):
        for y in tiles_y:
            seen[y, x] += 1
            assert seen[y, x].numel() * 3 * (2 + 1) <= max(budget, 9)  # the contexts and their mean
    assert (seen == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "first_norm, smooth, direction",
    [("clipped_l2norm", 9.0, "t2i"), ("softmax", 4.0, "t2i"), ("l1norm", 9.0, "i2t"), (None, 2.0, "i2t")],
)
def test_as_accurate_as_the_plain_formula(first_norm, smooth, direction, dtype):
    for sizes in ((4, 4, 36, 20, 64), (3, 3, 40, 45, 16)):
        images, captions = make(sizes, dtype)
        # with few words all similarities of a row may be negative; its clipped norm is then next to nothing and rules the errors
        words = make_lengths(sizes[1], sizes[3], low=8)
        options = dict(direction=direction, first_norm=first_norm, smooth=smooth)
        got = assert_as_accurate(images, captions, words, what=str(sizes), **options)
        assert got["out0"].dtype == torch.float32 and got["grad images"].dtype == dtype


def test_as_accurate_where_attended_vectors_cancel():
    # contexts around zero, nearly uniform weights, |a| about |c|/1000: where a float32 Gram matrix, or <q, a> as a sum of
    # scores, loses several times what the plain formula loses
    images, captions = make((3, 4, 36, 8, 64))
    regions = torch.tensor([36, 9, 5])
    for image, real in zip(images, regions.tolist(), strict=True):
        image[:real] -= image[:real].mean(0)
    images, captions = images.float(), captions.float()
    options = dict(image_lengths=regions, first_norm=None, smooth=0.01)
    for i in range(3):  # each image by itself, or the worst would hide the others
        own = {**options, "image_lengths": regions[i : i + 1]}
        assert_as_accurate(images[i : i + 1], captions, what=f"image {i}", **own)


def test_damsm_is_a_stacked_cross_attention():
    images, captions = make((3, 4, 9, 6, 5), normalize=False)
    words, regions = torch.tensor([6, 2, 1, 4]), torch.tensor([9, 3, 5])
    options = dict(gamma1=3.0, gamma2=2.0)
    got = run(damsm_similarity, images, captions, words, regions, **options)
    assert_equal(got, run(reference.damsm_similarity, images, captions, words, regions, **options))
    want = naive(images.numpy(), captions.numpy(), words, regions, "t2i", "softmax", 3.0, "logsumexp", 2.0)
    np.testing.assert_allclose(got[0].numpy(), 2.0 * want, rtol=1e-12)


@given(
    sizes=st.tuples(*(st.integers(0, 3),) * 2, *(st.integers(0, 5),) * 3),
    seed=st.integers(0, 99),
    direction=st.sampled_from(DIRECTIONS),
    first_norm=st.sampled_from(FIRST_NORMS),
    aggregation=st.sampled_from(AGGREGATIONS),
    use_lengths=st.booleans(),
)
def test_any_shape(sizes, seed, direction, first_norm, aggregation, use_lengths):
    images, captions = make(sizes, seed=seed)
    lengths = (make_lengths(sizes[1], sizes[3], seed, 0), make_lengths(sizes[0], sizes[2], seed, 0)) if use_lengths else ()
    options = dict(direction=direction, first_norm=first_norm, aggregation=aggregation)
    want = run(reference.stacked_cross_attention, images, captions, *lengths, **options)
    assert all(torch.isfinite(x).all() for x in want)
    assert_equal(run(stacked_cross_attention, images, captions, *lengths, **options), want, 1e-9)


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("backend", ["reference", "streaming"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding_reaches_nothing(direction, backend, small_tiles):
    images, captions = make(SIZES["gram"])
    words, regions = torch.tensor([6, 1, 0, 3, 2]), torch.tensor([7, 2, 0, 5])
    dirty_images, dirty_captions = images.clone(), captions.clone()
    for x, lengths, garbage in ((dirty_images, regions, math.inf), (dirty_captions, words, NAN)):
        for row, length in zip(x, lengths.tolist(), strict=True):
            row[length:] = garbage
    options = dict(direction=direction, backend=backend)
    for first_norm in FIRST_NORMS:
        for aggregation in AGGREGATIONS:
            options |= dict(first_norm=first_norm, aggregation=aggregation)
            got = run(stacked_cross_attention, dirty_images, dirty_captions, words, regions, **options)
            assert_equal(got, run(stacked_cross_attention, images, captions, words, regions, **options), 0)
            assert (got[0][2] == 0).all() and (got[0][:, 2] == 0).all()
            for grad, lengths in zip(got[1:], (regions, words), strict=True):
                assert torch.isfinite(grad).all()
                assert all((g[n:] == 0).all() for g, n in zip(grad, lengths.tolist(), strict=True))


@pytest.mark.parametrize("first_norm", FIRST_NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vectors_have_finite_gradients(first_norm, dtype):
    images, captions = make(SIZES["gram"], dtype)
    images[0], images[1, 2], captions[1], captions[2, 0] = 0, 0, 0, 0
    captions[3, 0] = -captions[3, 1]
    captions[4, 0] *= 1e-10  # not zero, but below the cosine's 1e-8
    for direction in DIRECTIONS:
        options = dict(direction=direction, first_norm=first_norm)
        want = run(reference.stacked_cross_attention, images, captions, **options)
        got = run(stacked_cross_attention, images, captions, **options)
        assert all(torch.isfinite(x).all() for x in (*want, *got))
        if dtype == torch.float64:
            assert_equal(got, want, 1e-7)  # behind a zero vector, rounding is divided by eps = 1e-8


def test_strided_inputs_and_sum_backward():
    images, captions = make((4, 5, 6, 8, 7))
    want = run(reference.stacked_cross_attention, images, captions, weight=torch.ones(4, 5))
    strided = [images.transpose(0, 2).contiguous().transpose(0, 2), captions.repeat(1, 2, 2)[:, :8, :7]]
    leaves = [x.detach().requires_grad_() for x in strided]
    assert not any(x.is_contiguous() for x in leaves)
    similarity = stacked_cross_attention(*leaves)
    similarity.sum().backward()
    assert_equal((similarity.detach(), *(x.grad for x in leaves)), want)


def test_inputs_are_left_alone_and_repeats_are_equal():
    images, captions = make(SIZES["gram"], torch.float32)
    words = torch.tensor([6, 1, 0, 3, 2])
    before = [x.clone() for x in (images, captions, words)]
    first, second = (run(stacked_cross_attention, images, captions, words) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(before, (images, captions, words), strict=True))
    out = stacked_cross_attention(images, captions, words)
    assert out.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in (images, captions)}


def test_one_frozen_side_and_a_retained_graph():
    images, captions = make(SIZES["gram"])
    _, want, _ = run(stacked_cross_attention, images, captions, weight=torch.ones(4, 5))
    images.requires_grad_()
    loss = stacked_cross_attention(images, captions).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert captions.grad is None
    assert_equal((images.grad,), (2 * want,))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradcheck(sizes):
    images, captions = (x[:2].requires_grad_() for x in make(sizes))
    words = torch.tensor([6, 2])
    assert torch.autograd.gradcheck(lambda x, y: stacked_cross_attention(x, y, words), (images, captions))
    assert torch.autograd.gradcheck(lambda x, y: damsm_similarity(x, y, words), (images, captions))


def test_second_derivatives_are_refused():
    images, captions = (x.requires_grad_() for x in make(SIZES["gram"]))
    grads = torch.autograd.grad(stacked_cross_attention(images, captions).sum(), [images, captions], create_graph=True)
    with pytest.raises(RuntimeError, match="stacked_cross_attention has no second derivative"):
        grads[0].sum().backward()


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_autocast_computes_in_float32(backend):
    leaves = [x.requires_grad_() for x in make((3, 4, 6, 7, 8), torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = stacked_cross_attention(*leaves, backend=backend)
        mixed = stacked_cross_attention(leaves[0], leaves[1].bfloat16(), backend=backend)
        with pytest.raises(TypeError, match="captions must have the dtype of images, torch.float64"):
            stacked_cross_attention(leaves[0].double(), leaves[1], backend=backend)
        if backend == "streaming":  # its backward pass too
            got.sum().backward(retain_graph=True)
            inside, leaves[0].grad, leaves[1].grad = [x.grad for x in leaves], None, None
    got.sum().backward()
    want = run(stacked_cross_attention, *(x.bfloat16() for x in leaves), backend=backend, weight=torch.ones(3, 4))
    assert torch.equal(got, want[0]) and torch.equal(mixed, want[0]) and got.dtype == torch.float32
    assert all(torch.equal(x.grad, w.float()) for x, w in zip(leaves, want[1:], strict=True))
    if backend == "streaming":
        assert all(torch.equal(x.grad, g) for x, g in zip(leaves, inside, strict=True))


# ------------------------------------------------------------------------------------------------ torch.library, compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(ragged, dtype):
    images, captions = make(SIZES["gram"], dtype)
    lengths = (torch.tensor([6, 1, 0, 3, 2]), torch.tensor([7, 2, 0, 5])) if ragged else (None, None)
    strided = captions.mT.contiguous().mT
    if dtype == torch.float32:
        images.requires_grad_(), strided.requires_grad_()
    torch.library.opcheck(OP, (images, strided, *lengths, *OPTIONS))
    grad = torch.randn(5, 4, dtype=torch.float32).mT
    for direction in DIRECTIONS:
        torch.library.opcheck(BACKWARD_OP, (grad, images.detach(), strided.detach(), *lengths, direction, *OPTIONS[1:]))


def test_fullgraph_ten_lengths_two_graphs():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stacked_cross_attention, fullgraph=True, backend=counter)
    for step in range(10):
        sizes = (4 + step, 6 + 2 * step, 9 + step, 5 + 2 * step, 32)
        images, captions = make(sizes)
        words, regions = make_lengths(sizes[1], sizes[3], step), make_lengths(sizes[0], sizes[2], step)
        want = run(stacked_cross_attention, images, captions, words, regions)
        assert_equal(run(compiled, images, captions, words, regions), want, 1e-12)
    assert counter.frame_count <= 2
    # values cannot be read inside a graph: lengths beyond the rows count as all rows
    assert_equal((compiled(images, captions, words + 99, regions),), (stacked_cross_attention(images, captions, None, regions),))


def test_bad_input_under_fullgraph_keeps_its_words():
    torch._dynamo.reset()
    compiled = torch.compile(stacked_cross_attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="captions must have images' feature size"):
        compiled(torch.randn(2, 3, 4), torch.randn(2, 3, 5))


@pytest.mark.parametrize("features", [4, 16])  # through the attended vectors, through the Gram matrix
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_memory_does_not_grow_with_the_pairs(direction, features, monkeypatch):
    budget = 4096
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", budget)
    for count in (16, 64):
        images, captions = make((count, count, 9, 8, features), torch.float32)
        with LargestAllocation() as record:
            run(stacked_cross_attention, images, captions, weight=torch.ones(count, count), direction=direction)
        # a whole map has count^2 * 72 elements, all attended vectors at least count^2 * 8 * features
        assert record.bytes <= max(8 * budget, bytes_of(images), 4 * count**2), record.by
        assert record.peak <= 20 * 8 * budget + 4 * (bytes_of(images, captions) + 4 * count**2)


# ------------------------------------------------------------------------------------------------ wrong input

IM, CA, LEN = torch.randn(2, 3, 4), torch.randn(5, 6, 4), torch.tensor([6, 1, 2, 3, 4])
BAD_INPUT = {
    "not a tensor": ((IM.tolist(), CA), {}, TypeError, "images must be a torch.Tensor"),
    "captions missing": ((IM, None), {}, TypeError, "captions must be a torch.Tensor"),
    "rank of images": ((IM[0], CA), {}, ValueError, "images must have 3 dimensions"),
    "rank of captions": ((IM, CA[None]), {}, ValueError, "captions must have 3 dimensions"),
    "integers": ((IM.long(), CA.long()), {}, TypeError, "images must be float16"),
    "dtypes differ": ((IM, CA.double()), {}, TypeError, "captions must have the dtype of images"),
    "devices differ": ((IM, CA.to("meta")), {}, ValueError, "captions must be on the device of images"),
    "feature size": ((IM, CA[..., :3]), {}, ValueError, "captions must have images' feature size D = 4"),
    "lengths as list": ((IM, CA, [6] * 5), {}, TypeError, "caption_lengths must be a torch.Tensor"),
    "float lengths": ((IM, CA, LEN.float()), {}, TypeError, "caption_lengths must be int64"),
    "int32 lengths": ((IM, CA, None, torch.tensor([1, 2], dtype=torch.int32)), {}, TypeError, "image_lengths must be int64"),
    "bool lengths": ((IM, CA, LEN > 1), {}, TypeError, "caption_lengths must be int64"),
    "rank of lengths": ((IM, CA, LEN[None]), {}, ValueError, "caption_lengths must have 1 dimensions"),
    "lengths swapped": ((IM, CA, torch.tensor([3, 3])), {}, ValueError, "one entry for each of the 5 captions"),
    "number of image lengths": ((IM, CA, LEN, LEN), {}, ValueError, "one entry for each of the 2 images"),
    "length too large": ((IM, CA, LEN + 1), {}, ValueError, r"caption_lengths must lie in \[0, 6\]"),
    "negative length": ((IM, CA, None, torch.tensor([3, -1])), {}, ValueError, r"image_lengths must lie in \[0, 3\]"),
    "lengths elsewhere": ((IM, CA, LEN.to("meta")), {}, ValueError, "caption_lengths must be on the CPU or"),
    "direction": ((IM, CA), dict(direction="i2i"), ValueError, "direction must be one of"),
    "direction None": ((IM, CA), dict(direction=None), ValueError, "direction must be one of"),
    "first_norm": ((IM, CA), dict(first_norm="l3norm"), ValueError, "first_norm must be one of"),
    "first_norm type": ((IM, CA), dict(first_norm=2), TypeError, "first_norm must be one of"),
    "aggregation": ((IM, CA), dict(aggregation="LogSumExp"), ValueError, "aggregation must be one of"),
    "smooth": ((IM, CA), dict(smooth="9"), TypeError, "smooth must be a real number"),
    "smooth NaN": ((IM, CA), dict(smooth=NAN), ValueError, "smooth must be a finite number"),
    "smooth bool": ((IM, CA), dict(smooth=True), TypeError, "smooth must be a real number"),
    "lambda_lse zero": ((IM, CA), dict(lambda_lse=0.0), ValueError, "lambda_lse must be greater than 0"),
    "lambda_lse tensor": ((IM, CA), dict(lambda_lse=torch.tensor(6.0)), TypeError, "lambda_lse must be a real number"),
    "backend": ((IM, CA), dict(backend="cpu"), ValueError, "backend must be one of"),
    "no kernel": ((IM, CA), dict(backend="cuda"), ValueError, "backend='cuda' cannot run stacked_cross_attention"),
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
