"""Rival methods as `va.evaluate` takes them: the plain method as its authors use it on CLIP, LeGrad, Grad-ECLIP and CLIP Surgery
for Hugging Face's CLIPModel, and captum's integrated gradients and occlusion for any model.

Each rival is a callable (model, inputs, target) -> an object with `.image`, `.regions` or `.text`. The rivals are written from
the papers and from the authors' code, which each docstring names; where paper and code differ, the docstring says which one is
followed. Every map is stored, as published. Scalings for display (min-max over the finished map, resizing) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_fast import explain
from vlattn_fast._ground.checks import call_on
from vlattn_fast.attach.session import at_rest
from vlattn_fast.interpret.relevancy.methods.registry import published

Inputs = Mapping[str, Any]


# --- CLIP's towers, layer by layer ---


class Layer(NamedTuple):
    """The tensors of one layer."""

    module: Any  # the layer
    entering: Tensor  # (B, N, C), its input
    query: Tensor  # (B, H, N, D), as key and value
    key: Tensor
    value: Tensor
    attention: Tensor  # (B, H, N, N), after the softmax
    heads: Tensor  # (B, N, C), attention @ value of all heads, in front of the output projection
    leaving: Tensor  # (B, N, C), its output


def vision_layers(model: Any, pixels: Tensor) -> list[Layer]:
    """Every layer of the vision tower, on a graph that starts at the pixels."""
    tower = model.vision_model
    return _layers(tower, tower.pre_layrnorm(tower.embeddings(pixels.detach().requires_grad_())), None)


def _layers(tower: Any, hidden: Tensor, mask: Tensor | None) -> list[Layer]:
    """mask: bool, broadcasts to (B, H, N, N)."""
    layers = []
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        normed = layer.layer_norm1(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = query @ key.transpose(-1, -2) * attention.scale
        maps = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        heads = _merged(maps @ value)
        summed = hidden + attention.out_proj(heads)
        leaving = summed + layer.mlp(layer.layer_norm2(summed))
        layers.append(Layer(layer, hidden, query, key, value, maps, heads, leaving))
        hidden = leaving
    return layers


def _merged(heads: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)"""
    return heads.transpose(1, 2).flatten(2)


def _image_embeddings(model: Any, hidden: Tensor) -> Tensor:
    """Tokens behind the last layer (..., C) -> embeddings (..., P) of length 1."""
    return F.normalize(model.visual_projection(model.vision_model.post_layernorm(hidden)), dim=-1)


@torch.no_grad()
def _text_embeddings(model: Any, inputs: Inputs) -> Tensor:
    """(T, P) of length 1."""
    outputs = model.get_text_features(
        input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), return_dict=True
    )
    return F.normalize(outputs.pooler_output, dim=-1)


def _chosen(inputs: Inputs, target: Any) -> list[int]:
    """The text of each image."""
    if not isinstance(target, Sequence):
        raise ValueError(f"target must be the text of each image, as evaluate gives it for CLIP; got {type(target).__name__}")
    return list(target)


def _on_grid(model: Any, patches: Tensor) -> Tensor:
    """(B, h * w) -> (B, h, w)"""
    return patches.detach().unflatten(-1, (model.config.vision_config.image_size // _patch(model), -1))


def legrad(model: nn.Module, inputs: Inputs, target: Any, *, layers: int = 2) -> SimpleNamespace:
    """LeGrad (Bousselham et al., ICCV 2025; code WalBouss/LeGrad, `LeWrapper.compute_legrad_clip`).

    In each of the last `layers` layers, s_l is the cosine of the text and of the mean token behind the layer in CLIP's embedding
    space; the map is the mean of relu(d s_l / dA_l) over heads and queries, without CLS. The maps are summed. As in the code, the
    default is the last two layers, and the mean token replaces the paper's pooled token.
    """
    texts = _text_embeddings(model, inputs)[_chosen(inputs, target)]
    with torch.enable_grad(), at_rest(model):
        last = vision_layers(model, inputs["pixel_values"])[-layers:]
        scores = [(_image_embeddings(model, layer.leaving.mean(1)) * texts).sum() for layer in last]
        grads = [torch.autograd.grad(s, layer.attention, retain_graph=True)[0] for s, layer in zip(scores, last, strict=True)]
    relevancy = torch.stack([grad.clamp(min=0).mean((1, 2)) for grad in grads]).sum(0)
    return SimpleNamespace(image=_on_grid(model, relevancy[:, 1:]))


def gradient_last_layer(model: nn.Module, inputs: Inputs, target: Any) -> Any:
    """The plain method in the last layer of each tower alone (Chefer et al., ICCV 2021; code
    hila-chefer/Transformer-MM-Explainability, `CLIP_explainability.ipynb`, whose default start_layer is -1)."""
    return explain(model, inputs, target=target, method=published("gradient", start_layer=-1))


def grad_eclip(model: nn.Module, inputs: Inputs, target: Any) -> SimpleNamespace:
    """Grad-ECLIP (Zhao et al., ICML 2024; code Cyang-Zhao/Grad-Eclip, `generate_emap.py`), of the image and of the text.

    relu(sum_c w_c lambda_i v_ic) in the last layer: w = the gradient of the cosine of image and text at the attention output of
    the pooled token, v_i = the values, lambda_i = cos(q_pooled, k_i), scaled to [0, 1] over the tokens, with q and k behind the
    output projection, as in the code. For the text the sum runs over the last two thirds of the layers (the code: 8 of 12), and
    lambda is scaled over the tokens up to the end of text (the code: also over padding, which no text token sees). The code runs
    these layers with one head, and so explains another model; here the layers keep their heads.
    """
    chosen = _chosen(inputs, target)
    ids, real = inputs["input_ids"][chosen], inputs.get("attention_mask")
    real = torch.ones_like(ids) if real is None else real[chosen]
    with torch.enable_grad(), at_rest(model):
        texts = _text_embeddings(model, inputs)[chosen]
        last = vision_layers(model, inputs["pixel_values"])[-1]
        images = _image_embeddings(model, last.leaving[:, 0])
        grad = torch.autograd.grad((images * texts).sum(), last.heads)[0][:, 0]
        patches = torch.ones(last.entering.shape[:2], dtype=torch.bool, device=ids.device)
        patches[:, 0] = False
        image = _eclip(last, grad, torch.zeros_like(ids[:, 0]), patches)[:, 1:].clamp(min=0)

        text_model: Any = model.text_model
        embedded = text_model.embeddings(input_ids=ids).detach().requires_grad_()
        earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        layers = _layers(text_model, embedded, earlier & real.bool()[:, None, None, :])
        eos = text_model.eos_token_id
        end = ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)  # the token that CLIP pools
        samples = torch.arange(len(ids), device=ids.device)
        pooled = model.text_projection(text_model.final_layer_norm(layers[-1].leaving))[samples, end]  # type: ignore[operator]
        used = layers[-max(1, 2 * len(layers) // 3) :]
        grads = torch.autograd.grad((F.normalize(pooled, dim=-1) * images.detach()).sum(), [layer.heads for layer in used])
        token = torch.arange(ids.shape[1], device=ids.device)
        until_end = token <= end[:, None]
        parts = [_eclip(layer, g[samples, end], end, until_end) for layer, g in zip(used, grads, strict=True)]
    words = (token > 0) & (token < end[:, None])
    text = torch.stack(parts).sum(0).clamp(min=0).detach()
    aligned = nn.utils.rnn.pad_sequence([one[word] for one, word in zip(text, words, strict=True)], batch_first=True)
    return SimpleNamespace(image=_on_grid(model, image), text=aligned)


def _eclip(layer: Layer, grad: Tensor, pooled: Tensor, among: Tensor) -> Tensor:
    """sum_c w_c lambda_i v_ic (B, N), lambda scaled over the tokens `among` (B, N); grad (B, C) is w, and pooled, int64 (B), the
    token whose query counts."""
    query, key, value = (_merged(part) for part in (layer.query, layer.key, layer.value))
    query, key = (layer.module.self_attn.out_proj(part) for part in (query, key))
    cosine = F.cosine_similarity(query[torch.arange(len(query), device=query.device), pooled][:, None], key, dim=-1)
    low = cosine.masked_fill(~among, torch.inf).amin(1, keepdim=True)
    high = cosine.masked_fill(~among, -torch.inf).amax(1, keepdim=True)
    spatial = (cosine - low) / (high - low).clamp(min=torch.finfo(cosine.dtype).tiny)
    return (grad[:, None] * value).sum(-1) * spatial


@torch.no_grad()
def clip_surgery(model: nn.Module, inputs: Inputs, target: Any, *, layers: int | None = None) -> SimpleNamespace:
    """CLIP Surgery (Li et al., 2023, arXiv 2304.05653; code xmed-lab/CLIP_Surgery, `clip_feature_surgery`).

    Architecture: beside the model's path a second path sums softmax(v v^T / sqrt(D)) v of the last `layers` layers, without
    MLPs, each from the states of the model's path. Its patches, in CLIP's embedding space, are compared with the texts.
    Features: the similarity with text t is weighted by w_t = T softmax_t(2 cos(image, t)), and the mean over the T texts is
    subtracted, so two texts or more are needed. Texts are taken as they are; the code's demo averages 85 prompts for each.

    Args:
        layers: None = half of them (the code: 6 of 12).
    """
    chosen = _chosen(inputs, target)
    texts = _text_embeddings(model, inputs)
    if len(texts) < 2:
        raise ValueError(f"inputs must have two texts or more, whose mean similarity is subtracted; got {len(texts)}")
    with at_rest(model):
        seen = vision_layers(model, inputs["pixel_values"])
        surgical = seen[-(len(seen) // 2 if layers is None else layers) :]
        second = surgical[0].entering
        for layer in surgical:
            attention = layer.module.self_attn
            consistent = (layer.value @ layer.value.transpose(-1, -2) * attention.scale).softmax(-1) @ layer.value
            second = second + attention.out_proj(_merged(consistent))
        pooled = _image_embeddings(model, seen[-1].leaving[:, 0])
        patches = _image_embeddings(model, second[:, 1:])
    weights = len(texts) * (2 * pooled @ texts.T).softmax(-1)
    similarity = patches @ texts.T * weights[:, None]
    similarity = similarity - similarity.mean(-1, keepdim=True)
    return SimpleNamespace(image=_on_grid(model, similarity[torch.arange(len(pooled)), :, chosen]))


# --- captum ---


def integrated_gradients(model: nn.Module, inputs: Inputs, target: Any, *, steps: int = 20) -> SimpleNamespace:
    """captum's IntegratedGradients (Sundararajan, Taly, Yan, ICML 2017) from an image of zeros, summed over a patch or region."""
    from captum.attr import IntegratedGradients

    name, score, rest = _scored(model, inputs, target)
    with torch.enable_grad(), at_rest(model):
        method = IntegratedGradients(score)
        image = inputs[name]
        attribution = method.attribute(image, additional_forward_args=rest, n_steps=steps, internal_batch_size=len(image))
    return _by_entry(model, name, attribution)


def occlusion(model: nn.Module, inputs: Inputs, target: Any) -> SimpleNamespace:
    """captum's Occlusion (Zeiler and Fergus, ECCV 2014), one patch or region after another set to zeros."""
    from captum.attr import Occlusion

    name, score, rest = _scored(model, inputs, target)
    image = inputs[name]
    window = (image.shape[1], _patch(model), _patch(model)) if image.ndim == 4 else (1, image.shape[2])
    with torch.no_grad(), at_rest(model):
        attribution = Occlusion(score).attribute(image, window, strides=window, additional_forward_args=rest)
    return _by_entry(model, name, attribution)


def _scored(model: nn.Module, inputs: Inputs, target: Any) -> tuple[str, Callable[..., Tensor], tuple[Any, ...]]:
    """The image's name among the inputs, the score as a function of the image and of the remaining tensors, and these tensors."""
    name = next((n for n in ("pixel_values", "region_features", "visual_feats") if isinstance(inputs.get(n), Tensor)), None)
    if name is None:
        raise ValueError(f"inputs must have an image: pixel_values, region_features or visual_feats; got {sorted(inputs)}")
    beside = {key: value for key, value in inputs.items() if key != name and isinstance(value, Tensor)}
    fixed = {key: value for key, value in inputs.items() if key != name and key not in beside}
    pair = hasattr(model, "logit_scale") and not callable(target)
    if pair:
        chosen = _chosen(inputs, target)
        beside = {key: value[chosen] for key, value in beside.items()}
    index = None if callable(target) else torch.tensor(target, device=inputs[name].device)

    def score(image: Tensor, *rest: Any) -> Tensor:
        arguments = {name: image, **dict(zip(beside, rest, strict=True)), **fixed}
        outputs = model(**arguments)
        if callable(target):
            scores: Tensor = call_on("target", target, outputs, arguments)
            return scores
        if pair:
            return outputs.logits_per_image.diagonal()
        assert index is not None
        logits = outputs.logits
        if logits.ndim == 3:  # a decoder: behind the last token of each prompt, which padding may follow
            last = dict(zip(beside, rest, strict=True))["attention_mask"].sum(1) - 1
            logits = logits[torch.arange(len(logits)), last]
        return logits.gather(1, index.repeat(len(image) // len(index))[:, None])[:, 0]

    return name, score, tuple(beside.values())


def _patch(model: Any) -> int:
    """Height and width of a patch in pixels."""
    config = getattr(model, "vision", model).config
    size: int = getattr(config, "vision_config", config).patch_size
    return size


def _by_entry(model: Any, name: str, attribution: Tensor) -> SimpleNamespace:
    """Attributions of pixels (B, C, H, W) summed over patches, of regions (B, R, D) over their features."""
    attribution = attribution.detach()
    if name != "pixel_values":
        return SimpleNamespace(regions=attribution.sum(-1))
    size = _patch(model)
    return SimpleNamespace(image=attribution.sum(1).unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).sum((-3, -1)))


CLIP: dict[str, Callable[..., Any]] = {
    "gradient_last_layer": gradient_last_layer,
    "legrad": legrad,
    "grad_eclip": grad_eclip,
    "clip_surgery": clip_surgery,
}
CAPTUM: dict[str, Callable[..., SimpleNamespace]] = {"captum_integrated_gradients": integrated_gradients, "occlusion": occlusion}
