"""torch.nn.MultiheadAttention by scaled_dot_product_attention, with every mask, and inside of torch's encoder."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.handwritten_cases import assert_equal, padding, replaced

MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": lambda: {},
    "bool padding": lambda: {"key_padding_mask": padding(2, 5) == 0},
    "float padding": lambda: {"key_padding_mask": torch.randn(2, 5)},
    "bool mask": lambda: {"attn_mask": torch.rand(5, 5).index_fill(1, torch.tensor(2), 0) > 0.6},
    "float mask": lambda: {"attn_mask": torch.randn(5, 5)},
    "mask per head": lambda: {"attn_mask": torch.randn(8, 5, 5)},
    "both bool": lambda: {"attn_mask": causal_mask(), "key_padding_mask": padding(2, 5) == 0},
    "both float": lambda: {"attn_mask": torch.randn(8, 5, 5), "key_padding_mask": torch.randn(2, 5)},
    "bool mask, float padding": lambda: {"attn_mask": causal_mask(), "key_padding_mask": torch.randn(2, 5)},
    "float mask, bool padding": lambda: {"attn_mask": torch.randn(5, 5), "key_padding_mask": padding(2, 5) == 0},
    "causal": lambda: {"attn_mask": causal_mask(), "is_causal": True},
    "causal and padding": lambda: {"attn_mask": causal_mask(), "is_causal": True, "key_padding_mask": padding(2, 5) == 0},
}
KINDS: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "batch second": {},
    "no bias": {"bias": False},
    "key and value bias": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True, "batch_first": True},
    "both extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "own sizes": {"kdim": 12, "vdim": 20, "batch_first": True},
}


def causal_mask() -> Tensor:
    return torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_multihead_attention(kind: str, masks: str, need_weights: bool) -> None:
    module = lively(nn.MultiheadAttention(32, 4, dropout=0.1, **KINDS[kind])).eval().double()
    shape = (2, 5) if module.batch_first else (5, 2)
    states = [torch.randn(*shape, size).double() for size in (32, module.kdim, module.vdim)]
    given = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in MASKS[masks]().items()}
    expected = module(*states, **given, need_weights=need_weights)
    with replaced(module) as watch:
        outputs = module(*states, **given, need_weights=need_weights)
    assert_equal(outputs, expected, torch.float64)
    assert (outputs[1] is None) == (not need_weights)
    assert len(watch.shapes) == 1
    assert watch.shapes[0] == (2, 4, 5, 5 + ("add_bias_kv" in KINDS[kind]) + ("add_zero_attn" in KINDS[kind]))


@torch.no_grad()
def test_multihead_attention_without_a_batch() -> None:
    module = lively(nn.MultiheadAttention(32, 4)).eval()
    x, y, masks = torch.randn(3, 32), torch.randn(5, 32), {"attn_mask": torch.randn(4, 3, 5), "key_padding_mask": torch.randn(5)}
    expected = module(x, y, y, **masks)
    with replaced(module) as watch:
        assert_equal(module(x, y, y, **masks), expected, torch.float32)
    assert watch.shapes == [(1, 4, 3, 5)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
@torch.no_grad()
def test_a_transformer_encoder_leaves_its_fast_path(nested: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = lively(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)).eval()
    x, masked = torch.randn(2, 7, 32), padding(2, 7) == 0
    expected = model(x, src_key_padding_mask=masked)
    with replaced(model) as watch:
        outputs = model(x, src_key_padding_mask=masked)
    assert bool((expected[masked] == 0).all()) == nested  # the fast path was taken without the mode
    assert_equal(outputs[~masked], expected[~masked], torch.float32)
    assert len(watch.shapes) == 2
    fast = {"_transformer_encoder_layer_fwd", "_nested_tensor_from_mask", "_native_multi_head_attention"}
    assert not fast & set(watch.names)
