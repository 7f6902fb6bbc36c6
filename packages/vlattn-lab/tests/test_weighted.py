"""Weighted relevancy of CLIPMapper: `explain` against stored maps, and these against the model's own sums, entry by entry."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import vlattn_fast as va
from tests.helpers.small_models import lively
from tests.helpers.weighted_maps import _relevancies, run, shares, weighted_relevancy
from vlattn_fast.backends.reference.relevancy_residual import WEIGHTINGS
from vlattn_fast.interpret.relevancy.methods.registry import with_options
from vlattn_fast.models import CLIPMapper
from vlattn_lab.clip import CONFIG as CLIP_CONFIG
from vlattn_lab.clip import build_clip
from vlattn_lab.mapper import CONFIG
from vlattn_lab.texts import SceneProcessor

pytestmark = pytest.mark.usefixtures("published")


def make(task, **options):
    clip = build_clip(CLIP_CONFIG)
    model = lively(CLIPMapper(clip.vision_model, clip.text_model, **CONFIG[task], **options)).eval().double()
    texts = ["what is left of a six", "is there a three"]
    inputs = SceneProcessor(end=task == "vqa")(torch.rand(2, 32, 32).double(), texts)
    return model, inputs, [3, 5]


@pytest.fixture(params=["vqa", "captions"])
def mapper(request):
    return make(request.param)


def test_without_weights_it_is_the_plain_rule(mapper):
    model, inputs, target = mapper
    want = va.explain(model, inputs, target=target)
    got = weighted_relevancy(model, inputs, target, weighting="equal", normalize=False)
    for name in ("image", "text"):
        one, two = getattr(got, name), getattr(want, name)
        assert one.shape == two.shape and two.abs().max() > 1e-6
        assert (one - two).abs().max() < 1e-10 * two.abs().max()


def test_it_runs_the_model_itself(mapper):
    model, inputs, _ = mapper
    sums = []
    handles = [
        module.register_forward_hook(lambda m, a, o: sums.append((*a, o)))
        for layer in model.layers
        for module in (layer.self_attention_residual, layer.cross_attention_residual)
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    found, place, steps = run(model, inputs)
    read = logits if logits.ndim == 2 else logits[[0, 1], place]
    torch.testing.assert_close(found.detach(), read, rtol=1e-10, atol=1e-12)
    assert place.tolist() == ([7, 5] if logits.ndim == 2 else [6, 4])
    own = [step for step in steps[-2 * len(model.layers) :]]
    assert [step.kind for step in own] == ["tt", "ti"] * len(model.layers)
    real = inputs["attention_mask"]
    for step, (stream, branch, total) in zip(own, sums, strict=True):
        for one, two in ((step.x, stream), (step.y - step.x, branch), (step.y, total)):
            torch.testing.assert_close(one.detach()[real], two[real], rtol=1e-8, atol=1e-10)


def test_weights_are_shares_of_the_sum():
    x, o, g = (torch.randn(2, 3, 4).double() for _ in range(3))
    a, b = shares("contribution", x, o, g)
    before, after = abs(float(g[1, 2] @ x[1, 2])), abs(float(g[1, 2] @ o[1, 2]))
    assert float(a[1, 2]) == pytest.approx(before / (before + after)) and float((a + b - 1).abs().max()) < 1e-12
    assert float(shares("norm", x, o, g)[0][1, 2]) == pytest.approx(float(x[1, 2].norm() / (x[1, 2].norm() + o[1, 2].norm())))
    before, after = (sum(abs(float(g[1, 2, c] * term[1, 2, c])) for c in range(4)) for term in (x, o))
    assert float(shares("magnitude", x, o, g)[0][1, 2]) == pytest.approx(before / (before + after))


def test_each_addition_has_its_weights(mapper):
    """Entry by entry, on the maps, sums and gradients of the run."""
    model, inputs, target = mapper
    logits, place, steps = run(model, inputs)
    parts = [part for step in steps for part in (step.maps, step.y)]
    grads = torch.autograd.grad(logits.gather(1, torch.tensor(target)[:, None]).sum(), parts)
    for weighting, normalize in (("contribution", True), ("norm", False)):
        tt, ti = (part.detach() for part in _relevancies(steps, grads, weighting, normalize))
        for row in range(2):
            r_tt, r_ii = torch.eye(tt.shape[1]).double(), torch.eye(ti.shape[2]).double()
            r_ti = torch.zeros(ti.shape[1:]).double()
            for step, grad_maps, grad_y in zip(steps, grads[::2], grads[1::2], strict=True):
                maps, x, o, g = step.maps[row], step.x[row], (step.y - step.x)[row], grad_y[row]
                abar = sum(torch.relu(head * slope) for head, slope in zip(maps, grad_maps[row], strict=True)) / len(maps)
                if normalize:
                    abar = torch.stack([line / line.sum() if line.sum() > 0 else line for line in abar])
                two = (
                    [(g * x).sum(-1).abs(), (g * o).sum(-1).abs()]
                    if weighting == "contribution"
                    else [x.norm(dim=-1), o.norm(dim=-1)]
                )
                a = torch.where(two[0] + two[1] > 0, two[0] / (two[0] + two[1]), 0.5).diag()
                b = torch.eye(len(a)).double() - a
                if step.kind == "ii":
                    r_ii = a @ r_ii + b @ abar @ r_ii
                elif step.kind == "tt":
                    r_tt, r_ti = a @ r_tt + b @ abar @ r_tt, a @ r_ti + b @ abar @ r_ti
                else:
                    r_ti = a @ r_ti + b @ r_tt.T @ abar @ r_ii
            assert (tt[row] - r_tt).abs().max() < 1e-10 and (ti[row] - r_ti).abs().max() < 1e-10 * r_ti.abs().max()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_explain_has_the_same_rule(mapper, weighting, normalize):
    model, inputs, target = mapper
    want = weighted_relevancy(model, inputs, target, weighting=weighting, normalize=normalize)
    method = "weighted" if normalize else "weighted:no_normalization"
    got = va.explain(model, inputs, target=target, method=with_options(method, weighting=weighting))
    for name in ("image", "text"):
        one, two = getattr(got, name), getattr(want, name)
        assert two.abs().max() > 1e-6
        assert (one - two).abs().max() < 1e-10 * two.abs().max()


@pytest.mark.parametrize("task", CONFIG)
@pytest.mark.parametrize("cross_first", [True, False])
def test_image_tokens_that_attend_to_themselves(task, cross_first):
    """In both orders of the layers: the relevancies of the image grow between the attentions to it."""
    model, inputs, target = make(task, image_self_attention=True, cross_first=cross_first)
    assert [step.kind for step in run(model, inputs)[2][-3:]] == (["ii", "ti", "tt"] if cross_first else ["ii", "tt", "ti"])
    for weighting, normalize in (("contribution", True), ("equal", False)):
        want = weighted_relevancy(model, inputs, target, weighting=weighting, normalize=normalize)
        method = with_options("weighted" if normalize else "weighted:no_normalization", weighting=weighting)
        got = va.explain(model, inputs, target=target, method=method)
        for name in ("image", "text"):
            one, two = getattr(got, name), getattr(want, name)
            assert two.abs().max() > 1e-6
            assert (one - two).abs().max() < 1e-10 * two.abs().max()


def test_each_token_of_a_caption():
    model, inputs, _ = make("captions")
    whole = va.explain(model, inputs, answer=[[3, 9], [5, 4]], method="weighted")
    assert whole.relevancy["vision"].shape == (2, 2, 65)
    first = va.explain(model, inputs, answer=[[3], [5]], method="weighted", per_token=False)
    torch.testing.assert_close(whole.relevancy["vision"][:, 0], first.relevancy["vision"], rtol=1e-9, atol=1e-12)
