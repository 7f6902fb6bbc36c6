"""Keys of few queries that are split into parts, and joined, by the Triton kernel of score_attention.

Here a part has so few keys that small calls are split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops.score_cases import check
from tests.kernels.test_score_attention import KINDS, Ahead, tensors
from vlattn_fast.kernels import _configurations, score_attention
from vlattn_fast.scores import cosine

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of parts of all calls: every call of a test is split."""
    numbers: list[int] = []
    made = score_attention._parts

    def noted(*arguments: Any) -> Any:
        of_call = made(*arguments)
        numbers.append(0 if of_call is None else of_call.number)
        return of_call

    monkeypatch.setattr(score_attention, "FEWEST_KEYS", 16)
    monkeypatch.setattr(score_attention, "_parts", noted)
    yield numbers
    assert numbers and min(numbers) >= 3


def key_mask(n: int, m: int) -> torch.Tensor:
    """Of the first and the last parts nothing is left."""
    mask = torch.rand(1, m) > 0.4
    mask[:, :70] = mask[:, -40:] = False
    return mask


def attn_mask(n: int, m: int) -> torch.Tensor:
    """A row without keys, one without those of the first parts, and one that is masked by finite numbers."""
    mask = torch.randn(n, m)
    mask[0], mask[1, :70], mask[2] = -torch.inf, -torch.inf, torch.finfo(F32).min
    return mask


MASKS = {"key_mask": key_mask, "attn_mask": attn_mask}


@pytest.mark.parametrize(
    "kind, n, m, dtype, options",
    [
        ("dot", 1, 128, F32, {}),
        ("dot", 5, 161, F32, {"scale": -0.7}),
        ("dot", 16, 257, BF16, {}),
        ("dot", 3, 150, F32, {"key_mask": True}),
        ("dot", 3, 321, BF16, {"key_mask": True}),
        ("dot", 4, 150, F32, {"attn_mask": True}),
        ("dot", 3, 150, F32, {"softcap": 1.5}),
        ("cosine", 3, 150, F32, {}),
        ("tanh", 3, 150, F32, {"key_mask": True}),
        ("additive", 2, 65, F32, {}),
        ("additive", 3, 70, F32, {"attn_mask": True}),
    ],
)
def test_parts_are_joined(kind: str, n: int, m: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Outputs, the log-sum-exp and gradients."""
    options = {name: MASKS[name](n, m) if value is True else value for name, value in options.items()}
    check("triton", as_dtype(tensors(n, m), dtype), KINDS[kind], **options)


def test_scores_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_configurations, "OVERRIDES", Ahead(unused={}))
    check("triton", tensors(3, 83), KINDS["dot"])


def test_cosine_without_a_clamp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosine, "readable", lambda x: False)
    check("triton", tensors(3, 150), lambda p: "cosine")


def test_float32_rows_in_parts() -> None:
    inputs = {name: x for name, x in tensors(3, 200, 192, 136).items() if name in ("query", "key", "value")}
    check("triton", inputs, KINDS["dot"], scale=0.07)


@pytest.mark.parametrize("options", [{"dropout_p": 0.3}, {"sink": torch.tensor([0.3, -1.0, 2.0, 0.0])}])
def test_samples_and_heads_that_share_keys(options: dict[str, Any]) -> None:
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 140, 8), torch.randn(2, 2, 140, 5)
    outputs = []
    for backend in ("triton", "streaming"):
        torch.manual_seed(1)
        outputs.append(va.score_attention(query, key, value, enable_gqa=True, return_lse=True, backend=backend, **options))
    torch.testing.assert_close(*outputs)


def test_nan_of_a_part_stays_and_that_of_padding_does_not() -> None:
    inputs = {name: x for name, x in tensors(3, 150).items() if name in ("query", "key", "value")}
    mask = key_mask(3, 150)
    inputs["key"][..., 10, :] = inputs["value"][..., 149, :] = torch.nan
    assert va.score_attention(**inputs, backend="triton").isnan().all()
    masked = va.score_attention(**inputs, key_mask=mask, backend="triton")
    torch.testing.assert_close(masked, va.score_attention(**inputs, key_mask=mask, backend="streaming"))
    assert masked.isfinite().all()


def test_bits_repeat() -> None:
    inputs = {name: x for name, x in tensors(3, 150).items() if name in ("query", "key", "value")}
    first, second = (va.score_attention(**inputs, return_lse=True, backend="triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


TILES = {"BLOCK_Q": 64, "BLOCK_KV": 64}


@pytest.mark.parametrize(
    "heads, n, m, keys",
    [
        (4, 8, 8192, 256),
        (32, 8, 8192, 1024),
        (1, 1, 131072, 512),
        (66, 64, 131072, 32768),
        (1, 1, 1024, 256),
        (1, 1, 1151, 320),
        (67, 8, 131072, 0),  # programs are enough
        (4, 65, 8192, 0),  # two tiles of queries
        (4, 8, 1023, 0),
    ],
)
def test_how_many_keys_a_part_has(
    heads: int, n: int, m: int, keys: int, monkeypatch: pytest.MonkeyPatch, parts: list[int]
) -> None:
    monkeypatch.setattr(score_attention, "FEWEST_KEYS", 256)
    assert score_attention.keys_of_a_part(heads, n, m, TILES) == keys
    parts.append(3)  # nothing is called
