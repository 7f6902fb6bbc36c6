"""The trial of docs/gluon.md on a device: r Abar of one row by Triton's kernel, with its fastest tiles, and by both in Gluon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va
from tools.gpu import launches, production
from vlattn_fast.checking.tolerance import settle

Row = dict[str, Any]
BATCH, HEADS, TOKENS, SIZE = 64, 16, 768, 64  # CLIP's, in whole tiles; 256 keys are the fewest
KERNELS = ("_step_kernel", "_gluon_kernel")


def measured(item: dict[str, Any], device: str) -> Row:
    """Microseconds of each kernel, and how near each result is to the formula, by the tolerance rule."""
    made, formula = calls(device, few=device == "cpu")
    truth, plain = {"r": formula(torch.float64)}, {"r": formula(torch.bfloat16)}
    ratios, kernels = {}, []
    for name, call in made.items():
        pools = settle(iter([({"r": call()[:1]}, truth, plain)]), enough=lambda: 1, most=1)
        ratios[name] = production.ratio_of(pools["r"])
        kernels.append([launch for kernel, launch, _ in launches.launched(call) if kernel in KERNELS])
    seconds = launches.in_turns(kernels, device)
    times = {name: round(each * 1e6, 3) for name, each in zip(made, seconds, strict=True)}
    wrong = {name: ratio for name, ratio in ratios.items() if not ratio <= 1.0}
    problem = f"the tolerance rule is broken: {wrong}" if wrong else ""
    return {"passed": not wrong, "problem": problem, "ratios": ratios, "us": times, "timed_by": launches.TIMED_BY[device]}


def calls(device: str, few: bool = False) -> tuple[dict[str, Callable[[], Tensor]], Callable[[torch.dtype], Tensor]]:
    """The kernels' calls, and the formula of the first sample in a dtype. few: samples, heads and tokens."""
    from tools.trials.relevancy_step import step

    batch, heads, tokens = (1, 1, 256) if few else (BATCH, HEADS, TOKENS)
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, heads, tokens, SIZE)
    query, key, value, grad = (torch.randn(shape, device=device, generator=generator).bfloat16() for _ in range(4))
    r, scale = torch.rand(batch, tokens, device=device, generator=generator), SIZE**-0.5
    lse = (scale * query.float() @ key.float().mT).logsumexp(-1)

    def formula(dtype: torch.dtype) -> Tensor:
        inputs = (x[:1].to(dtype) for x in (query, key, value, grad))
        return va.reference.relevancy_step(r[:1, None].to(torch.promote_types(dtype, torch.float32)), *inputs)[:, 0]

    made = {
        "Triton": lambda: va.relevancy_step(r[:, None], query, key, value, grad, lse=lse, backend="triton")[:, 0],
        "Gluon, products ahead": lambda: step(r, query, key, value, grad, lse, scale, ahead=True),
        "Gluon, groups in turn": lambda: step(r, query, key, value, grad, lse, scale, ahead=False),
    }
    return made, formula
