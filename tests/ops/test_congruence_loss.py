"""congruence_loss: reference against hand-worked numbers, loops and closed forms; every backend against reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compare import LargestAllocation, assert_all_close_to, outputs_and_grads
from torch import Tensor

from vlattn_fast.nn.congruence_loss import CongruenceLoss, training_signal_annealing
from vlattn_fast.ops.congruence_loss import BACKENDS, DIRECTIONS, KINDS, congruence_loss
from vlattn_fast.reference.congruence_loss import congruence_loss as reference
from vlattn_fast.streaming import _tiles

NAMES = ("text_query", "text_key", "image_query", "image_key")
CROSS = ("cross_text_query", "cross_image_key", "cross_image_query", "cross_text_key")
RUNNABLE = [name for name in BACKENDS if name not in ("cuda", "triton")]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make(sizes: tuple[int, int, int, int, int], cross: bool = False, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Named queries and keys for sizes (B,H,L,V,D)."""
    batch, heads, words, regions, head_dim = sizes
    names = NAMES + (CROSS if cross else ())
    return {
        n: (1.5 * torch.randn(batch, heads, words if "text" in n else regions, head_dim, dtype=torch.float64)).to(dtype)
        for n in names
    }


def call(fn: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """fn as a function of the named tensors, one loss per sample unless the options say otherwise."""
    options = {"reduction": "none", **options}

    def run(**x: Tensor) -> Tensor:
        cross = ((x[CROSS[0]], x[CROSS[1]]), (x[CROSS[2]], x[CROSS[3]])) if CROSS[0] in x else None
        return fn((x["text_query"], x["text_key"]), (x["image_query"], x["image_key"]), cross, **options)

    return run


def prefix(lengths: list[int], size: int) -> Tensor:
    return torch.arange(size) < torch.tensor(lengths)[:, None]


def case(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs in float64 and the options of one case."""
    if name == "plain":
        return make((2, 2, 5, 7, 4)), {}
    if name == "cross, scale":
        return make((2, 3, 6, 4, 3), cross=True), {"scale": 0.4}
    if name == "ragged":
        return make((3, 2, 6, 9, 4)), {"text_mask": prefix([6, 3, 1], 6), "image_mask": prefix([9, 5, 1], 9)}
    if name == "scattered, cross":  # the first token is not a real one
        words, regions = torch.rand(3, 6) > 0.4, torch.rand(3, 8) > 0.4
        words[:, 0], words[:, 2], regions[:, 0], regions[:, 3] = False, True, False, True
        return make((3, 2, 6, 8, 4), cross=True), {"text_mask": words, "image_mask": regions}
    if name == "one modality empty":
        return make((4, 2, 4, 5, 3)), {"text_mask": prefix([0, 4, 0, 2], 4), "image_mask": prefix([5, 0, 0, 3], 5)}
    if name == "text mask only":
        return make((2, 2, 4, 5, 3), cross=True), {"text_mask": prefix([2, 0], 4)}
    if name == "ones":
        return make((1, 1, 1, 1, 1)), {}
    if name == "one word":
        return make((2, 1, 1, 6, 2)), {}
    if name == "scale 0":
        return make((1, 2, 3, 4, 2)), {"scale": 0.0}
    if name == "length 0":
        return make((2, 2, 0, 4, 3)), {}
    if name == "batch 0":
        return make((0, 2, 3, 4, 3)), {}
    raise KeyError(name)


CASES = (
    "plain",
    "cross, scale",
    "ragged",
    "scattered, cross",
    "one modality empty",
    "text mask only",
    "ones",
    "one word",
    "scale 0",
    "length 0",
    "batch 0",
)


def by_hand() -> dict[str, Tensor]:
    """One head of size 1, keys (1, 0): a query ln 3 attends (3/4, 1/4), a query 0 attends (1/2, 1/2)."""
    ln3 = math.log(3.0)
    rows = {"text_query": [ln3, 0.0], "text_key": [1.0, 0.0], "image_query": [0.0, ln3], "image_key": [1.0, 0.0]}
    return {name: torch.tensor(row, dtype=torch.float64).view(1, 1, 2, 1) for name, row in rows.items()}


@pytest.mark.parametrize("fn", [reference, congruence_loss], ids=["reference", "streaming"])
def test_by_hand(fn: Callable[..., Tensor]) -> None:
    # LL = LV = [[3/4, 1/4], [1/2, 1/2]], VV = VL = [[1/2, 1/2], [3/4, 1/4]]. Of a row with two entries, softmax is the sigmoid
    # of their difference, and sym of two rows (p, 1 - p), (t, 1 - t) is (p - t) (logit p - logit t).
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    loss = {kind: float(call(fn, kind=kind, direction="text")(**by_hand())) for kind in KINDS}
    # LV VV = [[9/16, 7/16], [5/8, 3/8]]; LV VV LV^T = [[17/32, 1/2], [9/16, 1/2]]: differences 1/32, 1/16; LL's 1/2, 0
    cacr = (sigmoid(1 / 2) - sigmoid(1 / 32)) * 15 / 32 + (sigmoid(1 / 16) - sigmoid(0)) / 16
    assert loss["cacr"] == pytest.approx(cacr / 2, rel=1e-14)
    # the second word attends both regions alike: the first is taken. VV[(0, 0), (0, 0)] is constant, t = 1/2
    assert loss["iais_singular"] == pytest.approx((3 / 4 - 1 / 2) * math.log(3) / 2, rel=1e-14)
    # LV VL = [[9/16, 7/16], [5/8, 3/8]]; eps in the logarithms adds -eps (t/p + p/t): 185/42 and 62/15 in the two rows
    distributed = (3 / 4 - 9 / 16) * (math.log(3) - math.log(9 / 7)) + (5 / 8 - 1 / 2) * math.log(5 / 3)
    assert loss["iais_distributed"] == pytest.approx(distributed / 2 - 1e-6 * (185 / 42 + 62 / 15) / 2, abs=1e-10)
    both = float(call(fn, kind="cacr")(**by_hand()))
    assert both == pytest.approx(cacr / 2 + float(call(fn, direction="image")(**by_hand())), rel=1e-14)


def naive(x: dict[str, Tensor], kind: str, direction: str, words: Tensor, regions: Tensor, scale: float) -> list[float]:
    """The formula of the loss, in loops over the real tokens of each sample."""

    def attention(query: Tensor, key: Tensor, b: int, rows: list[int], columns: list[int]) -> Any:
        out = np.zeros((len(rows), len(columns)))
        for h in range(query.shape[1]):
            for a, i in enumerate(rows):
                e = [math.exp(scale * float(query[b, h, i] @ key[b, h, j])) for j in columns]
                out[a] += np.array(e) / sum(e) / query.shape[1]
        return out

    def softmax(a: Any) -> Any:
        return np.stack([np.exp(row) / sum(math.exp(v) for v in row) for row in a])

    def sym(p: Any, t: Any, eps: float) -> float:
        total = 0.0
        for i, j in np.ndindex(p.shape):
            total += t[i, j] * (math.log(t[i, j]) - math.log(p[i, j] + eps))
            total += p[i, j] * (math.log(p[i, j]) - math.log(t[i, j] + eps))
        return total / len(p)

    losses = []
    for b in range(len(words)):
        n, m = words[b].nonzero()[:, 0].tolist(), regions[b].nonzero()[:, 0].tolist()
        ll, vv = attention(x["text_query"], x["text_key"], b, n, n), attention(x["image_query"], x["image_key"], b, m, m)
        lv = attention(x.get(CROSS[0], x["text_query"]), x.get(CROSS[1], x["image_key"]), b, n, m)
        vl = attention(x.get(CROSS[2], x["image_query"]), x.get(CROSS[3], x["text_key"]), b, m, n)
        sides = {"text": (ll, vv, lv, vl), "image": (vv, ll, vl, lv)}
        loss = 0.0
        for own, other, cross, back in (sides.values() if direction == "both" else [sides[direction]]) if n and m else ():
            if kind == "cacr":
                loss += sym(softmax(own), softmax(cross @ other @ cross.T), 0.0)
            elif kind == "iais_singular":
                c = cross.argmax(1)
                loss += sym(own, softmax(np.array([[other[i, j] for j in c] for i in c])), 0.0)
            else:
                loss += sym(own, cross @ back, 1e-6)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "cross, scale", "scattered, cross", "one modality empty"])
def test_reference_matches_loops(name: str, kind: str, direction: str) -> None:
    x, options = case(name)
    got = call(reference, kind=kind, direction=direction, **options)(**x)
    full = [torch.ones(x[n].shape[0], x[n].shape[2], dtype=torch.bool) for n in ("text_query", "image_query")]
    masks = [options.get("text_mask", full[0]), options.get("image_mask", full[1])]
    want = naive(x, kind, direction, *masks, options.get("scale", x["text_query"].shape[3] ** -0.5))
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_reference_gradient_is_the_closed_form() -> None:
    x = {name: value.requires_grad_() for name, value in make((1, 3, 4, 6, 5)).items()}

    def block(query: str, key: str) -> Tensor:
        return torch.softmax(x[query] @ x[key].mT * 5**-0.5, -1).mean(1)[0]

    ll, vv, cross = block("text_query", "text_key"), block("image_query", "image_key"), block("text_query", "image_key").detach()
    target = cross @ vv @ cross.T
    p, t = torch.softmax(ll, -1), torch.softmax(target, -1)
    d = (ll - ll.logsumexp(-1, keepdim=True)) - (target - target.logsumexp(-1, keepdim=True))
    by_p, by_t = (d + 1 - t / p) / 4, (-d + 1 - p / t) / 4
    by_ll = p * (by_p - (p * by_p).sum(-1, keepdim=True))
    by_target = t * (by_t - (t * by_t).sum(-1, keepdim=True))
    want = torch.autograd.grad([ll, vv], list(x.values()), [by_ll.detach(), (cross.T @ by_target @ cross).detach()])
    got = outputs_and_grads(call(reference, direction="text"), x)
    for name, grad in zip(NAMES, want, strict=True):
        torch.testing.assert_close(got[f"grad {name}"], grad, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fn", [reference, congruence_loss], ids=["reference", "streaming"])
def test_gradients_by_finite_differences(fn: Callable[..., Tensor], kind: str) -> None:
    x = make((2, 2, 3, 4, 2), cross=True)
    masks = {"text_mask": prefix([3, 2], 3), "image_mask": prefix([3, 4], 4)}
    leaves = NAMES + CROSS if kind == "iais_distributed" else NAMES  # else the cross block is a constant of the loss
    free = [x[name].clone().requires_grad_() for name in leaves]
    run = call(fn, kind=kind, **masks)
    assert torch.autograd.gradcheck(lambda *t: run(**{**x, **dict(zip(leaves, t, strict=True))}), free)


@pytest.mark.parametrize("tile", [None, 24])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_backend_matches_reference(
    backend: str, name: str, kind: str, dtype: torch.dtype, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile is not None:  # rows, heads and samples in several tiles
        monkeypatch.setattr(_tiles, "TILE_ELEMENTS", tile)
    x, options = case(name)
    x = {key: value.to(dtype) for key, value in x.items()}
    cotangent = torch.rand(x["text_query"].shape[0], dtype=torch.float64) + 0.5
    # with one word p = t = 1: gradients are zero but for rounding, and what cancels is of size 1
    scales = {f"grad {key}": 1.0 for key in x} if name in ("ones", "one word") else None
    for direction in DIRECTIONS:
        run, plain = (
            call(f, kind=kind, direction=direction, **options, **more)
            for f, more in ((congruence_loss, {"backend": backend}), (reference, {}))
        )
        assert_all_close_to(run, plain, x, [cotangent], what=direction, scales=scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_real_sizes(kind: str, direction: str, dtype: torch.dtype) -> None:
    """float32 is held to the rule here: with a handful of tokens the plain formula's own error can be zero by luck."""
    x = make((3, 4, 40, 70, 16), cross=direction == "both", dtype=dtype)
    masks = {"text_mask": prefix([40, 31, 17], 40), "image_mask": prefix([36, 70, 50], 70)}
    run, plain = (call(fn, kind=kind, direction=direction, **masks) for fn in (congruence_loss, reference))
    assert_all_close_to(run, plain, x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_underflows(kind: str) -> None:
    x = {name: value * 40 for name, value in make((2, 1, 5, 6, 4), dtype=torch.float32).items()}
    run, plain = call(congruence_loss, kind=kind), call(reference, kind=kind)
    assert (torch.softmax(x["text_query"] @ x["text_key"].mT / 2, -1) == 0).any()
    got, want = outputs_and_grads(run, x), outputs_and_grads(plain, {k: v.double() for k, v in x.items()})
    for key, value in got.items():
        torch.testing.assert_close(value.double(), want[key], rtol=1e-4, atol=1e-5 * float(want[key].abs().max()) + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_image_direction_is_the_text_direction_of_the_other_modality(kind: str) -> None:
    x, options = case("scattered, cross")
    other = dict(zip(NAMES + CROSS, (x[name] for name in NAMES[2:] + NAMES[:2] + CROSS[2:] + CROSS[:2]), strict=True))
    swapped = {"text_mask": options["image_mask"], "image_mask": options["text_mask"]}
    got = call(congruence_loss, kind=kind, direction="image", **options)(**x)
    torch.testing.assert_close(got, call(congruence_loss, kind=kind, direction="text", **swapped)(**other))


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_tokens_does_not_matter(kind: str) -> None:
    x, options = case("ragged")
    order = {"text": torch.randperm(6), "image": torch.randperm(9)}
    moved = {name: value[:, :, order[name.split("_")[0]]] for name, value in x.items()}
    masks = {f"{side}_mask": options[f"{side}_mask"][:, order[side]] for side in order}
    torch.testing.assert_close(
        call(congruence_loss, kind=kind, **masks)(**moved), call(congruence_loss, kind=kind, **options)(**x)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ragged", "scattered, cross", "one modality empty", "text mask only"])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_padding_reaches_nothing(backend: str, name: str, kind: str) -> None:
    x, options = case(name)
    run = call(congruence_loss, kind=kind, backend=backend, **options)
    clean = outputs_and_grads(run, x)
    for value in (torch.nan, torch.inf, 1e30):
        dirty = dict(x)
        for key in x:
            mask = options.get("text_mask" if "text" in key else "image_mask")
            if mask is not None:
                dirty[key] = x[key].masked_fill(~mask[:, None, :, None], value)
                assert (clean[f"grad {key}"].transpose(1, 2)[~mask] == 0).all()
        for key, got in outputs_and_grads(run, dirty).items():
            assert torch.equal(got, clean[key]), key


@pytest.mark.parametrize("backend", RUNNABLE)
def test_mean_counts_empty_samples(backend: str) -> None:
    x, options = case("one modality empty")
    each = call(congruence_loss, backend=backend, **options)(**x)
    assert (each[:3] == 0).all() and each[3] > 0
    mean = call(congruence_loss, backend=backend, reduction="mean", **options)(**x)
    assert mean.shape == () and float(mean) == pytest.approx(float(each.sum()) / 4)
    assert float(call(congruence_loss, backend=backend, reduction="mean")(**case("batch 0")[0])) == 0.0


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("kind", ["cacr", "iais_singular"])
def test_cross_block_is_a_constant(kind: str, backend: str) -> None:
    x, options = case("cross, scale")
    grads = outputs_and_grads(call(congruence_loss, kind=kind, backend=backend, **options), x)
    assert all((grads[f"grad {name}"] == 0).all() for name in CROSS)
    assert all((grads[f"grad {name}"] != 0).any() for name in NAMES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_dtype_and_autocast(dtype: torch.dtype) -> None:
    x = make((2, 2, 4, 5, 8), dtype=dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    run = call(congruence_loss)
    assert run(**x).dtype == wanted == call(reference)(**x).dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs_and_grads(run, x)
    if dtype != torch.float64:  # the inputs are rounded, nothing else is
        want = outputs_and_grads(run, {key: value.bfloat16() for key, value in x.items()})
        assert torch.equal(got["out0"], want["out0"])
        assert all(got[f"grad {key}"].dtype == dtype for key in x)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs_are_read_and_not_written(kind: str) -> None:
    x, options = case("ragged")
    strided = {}
    for key, value in x.items():
        room = torch.full((*value.shape[:2], 2 * value.shape[2], value.shape[3] + 3), torch.nan, dtype=value.dtype)
        strided[key] = room[:, :, ::2, 1:-2].copy_(value)
        assert not strided[key].is_contiguous()
    expanded = {key: value[:1].expand(3, -1, -1, -1) for key, value in strided.items()}
    run, before = call(congruence_loss, kind=kind, **options), {key: value.clone() for key, value in strided.items()}
    got, want = outputs_and_grads(run, strided), outputs_and_grads(run, x)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert all(torch.equal(strided[key], before[key]) for key in before)
    got, want = outputs_and_grads(run, expanded), outputs_and_grads(run, {k: v.contiguous() for k, v in expanded.items()})
    assert all(torch.equal(got[key], want[key]) for key in want)


def op_arguments(kind: str, masks: bool, grad: bool) -> tuple[Any, ...]:
    x = {key: value.requires_grad_(grad) for key, value in make((2, 3, 5, 4, 6), cross=True, dtype=torch.float32).items()}
    tail = (prefix([5, 1], 5), prefix([4, 2], 4)) if masks else (None, None)
    queries = [x[name] for name in ("text_query", "image_query", "cross_text_query", "cross_image_query")]
    keys = [x[name] for name in ("text_key", "image_key", "cross_image_key", "cross_text_key")]
    return queries, keys, *tail, kind, "both", 0.5, "streaming"


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    torch.library.opcheck(torch.ops.vlattn.congruence_loss, op_arguments(kind, True, True))
    torch.library.opcheck(torch.ops.vlattn.congruence_loss, op_arguments(kind, False, False))
    backward = (torch.tensor([0.5, 2.0]), *op_arguments(kind, True, False))
    torch.library.opcheck(torch.ops.vlattn.congruence_loss_backward, backward)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative_is_refused(kind: str) -> None:
    x = {key: value.requires_grad_() for key, value in make((1, 2, 3, 4, 2)).items()}
    (grad,) = torch.autograd.grad(call(congruence_loss, kind=kind)(**x).sum(), x["text_query"], create_graph=True)
    with pytest.raises(RuntimeError, match="congruence_loss has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_fullgraph_ten_lengths_two_graphs(kind: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(text: Any, image: Any, text_mask: Tensor) -> Tensor:
        return congruence_loss(text, image, kind=kind, text_mask=text_mask)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for n in range(10):
        x = {key: value.requires_grad_() for key, value in make((2, 3, 5 + n, 7 + 2 * n, 4)).items()}
        arguments = (x["text_query"], x["text_key"]), (x["image_query"], x["image_key"]), prefix([5, 3], 5 + n)
        got, want = (f(*arguments) for f in (compiled, step))
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(loss, list(x.values())) for loss in (got, want)), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_no_map_with_a_head_axis(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1 << 12)
    batch, heads, tokens, head_dim = 2, 8, 128, 4
    x = make((batch, heads, tokens, tokens, head_dim), dtype=torch.float32)
    run = call(congruence_loss, kind=kind)
    with LargestAllocation() as forward:
        run(**x)
    with LargestAllocation() as both:
        outputs_and_grads(run, x)
    tile, head_mean, gradient = 4 << 12, 4 * tokens * tokens, 4 * batch * heads * tokens * head_dim
    assert forward.bytes <= head_mean, forward.by
    assert forward.peak <= 2 * head_mean + 16 * tile
    assert both.bytes <= max(head_mean, gradient), both.by
    assert both.peak <= 3 * head_mean + 16 * tile + 9 * gradient < 4 * batch * heads * tokens * tokens


def bad(**change: Any) -> dict[str, Any]:
    text, image = (torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)), (torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8))
    return {"text": text, "image": image, **change}


T, V = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 8)
BAD_INPUT = [
    (bad(kind="soft"), ValueError, "kind must be one of.*'soft'"),
    (bad(kind=None), ValueError, "kind must be one of"),
    (bad(direction="up"), ValueError, "direction must be one of.*'up'"),
    (bad(direction=1), TypeError, "direction must be one of.*int 1"),
    (bad(reduction="sum"), ValueError, "reduction must be one of.*'sum'"),
    (bad(backend="nonsense"), ValueError, "backend must be one of.*'nonsense'"),
    (bad(backend="cuda"), ValueError, "backend='cuda' cannot run congruence_loss"),
    (bad(scale="1"), TypeError, "scale must be a real number; got str"),
    (bad(scale=math.nan), ValueError, "scale must be a finite number"),
    (bad(text=T), TypeError, r"text must be the pair \(query.*got a torch.float32 tensor"),
    (bad(image=(V,)), TypeError, "image must be the pair"),
    (bad(image=(V, [1.0])), TypeError, "image key must be a torch.Tensor.*got list"),
    (bad(text=(T[0], T[0])), ValueError, r"text query must have 4 dimensions.*\(3, 4, 8\)"),
    (bad(text=(T, T[:, :, :3])), ValueError, r"text key must have the shape \(2, 3, 4, 8\).*\(2, 3, 3, 8\)"),
    (bad(image=(V[:, :2], V[:, :2])), ValueError, r"image query must have the shape \(2, 3, 5, 8\).*\(2, 2, 5, 8\)"),
    (bad(image=(V[:1], V)), ValueError, r"image query must have the shape .*\(1, 3, 5, 8\)"),
    (bad(image=(V[..., :7], V)), ValueError, r"image query must have the shape .*\(2, 3, 5, 7\)"),
    (bad(image=(V, V.double())), TypeError, "image key must have the dtype of text query, torch.float32"),
    (bad(text=(T.long(), T), image=(V, V)), TypeError, "text query must be float16, bfloat16, float32 or float64"),
    (bad(text=(T, T.to("meta"))), ValueError, "text key must be on the device of text query"),
    (bad(cross=(T, V, V)), TypeError, "cross must be the pair"),
    (bad(cross=((T, V), V)), TypeError, r"cross\[1\] must be the pair \(image query, text key\)"),
    (bad(cross=((T, V), (T, V))), ValueError, r"cross image query must have the shape \(2, 3, 5, 8\)"),
    (bad(text_mask=torch.ones(2, 9, dtype=torch.bool)), ValueError, r"text_mask must have shape \(2, 4\)"),
    (bad(image_mask=torch.ones(2, 5)), TypeError, "image_mask must be bool"),
    (bad(image_mask=[[True] * 5] * 2), TypeError, "image_mask must be a torch.Tensor"),
]


@pytest.mark.parametrize("arguments, error, words", BAD_INPUT, ids=[words for _, _, words in BAD_INPUT])
def test_bad_input(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = dict(arguments)
    text, image, cross = arguments.pop("text"), arguments.pop("image"), arguments.pop("cross", None)
    with pytest.raises(error, match=words):
        congruence_loss(text, image, cross, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_module(kind: str) -> None:
    x, options = case("scattered, cross")
    module = CongruenceLoss(kind, direction="image", scale=0.3, reduction="none")
    got = call(lambda *args, reduction, **masks: module(*args, **masks), **options)(**x)
    want = call(congruence_loss, kind=kind, direction="image", scale=0.3, **options)(**x)
    assert torch.equal(got, want)
    assert kind in repr(module) and "image" in repr(module)
    for wrong in ({"kind": "soft"}, {"direction": "up"}, {"reduction": "sum"}, {"scale": math.inf}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            CongruenceLoss(**wrong)  # type: ignore[arg-type]


def test_training_signal_annealing() -> None:
    # x = 1/4
    want = {"linear": 0.25, "exp": math.exp(-3.75), "log": 1 - math.exp(-1.25), "const": 1.0}
    for schedule, weight in want.items():
        assert training_signal_annealing(25, 100, schedule) == pytest.approx(weight)
    assert training_signal_annealing(100, 100) == training_signal_annealing(300, 100) == 1.0
    assert training_signal_annealing(0, 100, "log") == training_signal_annealing(0, 100, "linear") == 0.0
    for arguments, words in (((-1, 10), "step"), ((1, 0), "num_steps"), ((1, 10, "cosine"), "schedule")):
        with pytest.raises(ValueError, match=f"{words} must be"):
            training_signal_annealing(*arguments)
