"""The formula of congruence_loss against hand-worked numbers, loops and its own symmetry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.ops.backends import F64, on
from tests.helpers.ops.congruence_loss_cases import CROSS, FORMS, NAMES, call, make, masks
from vlattn_fast.backends.reference.congruence_loss import congruence_loss as reference
from vlattn_fast.ops.congruence_loss import DIRECTIONS, KINDS, NORMALIZATIONS, congruence_loss


def by_hand() -> dict[str, Tensor]:
    """One head of size 1, keys (1, 0): a query ln 3 attends (3/4, 1/4), a query 0 attends (1/2, 1/2)."""
    ln3 = math.log(3.0)
    rows = {"text_query": [ln3, 0.0], "text_key": [1.0, 0.0], "image_query": [0.0, ln3], "image_key": [1.0, 0.0]}
    return {name: torch.tensor(row, dtype=torch.float64).view(1, 1, 2, 1) for name, row in rows.items()}


@on("reference", "streaming")
def test_by_hand(backend: str) -> None:
    # LL = LV = [[3/4, 1/4], [1/2, 1/2]], VV = VL = [[1/2, 1/2], [3/4, 1/4]]. In a row with two entries, softmax is the sigmoid
    # of their difference, and sym of two rows (p, 1 - p), (t, 1 - t) is (p - t) (logit p - logit t).
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    loss = {kind: float(call(congruence_loss, backend=backend, kind=kind, direction="text")(**by_hand())) for kind in KINDS}
    # LV VV = [[9/16, 7/16], [5/8, 3/8]]; LV VV LV^T = [[17/32, 1/2], [9/16, 1/2]]: differences 1/32, 1/16; LL's 1/2, 0
    cacr = (sigmoid(1 / 2) - sigmoid(1 / 32)) * 15 / 32 + (sigmoid(1 / 16) - sigmoid(0)) / 16
    assert loss["cacr"] == pytest.approx(cacr / 2, rel=1e-14)
    # the second word attends both regions alike: the first is taken. VV[(0, 0), (0, 0)] is constant, t = 1/2
    assert loss["iais_singular"] == pytest.approx((3 / 4 - 1 / 2) * math.log(3) / 2, rel=1e-14)
    # LV VL = [[9/16, 7/16], [5/8, 3/8]]; eps in the logarithms adds -eps (t/p + p/t): 185/42 and 62/15 in the two rows
    distributed = (3 / 4 - 9 / 16) * (math.log(3) - math.log(9 / 7)) + (5 / 8 - 1 / 2) * math.log(5 / 3)
    assert loss["iais_distributed"] == pytest.approx(distributed / 2 - 1e-6 * (185 / 42 + 62 / 15) / 2, abs=1e-10)
    # as they are, VV[(0, 0), (0, 0)] = 1/2 throughout; e moves a term by less than 2e-6
    options = {"backend": backend, "direction": "text", "normalize": "none"}
    plain = {kind: float(call(congruence_loss, kind=kind, **options)(**by_hand())) for kind in KINDS}
    first = 7 / 32 * math.log(24 / 17) + math.log(2) / 4
    assert plain["cacr"] == pytest.approx((first + math.log(9 / 8) / 16) / 2, abs=1e-6)
    assert plain["iais_singular"] == pytest.approx(math.log(3) / 8, abs=1e-6)
    assert plain["iais_distributed"] == pytest.approx(distributed / 2, abs=1e-6)
    both = float(call(congruence_loss, backend=backend, kind="cacr")(**by_hand()))
    assert both == pytest.approx(
        cacr / 2 + float(call(congruence_loss, backend=backend, direction="image")(**by_hand())), rel=1e-14
    )


def naive(
    x: dict[str, Tensor], kind: str, normalize: str, direction: str, words: Tensor, regions: Tensor, scale: float
) -> list[float]:
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

    def soft_relation(weights: Any, others: Any, relations: Any) -> float:
        """The mean relation of what two tokens stand for, over all pairs of tokens of the other modality."""
        pairs = np.ndindex(relations.shape)
        return math.fsum(weights[v] * others[w] * relations[v, w] for v, w in pairs)

    def sym(p: Any, t: Any, eps: float) -> float:
        total = 0.0
        for i, j in np.ndindex(p.shape):
            total += t[i, j] * (math.log(t[i, j]) - math.log(p[i, j] + eps))
            total += p[i, j] * (math.log(p[i, j]) - math.log(t[i, j] + eps))
        return total / len(p)

    def plain(p: Any, t: Any) -> float:
        return math.fsum((a - b) * math.log((a + 1e-6) / (b + 1e-6)) for a, b in zip(p.flat, t.flat, strict=True)) / len(p)

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
                target = np.array([[soft_relation(of_i, of_j, other) for of_j in cross] for of_i in cross])
                np.testing.assert_allclose(cross @ other @ cross.T, target, rtol=1e-12)  # the change of basis
                loss += plain(own, target) if normalize == "none" else sym(softmax(own), softmax(target), 0.0)
            elif kind == "iais_singular":
                c = cross.argmax(1)
                target = np.array([[other[i, j] for j in c] for i in c])
                loss += plain(own, target) if normalize == "none" else sym(own, softmax(target), 0.0)
            else:
                loss += plain(own, cross @ back) if normalize == "none" else sym(own, cross @ back, 1e-6)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [None, "scattered", "empty samples"])
def test_reference_matches_loops(name: str | None, form: str) -> None:
    x, given = make(6, 9, b=3, cross=name != "empty samples"), {} if name is None else masks(name)
    text, image = (given.get(f"{side}_mask", torch.ones(3, n, dtype=torch.bool)) for side, n in (("text", 6), ("image", 9)))
    for direction in DIRECTIONS:
        got = call(reference, **FORMS[form], direction=direction, scale=0.4, **given)(**x)
        want = torch.tensor(naive(x, *FORMS[form].values(), direction, text, image, 0.4), dtype=F64)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_image_direction_is_the_text_direction_of_the_other_modality(kind: str) -> None:
    x, options = make(6, 9, b=3, cross=True), masks("scattered")
    other = dict(zip(NAMES + CROSS, (x[name] for name in NAMES[2:] + NAMES[:2] + CROSS[2:] + CROSS[:2]), strict=True))
    swapped = {"text_mask": options["image_mask"], "image_mask": options["text_mask"]}
    got = call(reference, kind=kind, direction="image", **options)(**x)
    torch.testing.assert_close(got, call(reference, kind=kind, direction="text", **swapped)(**other))


@on("reference", "streaming", "cpu", "triton")
def test_rows_as_they_are_leave_no_hole(backend: str) -> None:
    """0 if and only if the maps are equal; a softmax ignores that even rows are 1/3 within the text, 1/2 through the image."""
    zeros = {name: torch.zeros(1, 1, 3 if "text" in name else 2, 4) for name in NAMES}
    options = {"backend": backend, "direction": "text"}
    even = {normalize: call(congruence_loss, normalize=normalize, **options)(**zeros).item() for normalize in NORMALIZATIONS}
    assert abs(even["softmax"]) < 1e-12 and even["none"] == pytest.approx(math.log(3 / 2) / 2, rel=1e-4)
    # the image is the text with its words in another order, and words attend to their own regions, wholly
    query, key, order, own = (
        torch.randn(1, 2, 5, 8),
        torch.randn(1, 2, 5, 8),
        torch.randperm(5),
        400.0 * torch.eye(5, 8)[None, None],
    )
    across = {name: own.expand(1, 2, 5, 8)[:, :, order if "image" in name else slice(None)] for name in CROSS}
    renamed = dict(zip(NAMES, (query, key, query[:, :, order], key[:, :, order]), strict=True)) | across
    for kind in KINDS[:2]:
        run = call(congruence_loss, kind=kind, normalize="none", backend=backend)
        assert 0 <= run(**renamed).item() < 1e-11
        assert run(**renamed | {"image_key": 1.1 * renamed["image_key"]}).item() > 1e-4
