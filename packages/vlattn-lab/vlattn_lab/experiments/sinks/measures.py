"""The measurements of one model and its samples: plain numbers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast import Explanation, explain, find_sinks
from vlattn_fast.interpret.relevancy import sink_detection as detector
from vlattn_fast.interpret.relevancy.methods.registry import published
from vlattn_fast.models import CLIPMapper
from vlattn_lab.experiments.experiment import least_seconds
from vlattn_lab.experiments.sinks.planted import TOKEN
from vlattn_lab.experiments.sinks.samples import Samples

METHODS = ("gradient", "rollout", "attention", "weighted")
SINKS = ("keep", "remove")
TIMES, NORMS = (3.0, 5.0, 10.0), (0.5, 0.8, 1.0, 100.0)  # 100 = any values


def run(model: nn.Module, asked: Samples, method: str, sinks: str) -> Explanation:
    return explain(model, asked.inputs, target=asked.target, method=published(method, sinks=sinks))


def detected(model: nn.Module, asked: Samples) -> list[dict[str, Any]]:
    """The sinks of all samples by tower, reader and token."""
    by_token: dict[tuple[str, str, str], list[Any]] = {}
    for sample in find_sinks(model, asked.inputs):
        for sink in sample:
            kind = {0: "first", TOKEN: "planted patch"}.get(sink.index, "other") if sink.tower == "vision" else sink.index
            by_token.setdefault((sink.tower, sink.reader, "first" if kind == 0 else str(kind)), []).append(sink)
    return [
        {
            **{"tower": tower, "reader": reader, "token": token, "samples": round(len(sinks) / len(asked), 4)},
            "layers": round(sum(len(sink.layers) for sink in sinks) / len(sinks), 4),
            "share": _mean([sink.shares[layer] for sink in sinks for layer in sink.layers]),
            "norm": _mean([sink.norms[layer] for sink in sinks for layer in sink.layers]),
        }
        for (tower, reader, token), sinks in by_token.items()
    ]


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


@contextlib.contextmanager
def _detector(times: float, norm: float) -> Iterator[None]:
    before = detector.TIMES, detector.NORM
    detector.TIMES, detector.NORM = times, norm
    try:
        yield
    finally:
        detector.TIMES, detector.NORM = before


def thresholds(model: nn.Module, asked: Samples) -> list[dict[str, Any]]:
    """For each pair of thresholds, by sample: in how many of the attentions to patches the planted one is found, and how many
    other patches, of digits that the sample is about or not; and the pointing of rollout without them."""
    rows = []
    for times, norm in itertools.product(TIMES, NORMS):
        with _detector(times, norm):
            explanation = run(model, asked, "rollout", "remove")
        hits, digits, others = 0, 0, 0
        for sample, named in zip(explanation.sinks or [], asked.named, strict=True):
            for sink in sample:
                if sink.tower == "vision" and sink.index == TOKEN:
                    hits += len(sink.layers)
                elif sink.tower == "vision":
                    digits += len(sink.layers) * bool(named[sink.index])
                    others += len(sink.layers) * (not named[sink.index])
        counts = {
            name: round(count / len(asked), 4) for name, count in (("planted", hits), ("digits", digits), ("others", others))
        }
        row = {"times": times, "norm": norm, "attentions": _attentions(model), **counts}
        rows.append({**row, "pointing": _pointing(explanation, asked)[0]})
    return rows


def _attentions(model: nn.Module) -> int:
    """How many layers attend to patches."""
    parts: Any = model
    vision = parts.vision if isinstance(model, CLIPMapper) else parts.vision_model
    return len(vision.encoder.layers) + (len(parts.layers) if isinstance(model, CLIPMapper) else 0)


def explained(model: nn.Module, asked: Samples) -> list[dict[str, Any]]:
    """By method, with sinks and without: pointing, mass, and the share of the map that lies on the planted patch."""
    rows = []
    for method, sinks in itertools.product(METHODS, SINKS):
        explanation = run(model, asked, method, sinks)
        pointing, mass, planted = _pointing(explanation, asked)
        rows.append({"method": method, "sinks": sinks, "pointing": pointing, "mass": mass, "planted": planted})
    return rows


def _patches(explanation: Explanation) -> Tensor:
    assert isinstance(explanation.image, Tensor)
    return explanation.image.flatten(1).double()


def _pointing(explanation: Explanation, asked: Samples) -> tuple[float, float, float]:
    """The share of samples whose largest entry is in a digit that they are about; the shares of positive mass there, and on the
    planted patch."""
    maps, named = _patches(explanation), asked.named[:, 1:]
    inside = named.gather(1, maps.argmax(1, keepdim=True)).double().mean()
    mass = maps.clamp(min=0)
    mass = mass / mass.sum(1, keepdim=True)
    return round(float(inside), 4), round(float((mass * named).sum(1).mean()), 4), round(float(mass[:, TOKEN - 1].mean()), 4)


def seconds(tokens: int, rounds: int) -> dict[str, float]:
    """The least seconds of processor time of an explanation of a ViT with random weights and so many patches, by method and
    `sinks`."""
    from transformers import ViTConfig, ViTForImageClassification

    side = 8 * round(tokens**0.5)
    sizes: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=side, patch_size=8, **sizes)).eval()
    inputs = {"pixel_values": torch.randn(1, 3, side, side)}
    calls = {
        f"{method} {sinks}": functools.partial(explain, model, inputs, method=published(method, sinks=sinks))
        for method in METHODS
        for sinks in SINKS
    }
    least = least_seconds(calls, rounds, clock=time.process_time)
    return {name: round(value, 4) for name, value in least.items()}
