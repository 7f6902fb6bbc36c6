"""Small random models whose attention is written out by hand, with the calls that stand for it, and who watches them."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.helpers.interpret import encoder_cases
from tests.helpers.interpret.cases import TEXT, VISION
from tests.helpers.interpret.encoder_cases import Encoder
from tests.helpers.releases import OLDER
from tools.tiny_models.inputs import inputs_of
from tools.tiny_models.shrink import small_model
from vlattn_fast.attach.handwritten import replacements
from vlattn_fast.attach.session import overridden

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


def assert_as_exact(actual: Any, expected: Any, exact: Any) -> None:
    """The root mean square of the errors of `actual` is at most twice that of `expected`, plus an ulp of the numbers."""
    numbers = [[x.double() for x in tensors(each) if x.is_floating_point()] for each in (actual, expected, exact)]
    scales = [x.abs().max() for x in numbers[2]]
    ours, usual, truth = (torch.cat([(x / y).flatten() for x, y in zip(each, scales, strict=True)]) for each in numbers)
    error, allowed = (x.sub(truth).square().mean().sqrt() for x in (ours, usual))
    assert error <= 2 * allowed + torch.finfo(torch.float32).eps


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


def blip() -> Made:
    bert = dict(TEXT, **POSITIONS, encoder_hidden_size=32, bos_token_id=1, sep_token_id=2, pad_token_id=0)
    config = transformers.BlipConfig(text_config=bert, vision_config=VISION, projection_dim=16)
    model = transformers.BlipForConditionalGeneration(config)
    return model, {**text(), "pixel_values": pixels()}, 3 + 3 * 2  # its decoder fills a cache


def rembert() -> Made:
    config = transformers.RemBertConfig(**TEXT, **POSITIONS, is_decoder=True, add_cross_attention=True, input_embedding_size=12)
    inputs = {**text(), "encoder_hidden_states": pixels(5, 32), "encoder_attention_mask": padding(2, 5)}
    return transformers.RemBertModel(config), inputs, 6


def trocr() -> Made:
    sizes = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=60)
    model = transformers.TrOCRForCausalLM(transformers.TrOCRConfig(**sizes, cross_attention_hidden_size=20, **POSITIONS))
    return model, {**text(), "encoder_hidden_states": pixels(5, 20), "encoder_attention_mask": padding(2, 5)}, 4


def donut() -> Made:
    sizes = dict(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    config = transformers.DonutSwinConfig(**sizes)  # its second layer shifts the windows, so it has a mask
    return transformers.DonutSwinModel(config), {"pixel_values": pixels(3, 32, 32)}, 4


def timesformer() -> Made:
    config = transformers.TimesformerConfig(**VISION, num_frames=2)
    return transformers.TimesformerModel(config), {"pixel_values": pixels(2, 3, 24, 24)}, 6


def of_encoder(make: Callable[[], Encoder], calls: int = 3) -> Callable[[], Made]:
    def made() -> Made:
        case = make()
        return case.model, case.inputs, calls

    made.__name__ = make.__name__
    return made


vilt, visual_bert, layoutlmv3 = map(of_encoder, (encoder_cases.vilt, encoder_cases.visual_bert, encoder_cases.layoutlmv3))
git = of_encoder(encoder_cases.git)  # and three by the attention interface, in the vision tower
flava = of_encoder(encoder_cases.flava, 9)


def of_whole(name: str, calls: int) -> Callable[[], Made]:
    """A tiny model with the inputs of `tools.tiny_models`."""

    def make() -> Made:
        model = small_model(getattr(transformers, name))
        mapping = "image-text" if name.startswith("Blip") else "text"
        return model, next(inputs_of(mapping, model))(), calls

    make.__name__ = name
    return make


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
        if OLDER:
            pytest.importorskip(f"transformers.models.{path}")
        model = build(getattr(importlib.import_module(f"transformers.models.{path}"), name))
        return model, {k: v if isinstance(v, Tensor) else pixels(*v) for k, v in inputs.items()}, 1

    make.__name__ = name
    return make


MODELS = [lxmert, vilt, visual_bert, flava, blip, git, layoutlmv3, rembert, trocr, donut, timesformer]
CALLS = {"BlipForImageTextRetrieval": 6, "PerceiverForMaskedLM": 28, "MPNetModel": 2, "MegatronBertModel": 2, "TapasModel": 2}
CALLS |= {"GroupViTTextModel": 2, "MobileViTModel": 9, "MgpstrModel": 2, "SamVisionModel": 2}
MODELS += [of_whole(name, calls) for name, calls in CALLS.items()]
MODULES = [
    "BlipTextSelfAttention",
    "GroundingDinoMultiheadAttention", "MMGroundingDinoMultiheadAttention", "OmDetTurboMultiheadAttention",
    "ZoeDepthMultiheadAttention", "TvpAttention", "ClapAudioSelfAttention", "MaskFormerSwinSelfAttention",
    "GotOcr2VisionAttention", "PPFormulaNetVisionAttention", "SLANeXtVisionAttention", "SamHQVisionAttention",
    "DeepseekOcr2SamVisionAttention", "UnlimitedOcrSamVisionAttention",
]  # fmt: skip
