"""Hand-written attention and nn.MultiheadAttention by scaled_dot_product_attention give the same outputs."""

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.helpers.interpret.cases import TEXT, lively
from tests.helpers.interpret.handwritten_cases import (
    MODELS,
    MODULES,
    POSITIONS,
    SDPA,
    Made,
    assert_as_exact,
    assert_equal,
    blip,
    git,
    layoutlmv3,
    lxmert,
    of_class,
    padding,
    rembert,
    replaced,
    trocr,
    visual_bert,
)
from tests.helpers.releases import OLDER
from vlattn_fast.attach.handwritten import _TRANSFORMERS, calls_interface, replacements
from vlattn_fast.attach.session import overridden


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [*MODELS, *map(of_class, MODULES)], ids=lambda make: make.__name__)
@torch.no_grad()
def test_a_model_gives_the_same_and_every_attention_is_one_call(make: Callable[[], Made], dtype: torch.dtype) -> None:
    model, inputs, calls = make()
    lively(model).eval().to(dtype)
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    torch.manual_seed(1)  # ViLT draws which padding it keeps
    expected = model(**inputs)
    torch.manual_seed(1)
    with replaced(model) as watch:
        outputs = model(**inputs)
    has_map = make.__name__ in MODULES and isinstance(outputs, tuple) and outputs[1:] == (None,)
    expected = expected[0] if has_map else expected  # the other one is the map
    # SAM's eager attention takes its softmax in float32 whatever the model's dtype.
    single = any(hasattr(module, "use_rel_pos") for module in model.modules())
    if dtype == torch.float64 or single:
        assert_equal(outputs, expected, torch.float32 if single else dtype)
    else:
        wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        torch.manual_seed(1)
        exact = model.double()(**wide)
        assert_as_exact(outputs, expected, exact[0] if has_map else exact)
    assert len([name for name in watch.names if name == SDPA.__name__]) == calls
    assert sum("softmax" in name for name in watch.names) == (3 if make is git else 0)  # nothing by hand is left


def test_lxmert_calls_one_module_twice_in_turn() -> None:
    model, inputs, _ = lxmert()
    with torch.no_grad(), replaced(model.eval()) as watch:
        model(**inputs)
    cross, language, vision = [(2, 4, 7, 5), (2, 4, 5, 7)], (2, 4, 7, 7), (2, 4, 5, 5)
    assert watch.shapes == [language, vision, *[*cross, language, vision] * 2]


@torch.no_grad()
def test_a_cache_goes_on_where_it_stopped() -> None:
    for make in (rembert, trocr, git):
        model, inputs, _ = make()
        lively(model).eval()
        first, rest = dict(inputs, input_ids=inputs["input_ids"][:, :4]), {"input_ids": inputs["input_ids"][:, 4:]}
        first.pop("attention_mask")
        rest |= {k: v for k, v in first.items() if k.startswith("encoder")}
        expected = model(**rest, past_key_values=model(**first, use_cache=True).past_key_values)
        with replaced(model) as watch:
            outputs = model(**rest, past_key_values=model(**first, use_cache=True).past_key_values)
        assert_equal(outputs, expected, torch.float32)
        assert watch.shapes[-1][2] == rest["input_ids"].shape[1]


@torch.no_grad()
def test_generation_by_blip_is_the_same() -> None:
    model, inputs, _ = blip()
    lively(model).eval()
    inputs = dict(inputs, max_new_tokens=4, min_new_tokens=4)
    expected = model.generate(**inputs)
    with replaced(model):
        assert torch.equal(model.generate(**inputs), expected)


def test_gradients_are_the_same() -> None:
    model, inputs, _ = layoutlmv3()
    lively(model).eval().double()
    inputs["pixel_values"] = inputs["pixel_values"].double().requires_grad_()
    grads = []
    for context in (contextlib.nullcontext(), replaced(model)):
        with context:
            model(**inputs).logits.square().sum().backward()
        grads.append(inputs["pixel_values"].grad)
        inputs["pixel_values"].grad = None
    assert (grads[0] - grads[1]).abs().max() <= 1e-11 * grads[0].abs().max()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_options_are_refused() -> None:
    model, inputs, _ = lxmert()
    with replaced(model.eval()), pytest.raises(ValueError, match="must not ask for attention maps; got output_attentions=True"):
        model(**inputs, output_attentions=True)
    module, x = nn.MultiheadAttention(32, 4).eval(), torch.randn(3, 2, 32)
    with replaced(module):
        with pytest.raises(ValueError, match="got average_attn_weights=False"):
            module(x, x, x, average_attn_weights=False)
        with pytest.raises(ValueError, match="got None"):
            module(x, x, x, is_causal=True)
        with pytest.raises(ValueError, match="must be bool or float; got torch.int64"):
            module(x, x, x, key_padding_mask=padding(2, 3))
        with pytest.raises(ValueError, match="must be dense in nn.MultiheadAttention; got a nested tensor"):
            module(*[torch.nested.nested_tensor([x[:, 0], x[:2, 1]])] * 3)


def test_a_bool_mask_is_refused_where_it_would_be_added() -> None:
    model = transformers.MPNetModel(transformers.MPNetConfig(**TEXT, **POSITIONS)).eval()
    attention = model.encoder.layer[0].attention.attn
    with replaced(model), pytest.raises(ValueError, match="must give MPNetSelfAttention float masks.*; got torch.bool"):
        attention(torch.randn(2, 7, 32), torch.ones(2, 1, 1, 7, dtype=torch.bool))


def test_a_forward_of_somebody_else_is_refused_and_kept() -> None:
    model, _, _ = visual_bert()
    attention = model.visual_bert.encoder.layer[1].attention.self
    attention.forward = kept = lambda *args: None
    with pytest.raises(
        ValueError, match="in 'visual_bert.encoder.layer.1.attention.self' .VisualBertSelfAttention.; got one of its own"
    ):
        with overridden(replacements(model)):
            pass
    assert attention.forward is kept
    assert "forward" not in vars(model.visual_bert.encoder.layer[0].attention.self)


def test_runs_over_one_model_overlap() -> None:
    model, _, _ = visual_bert()
    attention = model.visual_bert.encoder.layer[0].attention.self
    with overridden(replacements(model)):
        outer = attention.forward
        with overridden(replacements(model)):
            assert attention.forward is outer
        assert attention.forward is outer
    assert "forward" not in vars(attention)


def test_a_subclass_with_a_forward_of_its_own_and_a_namesake_are_left_alone() -> None:
    class Doubled(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)[0]

    class Named(nn.MultiheadAttention):
        pass

    class ViltSelfAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert list(replacements(Doubled(32, 4))) == list(replacements(ViltSelfAttention())) == []
    assert len(list(replacements(Named(32, 4)))) == 1


def test_every_function_takes_what_the_class_takes() -> None:
    folder, seen = Path(transformers.__file__).parent / "models", set()
    for path in sorted(folder.glob("*/modeling_*.py")):
        names = set(re.findall(r"^class (\w+)\(", path.read_text(), re.MULTILINE)) & set(_TRANSFORMERS)
        for name in names:
            kind = getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)
            theirs, ours = (dict(inspect.signature(f).parameters) for f in (kind.forward, _TRANSFORMERS[name]))
            given = {"past_key_values" if one == "cache" else one for one in theirs} - {"self", "output_attentions", "kwargs"}
            needed = {one for one, its in ours.items() if its.default is its.empty} - {"module", "_", "named"}
            assert needed <= given or calls_interface(kind), name
            assert {"_", "named"} & set(ours) or given <= set(ours) or calls_interface(kind), name
        seen |= names
    assert seen == set(_TRANSFORMERS) or (OLDER and seen)


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
