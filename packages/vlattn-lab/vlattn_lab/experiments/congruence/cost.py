"""The cost of a congruence loss in a training step: this package's and the authors' loop over samples, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlattn_fast as va
from vlattn_fast import congruence_loss
from vlattn_fast.benchmarks._published import published_loss, uneven_masks
from vlattn_fast.measuring.memory import peak_of_call
from vlattn_fast.models import UNITER, UNITERConfig
from vlattn_lab.experiments.congruence.training import CONFIG
from vlattn_lab.experiments.experiment import least_seconds
from vlattn_lab.train.fit import seeded

Pair = tuple[Tensor, Tensor]  # query, key (B, H, N, D)
Loss = Callable[..., Tensor]  # words, regions, `text_mask` and `image_mask` -> a scalar
DIRECTION = "image"  # one direction a step, as the authors train


@dataclass(frozen=True)
class Problem:
    """A training step."""

    config: UNITERConfig
    batch: int
    matched: int  # samples, first in the batch, that have the loss
    text: int  # tokens
    image: int
    uneven: bool  # captions and pictures differ in length and are padded


BASE = UNITERConfig(num_hidden_layers=1, vocab_size=1000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
PROBLEMS = {
    "two layers of width 64": Problem(CONFIG, 144, 48, 7, 2, uneven=False),
    "one layer of UNITER-base": Problem(BASE, 16, 16, 40, 64, uneven=True),
}


def official(text: Pair, image: Pair, kind: str, **masks: Tensor) -> Tensor:
    names = ("text_query", "text_key", "image_query", "image_key")
    return published_loss({**dict(zip(names, (*text, *image), strict=True)), **masks}, kind, DIRECTION).mean()


def measure(problem: Problem, kind: str, rounds: int) -> dict[str, Any]:
    """Least milliseconds of `rounds` in turns, and peak MiB of one call, for five calls: a training step without the loss, with
    this package's loss and with the authors' loop, and each of the two losses alone, forward and backward."""
    losses: dict[str, Loss] = {
        "ours": partial(congruence_loss, kind=kind, direction=DIRECTION),
        "official": partial(official, kind=kind),
    }
    calls = {"step none": _step(problem, None)} | {f"step {name}": _step(problem, loss) for name, loss in losses.items()}
    calls |= {f"loss {name}": _alone(problem, loss) for name, loss in losses.items()}
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name, call in calls.items():
        call()
        peak, _ = peak_of_call(call)
        result[f"{name} MiB"] = None if peak is None else round(peak / 2**20, 2)
    return result | {f"{name} ms": round(1e3 * seconds, 3) for name, seconds in least_seconds(calls, rounds).items()}


def _masks(problem: Problem, count: int) -> dict[str, Tensor]:
    """`text_mask` bool (B, L) and `image_mask` (B, V)."""
    masks = uneven_masks(problem.text, problem.image, count)
    return masks if problem.uneven else {name: torch.ones_like(mask) for name, mask in masks.items()}


def _step(problem: Problem, loss: Loss | None) -> Callable[[], None]:
    """Forward, matching loss, the congruence loss of the last layer, backward, AdamW."""
    config, generator = problem.config, torch.Generator().manual_seed(0)
    model = seeded(0, lambda: UNITER(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # same cost, and the weights stay equal between calls
    count, text, image = problem.batch, problem.text, problem.image
    masks = _masks(problem, count)
    inputs = {
        "input_ids": torch.randint(config.vocab_size, (count, text), generator=generator),
        "region_features": torch.randn(count, image, config.region_dim, generator=generator),
        "region_positions": torch.randn(count, image, config.position_dim, generator=generator),
    }
    if problem.uneven:
        inputs |= {"attention_mask": masks["text_mask"], "region_mask": masks["image_mask"]}
    label = torch.zeros(count, dtype=torch.int64)
    label[: problem.matched] = 1

    def step() -> None:
        if loss is None:
            total = F.cross_entropy(model(**inputs).logits, label)
        else:
            with va.nn.capture_attention(model) as captured:
                logits = model(**inputs).logits
            query, key = (x[: problem.matched] for x in (captured.query, captured.key))
            words, regions = (query[:, :, :text], key[:, :, :text]), (query[:, :, text:], key[:, :, text:])
            matched_masks = {name: mask[: problem.matched] for name, mask in masks.items()}
            total = F.cross_entropy(logits, label) + loss(words, regions, **matched_masks)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return step


def _alone(problem: Problem, loss: Loss) -> Callable[[], None]:
    config, generator = problem.config, torch.Generator().manual_seed(0)
    count, heads, head_dim = problem.matched, config.num_attention_heads, config.hidden_size // config.num_attention_heads
    tensors = [
        torch.randn(count, heads, length, head_dim, generator=generator).requires_grad_()
        for length in (problem.text, problem.text, problem.image, problem.image)
    ]
    masks = _masks(problem, count)

    def call() -> None:
        torch.autograd.grad(loss((tensors[0], tensors[1]), (tensors[2], tensors[3]), **masks), tensors, allow_unused=True)

    return call
