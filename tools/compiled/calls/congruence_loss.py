"""Calls of congruence_loss to compile: short rows and long, every kind, dtype, head sizes 64 and 128, masked and not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from vlattn_fast.backends.cuda import congruence_loss as in_cuda
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs
from vlattn_fast.kernels import congruence_loss

UNITER, LONG = (60, 100), (160, 400)  # text and image tokens


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "cacr masked bf16 64", lambda: run("cacr", torch.bfloat16, 64, masked=True)
    yield "cacr bf16 128", lambda: run("cacr", torch.bfloat16, 128)
    yield "cacr masked fp16 64", lambda: run("cacr", torch.float16, 64, masked=True)
    yield "cacr masked fp32 64", lambda: run("cacr", torch.float32, 64, masked=True)
    yield "iais_distributed masked bf16 64", lambda: run("iais_distributed", torch.bfloat16, 64, masked=True)
    yield "iais_singular masked bf16 64", lambda: run("iais_singular", torch.bfloat16, 64, masked=True)
    yield "iais_singular long bf16 64", lambda: run("iais_singular", torch.bfloat16, 64, LONG)
    yield "cacr long masked bf16 128", lambda: run("cacr", torch.bfloat16, 128, LONG, masked=True)
    yield "cacr long masked fp32 64", lambda: run("cacr", torch.float32, 64, LONG, masked=True)


def compared_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """By the CUDA C++ kernel."""
    for kind in ("cacr", "iais_distributed"):
        yield f"cuda {kind} masked bf16 64", lambda kind=kind: run(kind, torch.bfloat16, 64, masked=True, kernels=in_cuda)


def run(
    kind: str,
    dtype: torch.dtype,
    size: int,
    lengths: tuple[int, int] = UNITER,
    masked: bool = False,
    kernels: Any = congruence_loss,
) -> None:
    """Forward and backward, both directions. kernels: the backend's module."""
    text, image = (torch.empty(1, 12, length, size, dtype=dtype) for length in lengths)
    text_mask, image_mask = (torch.ones(1, length, dtype=torch.bool) if masked else None for length in lengths)
    inputs = CongruenceLossInputs(
        text_query=text,
        image_query=image,
        cross_text_query=text,
        cross_image_query=image,
        text_key=text,
        image_key=image,
        cross_image_key=image,
        cross_text_key=text,
        text_mask=text_mask,
        image_mask=image_mask,
        kind=kind,
        normalize="softmax",
        direction="both",
        scale=size**-0.5,
        saves=True,
        backend="triton",
    )
    _, gradients = kernels.forward(inputs)
    shared = {name: x for name, x in inputs._asdict().items() if name != "saves"}
    kernels.backward(CongruenceLossBackwardInputs(grad_loss=torch.ones(1), gradients=gradients, **shared))
