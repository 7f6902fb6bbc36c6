"""Weighted relevancy of `CLIPMapper` on stored maps, from a forward pass written out.

What Chefer, Gur, Wolf (ICCV 2021) add in equations 6, 7 and 10 is added with weights, token by token: R <- diag(a) R +
diag(b) (...), where y = x + o is the residual sum behind the attention, a and b are the shares of x and o by `weighting`, and the
rows of Abar are divided by their sums. Equations 8 and 9 are applied with equal weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.attach.session import at_rest
from vlattn_fast.models import CLIPMapper


@dataclass(frozen=True)
class Step:
    """One attention and the residual sum behind it.

    Args:
        kind: "ii" the image, "tt" the text to itself, "ti" the text to the image.
        maps: (B, H, N, M).
        x, y: (B, N, C), the stream in front of the sum, and the sum.
    """

    kind: str
    maps: Tensor
    x: Tensor
    y: Tensor


def _attended(
    module: Any, names: tuple[str, str, str, str], states: Tensor, context: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Maps (B, H, N, M) and output (B, N, C) of multi-head attention whose projections have these names."""
    query, key, value, out = (getattr(module, name) for name in names)
    q, k, v = (
        project(of).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for project, of in ((query, states), (key, context), (value, context))
    )
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    maps = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
    return maps, out((maps @ v).transpose(1, 2).flatten(2))


def _encoded(kind: str, encoder: Any, hidden: Tensor, mask: Tensor | None, steps: list[Step]) -> Tensor:
    """The states behind the layers of one of CLIP's encoders."""
    for layer in encoder.encoder.layers:
        normed, names = layer.layer_norm1(hidden), ("q_proj", "k_proj", "v_proj", "out_proj")
        maps, out = _attended(layer.self_attn, names, normed, normed, mask)
        steps.append(Step(kind, maps, hidden, hidden + out))
        hidden = steps[-1].y + layer.mlp(layer.layer_norm2(steps[-1].y))
    return hidden


def run(model: CLIPMapper, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[Step]]:
    """The logits that are read (B, classes), the position (B) of the text where they are, and every attention in its order."""
    vision: Any = model.vision
    text: Any = model.text
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    steps: list[Step] = []
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    # Padding attends itself, too: a row without keys would be NaN.
    causal = (earlier & real[:, None, None]) | torch.eye(ids.shape[1], dtype=torch.bool)
    image = vision.pre_layrnorm(vision.embeddings(inputs["pixel_values"].detach().requires_grad_()))
    image = _encoded("ii", vision, image, None, steps)
    image = model.vision_projection(model.vision_norm(image))
    hidden = text.embeddings(input_ids=ids).detach().requires_grad_()
    hidden = model.text_projection(text.final_layer_norm(_encoded("tt", text, hidden, causal, steps)))
    mask = real[:, None, None] if model.num_answers is not None else causal
    names = ("query", "key", "value", "output")
    for number, layer in enumerate(model.layers):
        part: Any = layer
        if model.image_layers:
            own: Any = model.image_layers[number]
            normed = own.self_attention_norm(image)
            maps, out = _attended(own.self_attention, names, normed, normed, None)
            steps.append(Step("ii", maps, image, image + out))
            image = steps[-1].y
        for kind in ("ti", "tt") if part.cross_first else ("tt", "ti"):
            if kind == "tt":
                normed = part.self_attention_norm(hidden)
                maps, out = _attended(part.self_attention, names, normed, normed, mask)
            else:
                maps, out = _attended(part.cross_attention, names, part.cross_attention_norm(hidden), image, None)
            steps.append(Step(kind, maps, hidden, hidden + out))
            hidden = steps[-1].y
        hidden = hidden + part.mlp(part.mlp_norm(hidden))
    place = (ids == model.eos_token_id).int().argmax(1) if model.num_answers is not None else real.sum(1) - 1
    return model.head(model.norm(hidden))[torch.arange(len(ids)), place], place, steps


def shares(weighting: str, x: Tensor, o: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """a and b (B, N, 1) by the name of a weighting, see `relevancy_residual`."""
    sizes = {
        "contribution": lambda term: (gradient * term).sum(-1, keepdim=True).abs(),
        "norm": lambda term: term.norm(dim=-1, keepdim=True),
        "magnitude": lambda term: (gradient * term).abs().sum(-1, keepdim=True),
    }
    if weighting == "equal":
        one = torch.ones_like(x[..., :1])
        return one, one
    before, after = map(sizes[weighting], (x, o))
    share = torch.where(before + after > 0, before / (before + after), 0.5)
    return share, 1 - share


Grads = tuple[Tensor | None, ...]  # at the maps and at y, step by step


def _run_back(model: CLIPMapper, inputs: Mapping[str, Any], target: list[int]) -> tuple[Tensor, list[Step], Grads]:
    """The position (B) of the text that is read, every attention, and the gradients of the target's logit."""
    with torch.enable_grad(), at_rest(model):
        logits, place, steps = run(model, inputs)
        score = logits.gather(1, torch.tensor(target)[:, None]).sum()
        parts = [part for step in steps for part in (step.maps, step.y)]
        return place, steps, torch.autograd.grad(score, parts, allow_unused=True)


def weighted_relevancy(
    model: Any, inputs: Mapping[str, Any], target: list[int], *, weighting: str = "contribution", normalize: bool = True
) -> SimpleNamespace:
    """`.image` (B, h, w) and `.text` (B, T) of the row that is read, as `evaluate` takes them.

    Args:
        model: a CLIPMapper over the encoders of Hugging Face's CLIP.
        target: of each row the answer or the next token.
        normalize: each row of Abar is divided by its sum.
    """
    place, steps, grads = _run_back(model, inputs, target)
    with torch.no_grad():
        tt, ti = _relevancies(steps, grads, weighting, normalize)
        rows = torch.arange(len(place))
        found, own = ti[rows, place, 1:], tt[rows, place]
        own[rows, place] = 0
    side = round(found.shape[1] ** 0.5)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    special = {getattr(model.text.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    words = real & ~torch.isin(ids, torch.tensor(sorted(special)))
    text = torch.nn.utils.rnn.pad_sequence([row[of] for row, of in zip(own, words, strict=True)], batch_first=True)
    return SimpleNamespace(image=found.unflatten(1, (side, side)), text=text)


def _relevancies(steps: list[Step], grads: Grads, weighting: str, normalize: bool) -> tuple[Tensor, Tensor]:
    """R_tt and R_ti."""
    sizes = {kind[0]: step.maps.shape[2] for step in steps for kind in [step.kind]}
    first = steps[0].maps
    tt, ii = (torch.eye(sizes[name]).to(first).expand(len(first), -1, -1) for name in ("t", "i"))
    ti = first.new_zeros(len(first), sizes["t"], sizes["i"])
    for step, grad_maps, grad_y in zip(steps, grads[::2], grads[1::2], strict=True):
        if grad_maps is None or grad_y is None:
            continue
        abar = (step.maps * grad_maps).clamp(min=0).mean(1)
        if normalize:
            total = abar.sum(-1, keepdim=True)
            abar = torch.where(total > 0, abar / total, 0.0)
        a, b = shares(weighting, step.x, step.y - step.x, grad_y)
        if step.kind == "ii":
            ii = a * ii + b * (abar @ ii)
        elif step.kind == "tt":
            tt, ti = a * tt + b * (abar @ tt), a * ti + b * (abar @ ti)
        else:
            text_part, image_part = (_bar(part) if weighting == "equal" else part for part in (tt, ii))
            ti = a * ti + b * (text_part.transpose(1, 2) @ abar @ image_part)
    return tt, ti


def _bar(relevancy: Tensor) -> Tensor:
    """Equations 8 and 9; zero rows stay zero."""
    eye = torch.eye(relevancy.shape[-1]).to(relevancy)
    beside = relevancy - eye
    total = beside.sum(-1, keepdim=True)
    return torch.where(total != 0, beside / total, 0.0) + eye
