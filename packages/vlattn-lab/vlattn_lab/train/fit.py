"""The loop that all trainings share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model")


def seeded(seed: int, make: Callable[[], Model]) -> Model:
    """The result of `make`, for which torch's random numbers depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")


def fit(
    parameters: Iterable[nn.Parameter],
    losses: Callable[[], dict[str, Tensor]],
    weights: Mapping[str, float],
    steps: int,
    *,
    learning_rate: float,
    log_every: int = 0,
    warmup: float = 0.3,
    fused: bool = False,
    memory: float = 0.999,
) -> None:
    """`steps` steps of AdamW down the weighted sum of `losses()`, with one learning-rate cycle, which rises to `learning_rate`
    for the share `warmup` of the steps. A line is printed every log_every steps and at the end; 0 prints none. fused: one kernel
    for the whole step, which is faster and rounds differently. memory: AdamW's, of squared gradients."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, memory), weight_decay=0.01, fused=fused)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=max(steps, 2), pct_start=warmup)
    for step in range(1, steps + 1):
        parts = losses()
        optimizer.zero_grad(set_to_none=True)
        torch.stack([weights[name] * loss for name, loss in parts.items()]).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if log_every and (step % log_every == 0 or step == steps):
            print(f"step {step}: " + ", ".join(f"{name} {loss.item():.4f}" for name, loss in parts.items()), flush=True)
