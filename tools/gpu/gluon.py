"""The trial of docs/gluon.md on a device: r Abar of one row by Triton's kernel, with its fastest tiles, and by both in Gluon."""

from __future__ import annotations

from typing import Any

import torch

import vlattn_fast as va
from tools.gpu import launches, production
from vlattn_fast.checking.tolerance import settle

Row = dict[str, Any]
BATCH, HEADS, TOKENS, SIZE = 64, 16, 768, 64  # CLIP's, in whole tiles; 256 keys are the fewest
KERNELS = ("_step_kernel", "_gluon_kernel")


def measured(item: dict[str, Any], device: str) -> Row:
    """Microseconds of each kernel, and how near each result is to the formula, by the tolerance rule."""
    from tools.trials.relevancy_step import step

    batch, heads, tokens = (1, 1, 256) if device == "cpu" else (BATCH, HEADS, TOKENS)
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, heads, tokens, SIZE)
    query, key, value, grad = (torch.randn(shape, device=device, generator=generator).bfloat16() for _ in range(4))
    r, scale = torch.rand(batch, tokens, device=device, generator=generator), SIZE**-0.5
    lse = (scale * query.float() @ key.float().mT).logsumexp(-1)
    first = slice(1)  # sample, which is compared

    def formula(dtype: torch.dtype) -> torch.Tensor:
        inputs = (x[first].to(dtype) for x in (query, key, value, grad))
        return va.reference.relevancy_step(r[first, None].to(torch.promote_types(dtype, torch.float32)), *inputs)[:, 0]

    calls = {
        "Triton": lambda: va.relevancy_step(r[:, None], query, key, value, grad, lse=lse, backend="triton")[:, 0],
        "Gluon, products ahead": lambda: step(r, query, key, value, grad, lse, scale, ahead=True),
        "Gluon, groups in turn": lambda: step(r, query, key, value, grad, lse, scale, ahead=False),
    }
    truth, plain = {"r": formula(torch.float64)}, {"r": formula(torch.bfloat16)}
    ratios, kernels = {}, []
    for name, call in calls.items():
        pools = settle(iter([({"r": call()[first]}, truth, plain)]), enough=lambda: 1, most=1)
        ratios[name] = production.ratio_of(pools["r"])
        kernels.append([launch for kernel, launch, _ in launches.launched(call) if kernel in KERNELS])
    seconds = launches.in_turns(kernels, device)
    times = {name: round(each * 1e6, 3) for name, each in zip(calls, seconds, strict=True)}
    wrong = {name: ratio for name, ratio in ratios.items() if not ratio <= 1.0}
    problem = f"the tolerance rule is broken: {wrong}" if wrong else ""
    return {"passed": not wrong, "problem": problem, "ratios": ratios, "us": times, "timed_by": launches.TIMED_BY[device]}
