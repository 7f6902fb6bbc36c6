"""Inputs and comparisons of the gradients of relevancy_step and attention_map.

Where A dA changes its sign, and where two heads are equal, these gradients jump: a head that is taken in float32 and not in
float64 is no error. So values and cotangents are small integers, whose products are exact in every dtype, and draws in which two
heads nearly tie are left out.
"""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import SETTLED, SLOW, _KernelsOnTheCpu, as_dtype
from vlattn_fast.checking.tolerance import settle

NARROWEST = 4e-6  # relative distance of two heads that float32 tells apart


def inputs(
    n: int, m: int, *, b: int = 2, h: int = 2, kv: int = 2, d: int = 6, dv: int = 5, rows: int = 2, seed: int = 0
) -> dict[str, Tensor]:
    """What relevancy_step takes, in float64; query and key as a model lays them out, (B, N, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"query": (b, n, h, d), "key": (b, m, kv, d), "value": (b, m, kv, dv), "grad_output": (b, n, h, dv)}
    made = {"relevancy": torch.rand(b, rows, n, dtype=torch.float64, generator=generator)}
    largest = 3 if dv <= 28 else 1  # bfloat16 holds integers up to 256
    for name, shape in shapes.items():
        whole = name in ("value", "grad_output")
        x = torch.randint(-largest, largest + 1, shape, generator=generator) if whole else torch.randn(shape, generator=generator)
        made[name] = x.double().transpose(1, 2)
    return made


def check(
    backend: str,
    operator: str,
    make: Callable[[int], dict[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    *,
    scales: dict[str, float] | float = 0.0,
    formula_options: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Every gradient of the operator ("step" or "map") against the formula by the tolerance rule; `make(seed)` draws the inputs.
    `formula_options` are other ones for the yardstick in the dtype of the call."""
    reduction = options.get("head_reduction", "mean")

    def run(tensors: dict[str, Tensor], cotangent: Tensor, backend: str, options: dict[str, Any]) -> dict[str, Tensor]:
        leaves = {name: x.clone(memory_format=torch.preserve_format).requires_grad_() for name, x in tensors.items()}
        gqa = leaves["key"].shape[1] != leaves["query"].shape[1]
        call = va.relevancy_step if operator == "step" else va.attention_map
        result = call(**leaves, enable_gqa=gqa, backend=backend, **options)
        grads = torch.autograd.grad(result, list(leaves.values()), cotangent.to(result.dtype))
        return dict(zip(leaves, grads, strict=True))

    def runs() -> Iterator[tuple[dict[str, Tensor], ...]]:
        for seed in count():
            wide = make(seed)
            if operator == "map":
                del wide["relevancy"]
            if options["rule"] == "attention":
                del wide["value"], wide["grad_output"]
            tensors = as_dtype(wide, dtype)
            if "relevancy" in tensors:
                tensors["relevancy"] = wide["relevancy"].float()
            exact = as_dtype(tensors, torch.float64)
            if reduction != "mean" and _nearly_tied(exact, reduction, options):
                continue
            (batch, _, n, _), m = exact["query"].shape, exact["key"].shape[2]
            shape = (batch, tensors["relevancy"].shape[1], m) if operator == "step" else (batch, n, m)
            cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
            ours = run(tensors, cotangent, backend, options)
            assert {x.dtype for name, x in ours.items() if name != "relevancy"} == {dtype}
            yield (
                ours,
                run(exact, cotangent, "reference", options),
                run(tensors, cotangent, "reference", formula_options or options),
            )

    with _KernelsOnTheCpu() as slow:
        pools = settle(runs(), scales, lambda: SLOW if slow.ran else SETTLED)
    for name, errors in pools.items():
        assert errors.ratio() <= 1.0, f"{backend} {operator} gradient of {name}: {errors}"


def _nearly_tied(tensors: dict[str, Tensor], reduction: str, options: dict[str, Any]) -> bool:
    """Whether, at any pair, float32 may take another head than float64."""
    heads, group = tensors["query"].shape[1], tensors["query"].shape[1] // tensors["key"].shape[1]
    each = []
    for h in range(heads):
        one = {
            name: x[:, h : h + 1] if name in ("query", "grad_output") else x[:, h // group, None] for name, x in tensors.items()
        }
        mask = options.get("attn_mask")
        of_head = {"attn_mask": mask[..., h : h + 1, :, :]} if mask is not None and mask.dim() > 2 else {}
        named = {name: x for name, x in options.items() if name not in ("head_reduction", "row_normalize")}
        each.append(va.reference.attention_map(**one, **(named | of_head)))
    first, second, *_ = torch.stack(each).sort(dim=0, descending=reduction == "max").values
    gap = (first - second).abs() / torch.maximum(first, second)
    return bool(((gap > 0) & (gap < NARROWEST)).any())  # equal heads stay equal
