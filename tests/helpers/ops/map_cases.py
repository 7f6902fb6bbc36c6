"""Sizes, masks and comparisons of attention_map and attention_statistics."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to

# keys in two tiles of the Triton kernels in float32, and in many of streaming's with TILE_ELEMENTS = 3 * M
B, H, N, M, D, DV = 2, 2, 7, 40, 5, 3


def sharp(inputs: dict[str, Tensor], m: int = M) -> tuple[dict[str, Tensor], Tensor]:
    """Logits in the hundreds that grow with the key, and a key mask (B, m) that masks those of the larger half."""
    key = 8 * inputs["key"].abs() * torch.linspace(-1, 1, m, dtype=inputs["key"].dtype)[:, None]
    return inputs | {"query": 8 * inputs["query"].abs(), "key": key}, (torch.arange(m) < m // 2).expand(B, -1)


def map_inputs(
    rule: str, n: int = N, m: int = M, d: int = D, dv: int = DV, *, b: int = B, h: int = H, kv: int = H
) -> dict[str, Tensor]:
    """What attention_map takes, in float64 and as a model lays it out, (B, N, H, D)."""
    shapes = {"query": (n, h, d), "key": (m, kv, d), "value": (m, kv, dv), "grad_output": (n, h, dv)}
    made = {name: 1.5 * torch.randn(b, *shape, dtype=torch.float64).transpose(1, 2) for name, shape in shapes.items()}
    return made if rule == "gradient" else {name: made[name] for name in ("query", "key")}


def check_map(backend: str, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """The map of `backend` against the formula's; nothing that goes in is written to."""
    given = {name: x for name, x in (inputs | options).items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in given.items()}
    run = partial(va.attention_map, **options, backend=backend)
    plain = partial(va.reference.attention_map, **options)
    abar = assert_all_close_to(run, plain, inputs, grads=False)["out0"]
    assert all(torch.equal(given[name], x) for name, x in before.items())
    assert abar.is_contiguous() and abar.isfinite().all()
    return abar


G = 3
STATISTICS = ("mass", "entropy", "maximum", "received")  # those with gradients


def statistics_inputs(n: int = N, m: int = M, d: int = D, *, b: int = B, h: int = H, kv: int = H) -> dict[str, Tensor]:
    """What attention_statistics takes, in float64: query and key as a model lays them out, row_weight of both signs."""
    query, key = (1.5 * torch.randn(b, *shape, dtype=torch.float64).transpose(1, 2) for shape in ((n, h, d), (m, kv, d)))
    return {"query": query, "key": key, "row_weight": torch.randn(b, n, dtype=torch.float64)}


def groups(m: int = M, num_groups: int = G) -> dict[str, Any]:
    """Some keys are in no group."""
    return {"key_groups": torch.randint(-1, num_groups, (m,)), "num_groups": num_groups}


def but_argmax(function: Callable[..., Any], **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as compare.py takes it: floating outputs only."""

    def call(**tensors: Tensor) -> tuple[Tensor, ...]:
        found = function(**tensors, **options)
        return tuple(getattr(found, name) for name in STATISTICS)

    return call


def check_statistics(backend: str, inputs: dict[str, Tensor], *, only: str | None = None, **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of `backend` against the formula's; nothing that goes in is written to. `only` names the statistic
    that has a cotangent."""
    given = {name: x for name, x in (inputs | options).items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in given.items()}
    plain = va.reference.attention_statistics(**inputs, **options)
    cotangents = [torch.randn_like(getattr(plain, name)) if only in (None, name) else None for name in STATISTICS]
    argmax = []

    def run(**tensors: Tensor) -> tuple[Tensor, ...]:
        found = va.attention_statistics(**tensors, **options, backend=backend)
        argmax.append(found.argmax)
        return tuple(getattr(found, name) for name in STATISTICS)

    formula = but_argmax(va.reference.attention_statistics, **options)
    scales = {"grad query": 0.1, "grad key": 0.1}  # where a gradient cancels, what was summed is larger
    got = assert_all_close_to(run, formula, inputs, cotangents, scales=scales, what=f"{only}")
    if inputs["query"].dtype in (torch.float32, torch.float64):  # in 16 bit many weights of the formula tie
        _assert_largest(argmax[0], plain.argmax, inputs, options)
    assert all(torch.equal(given[name], x) for name, x in before.items())
    return got


def _assert_largest(argmax: Tensor, formula: Tensor, inputs: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Each row's largest weight is where the formula has it, or where another weight is as large up to rounding."""
    rows = argmax != formula
    if rows.any():
        size = inputs["key"].shape[2]
        each_key = {**options, "key_groups": torch.arange(size), "num_groups": size}
        weights = va.reference.attention_statistics(**as_dtype(inputs, torch.float64), **each_key).mass[rows]
        assert (argmax[rows] >= 0).all() and (formula[rows] >= 0).all()
        assert (weights.gather(-1, argmax[rows][:, None])[:, 0] >= (1 - 1e-4) * weights.amax(-1)).all()
