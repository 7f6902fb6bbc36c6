"""Any shape of a tile that `make gpu PARTS=tiles` may choose: more queries than keys, and more keys than queries.

A loop over queries or keys begins and ends at the diagonal of a causal mask, which depends on the shape. Query heads share key
heads, and each has a mask of its own, so that every tile meets another one.
"""

from functools import partial
from typing import Any

import pytest
import torch

from tests.helpers.compare import as_dtype
from tests.helpers.ops import abar_cases, backends, map_cases, relevancy_cases, score_cases
from vlattn_fast._ground import extras
from vlattn_fast.kernels import _configurations

N, H, HEADS = 36, 4, {"h": 4, "kv": 2}


class Tiles(dict[str, Any]):
    """Every launch has tiles of so many queries and keys."""

    def __init__(self, queries: int, keys: int) -> None:
        super().__init__(unused={})
        self.sizes = {"BLOCK_Q": queries, "BLOCK_KV": keys}

    def get(self, key: str, default: Any = None) -> Any:
        return {name: self.sizes.get(name, x) for name, x in default.items()}


@pytest.fixture(params=[(32, 16), (16, 32)], ids=str, autouse=True)
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_configurations, "OVERRIDES", Tiles(*request.param))


def masks() -> dict[str, Any]:
    return {"attn_mask": torch.rand(H, N, N) > 0.3, "is_causal": True}


def float_masks() -> dict[str, Any]:
    """Each head has another row whose logits are so low that its log-sum-exp alone does not give its weights."""
    mask = torch.randn(H, N, N)
    mask[torch.arange(H), 20 + torch.arange(H)] = -1e6
    return {"attn_mask": mask, "is_causal": True}


@pytest.mark.parametrize("score", ("dot", "cosine-eps=5", "additive"))
def test_score_attention(score: str) -> None:
    b = 2 if score == "cosine-eps=5" else 1
    inputs, make = score_cases.tensors("triton", score, b=b, n=N, m=N, **HEADS)
    score_cases.check("triton", inputs, make, cancels=True, enable_gqa=True, **masks())


@pytest.mark.parametrize("rule", ("gradient", "attention"))
def test_relevancy_attention(rule: str) -> None:
    options = masks() if rule == "gradient" else {"row_normalize": True, **float_masks()}
    relevancy_cases.check("triton", relevancy_cases.tensors(N, **HEADS), rule=rule, **options)


COMPILED_BY_OLD_TRITON = not backends.INTERPRET and bool(extras.missing("triton", 3, 7))
REFUSED = pytest.mark.skipif(COMPILED_BY_OLD_TRITON, reason="Triton 3.6 compiles no such tile; no configuration has one")


@pytest.mark.parametrize("operator", (pytest.param("step", marks=REFUSED), "map"))
def test_gradients_of_maps(operator: str) -> None:
    make = partial(_drawn, b=1, **HEADS)
    abar_cases.check("triton", operator, make, rule="gradient", **masks())


def _drawn(seed: int, **sizes: int) -> dict[str, torch.Tensor]:
    return abar_cases.inputs(N, N, seed=seed, **sizes)


@pytest.mark.parametrize("rule", ("gradient", "attention"))
def test_attention_map(rule: str) -> None:
    inputs = as_dtype(map_cases.map_inputs(rule, N, N, b=1, **HEADS), torch.float32)
    map_cases.check_map("triton", inputs, rule=rule, enable_gqa=True, **masks())


def test_attention_statistics() -> None:
    inputs = as_dtype(map_cases.statistics_inputs(N, N, b=1, **HEADS), torch.float32)
    map_cases.check_statistics("triton", inputs, enable_gqa=True, **masks(), **map_cases.groups(N))
