"""recurrent_step in C++: how tiles, heads and rows are dealt out, sizes beside those of vectors, and the matrices of chunks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to
from vlattn_fast.backends.streaming import _tiles


def tensors(n: int, h: int, d: int, dv: int, rows: int, *, per_feature: bool = False) -> dict[str, Tensor]:
    """A gated delta rule, whose query heads are shared where there are several."""
    x = {"relevancy": torch.rand(1, rows, n), "query": torch.randn(1, -(-h // 2) if h % 2 == 0 else h, n, d)}
    x |= {"key": F.normalize(torch.randn(1, h, n, d), dim=-1), "value": torch.randn(1, h, n, dv)}
    x |= {"grad_output": torch.randn(1, h, n, dv), "log_decay": -torch.rand(1, h, n, *[d] * per_feature) / 4}
    return x | {"beta": 2 * torch.rand(1, h, n)}


SIZES = {
    "a partial chunk, few heads": (70, 3, 20, 9, 1),
    "more heads than parts": (65, 34, 16, 3, 2),
    "features beyond a block of lanes": (150, 2, 130, 140, 1),
    "rows by a product": (200, 2, 24, 16, 5),
    "rows beyond a group": (140, 12, 8, 8, 19),
}


@pytest.mark.parametrize("options", ({}, {"rule": "attention"}, {"row_normalize": True}), ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, options: dict[str, object]) -> None:
    for beta in (True, False):
        x = tensors(*SIZES[name], per_feature=beta == ("lanes" in name))
        x = x if beta else {key: tensor for key, tensor in x.items() if key != "beta"}

        def ours(**given: Tensor) -> Tensor:
            return va.recurrent_step(**given, **options, backend="cpu")

        def formula(**given: Tensor) -> Tensor:
            return va.reference.recurrent_step(**given, **options)

        assert_all_close_to(ours, formula, x, grads=False)


def test_more_tiles_than_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts take tiles there and back; with as many threads as there are, and with one, the bits are the same."""
    x = tensors(64 * 35 + 3, 2, 4, 2, 1)
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1 << 22)
    truth = va.recurrent_step(**{name: tensor.double() for name, tensor in x.items()}, backend="streaming")
    got = va.recurrent_step(**x, backend="cpu")
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())


def test_a_row_of_subnormal_numbers_has_shares() -> None:
    """A decay of exp(-90) is subnormal, and so are all of the last row's numbers, whose key is 0."""
    x = {name: tensor for name, tensor in tensors(8, 1, 4, 2, 1).items() if name not in ("value", "grad_output", "beta")}
    x["log_decay"][..., -1] = -90.0
    x["key"][:, :, -1] = 0.0
    x["relevancy"] = torch.eye(8)[None, -1:]
    exact = va.reference.recurrent_step(**{name: tensor.double() for name, tensor in x.items()}, rule="attention")
    got = va.recurrent_step(**x, rule="attention", backend="cpu")
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3)
    assert exact.sum() > 0.99
