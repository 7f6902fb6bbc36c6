"""paged_attention_statistics in Triton with few tokens a request: keys in parts, which are joined, and logits that are stored."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.ops.test_paged_attention_statistics import check, groups, requests, tensors
from vlattn_fast.backends.reference.paged_attention_statistics import STATISTICS
from vlattn_fast.kernels import paged_attention_statistics

F32, BF16 = torch.float32, torch.bfloat16
LENGTHS, COUNTS = (37, 70, 9, 0, 64), (1, 3, 0, 0, 2)


class Noted:
    """Stands in for a kernel, notes with which names and values it is launched, and launches it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.calls = kernel, list[dict[str, Any]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> None:
            self.calls.append(arguments)
            self.kernel[grid](**arguments)

        return launch


@pytest.fixture(autouse=True)
def rows_kernel(monkeypatch: pytest.MonkeyPatch) -> Noted:
    """Parts have 16 keys or a tile, so that small calls have several."""
    noted = Noted(paged_attention_statistics._rows_kernel)
    monkeypatch.setattr(paged_attention_statistics, "_rows_kernel", noted)
    monkeypatch.setattr(paged_attention_statistics, "FEWEST_KEYS", 16)
    return noted


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "window over parts": {"window": 41},
    "softcap": {"softcap": 0.7, "window": 40},
    "negative scale": {"scale": -0.6},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_options(name: str, dtype: torch.dtype) -> None:
    of = requests(LENGTHS, COUNTS)
    check("triton", as_dtype(tensors(of), dtype), {**of, **groups(of, 70), **OPTIONS[name]})


@pytest.mark.parametrize("fewest, most, number", [(256, 32, 1), (70, 32, 2), (16, 2, 2), (16, 32, 6)])
def test_parts_are_joined(fewest: int, most: int, number: int, rows_kernel: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table and constants say how many there are."""
    monkeypatch.setattr(paged_attention_statistics, "FEWEST_KEYS", fewest)
    monkeypatch.setattr(paged_attention_statistics, "MOST_PARTS", most)
    of = requests(LENGTHS, COUNTS)
    check("triton", as_dtype(tensors(of), F32), {**of, **groups(of, 70)})
    assert {call["parts"].number for call in rows_kernel.calls} == {number}


@pytest.mark.parametrize(
    "lengths, counts, heads, key_heads, block_size, size, count",
    [
        ((150,), (1,), 4, 2, 16, 8, 3),
        ((150,), (4,), 3, 3, 3, 5, 0),
        ((40, 2, 33), (9, 0, 2), 6, 2, 7, 33, 70),  # a tile has two tokens
        ((65, 1), (1, 1), 40, 1, 1, 16, 5),  # a token has more heads than a tile rows
        ((100, 20), (2, 3), 8, 1, 32, 136, 1),
    ],
)
def test_sizes(
    lengths: tuple[int, ...], counts: tuple[int, ...], heads: int, key_heads: int, block_size: int, size: int, count: int
) -> None:
    of = requests(lengths, counts, block_size)
    inputs = as_dtype(tensors(of, heads, key_heads, block_size, size, more=0), F32)
    check("triton", inputs, {**of, **(groups(of, 60, count) if count else {"num_groups": 0})})


@pytest.mark.parametrize("window", [None, 30])
def test_values_that_nobody_has_checked(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths beyond the table, below 0 and below the number of tokens, blocks that the cache does not have."""
    monkeypatch.setattr("vlattn_fast.ops.paged_attention_statistics._check_values", lambda _: None)
    of = requests(LENGTHS, COUNTS)
    inputs = as_dtype(tensors(of), F32)
    of["lengths"] = torch.tensor([97, 2**31 + 90, 9, 5, 1])
    of["block_table"][:, 3] = torch.tensor([99, -1, 99, -1, 2])
    call = partial(va.paged_attention_statistics, **of, **groups(of, 70), window=window, statistics=STATISTICS)
    exact = va.reference.paged_attention_statistics
    want = partial(exact, **call.keywords)(**as_dtype(inputs, torch.float64))
    for name, x, y in zip(STATISTICS, call(**inputs, backend="triton"), want, strict=True):
        torch.testing.assert_close(x, y.float(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_of_a_part(value: float) -> None:
    """It reaches the tokens that see it, and the attention that their keys receive."""
    of = requests((70, 30), (3, 2))
    inputs = as_dtype(tensors(of, more=0), F32)
    inputs["query"] = inputs["query"].abs()
    inputs["key_cache"][of["block_table"][0, 68 // 16], 1, 68 % 16] = value  # the second token is the first to see it
    call = partial(va.paged_attention_statistics, **of, **groups(of, 70), statistics=STATISTICS)
    found, exact = call(**inputs, backend="triton"), call(**as_dtype(inputs, torch.float64), backend="reference")
    assert found.entropy.isnan().nonzero().tolist() == [[i, h] for i in (1, 2) for h in (2, 3)]
    for name, got, want in zip(STATISTICS, found, exact, strict=True):
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got == torch.inf, want == torch.inf), name


def test_bits_of_a_request_alone_in_a_batch_and_in_a_wider_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention_statistics, "MOST_PARTS", 4)  # of request 1 parts are longer than 16
    of = requests(LENGTHS, COUNTS)
    inputs, of_keys = as_dtype(tensors(of, more=0), F32), groups(of, 70)
    call = partial(va.paged_attention_statistics, key_cache=inputs["key_cache"], statistics=STATISTICS, backend="triton")
    whole = call(query=inputs["query"], **of, **of_keys)
    for r in range(len(LENGTHS)):
        tokens, one = slice(*of["query_starts"][r : r + 2].tolist()), slice(r, r + 1)
        for columns in (-(-LENGTHS[r] // 16), 50):
            table = torch.full((1, columns), -1)
            table[:, :6] = of["block_table"][one, :columns]
            alone = call(
                query=inputs["query"][tokens],
                block_table=table,
                lengths=of["lengths"][one],
                query_starts=torch.tensor([0, COUNTS[r]]),
                key_groups=of_keys["key_groups"][one],
                num_groups=3,
            )
            for name, x, y in zip(STATISTICS, alone, whole, strict=True):
                want = y[one, :, : LENGTHS[r]] if name == "received" else y[tokens]
                assert torch.equal(x[..., : LENGTHS[r]] if name == "received" else x, want), (r, columns, name)


@pytest.mark.parametrize("tokens, stored", [(4, True), (5, False)])
def test_logits_of_few_tokens_are_stored(tokens: int, stored: bool, rows_kernel: Noted) -> None:
    """Then `received` reads no keys. It takes at most four times its own memory for them, whatever the tokens."""
    of = requests((40,), (tokens,))
    inputs = as_dtype(tensors(of, more=0), F32)
    for statistics in (["received"], ["mass"]):
        found = va.paged_attention_statistics(**inputs, **of, **groups(of), statistics=statistics, backend="triton")
        logits: Tensor | None = rows_kernel.calls[-1]["p_logits"]
        assert (logits is not None) == (stored and found.received is not None)
        assert logits is None or logits.numel() <= 4 * found.received.numel()
