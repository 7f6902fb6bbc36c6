"""The rivals against their formulas written out, one image, head, patch and text at a time, on Hugging Face's own attention."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import vlattn_fast as va
from tests.helpers.small_models import made, rows
from vlattn_lab import rivals

TARGET = [2, 0, 2]


@pytest.fixture
def clip():
    model, inputs = made("clip")
    model.double().set_attn_implementation("literal")  # in float64, too
    return model, {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@contextlib.contextmanager
def watching(layers):
    """What the modules of transformers compute themselves, by hooks, of each layer."""
    seen = [SimpleNamespace() for _ in layers]
    handles = []
    for layer, found in zip(layers, seen, strict=True):

        def keep(name, found=found):
            return lambda module, args, output: setattr(found, name, output)

        attention = layer.self_attn
        handles += [part.register_forward_hook(keep(name)) for name, part in (("q", attention.q_proj), ("k", attention.k_proj))]
        handles += [attention.v_proj.register_forward_hook(keep("v")), layer.register_forward_hook(keep("leaving"))]
        handles.append(attention.register_forward_hook(lambda m, a, o, found=found: setattr(found, "attention", o[1])))
        handles.append(attention.out_proj.register_forward_pre_hook(lambda m, a, found=found: setattr(found, "heads", a[0])))
        handles.append(
            layer.register_forward_pre_hook(
                lambda m, a, k, found=found: setattr(found, "entering", a[0] if a else k["hidden_states"]), with_kwargs=True
            )
        )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run(model, inputs):
    with watching(model.vision_model.encoder.layers) as vision, watching(model.text_model.encoder.layers) as text:
        return model(**inputs), vision, text


def embedded(model, hidden):
    made = model.visual_projection(model.vision_model.post_layernorm(hidden))
    return made / made.norm()


def close(got, want):
    want = torch.tensor(want, dtype=torch.float64).view(got.shape)
    assert want.abs().max() > 1e-6
    assert (got - want).abs().max() < 1e-10 * want.abs().max()


def test_legrad(clip):
    model, inputs = clip
    for count in (2, 3):
        outputs, vision, _ = run(model, inputs)
        want = []
        for image, text in enumerate(TARGET):
            values = [0.0] * 16
            for layer in vision[-count:]:
                score = embedded(model, layer.leaving[image].mean(0)) @ outputs.text_embeds[text].detach()
                (grad,) = torch.autograd.grad(score, layer.attention, retain_graph=True)
                heads, queries, _ = grad[image].shape
                for patch in range(16):
                    column = [max(float(grad[image, h, i, patch + 1]), 0.0) for h in range(heads) for i in range(queries)]
                    values[patch] += sum(column) / (heads * queries)
            want += values
        close(rivals.legrad(model, inputs, TARGET, layers=count).image, want)


def test_the_gradient_in_the_last_layer(clip):
    model, inputs = clip
    outputs, vision, text = run(model, inputs)
    image, words = [], []
    for row, of in enumerate(TARGET):
        score, end = outputs.logits_per_image[row, of], inputs["input_ids"][of].tolist().index(58)
        for layer, query, sample, found in ((vision[-1], 0, row, image), (text[-1], end, of, words)):
            (grad,) = torch.autograd.grad(score, layer.attention, retain_graph=True)
            weights = (grad[sample, :, query] * layer.attention[sample, :, query]).clamp(min=0).mean(0).tolist()
            found.append(weights[1:] if found is image else weights[1:end])
    got = rivals.gradient_last_layer(model, inputs, TARGET)
    close(got.image, image)
    for row, want in enumerate(words):
        close(got.text[row, : len(want)], want)


def cosine(one, two):
    return float(torch.nn.functional.cosine_similarity(one, two, dim=0).detach())


def test_grad_eclip(clip):
    model, inputs = clip
    outputs, vision, text = run(model, inputs)
    cosines = (outputs.image_embeds * outputs.text_embeds[TARGET]).sum(-1)
    image, words = [], []
    for row, of in enumerate(TARGET):
        layer, project = vision[-1], model.vision_model.encoder.layers[-1].self_attn.out_proj
        (grad,) = torch.autograd.grad(cosines[row], layer.heads, retain_graph=True)
        spatial = [cosine(project(layer.q[row, 0]), project(layer.k[row, patch])) for patch in range(1, 17)]
        for patch, share in enumerate(spatial):
            share = (share - min(spatial)) / (max(spatial) - min(spatial))
            channels = zip(grad[row, 0].tolist(), layer.v[row, patch + 1].tolist(), strict=True)
            image.append(max(sum(w * share * v for w, v in channels), 0.0))

        end = inputs["input_ids"][of].tolist().index(58)
        sums = [0.0] * end
        for layer, module in list(zip(text, model.text_model.encoder.layers, strict=True))[1:]:  # two of three layers
            project = module.self_attn.out_proj
            (grad,) = torch.autograd.grad(cosines[row], layer.heads, retain_graph=True)
            spatial = [cosine(project(layer.q[of, end]), project(layer.k[of, word])) for word in range(end + 1)]
            for word in range(1, end):
                share = (spatial[word] - min(spatial)) / (max(spatial) - min(spatial))
                sums[word] += share * float((grad[of, end] @ layer.v[of, word]).detach())
        words.append([max(value, 0.0) for value in sums[1:]])
    got = rivals.grad_eclip(model, inputs, TARGET)
    close(got.image, image)
    close(got.text, [row + [0.0] * (got.text.shape[1] - len(row)) for row in words])
    assert max(map(len, words)) == got.text.shape[1]


def test_clip_surgery(clip):
    model, inputs = clip
    with torch.no_grad():
        outputs, vision, _ = run(model, inputs)
        for count in (1, 2):
            want = []
            for row, target in enumerate(TARGET):
                second = vision[-count].entering[row]
                for layer, module in list(zip(vision, model.vision_model.encoder.layers, strict=True))[-count:]:
                    parts = []
                    for head in layer.v[row].split(8, dim=-1):
                        scores = head @ head.T / 8**0.5
                        parts.append(scores.softmax(-1) @ head)
                    second = second + module.self_attn.out_proj(torch.cat(parts, -1))
                pooled = embedded(model, vision[-1].leaving[row, 0])
                texts = outputs.text_embeds
                probability = torch.stack([2 * pooled @ text for text in texts]).softmax(0)
                weights = probability / probability.mean()
                for patch in range(1, 17):
                    features = torch.stack([embedded(model, second[patch]) * t * w for t, w in zip(texts, weights, strict=True)])
                    want.append(float((features[target] - features.mean(0)).sum()))
            close(rivals.clip_surgery(model, inputs, TARGET, layers=count).image, want)
        assert torch.equal(
            rivals.clip_surgery(model, inputs, TARGET).image, rivals.clip_surgery(model, inputs, TARGET, layers=1).image
        )
        one = {name: inputs[name][:1] for name in ("input_ids", "attention_mask", "pixel_values")}
        with pytest.raises(ValueError, match="inputs must have two texts or more"):
            rivals.clip_surgery(model, one, [0])


def test_evaluate_takes_them():
    model, inputs = made("clip")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = va.evaluate(model, [(inputs, [1, 2, 0], None)], methods=rivals.CLIP, tests=("positive", "deletion", "sanity"))
    table = rows(result)
    for name in rivals.CLIP:
        for part in ("image", "text"):
            row = table[name, "deletion", part]
            assert (row["samples"], row["left_out"]) == ((3, 0) if part == "image" or name.startswith("grad") else (0, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="target must be the text of each image"):
        rivals.legrad(model, inputs, lambda outputs: outputs.logits_per_image.diagonal())


def test_tensors_are_made_where_the_model_is(clip):
    """A tensor made without a device would be one of "meta" here, and does not go with those of the model."""
    model, inputs = clip
    want = rivals.grad_eclip(model, inputs, TARGET)
    with torch.device("meta"):
        got = rivals.grad_eclip(model, inputs, TARGET)
    assert torch.equal(got.image, want.image) and torch.equal(got.text, want.text)


# --- captum, where it is installed ---


def test_occlusion_is_the_fall_without_a_patch():
    pytest.importorskip("captum")
    model, inputs = made("vit")
    with torch.no_grad():
        whole = model(**inputs).logits
        want = torch.zeros(2, 4, 5)
        for y in range(4):
            for x in range(5):
                pixels = inputs["pixel_values"].clone()
                pixels[:, :, 6 * y : 6 * y + 6, 6 * x : 6 * x + 6] = 0
                fall = whole - model(pixel_values=pixels).logits
                want[:, y, x] = fall[[0, 1], [3, 1]] * 3 * 36  # every pixel gets the whole fall
    torch.testing.assert_close(rivals.occlusion(model, inputs, [3, 1]).image, want, rtol=1e-3, atol=1e-3)


def test_integrated_gradients_add_up_to_the_score():
    pytest.importorskip("captum")
    model, inputs = made("clip")
    with torch.no_grad():
        whole, empty = (
            model(**{**inputs, "pixel_values": pixels}).logits_per_image[range(3), TARGET]
            for pixels in (inputs["pixel_values"], torch.zeros(3, 3, 24, 24))
        )
    found = rivals.integrated_gradients(model, inputs, TARGET, steps=300).image.sum((1, 2))
    torch.testing.assert_close(found, whole - empty, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("target", [[1, 0, 1], lambda outputs: outputs.logits[:, 1]], ids=["classes", "callable"])
def test_regions_of_uniter(target):
    """Occlusion: the fall without a region. Integrated gradients: 20 points of Gauss and Legendre from zeros to the features."""
    pytest.importorskip("captum")
    model, inputs = made("uniter")
    model.double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    features, classes = inputs["region_features"], target if isinstance(target, list) else [1, 1, 1]

    def score(features):
        return model(**{**inputs, "region_features": features}).logits[range(3), classes]

    with torch.no_grad():
        without = [score(features * (torch.arange(5) != region)[:, None]) for region in range(5)]
        falls = score(features)[:, None] - torch.stack(without, 1)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    mean = torch.zeros_like(features)
    for node, weight in zip(nodes, weights, strict=True):
        point = (features * (1 + node) / 2).requires_grad_()
        mean += weight / 2 * torch.autograd.grad(score(point).sum(), point)[0]
    falls = falls * features.shape[2]  # each feature gets the whole fall
    for method, want in ((rivals.occlusion, falls), (rivals.integrated_gradients, (mean * features).sum(-1))):
        torch.testing.assert_close(method(model, inputs, target).regions.double(), want, rtol=1e-5, atol=1e-5)
