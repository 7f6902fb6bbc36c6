"""Does the tangent of a map tell wrong maps from right ones? python -m vlattn_lab.sensitivity [--samples N] [--noise S].

The model is DigitScenes' CLIP, and the map that of `va.methods.Gradient(freeze=())` for a scene and its caption. A map is right
if the centre of its largest patch lies in the box of a digit that the caption names. A signal is good if it is larger for wrong
maps than for right ones: printed is the area under the ROC curve (AUC), 0.5 for chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import vlattn_fast as va
from vlattn_fast._ground.checks import check_integer
from vlattn_lab.clip import PATCH, load_clip
from vlattn_lab.scenes import CANVAS, Scenes, batches, digit_scenes
from vlattn_lab.texts import SceneProcessor

SIDE = CANVAS // PATCH


def maps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The maps (B, P) of scenes for their captions, differentiable in forward mode."""
    with va.nn.capture_relevancy(model, method=va.methods.Gradient(freeze=()), higher_order=True) as captured:
        outputs = model(**inputs)
    relevancy = captured.relevancy(outputs.logits_per_image.diagonal().sum())
    assert isinstance(relevancy, dict)
    return relevancy["vision"][:, 1:]  # without CLS


def map_and_tangent(model: Any, inputs: dict[str, Tensor], change: Tensor) -> tuple[Tensor, Tensor]:
    """The maps (B, P) and their tangents under a change of the pixels."""
    with forward_ad.dual_level():
        pixels = forward_ad.make_dual(inputs["pixel_values"], change)
        dual = forward_ad.unpack_dual(maps(model, {**inputs, "pixel_values": pixels}))
        return dual.primal.detach(), dual.tangent.detach()


def signals(model: Any, inputs: dict[str, Tensor], changes: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """The maps and, for each, what may say that it is wrong. Changes of the pixels have norm 1."""
    pixels, tangents, relevancy = inputs["pixel_values"], [], torch.empty(0)
    for _ in range(changes):
        change = torch.nn.functional.normalize(torch.randn(pixels.shape, generator=generator).flatten(1), dim=1)
        relevancy, tangent = map_and_tangent(model, inputs, change.view_as(pixels))
        tangents.append(tangent)
    squares = torch.stack(tangents).square().mean(0)
    shares = torch.nn.functional.normalize(relevancy.clamp(min=0), p=1, dim=1)
    peak = relevancy.argmax(1, keepdim=True)
    with torch.no_grad():
        similarity = model(**inputs).logits_per_image.diagonal()
    return relevancy, {
        "norm of the tangent / norm of the map": squares.sum(1).sqrt() / relevancy.norm(dim=1),
        "tangent / map at the largest patch": (squares.gather(1, peak).sqrt() / relevancy.gather(1, peak))[:, 0],
        "entropy of the map": torch.special.entr(shares).sum(1),
        "minus the largest patch's share": -shares.amax(1),
        "minus the similarity": -similarity,
    }


def right(relevancy: Tensor, scenes: Scenes) -> Tensor:
    """bool (B): the centre of the largest patch lies in a named box."""
    top = relevancy.argmax(1)
    centre = PATCH * torch.stack([top % SIDE, top // SIDE], -1)[:, None] + PATCH / 2
    inside = ((centre >= scenes.boxes[..., :2]) & (centre < scenes.boxes[..., 2:])).all(-1)
    return (inside & scenes.named).any(1)


def auc(signal: Tensor, wrong: Tensor) -> float:
    """The share of pairs of a wrong and a right map in which the wrong one's signal is larger; ties are half a pair."""
    one, two = signal[wrong, None], signal[~wrong]
    return float(((one > two).double() + (one == two).double() / 2).mean())


def measure(samples: int, noise: float, changes: int = 8, seed: int = 0) -> tuple[float, dict[str, float]]:
    """The share of right maps, and the AUC of each signal. noise: standard deviation of what is added to the pixels."""
    generator = torch.Generator().manual_seed(seed)
    (model, _), hits, columns = load_clip(), [], dict[str, list[Tensor]]()
    for scenes in batches(digit_scenes(samples, seed=seed), 50):
        inputs = dict(SceneProcessor()(scenes.images, scenes.captions))
        inputs["pixel_values"] = inputs["pixel_values"] + noise * torch.randn(inputs["pixel_values"].shape, generator=generator)
        relevancy, columns_here = signals(model, inputs, changes, generator)
        hits.append(right(relevancy, scenes))
        for name, signal in columns_here.items():
            columns.setdefault(name, []).append(signal)
    wrong = ~torch.cat(hits)
    return float((~wrong).double().mean()), {name: auc(torch.cat(parts), wrong) for name, parts in columns.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlattn_lab.sensitivity", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--noise", type=float, default=0.4)
    options = parser.parse_args(arguments)
    check_integer("--samples", options.samples, low=1)
    share, values = measure(options.samples, options.noise)
    print(f"right: {share:.3f} of {options.samples} maps")
    for name, value in values.items():
        print(f"{value:.3f}  {name}")


if __name__ == "__main__":
    main()
