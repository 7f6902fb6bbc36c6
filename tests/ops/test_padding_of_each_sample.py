"""Samples with padding of their own: each has keys that another one lacks, and none is masked throughout."""

from __future__ import annotations

import torch

from tests.helpers.compare import as_dtype
from tests.helpers.ops import abar_cases, map_cases, relevancy_cases, score_cases
from tests.helpers.ops.backends import each, finest, on

BACKENDS = ("streaming", "cpu", "triton")


def padding(m: int) -> torch.Tensor:
    """(2, m): every other key is real, and every third."""
    return torch.arange(m) % torch.tensor([[2], [3]]) == 0


@each("score", **{backend: ("dot", "additive") for backend in BACKENDS})
def test_score_attention(backend: str, score: str) -> None:
    score_cases.check(backend, *score_cases.tensors(backend, score), cancels=True, key_mask=padding(score_cases.M))


@on(*BACKENDS)
def test_relevancy_attention(backend: str) -> None:
    inputs = relevancy_cases.tensors(9, b=2, dtype=finest(backend))
    relevancy_cases.check(backend, inputs, key_mask=padding(9))


@each("operator", **{backend: ("step", "map") for backend in BACKENDS})
def test_gradients_of_maps(backend: str, operator: str) -> None:
    abar_cases.check(backend, operator, lambda seed: abar_cases.inputs(5, 9, seed=seed), rule="gradient", key_mask=padding(9))


@on(*BACKENDS)
def test_attention_map(backend: str) -> None:
    for m in (9, 40):
        map_cases.check_map(backend, as_dtype(map_cases.map_inputs("attention", 5, m), finest(backend)), key_mask=padding(m))


@on(*BACKENDS)
def test_attention_statistics(backend: str) -> None:
    inputs = as_dtype(map_cases.statistics_inputs(5, 9), finest(backend))
    map_cases.check_statistics(backend, inputs, key_mask=padding(9), **map_cases.groups(9))
