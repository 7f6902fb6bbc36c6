"""A small model of each kind, and samples of unequal lengths, for the properties in tests/interpret/properties/.

`@every(...)` runs a test for each method on each of these models. A method that is registered is asked without a line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.image_to_text import image_to_text, pictures
from vlattn_fast.interpret import Explanation
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.methods.registry import ABLATIONS, METHODS, with_options
from vlattn_fast.models.uniter import UNITER, UNITERConfig

WORDS, IMAGE = 40, 39  # ids, the last one of which stands for a part of an image
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(SIZES, vocab_size=WORDS, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(TEXT, num_key_value_heads=1, head_dim=8, max_position_embeddings=32)
VISION = dict(SIZES, image_size=8, patch_size=4)
OPT = dict(TEXT, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32)
SIDES = ("right", "left")


@dataclass(frozen=True)
class Small:
    """A model, and what differs from kind to kind.

    Args:
        samples: inputs of one sample each, without padding and masks.
        masks: the names of the masks that say which tokens are real, each with the inputs that it is of.
        real: of each tower, the masks of its tokens in order; a number stands for as many tokens without a mask.
        sides: where a batch may have its padding.
        options: arguments of `explain`.
        causal: the input of ids whose later tokens do not matter, and the towers that have them.
        positions: whether it is told its positions, which padding on the left shifts.
        dtype: float32 if the model computes in it anyway.
    """

    model: nn.Module
    samples: list[dict[str, Tensor]]
    masks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    real: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    sides: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    causal: tuple[str, tuple[str, ...]] | None = None
    positions: bool = False
    dtype: torch.dtype = torch.float64

    def batch(self, order: Sequence[int] = (0, 1), side: str = "right", more: int = 0, filler: int = 0) -> dict[str, Tensor]:
        """The samples in this order; those that are shorter, or all by `more` tokens, are padded with `filler`."""
        chosen = [dict(self.samples[i]) for i in order]
        inputs: dict[str, Tensor] = {}
        for mask, names in self.masks.items():
            lengths = [len(each[names[0]][0]) for each in chosen]
            size = max(lengths) + more
            for each, length in zip(chosen, lengths, strict=True):
                each[mask] = padded(torch.ones(1, length, dtype=torch.long), size, side, 0)
                each.update({name: padded(each[name], size, side, filler) for name in names})
        for name in chosen[0]:
            inputs[name] = torch.cat([each[name] for each in chosen])
        if self.positions:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if isinstance(self.model, UNITER):
            inputs |= {name: inputs[name].bool() for name in self.masks}
        return inputs

    def explain(self, inputs: dict[str, Tensor], method: Method, **options: Any) -> Explanation:
        options = {**self.options, **options}
        if method.takes_logits or not method.uses_position:
            options.pop("position", None)
        return va.explain(self.model, inputs, method=method, **options)

    def real_tokens(self, tower: str, inputs: dict[str, Tensor], size: int) -> Tensor:
        """bool (B, N), of the tokens of a tower."""
        count = len(next(iter(inputs.values())))
        parts = [
            torch.ones(count, name, dtype=torch.bool) if isinstance(name, int) else inputs[name].bool()
            for name in self.real.get(tower, (size,))
        ]
        return torch.cat(parts, 1)


def padded(x: Tensor, size: int, side: str, filler: int) -> Tensor:
    shape = (x.shape[0], size - x.shape[1], *x.shape[2:])
    more = torch.full(shape, filler, dtype=x.dtype)
    return torch.cat([x, more] if side == "right" else [more, x], 1)


def ids(*lengths: int, first: int | None = None, last: int | None = None, image: int = 0) -> list[dict[str, Tensor]]:
    """Texts of these lengths; `image` tokens of each stand for an image."""
    texts = []
    for length in lengths:
        text = torch.randint(4, 30, (1, length))
        text[:, 1 : 1 + image] = IMAGE
        if first is not None:
            text[:, 0] = first
        if last is not None:
            text[:, -1] = last
        texts.append({"input_ids": text})
    return texts


def beside(samples: list[dict[str, Tensor]], name: str, *shape: int) -> list[dict[str, Tensor]]:
    """The samples, each with random numbers of a shape."""
    return [{**each, name: torch.randn(1, *shape)} for each in samples]


class Pooled(nn.Module):
    """Torch's own layers over words, without an adapter, whose mean is classified. Only its attention knows its mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.embed, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, seen: Tensor) -> Tensor:
        real = seen.bool()
        states = self.encoder(self.embed(input_ids), src_key_padding_mask=~real)
        mean: Tensor = states.masked_fill(~real[..., None], 0.0).sum(1) / real.sum(1, keepdim=True)
        return self.head(mean)


TEXTS = {"attention_mask": ("input_ids",)}
OF_TEXT = {"text": ("attention_mask",)}
OF_IDS = {"tower0": ("attention_mask",), "input_ids": ("attention_mask",)}  # without an adapter
DECODER = dict(masks=TEXTS, real={"language": ("attention_mask",)}, sides=SIDES, options={"target": 7})
CAUSAL = ("input_ids", ("language",))
OF_DECODER = ("decoder_input_ids", ("tower1", "decoder_input_ids"))


def bert() -> Small:
    model = t.BertForSequenceClassification(t.BertConfig(**TEXT, num_labels=3, max_position_embeddings=16))
    return Small(model, ids(7, 4, first=2, last=3), TEXTS, OF_TEXT, ("right",), {"target": 1})


def pooled() -> Small:
    options = {"target": lambda outputs: outputs[:, 1], "position": "mean"}
    real = {"tower0": ("seen",), "input_ids": ("seen",)}  # by attention, and by embeddings
    return Small(Pooled(), ids(6, 4), {"seen": ("input_ids",)}, real, SIDES, options)


def vit() -> Small:
    model = t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=3))
    return Small(model, beside([{}, {}], "pixel_values", 3, 8, 8), options={"target": 1})


def clip() -> Small:
    text = dict(TEXT, max_position_embeddings=16, bos_token_id=37, eos_token_id=38)  # older configs have 2 for the largest id
    config = t.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    samples = beside(ids(7, 4, first=37, last=38), "pixel_values", 3, 8, 8)
    return Small(t.CLIPModel(config), samples, TEXTS, OF_TEXT, ("right",))


def siglip2() -> Small:
    """Images of unequal sizes, before a pooling head."""
    vision = dict(SIZES, patch_size=2, num_patches=9)
    config = t.Siglip2Config(text_config=dict(TEXT, max_position_embeddings=7, projection_size=16), vision_config=vision)
    shapes = torch.tensor([[[2, 4]], [[3, 2]]])
    samples = [
        {**text, "pixel_values": torch.randn(1, int(shape.prod()), 12), "spatial_shapes": shape}
        for text, shape in zip(ids(7, 7), shapes, strict=True)
    ]
    masks = {"pixel_attention_mask": ("pixel_values",)}
    return Small(t.Siglip2Model(config), samples, masks, {"vision": ("pixel_attention_mask",)}, ("right",))


def uniter() -> Small:
    config = UNITERConfig(**SIZES, vocab_size=WORDS, max_position_embeddings=16, region_dim=5, position_dim=7)
    samples = [
        {**text, "region_features": torch.randn(1, count, 5), "region_positions": torch.rand(1, count, 7)}
        for text, count in zip(ids(7, 4, first=2, last=3), (2, 4), strict=True)
    ]
    masks = {**TEXTS, "region_mask": ("region_features", "region_positions")}
    return Small(UNITER(config), samples, masks, {"joint": ("attention_mask", "region_mask")}, ("right",), {"target": 1})


def lxmert() -> Small:
    layers = dict(l_layers=1, x_layers=2, r_layers=1, visual_feat_dim=5, max_position_embeddings=16)
    sizes = {name: value for name, value in SIZES.items() if name != "num_hidden_layers"}
    model = t.LxmertForQuestionAnswering(t.LxmertConfig(**sizes, **layers, vocab_size=WORDS, num_qa_labels=3))
    samples = [
        {**text, "visual_feats": torch.randn(1, count, 5), "visual_pos": torch.rand(1, count, 4)}
        for text, count in zip(ids(7, 4, first=2, last=3), (5, 7), strict=True)
    ]
    masks = {**TEXTS, "visual_attention_mask": ("visual_feats", "visual_pos")}
    real = {"text": ("attention_mask",), "vision": ("visual_attention_mask",)}
    return Small(model, samples, masks, real, SIDES[:1], {"target": 1})


def t5() -> Small:
    sizes = dict(d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, vocab_size=WORDS, decoder_start_token_id=0)
    model = t.T5ForConditionalGeneration(t.T5Config(**sizes))
    samples = [{**text, "decoder_input_ids": torch.randint(4, 30, (1, 4))} for text in ids(6, 4)]
    options = {"position": "last", "target": lambda outputs: outputs.logits[:, -1, 7]}
    return Small(model, samples, TEXTS, OF_IDS, SIDES, options, OF_DECODER, dtype=torch.float32)


def llama() -> Small:
    model = t.LlamaForCausalLM(t.LlamaConfig(**LLAMA))
    return Small(model, ids(7, 4), **DECODER, causal=CAUSAL, positions=True)


def gemma2() -> Small:
    """Sliding windows, and a softcap of the scores."""
    config = t.Gemma2Config(**LLAMA, sliding_window=5, attn_logit_softcapping=0.5, query_pre_attn_scalar=8)
    return Small(t.Gemma2ForCausalLM(config), ids(7, 4), **DECODER, causal=CAUSAL, positions=True, dtype=torch.float32)


def gpt_oss() -> Small:
    """Learnt sinks."""
    config = t.GptOssConfig(**LLAMA, sliding_window=4, num_local_experts=2, num_experts_per_tok=1)
    config._experts_implementation = "eager"
    return Small(t.GptOssForCausalLM(config), ids(7, 4), **DECODER, causal=CAUSAL, positions=True)


def qwen3_next() -> Small:
    """A layer that recurs, before one that attends."""
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 1}
    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    config = t.Qwen3NextConfig(**LLAMA, **linear, **experts, layer_types=["linear_attention", "full_attention"])
    config._experts_implementation = "eager"
    return Small(t.Qwen3NextForCausalLM(config), ids(7, 4), **DECODER, causal=CAUSAL, positions=True, dtype=torch.float32)


def llava() -> Small:
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**LLAMA), image_token_index=IMAGE
    )
    samples = beside(ids(9, 6, image=4), "pixel_values", 3, 8, 8)
    return Small(t.LlavaForConditionalGeneration(config), samples, **DECODER, causal=CAUSAL, positions=True)


def blip2() -> Small:
    """Learnt queries that look at an image."""
    former = dict(SIZES, encoder_hidden_size=16, vocab_size=WORDS)
    config = t.Blip2Config(
        vision_config=VISION,
        qformer_config=former,
        text_config=dict(OPT, model_type="opt"),
        num_query_tokens=3,
        image_token_index=IMAGE,
    )
    samples = beside(ids(8, 6, image=3), "pixel_values", 3, 8, 8)
    return Small(t.Blip2ForConditionalGeneration(config), samples, **DECODER)


def captioner() -> Small:
    """A picture's encoder and a causal decoder of torch's own layers."""
    samples = [{"images": pictures(2)[i : i + 1], "decoder_input_ids": torch.randint(4, 30, (1, 5))} for i in range(2)]
    options = {"position": "last", "target": lambda outputs: outputs[:, -1, 7]}
    return Small(image_to_text(), samples, options=options, causal=OF_DECODER)


def whisper() -> Small:
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, d_model=16)
    sizes = dict(encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=60, num_mel_bins=4, max_source_positions=5)
    ends = dict(decoder_start_token_id=50, bos_token_id=2, eos_token_id=2, pad_token_id=3)
    samples = beside([{"decoder_input_ids": torch.randint(4, 30, (1, 4))} for _ in range(2)], "input_features", 4, 10)
    options = {"position": "last", "target": lambda outputs: outputs.logits[:, -1, 7]}
    model = t.WhisperForConditionalGeneration(t.WhisperConfig(**layers, **sizes, **ends))
    return Small(model, samples, options=options, causal=OF_DECODER)


MODELS: dict[str, Callable[[], Small]] = {
    make.__name__: make
    for make in (
        *(bert, pooled, vit, clip, siglip2, uniter, lxmert, t5, llama, gemma2, gpt_oss, qwen3_next, llava, blip2, captioner),
        whisper,
    )
}
SEEDS = dict(clip=1, siglip2=7, uniter=2, lxmert=1, t5=1, llama=1, gemma2=1, qwen3_next=1, captioner=12)  # no map is all zeros
BETWEEN = {"lxmert", "t5", "captioner", "whisper"}  # their towers attend to one another
DECODERS = {"llama", "gemma2", "gpt_oss", "qwen3_next", "llava", "blip2"}
REFUSED: dict[str, set[str]] = {  # the models that a method refuses; without a line, a method must explain all
    "glimpse": BETWEEN | {"qwen3_next"},
    "tam": {*MODELS} - DECODERS,
    **dict.fromkeys(("gradient:no_normalization", "gradient:no_self_attention", "rollout:one_hot"), {*MODELS} - BETWEEN),
}
OPTIONS: dict[str, dict[str, Any]] = {  # the noise is drawn for a whole batch
    "integrated_gradients": {"n_steps": 2},
    "smoothgrad": {"n_samples": 2, "noise": 0.0},
}
QUICK = ("pooled", "t5", "llava")
UNLIKE = {("occlusion", "blip2"), ("occlusion", "siglip2"), ("occlusion", "clip")}  # which other pairs do not stand for
Without = Mapping[str | tuple[str, str], str]


def every(*models: str, quick: Sequence[str] = QUICK, without: Without | None = None) -> pytest.MarkDecorator:
    """The test runs for each method on each model, or on these. `without` says of methods, of models, or of pairs why they do not
    have the property. `make test` has all methods on the models `quick`, each method on one, and unless `quick` is given,
    "gradient" on all."""
    models, without = models or tuple(MODELS), without or {}
    every_pair = [(method, model) for method in {**METHODS, **ABLATIONS} for model in models]
    pairs = [pair for pair in every_pair if pair[1] not in REFUSED.get(pair[0], ()) and not {*pair, pair} & {*without}]
    first = {method: next(model for model in (*quick, *models) if (method, model) in pairs) for method, _ in pairs}

    def is_quick(method: str, model: str) -> bool:
        if model == first[method] or (model in quick and method in METHODS):
            return True
        return quick is QUICK and (method == "gradient" or (method, model) in UNLIKE)

    rows = [
        pytest.param(method, model, id=f"{method}-{model}", marks=[] if is_quick(method, model) else pytest.mark.slow)
        for method, model in pairs
    ]
    return pytest.mark.parametrize(("method", "model"), rows)


def made(name: str) -> Small:
    """In eval mode."""
    torch.manual_seed(SEEDS.get(name, 0))
    small = MODELS[name]()
    lively(small.model).eval().to(small.dtype)
    samples = [{key: x.to(small.dtype) if x.is_floating_point() else x for key, x in each.items()} for each in small.samples]
    return replace(small, samples=samples)


def method_named(name: str, **options: Any) -> Method:
    return with_options(name, **OPTIONS.get(name, {}), **options)


BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest entry


def assert_close(got: Tensor, expected: Tensor, what: Any, least: float = 0.0) -> None:
    assert got.shape == expected.shape, what
    bound = BOUNDS[expected.dtype] * max(float(expected.abs().max()), least)
    assert (got - expected).abs().max() <= bound, f"{what}: {got} is not {expected}"
