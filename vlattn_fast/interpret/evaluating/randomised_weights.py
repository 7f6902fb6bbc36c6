"""Randomised weights, for the sanity check of Adebayo et al. (NeurIPS 2018)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def randomise(parameters: Iterable[nn.Parameter], generator: torch.Generator) -> None:
    """Replaces every tensor by normal numbers with the tensor's mean and standard deviation."""
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.numel():
            trained = parameter.float()
            noise = torch.randn(parameter.shape, generator=generator).to(trained.device)
            parameter.copy_(trained.mean() + trained.std(correction=0) * noise)


def cascade(model: nn.Module, inputs: Mapping[str, Any], stages: int) -> list[list[nn.Parameter]]:
    """The model's parameters from its output to its input, in `stages` groups of as many modules.

    The order is the reverse of the modules' first calls. A model with fewer modules has empty groups.
    """
    order: list[nn.Module] = []

    def note(module: nn.Module, args: Any) -> None:
        if module not in order:
            order.append(module)

    holders = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_pre_hook(note) for module in holders]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    never = [module for module in holders if module not in order]  # other modules read their parameters
    groups: list[list[nn.Parameter]] = []
    done: set[int] = set()
    backwards = [*reversed(order), *never]
    sizes = [len(backwards) * (stage + 1) // stages for stage in range(stages)]
    for start, end in zip([0, *sizes], sizes, strict=False):
        members = [p for module in backwards[start:end] for p in module.parameters(recurse=False) if id(p) not in done]
        done |= {id(parameter) for parameter in members}
        groups.append(members)
    return groups
