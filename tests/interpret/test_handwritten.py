"""Hand-written attention by scaled_dot_product_attention: the same outputs, one call each, and everything put back."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

transformers = pytest.importorskip("transformers")

from tests.interpret.cases import TEXT, VISION, lively  # noqa: E402
from vlattn_fast.interpret._override import overridden  # noqa: E402
from vlattn_fast.interpret.handwritten import _TRANSFORMERS, replacements  # noqa: E402

SDPA = nn.functional.scaled_dot_product_attention
POSITIONS = dict(max_position_embeddings=32)


class Watch(TorchFunctionMode):
    """Notes every torch function that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        if func is SDPA:
            self.shapes.append((*args[0].shape[:3], args[1].shape[2]))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def replaced(model: nn.Module) -> Iterator[Watch]:
    watch = Watch()
    with overridden(replacements(model)), watch:
        yield watch
    assert not any("forward" in vars(module) for module in model.modules())


def tensors(outputs: Any) -> list[Tensor]:
    """All tensors of an output in order; caches hold the keys and values that were attended to."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [tensor for each in outputs for tensor in tensors(each)]
    if hasattr(outputs, "cross_attention_cache"):
        return [*tensors(outputs.self_attention_cache), *tensors(outputs.cross_attention_cache)]
    if hasattr(outputs, "layers"):
        return [tensor for layer in outputs.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return []


def assert_equal(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected) > 0
    bound = 1e-12 if dtype == torch.float64 else 3e-6
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.is_floating_point():
            assert (a - b).abs().max() <= bound * b.abs().max()


def padding(batch: int, size: int) -> Tensor:
    """(batch, size) ones, the second sample's last two zero."""
    mask = torch.ones(batch, size, dtype=torch.long)
    mask[1, -2:] = 0
    return mask


def text(size: int = 7) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 50, (2, size)), "attention_mask": padding(2, size)}


def pixels(*shape: int) -> Tensor:
    return torch.randn(2, *(shape or (3, 24, 24)))


Made = tuple[nn.Module, dict[str, Any], int]  # model, inputs, attention calls


def lxmert() -> Made:
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=60)
    layers = dict(l_layers=1, x_layers=2, r_layers=1, visual_feat_dim=10, **POSITIONS)
    inputs = {**text(), "visual_feats": pixels(5, 10), "visual_pos": pixels(5, 4), "visual_attention_mask": padding(2, 5)}
    return transformers.LxmertModel(transformers.LxmertConfig(**sizes, **layers)), inputs, 1 + 1 + 2 * (2 + 2)


def vilt() -> Made:
    config = transformers.ViltConfig(**{**VISION, **TEXT, **POSITIONS}, qkv_bias=True)
    mask = torch.ones(2, 24, 24, dtype=torch.long)
    mask[1, :, 12:] = 0
    return transformers.ViltModel(config), {**text(), "pixel_values": pixels(), "pixel_mask": mask}, 3


def visual_bert() -> Made:
    config = transformers.VisualBertConfig(**TEXT, **POSITIONS, visual_embedding_dim=10)
    inputs = {**text(), "visual_embeds": pixels(5, 10), "visual_attention_mask": padding(2, 5).float()}
    return transformers.VisualBertModel(config), inputs, 3


def flava() -> Made:
    parts = dict(image_config=VISION, text_config={**TEXT, **POSITIONS}, multimodal_config=TEXT, projection_dim=16)
    model = transformers.FlavaModel(transformers.FlavaConfig(**parts, hidden_size=32))
    return model, {**text(), "pixel_values": pixels()}, 9


def blip() -> Made:
    bert = dict(TEXT, **POSITIONS, encoder_hidden_size=32, bos_token_id=1, sep_token_id=2, pad_token_id=0)
    config = transformers.BlipConfig(text_config=bert, vision_config=VISION, projection_dim=16)
    model = transformers.BlipForConditionalGeneration(config)
    return model, {**text(), "pixel_values": pixels()}, 3 + 3 * 2  # its decoder fills a cache


def blip_retrieval() -> Made:
    bert = dict(TEXT, **POSITIONS, encoder_hidden_size=32, is_decoder=True)
    config = transformers.BlipConfig(text_config=bert, vision_config=VISION, projection_dim=16)
    return transformers.BlipForImageTextRetrieval(config), {**text(), "pixel_values": pixels()}, 3 + 3 * 2


def git() -> Made:
    model = transformers.GitForCausalLM(transformers.GitConfig(**TEXT, **POSITIONS, vision_config=VISION))
    return model, {**text(), "pixel_values": pixels()}, 3  # and three by the attention interface, in the vision tower


def perceiver() -> Made:
    sizes = dict(num_latents=6, d_latents=24, d_model=40, num_blocks=1, num_self_attends_per_block=2, vocab_size=60)
    heads = dict(num_self_attention_heads=4, num_cross_attention_heads=2, qk_channels=16, v_channels=24)
    config = transformers.PerceiverConfig(**sizes, **heads, max_position_embeddings=7)
    inputs = {"inputs": torch.randint(3, 50, (2, 7)), "attention_mask": padding(2, 7)}
    return transformers.PerceiverForMaskedLM(config), inputs, 1 + 2 + 1


def layoutlmv3() -> Made:
    boxes = dict(coordinate_size=5, shape_size=6, has_relative_attention_bias=True, has_spatial_attention_bias=True)
    config = transformers.LayoutLMv3Config(**TEXT, **POSITIONS, **boxes, input_size=24, patch_size=6)
    model = transformers.LayoutLMv3Model(config)
    return model, {**text(), "bbox": torch.randint(0, 50, (2, 7, 4)).sort(-1).values, "pixel_values": pixels()}, 3


def mpnet() -> Made:
    return transformers.MPNetModel(transformers.MPNetConfig(**TEXT, **POSITIONS)), text(), 3


def rembert() -> Made:
    config = transformers.RemBertConfig(**TEXT, **POSITIONS, is_decoder=True, add_cross_attention=True, input_embedding_size=12)
    inputs = {**text(), "encoder_hidden_states": pixels(5, 32), "encoder_attention_mask": padding(2, 5)}
    return transformers.RemBertModel(config), inputs, 6


def megatron_bert() -> Made:
    return transformers.MegatronBertModel(transformers.MegatronBertConfig(**TEXT, **POSITIONS)), text(), 3


def tapas() -> Made:
    return transformers.TapasModel(transformers.TapasConfig(**TEXT, **POSITIONS)), text(), 3


def trocr() -> Made:
    sizes = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=60)
    model = transformers.TrOCRForCausalLM(transformers.TrOCRConfig(**sizes, cross_attention_hidden_size=20, **POSITIONS))
    return model, {**text(), "encoder_hidden_states": pixels(5, 20), "encoder_attention_mask": padding(2, 5)}, 4


def groupvit_text() -> Made:
    config = transformers.GroupViTTextConfig(**TEXT, **POSITIONS)
    return transformers.GroupViTTextModel(config), text(), 3


def mobilevit() -> Made:
    config = transformers.MobileViTConfig(
        image_size=32, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 12, 16, 16, 16, 24], num_attention_heads=4
    )
    return transformers.MobileViTModel(config), {"pixel_values": pixels(3, 32, 32)}, 2 + 4 + 3


def donut() -> Made:
    sizes = dict(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    config = transformers.DonutSwinConfig(**sizes)  # its second layer shifts the windows, so it has a mask
    return transformers.DonutSwinModel(config), {"pixel_values": pixels(3, 32, 32)}, 4


def timesformer() -> Made:
    config = transformers.TimesformerConfig(**VISION, num_frames=2)
    return transformers.TimesformerModel(config), {"pixel_values": pixels(2, 3, 24, 24)}, 6


def mgp_str() -> Made:
    sizes = dict(image_size=[8, 16], patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_token_length=5)
    return transformers.MgpstrModel(transformers.MgpstrConfig(**sizes)), {"pixel_values": pixels(3, 8, 16)}, 2


def sam() -> Made:
    sizes = dict(VISION, num_hidden_layers=2, output_channels=8, global_attn_indexes=[1], window_size=3, mlp_dim=48)
    config = transformers.SamVisionConfig(**sizes, attn_implementation="eager")
    return transformers.SamVisionModel(config), {"pixel_values": pixels()}, 2


def additive(rows: int) -> Tensor:
    """(2, 1, rows, 7), finfo.min at the second sample's padding and in all of its last row."""
    mask = (1 - padding(2, 7).float())[:, None, None].repeat(1, 1, rows, 1)
    mask[1, :, -1] = 1
    return mask * torch.finfo(torch.float32).min


CONFIG = SimpleNamespace(
    hidden_size=32,
    encoder_hidden_size=32,
    num_attention_heads=4,
    attention_dropout=0.1,
    attention_probs_dropout_prob=0.1,
    hidden_dropout_prob=0.1,
    layer_norm_eps=1e-6,
    qkv_bias=True,
    use_rel_pos=True,
    image_size=24,
    patch_size=8,
)
CROSS = {"queries": (5, 32), "keys": (7, 32), "values": (7, 32), "attention_mask": additive(5)}
ENCODER = {
    "hidden_states": (5, 32),
    "encoder_hidden_states": (7, 32),
    "attention_mask": additive(5)[..., :5],
    "encoder_attention_mask": additive(5),
}
WINDOWS = {"hidden_states": (4, 32), "attention_mask": torch.tensor([0.0, -100, -100, 0]).expand(2, 4, 4)}


def of_class(name: str) -> Callable[[], Made]:
    """A module by itself, with an additive mask where it takes one; no whole model of its kind is small."""

    def make() -> Made:
        path, build, inputs = {
            "GroundingDinoMultiheadAttention": ("grounding_dino", lambda kind: kind(CONFIG, 4), CROSS),
            "MMGroundingDinoMultiheadAttention": ("mm_grounding_dino", lambda kind: kind(CONFIG, 4), CROSS),
            "OmDetTurboMultiheadAttention": ("omdet_turbo", lambda kind: kind(CONFIG, 32, 4, 0.1), CROSS),
            "ZoeDepthMultiheadAttention": ("zoedepth", lambda kind: kind(32, 4, 0.1), CROSS),
            "BlipTextSelfAttention": ("blip.modeling_blip_text", lambda kind: kind(CONFIG, True), ENCODER),
            "TvpAttention": ("tvp", lambda kind: kind(CONFIG), {"hidden_states": (7, 32), "attention_mask": additive(7)}),
            "ClapAudioSelfAttention": ("clap", lambda kind: kind(CONFIG, 32, 4, 2), WINDOWS),
            "MaskFormerSwinSelfAttention": ("maskformer.modeling_maskformer_swin", lambda kind: kind(CONFIG, 32, 4, 2), WINDOWS),
            "GotOcr2VisionAttention": ("got_ocr2", lambda kind: kind(CONFIG, 3), {"hidden_states": (3, 3, 32)}),
            "PPFormulaNetVisionAttention": ("pp_formulanet", lambda kind: kind(CONFIG, 3), {"hidden_states": (3, 3, 32)}),
            "SLANeXtVisionAttention": ("slanext", lambda kind: kind(CONFIG, 3), {"hidden_states": (3, 3, 32)}),
            "SamHQVisionAttention": ("sam_hq", lambda kind: kind(CONFIG, 3), {"hidden_states": (3, 3, 32)}),
            "DeepseekOcr2SamVisionAttention": ("deepseek_ocr2", lambda kind: kind(CONFIG, 3), {"hidden_states": (3, 3, 32)}),
            "UnlimitedOcrSamVisionAttention": ("unlimited_ocr", lambda kind: kind(CONFIG, 3), {"hidden_states": (3, 3, 32)}),
        }[name]
        path = path if "." in path else f"{path}.modeling_{path}"
        model = build(getattr(importlib.import_module(f"transformers.models.{path}"), name))
        return model, {k: v if isinstance(v, Tensor) else pixels(*v) for k, v in inputs.items()}, 1

    make.__name__ = name
    return make


MODELS = [
    lxmert, vilt, visual_bert, flava, blip, blip_retrieval, git, perceiver, layoutlmv3, mpnet, rembert, megatron_bert, tapas,
    trocr, groupvit_text, mobilevit, donut, timesformer, mgp_str, sam,
]  # fmt: skip
MODULES = [
    "BlipTextSelfAttention",
    "GroundingDinoMultiheadAttention", "MMGroundingDinoMultiheadAttention", "OmDetTurboMultiheadAttention",
    "ZoeDepthMultiheadAttention", "TvpAttention", "ClapAudioSelfAttention", "MaskFormerSwinSelfAttention",
    "GotOcr2VisionAttention", "PPFormulaNetVisionAttention", "SLANeXtVisionAttention", "SamHQVisionAttention",
    "DeepseekOcr2SamVisionAttention", "UnlimitedOcrSamVisionAttention",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [*MODELS, *map(of_class, MODULES)], ids=lambda make: make.__name__)
@torch.no_grad()
def test_a_model_gives_the_same_and_every_attention_is_one_call(make: Callable[[], Made], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs, calls = make()
    lively(model).eval().to(dtype)
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    torch.manual_seed(1)  # ViLT draws which padding it keeps
    expected = model(**inputs)
    torch.manual_seed(1)
    with replaced(model) as watch:
        outputs = model(**inputs)
    if make.__name__ in MODULES and isinstance(outputs, tuple) and outputs[1:] == (None,):
        expected = expected[0]  # the other one is the map
    # SAM's eager attention takes its softmax in float32 whatever the model's dtype.
    single = any(hasattr(module, "use_rel_pos") for module in model.modules())
    assert_equal(outputs, expected, torch.float32 if single else dtype)
    assert len([name for name in watch.names if name == SDPA.__name__]) == calls
    assert sum("softmax" in name for name in watch.names) == (3 if make is git else 0)  # nothing by hand is left


def test_lxmert_calls_one_module_twice_in_turn() -> None:
    torch.manual_seed(0)
    model, inputs, _ = lxmert()
    with torch.no_grad(), replaced(model.eval()) as watch:
        model(**inputs)
    cross, language, vision = [(2, 4, 7, 5), (2, 4, 5, 7)], (2, 4, 7, 7), (2, 4, 5, 5)
    assert watch.shapes == [language, vision, *[*cross, language, vision] * 2]


@torch.no_grad()
def test_a_cache_goes_on_where_it_stopped() -> None:
    torch.manual_seed(0)
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
        assert watch.shapes[-1][2] == 3


@torch.no_grad()
def test_generation_by_blip_is_the_same() -> None:
    torch.manual_seed(0)
    model, inputs, _ = blip()
    lively(model).eval()
    inputs = dict(inputs, max_new_tokens=4, min_new_tokens=4)
    expected = model.generate(**inputs)
    with replaced(model):
        assert torch.equal(model.generate(**inputs), expected)


def test_gradients_are_the_same() -> None:
    torch.manual_seed(0)
    model, inputs, _ = layoutlmv3()
    lively(model).eval().double()
    inputs["pixel_values"] = inputs["pixel_values"].double().requires_grad_()
    grads = []
    for context in (contextlib.nullcontext(), replaced(model)):
        with context:
            model(**inputs).last_hidden_state.square().sum().backward()
        grads.append(inputs["pixel_values"].grad)
        inputs["pixel_values"].grad = None
    assert (grads[0] - grads[1]).abs().max() <= 1e-11 * grads[0].abs().max()


# --- torch.nn.MultiheadAttention ---

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
    torch.manual_seed(0)
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
    torch.manual_seed(0)
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
    torch.manual_seed(0)
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


# --- what is refused, and what is left alone ---


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
    with replaced(model), pytest.raises(ValueError, match="must give MPNetSelfAttention float masks.*; got one of torch.bool"):
        attention(torch.randn(2, 7, 32), torch.ones(2, 1, 1, 7, dtype=torch.bool))


def test_a_forward_of_somebody_else_is_refused_and_kept() -> None:
    model, _, _ = visual_bert()
    attention = model.encoder.layer[1].attention.self
    attention.forward = kept = lambda *args: None
    with pytest.raises(ValueError, match="in 'encoder.layer.1.attention.self' .VisualBertSelfAttention.; got one of its own"):
        with overridden(replacements(model)):
            pass
    assert attention.forward is kept
    assert "forward" not in vars(model.encoder.layer[0].attention.self)


def test_runs_over_one_model_overlap() -> None:
    model, _, _ = visual_bert()
    attention = model.encoder.layer[0].attention.self
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
            signatures = [inspect.signature(f).parameters.values() for f in (kind.forward, _TRANSFORMERS[name])]
            theirs, ours = ([(p.name, p.kind, p.default) for p in parameters][1:] for parameters in signatures)
            assert ours == theirs, name
        seen |= names
    assert seen == set(_TRANSFORMERS)
