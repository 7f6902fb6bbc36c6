"""Keys of few queries that are split into parts, and joined, by the Triton kernels of score_attention and attention_statistics.

Here a part has so few keys that small calls are split.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops.map_cases import check_statistics, statistics_inputs
from tests.helpers.ops.score_cases import check
from tests.kernels.test_score_attention import KINDS, Ahead, tensors
from vlattn_fast.kernels import _configurations, _tiles, attention_statistics, score_attention
from vlattn_fast.kernels._tiles import keys_of_a_part
from vlattn_fast.scores import cosine

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def keys_of_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of keys of a part, of all calls: every call of a test is split."""
    numbers: list[int] = []

    def noted(*arguments: Any) -> int:
        numbers.append(keys_of_a_part(*arguments))
        return numbers[-1]

    monkeypatch.setattr(_tiles, "FEWEST_KEYS", 16)
    monkeypatch.setattr(score_attention, "keys_of_a_part", noted)
    monkeypatch.setattr(attention_statistics, "keys_of_a_part", noted)
    yield numbers
    assert numbers and min(numbers) > 0


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
        ("dot", 2, 600, F32, {}),  # more parts than are joined at once
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
    heads: int, n: int, m: int, keys: int, monkeypatch: pytest.MonkeyPatch, keys_of_parts: list[int]
) -> None:
    monkeypatch.setattr(_tiles, "FEWEST_KEYS", 256)
    assert keys_of_a_part(heads, n, m, TILES) == keys
    keys_of_parts.append(1)  # no call is there to be split


@pytest.mark.parametrize(
    "num_groups, dtype, options",
    [
        (2, F32, {}),
        (2, BF16, {}),
        (70, F32, {}),
        (2, F32, {"key_mask": True}),
        (2, F32, {"attn_mask": True}),
        (0, F32, {"scale": -0.7}),
    ],
)
def test_statistics_are_joined(num_groups: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    n, m = 4, 170
    options = {name: MASKS[name](n, m) if value is True else value for name, value in options.items()}
    by_group = {"key_groups": torch.randint(-1, num_groups, (1, m)), "num_groups": num_groups} if num_groups else {}
    inputs = as_dtype(statistics_inputs(n, m, b=1, h=2, kv=1), dtype)
    check_statistics("triton", inputs, enable_gqa=True, **by_group, **options)


def test_statistics_of_nan_and_of_equal_weights() -> None:
    query, key = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 200, 8)
    key[..., 150, :] = key[..., 30, :] = 9.0 * query[..., 0, :]  # the largest of the first query, in two parts
    first = va.attention_statistics(query, key, backend="triton")
    assert first.argmax[0, 0, 0] == 30
    masked = va.attention_statistics(query, key, attn_mask=torch.tensor([[False], [True]]).expand(2, 200), backend="triton")
    assert masked.argmax[0, 0, 0] == -1 and masked.argmax[0, 0, 1] == first.argmax[0, 0, 1]
    key[..., 190, :] = torch.nan
    assert not va.attention_statistics(query, key, backend="triton").argmax.any()
    for ours, formula in zip(
        *(va.attention_statistics(query, key, backend=name) for name in ("triton", "reference")), strict=True
    ):
        if formula is not None and formula.is_floating_point():
            torch.testing.assert_close(ours, formula, equal_nan=True)
