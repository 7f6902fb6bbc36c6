"""Decoders, most of which see images: `explain` against stored maps, and where their image tokens lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch  # noqa: E402
import transformers as t  # noqa: E402

from tests.interpret.cases import Case, TowerCase, attention_mask, in_double, last_real_row, lively, one_sample, published  # noqa: E402
from vlattn_fast.interpret import FAMILIES, explain  # noqa: E402
from vlattn_fast.interpret.readout import image_maps  # noqa: E402

IMAGE, VOCABULARY = 98, 99
LLAMA = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCABULARY,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
OPT = dict(
    model_type="opt",
    hidden_size=32,
    ffn_dim=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    word_embed_proj_dim=32,
    vocab_size=VOCABULARY,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
Q_FORMER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, encoder_hidden_size=32, vocab_size=30
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Map:
    """One map of an image: the tiles that it shows, by their index among all, and a part of the cells.

    Args:
        row: of the batch.
        tiles: index of each tile, in rows and columns.
        shape: cells of a tile.
        cut: first row and column of cells that the map has; others are padding.
    """

    row: int
    tiles: list[list[int]]
    shape: tuple[int, int] = (4, 4)
    cut: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Decoder:
    model: torch.nn.Module
    prompts: list[list[int]]
    images: dict[str, Any]
    maps: list[Map] | None = None
    vision: str = "model.vision_tower"
    of_prompt: Callable[[torch.Tensor], dict[str, Any]] = lambda ids: {}
    layers: str = "model.language_model.layers"
    attention: str = "self_attn"
    summed: str | None = "post_attention_layernorm"

    def inputs(self, side: str = "right") -> dict[str, Any]:
        """The prompts, padded on one side."""
        size = max(len(prompt) for prompt in self.prompts)
        rows, masks = [], []
        for prompt in self.prompts:
            pad = [0] * (size - len(prompt))
            ones = [1] * len(prompt)
            rows.append(pad + prompt if side == "left" else prompt + pad)
            masks.append(pad + ones if side == "left" else ones + pad)
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": torch.tensor(masks), **self.images, **self.of_prompt(ids)}

    def case(self, inputs: dict[str, Any]) -> Case:
        tower = TowerCase(self.layers, self.attention, "", self.summed or "", last_real_row, attention_mask)
        return Case(self.model, inputs, {"language": tower}, lambda o, i: next_logits(o, i).max(-1).values)


def words(count: int, start: int = 3) -> list[int]:
    """Ids that differ."""
    return list(range(start, start + count))


def image(count: int) -> list[int]:
    return [IMAGE] * count


def two_images(tokens: int) -> list[list[int]]:
    return [[1, 5, *image(tokens), *words(5, 20)], [1, *image(tokens), *words(2, 40)]]


def own(shape: tuple[int, int], count: int = 2) -> list[Map]:
    """One map a row, of one tile."""
    return [Map(i, [[i]], shape) for i in range(count)]


def pixels(*shape: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(*shape, 3, 32, 32)}


# --- one token a patch, or a square of patches ---


def llava() -> Decoder:
    config = t.LlavaConfig(vision_config=t.CLIPVisionConfig(**VISION), text_config=LLAMA, image_token_index=IMAGE)
    return Decoder(t.LlavaForConditionalGeneration(config), two_images(16), pixels(2), own((4, 4)))


def paligemma() -> Decoder:
    config = t.PaliGemmaConfig(
        vision_config=dict(VISION, model_type="siglip_vision_model", projection_dim=32),
        text_config=dict(LLAMA, model_type="gemma"),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    # Without these, transformers' eager attention is causal and its SDPA is not, unless a prompt is padded.
    types = lambda ids: {"token_type_ids": torch.zeros_like(ids)}  # noqa: E731
    return Decoder(t.PaliGemmaForConditionalGeneration(config), two_images(16), pixels(2), own((4, 4)), of_prompt=types)


def gemma3() -> Decoder:
    config = t.Gemma3Config(
        vision_config=dict(VISION, model_type="siglip_vision_model", patch_size=4),
        text_config=dict(LLAMA, model_type="gemma3_text", sliding_window=8, query_pre_attn_scalar=8),
        image_token_index=IMAGE,
        boi_token_index=96,
        eoi_token_index=97,
        mm_tokens_per_image=4,
    )
    # Two images in the first prompt, as crops of one are.
    prompts = [[1, 5, 96, *image(4), 97, 6, 96, *image(4), 97, *words(5, 20)], [1, 96, *image(4), 97, *words(2, 40)]]
    maps = [Map(0, [[0]], (2, 2)), Map(0, [[1]], (2, 2)), Map(1, [[2]], (2, 2))]
    types = lambda ids: {"token_type_ids": (ids == IMAGE).long()}  # noqa: E731
    model = t.Gemma3ForConditionalGeneration(config)
    return Decoder(model, prompts, pixels(3), maps, of_prompt=types, summed="pre_feedforward_layernorm")


def mistral3() -> Decoder:
    config = t.Mistral3Config(
        vision_config=dict(VISION, model_type="pixtral", head_dim=8),
        text_config=dict(LLAMA, model_type="mistral"),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    images = {"pixel_values": torch.randn(2, 3, 32, 32), "image_sizes": torch.tensor([[16, 32], [32, 32]])}
    prompts = [[1, 5, *image(2), 97, *words(5, 20)], [1, *image(2), 96, *image(2), 97, *words(2, 40)]]
    model = t.Mistral3ForConditionalGeneration(config)
    return Decoder(model, prompts, images, [Map(0, [[0]], (1, 2)), Map(1, [[1]], (2, 2))])


def pixtral() -> Decoder:
    config = t.LlavaConfig(
        vision_config=dict(VISION, model_type="pixtral", head_dim=8),
        text_config=dict(LLAMA, model_type="mistral"),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    images = {"pixel_values": torch.randn(2, 3, 32, 32), "image_sizes": torch.tensor([[16, 32], [32, 24]])}
    rows = [96, *image(4)], [96, *image(3)]
    prompts = [[1, 5, *rows[0] * 2, *words(5, 20)], [1, *rows[1] * 4, *words(2, 40)]]
    return Decoder(t.LlavaForConditionalGeneration(config), prompts, images, [Map(0, [[0]], (2, 4)), Map(1, [[1]], (4, 3))])


def qwen(kind: str, **vision: Any) -> Decoder:
    parts = dict(depth=2, hidden_size=32, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, **vision)
    config = getattr(t, f"{kind}Config")(
        text_config=dict(LLAMA, model_type=None, rope_parameters=ROPE),
        vision_config=parts,
        image_token_id=IMAGE,
        video_token_id=97,
        vision_start_token_id=95,
        vision_end_token_id=96,
    )
    images = {"pixel_values": torch.randn(64, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 8], [1, 8, 4]])}
    prompts = [[1, 95, *image(8), 96, *words(5, 20)], [1, 95, *image(8), 96, *words(2, 40)]]
    types = lambda ids: {"mm_token_type_ids": (ids == IMAGE).int()}  # noqa: E731
    model = getattr(t, f"{kind}ForConditionalGeneration")(config)
    maps = [Map(0, [[0]], (2, 4)), Map(1, [[1]], (4, 2))]
    return Decoder(model, prompts, images, maps, vision="model.visual", of_prompt=types)


def qwen2_vl() -> Decoder:
    return qwen("Qwen2VL", embed_dim=32, mlp_ratio=2)


def qwen2_5_vl() -> Decoder:
    return qwen("Qwen2_5_VL", intermediate_size=48, window_size=16, out_hidden_size=32, fullatt_block_indexes=[1])


def qwen3_vl() -> Decoder:
    return qwen("Qwen3VL", intermediate_size=48, out_hidden_size=32, deepstack_visual_indexes=[0], num_position_embeddings=16)


# --- tiles and thumbnails ---


def idefics3(kind: str = "Idefics3") -> Decoder:
    config = getattr(t, f"{kind}Config")(vision_config=dict(VISION), text_config=LLAMA, image_token_id=IMAGE, scale_factor=2)
    tile = lambda label: [90, label, *image(4)]  # noqa: E731
    tiled = [*tile(81), *tile(82), *tile(83), 89, *tile(84), *tile(85), *tile(86), 88, *tile(80), 90]
    prompts = [[1, *tiled, *words(5, 20)], [1, 5, *tile(80), 90, 6, *tile(80), 90, *words(2, 40)]]
    images = pixels(2, 7)
    images["pixel_values"][1, 2:] = 0.0  # what pads a prompt with fewer tiles
    maps = [Map(0, [[0, 1, 2], [3, 4, 5]], (2, 2)), Map(0, [[6]], (2, 2)), Map(1, [[7]], (2, 2)), Map(1, [[8]], (2, 2))]
    model = getattr(t, f"{kind}ForConditionalGeneration")(config)
    return Decoder(model, prompts, images, maps, vision="model.vision_model", layers="model.text_model.layers")


def smolvlm() -> Decoder:
    return idefics3("SmolVLM")


def internvl() -> Decoder:
    config = t.InternVLConfig(
        vision_config=dict(VISION, image_size=[32, 32], patch_size=[8, 8]),
        text_config=dict(LLAMA, model_type="qwen2"),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    prompts = [[1, 5, *image(12), *words(5, 20)], [1, *image(4), *words(2, 40)]]
    maps = [Map(int(i == 3), [[i]], (2, 2)) for i in range(4)]
    return Decoder(t.InternVLForConditionalGeneration(config), prompts, pixels(4), maps)


def llava_next() -> Decoder:
    config = t.LlavaNextConfig(
        vision_config=dict(VISION, model_type="clip_vision_model"),
        text_config=LLAMA,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    # The first fills its two tiles. The second fills 8 x 6 cells of four tiles, in the middle.
    images = {**pixels(2, 5), "image_sizes": torch.tensor([[32, 64], [100, 80]])}
    prompts = [[1, 5, *image(16 + 4 * 9), *words(5, 20)], [1, *image(16 + 8 * 7), *words(2, 40)]]
    maps = [Map(0, [[0]]), Map(0, [[1, 2]]), Map(1, [[5]]), Map(1, [[6, 7], [8, 9]], cut=(0, 1))]
    return Decoder(t.LlavaNextForConditionalGeneration(config), prompts, images, maps)


def llava_onevision() -> Decoder:
    config = t.LlavaOnevisionConfig(
        vision_config=dict(VISION, model_type="siglip_vision_model"),
        text_config=dict(LLAMA, model_type="qwen2"),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    images = {**pixels(2, 5), "image_sizes": torch.tensor([[32, 64], [80, 100]])}
    prompts = [[1, 5, *image(16 + 4 * 9), *words(5, 20)], [1, *image(16 + 6 * 9), *words(2, 40)]]
    maps = [Map(0, [[0]]), Map(0, [[1, 2]]), Map(1, [[5]]), Map(1, [[6, 7], [8, 9]], cut=(1, 0))]
    return Decoder(t.LlavaOnevisionForConditionalGeneration(config), prompts, images, maps)


LLAMA4 = dict(LLAMA, model_type=None, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=16)


def llama4() -> Decoder:
    vision = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    sizes = dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32, pixel_shuffle_ratio=0.5)
    config = t.Llama4Config(vision_config={**vision, **sizes}, text_config=LLAMA4, image_token_index=IMAGE)
    tile = image(4)
    tiled = [80, *tile, 81, *tile, 81, *tile, 82, *tile, 81, *tile, 81, *tile, 82, 83, *tile, 84]
    prompts = [[1, *tiled, *words(5, 20)], [1, 80, *tile, 82, *tile, 82, 83, *tile, 84, 80, 83, *tile, 84, *words(2, 40)]]
    maps = [Map(0, [[0, 1, 2], [3, 4, 5]], (2, 2)), Map(0, [[6]], (2, 2)), Map(1, [[7], [8]], (2, 2))]
    maps += [Map(1, [[9]], (2, 2)), Map(1, [[10]], (2, 2))]
    model = t.Llama4ForConditionalGeneration(config)
    return Decoder(model, prompts, pixels(11), maps, vision="vision_model", layers="language_model.model.layers")


# --- queries that look at the whole image ---


def blip2(kind: str = "Blip2", **more: Any) -> Decoder:
    config = getattr(t, f"{kind}Config")(
        vision_config=VISION, qformer_config=Q_FORMER, text_config=OPT, num_query_tokens=4, image_token_index=IMAGE
    )
    layers = "language_model.model.decoder.layers"
    model = getattr(t, f"{kind}ForConditionalGeneration")(config)
    return Decoder(model, two_images(4), {**pixels(2), **more}, vision="vision_model", layers=layers, summed=None)


def instructblip() -> Decoder:
    ones = torch.ones(2, 5, dtype=torch.long)
    return blip2("InstructBlip", qformer_input_ids=torch.randint(3, 29, (2, 5)), qformer_attention_mask=ones)


def idefics2() -> Decoder:
    resampler = dict(resampler_n_latents=4, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=8, num_key_value_heads=2)
    config = t.Idefics2Config(
        vision_config=VISION,
        perceiver_config=dict(hidden_size=32, **resampler),
        text_config=dict(LLAMA, model_type="mistral"),
        image_token_id=IMAGE,
    )
    layers = "model.text_model.layers"
    return Decoder(t.Idefics2ForConditionalGeneration(config), two_images(4), pixels(2, 1), layers=layers)


# --- cross-attention ---


def mllama() -> Decoder:
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=4)
    config = t.MllamaConfig(
        vision_config=dict(
            vision,
            image_size=32,
            patch_size=8,
            vision_output_dim=64,
            max_num_tiles=2,
            intermediate_layers_indices=[0],
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        ),
        text_config=dict(LLAMA, model_type=None, num_hidden_layers=4, cross_attention_layers=[1, 3]),
        image_token_index=VOCABULARY,
    )
    images = {
        **pixels(2, 1, 2),
        "aspect_ratio_ids": torch.tensor([[2], [1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
    }

    def mask(ids: torch.Tensor) -> dict[str, Any]:
        """Words see the tiles of the image in front of them."""
        after = (ids == VOCABULARY).cumsum(1)[:, :, None, None]
        return {"cross_attention_mask": after * images["aspect_ratio_mask"][:, None]}

    prompts = [[1, VOCABULARY, *words(7, 20)], [1, 5, VOCABULARY, *words(3, 40)]]
    maps = [Map(0, [[0, 1]]), Map(1, [[2]])]
    model = t.MllamaForConditionalGeneration(config)
    return Decoder(model, prompts, images, maps, vision="model.vision_model", of_prompt=mask)


# --- text alone ---


def text(kind: str, layers: str = "model.layers", name: str = "{}ForCausalLM", parts: Any = LLAMA, **options: Any) -> Decoder:
    places = {key: options.pop(key) for key in ("attention", "summed") if key in options}
    config = getattr(t, f"{kind}Config")(**{key: value for key, value in parts.items() if key != "model_type"}, **options)
    model = getattr(t, name.format(kind))(config)
    return Decoder(model, [[1, *words(9)], [1, *words(5, 30)]], {}, layers=layers, **places)


GPT = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
GEMMA = dict(summed="pre_feedforward_layernorm", query_pre_attn_scalar=8)
DECODERS: dict[str, Callable[[], Decoder]] = {
    "LlavaForConditionalGeneration": llava,
    "PaliGemmaForConditionalGeneration": paligemma,
    "Gemma3ForConditionalGeneration": gemma3,
    "Mistral3ForConditionalGeneration": mistral3,
    "pixtral": pixtral,
    "Qwen2VLForConditionalGeneration": qwen2_vl,
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl,
    "Qwen3VLForConditionalGeneration": qwen3_vl,
    "Idefics3ForConditionalGeneration": idefics3,
    "SmolVLMForConditionalGeneration": smolvlm,
    "InternVLForConditionalGeneration": internvl,
    "LlavaNextForConditionalGeneration": llava_next,
    "LlavaOnevisionForConditionalGeneration": llava_onevision,
    "Llama4ForConditionalGeneration": llama4,
    "Blip2ForConditionalGeneration": blip2,
    "InstructBlipForConditionalGeneration": instructblip,
    "Idefics2ForConditionalGeneration": idefics2,
    "LlamaForCausalLM": lambda: text("Llama"),
    "Llama4ForCausalLM": lambda: text("Llama4Text", name="Llama4ForCausalLM", parts=LLAMA4),
    "MistralForCausalLM": lambda: text("Mistral", sliding_window=4),
    "Qwen2ForCausalLM": lambda: text("Qwen2"),
    "Qwen3ForCausalLM": lambda: text("Qwen3"),
    "GemmaForCausalLM": lambda: text("Gemma"),
    "Gemma2ForCausalLM": lambda: text("Gemma2", sliding_window=4, attn_logit_softcapping=None, **GEMMA),
    "Gemma3ForCausalLM": lambda: text("Gemma3Text", name="Gemma3ForCausalLM", sliding_window=4, **GEMMA),
    "PhiForCausalLM": lambda: text("Phi", parts=GPT, num_key_value_heads=4, summed=None),
    "GPT2LMHeadModel": lambda: text("GPT2", "transformer.h", "{}LMHeadModel", GPT, attention="attn", summed="ln_2"),
    "OPTForCausalLM": lambda: text("OPT", "model.decoder.layers", parts=OPT, summed=None),
    "GPTNeoXForCausalLM": lambda: text("GPTNeoX", "gpt_neox.layers", parts=GPT, attention="attention", summed=None),
}


@pytest.fixture
def decoder(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(6)
    made = {**DECODERS, "mllama": mllama}[request.param]()
    lively(made.model).eval()
    return made


every = pytest.mark.parametrize("decoder", DECODERS, indirect=True)


def next_logits(outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """(B, vocabulary) at the last real position."""
    last = last_real_row(inputs, inputs["input_ids"].shape[1]).to(outputs.logits)
    return (outputs.logits * last[..., None]).sum(1)


def stored_maps(decoder: Decoder, inputs: dict[str, Any], token: int | None = None, form: str = "eager") -> torch.Tensor:
    """R <- R + mean_h relu(A dA) R over the stored maps of all layers (Chefer et al. 2021, equations 5 and 6): the row of the
    last real position."""
    model = decoder.model
    before = model.config._attn_implementation
    model.set_attn_implementation(form)
    maps: list[torch.Tensor] = []
    handles = [
        layer.get_submodule(decoder.attention).register_forward_hook(lambda m, a, o: maps.append(o[1]))
        for layer in model.get_submodule(decoder.layers)
    ]
    try:
        logits = next_logits(model(**inputs, use_cache=False), inputs)
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)
    score = logits.max(-1).values if token is None else logits[:, token]
    relevancy = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype).expand(len(score), -1, -1)
    for attention, gradient in zip(maps, torch.autograd.grad(score.sum(), maps), strict=True):
        relevancy = relevancy + (attention * gradient).clamp(min=0).mean(1) @ relevancy
    row = last_real_row(inputs, relevancy.shape[-1]).to(relevancy.dtype)
    return (row[:, None] @ relevancy)[:, 0].detach()


def error(row: torch.Tensor, expected: torch.Tensor, inputs: dict[str, Any]) -> float:
    """The largest difference beside the identity, as a share of the largest value there."""
    own = last_real_row(inputs, row.shape[1]).bool()
    assert row.shape == expected.shape and (expected.masked_fill(own, 0.0) != 0).sum(-1).min() > 2
    return float((row - expected).abs().max() / expected.masked_fill(own, 0.0).abs().max())


@pytest.mark.parametrize("token", [None, 7])
@pytest.mark.parametrize("side", ["right", "left"])
@every
def test_equals_stored_maps(decoder, side, token):
    inputs = decoder.inputs(side)
    got = explain(decoder.model, inputs, target=token)
    assert list(got.relevancy) == ["language"]
    assert error(got.relevancy["language"], stored_maps(decoder, inputs, token), inputs) < 1e-5


@pytest.mark.parametrize("side", ["right", "left"])
@every
def test_in_double_precision(decoder, side):
    inputs = in_double(decoder.case(decoder.inputs(side)))
    got = explain(decoder.model, inputs).relevancy["language"]
    assert got.dtype == torch.float64
    assert error(got, stored_maps(decoder, inputs, form="literal"), inputs) < 1e-10


@every
def test_weighted(decoder):
    inputs = in_double(decoder.case(decoder.inputs()))
    got = explain(decoder.model, inputs, method="weighted").relevancy["language"]
    if decoder.summed is not None:
        expected = published(decoder.case(inputs), "weighted", form="literal")["language"]
    else:
        expected = weighted_by_branch(decoder, inputs)
    assert error(got, expected, inputs) < 1e-10


def weighted_by_branch(decoder: Decoder, inputs: dict[str, Any]) -> torch.Tensor:
    """`published` for layers in which no module is fed with the sum of stream and attention: its gradient is the branch's."""
    model = decoder.model
    model.set_attn_implementation("literal")
    maps, branches, streams, handles = [], [], [], []
    for layer in model.get_submodule(decoder.layers):
        attention = layer.get_submodule(decoder.attention)
        keep = lambda m, a, o: (maps.append(o[1]), branches.append(o[0]), None)[2]  # noqa: E731
        handles.append(attention.register_forward_hook(keep))
        handles.append(layer.register_forward_pre_hook(lambda m, a: streams.append(a[0])))
    score = next_logits(model(**inputs, use_cache=False), inputs).max(-1).values
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    gradients = torch.autograd.grad(score.sum(), [*maps, *branches])
    last = last_real_row(inputs, maps[0].shape[-1]).to(score.dtype)
    result = torch.zeros_like(last)
    for b, real in enumerate(inputs["attention_mask"].bool()):
        parts = ([part[b][real].detach() for part in kind] for kind in (streams, branches, gradients[len(maps) :]))
        x, o, g = parts
        kept = ([m[b][:, real][:, :, real].detach() for m in kind] for kind in (maps, gradients[: len(maps)]))
        sums = [a + b for a, b in zip(x, o, strict=True)]
        result[b, real] = one_sample("weighted", 0, *kept, x, sums, g, last[b, real][None], None)
    return result


# --- where the image tokens lie ---


def nothing(module, query, key, value, attention_mask, **options):  # type: ignore[no-untyped-def]
    """Attention that adds nothing, so that a token is its own patches alone."""
    return torch.zeros_like(query).transpose(1, 2), None


t.AttentionInterface.register("nothing", nothing)


@every
def test_maps_are_the_image_tokens_of_their_place(decoder):
    """Each entry is of the token that depends on the pixels at its place, and on no others."""
    inputs = decoder.inputs("left")
    explanation = explain(decoder.model, inputs)
    if decoder.maps is None:
        assert explanation.image is None
        return
    assert explanation.image_rows == [image.row for image in decoder.maps]
    row = explanation.relevancy["language"]
    numbers = torch.arange(row.numel()).view(row.shape)
    record = FAMILIES[type(decoder.model).__name__].towers[0]
    maps, _ = image_maps(record, decoder.model.config, inputs, numbers)
    assert len({int(i) for positions in maps for i in positions.flatten()}) == sum(positions.numel() for positions in maps)

    check_places(decoder, inputs, maps, "inputs_embeds")
    for positions, values in zip(maps, explanation.image, strict=True):
        assert torch.equal(values, row.flatten()[positions])


def check_places(decoder: Decoder, inputs: dict[str, Any], maps: Any, states: str) -> None:
    """Each entry of `maps`, which number the tokens of `states` in the batch, depends on the pixels of its place alone."""
    decoder.model.get_submodule(decoder.vision).set_attn_implementation("nothing")
    inputs["pixel_values"] = inputs["pixel_values"].requires_grad_()
    seen = []
    language = decoder.model.get_submodule(decoder.layers.rpartition(".")[0])
    hook = language.register_forward_pre_hook(lambda m, a, k: seen.append(k[states].flatten(0, 1)), with_kwargs=True)
    decoder.model(**inputs)
    hook.remove()
    for image, positions in zip(decoder.maps or [], maps, strict=True):
        for y, x in [(y, x) for y in range(positions.shape[0]) for x in range(positions.shape[1])]:
            (grad,) = torch.autograd.grad(seen[0][positions[y, x]].abs().sum(), inputs["pixel_values"], retain_graph=True)
            assert torch.equal(grad != 0, pixels_at(decoder, image, y, x, grad)), (image, y, x)


def pixels_at(decoder: Decoder, image: Map, y: int, x: int, like: torch.Tensor) -> torch.Tensor:
    """bool, True = a pixel of the cell (y, x) of a map."""
    marked = torch.zeros_like(like, dtype=torch.bool)
    if like.ndim == 2:  # Qwen: one row a patch, block by block
        first = 32 * image.tiles[0][0] + 4 * (y * image.shape[1] + x)
        marked[first : first + 4] = True
        return marked
    y, x = y + image.cut[0], x + image.cut[1]
    (height, width), sizes = image.shape, decoder.images.get("image_sizes")
    tile = image.tiles[y // height][x // width]
    of_tile = marked.view(-1, *like.shape[-3:])[tile]
    pixels = (32, 32) if sizes is None or like.ndim > 4 else sizes[image.row].tolist()
    h, w = pixels[0] // height, pixels[1] // width
    y, x = y % height, x % width
    of_tile[:, y * h : y * h + h, x * w : x * w + w] = True
    return marked


@pytest.mark.parametrize("decoder", ["LlavaOnevisionForConditionalGeneration"], indirect=True)
def test_large_images_are_scaled_down(decoder):
    """128 x 128 pixels are 8 x 8 cells, of which the model makes 4 x 4 where it allows one tile's worth."""
    ids = torch.tensor([[1, *image(16 + 4 * 5), 7]])
    images = {**pixels(1, 5), "image_sizes": torch.tensor([[128, 128]])}
    decoder.model.config.vision_aspect_ratio = "anyres_max_1"
    got = explain(decoder.model, {"input_ids": ids, **images})
    row = got.relevancy["language"][0]
    assert torch.equal(got.image[0].flatten(), row[1:17])
    assert torch.equal(got.image[1], row[17:37].view(4, 5)[:, :4])


@pytest.mark.parametrize("decoder", ["LlavaOnevisionForConditionalGeneration"], indirect=True)
def test_several_images_are_not_tiled(decoder):
    ids = torch.tensor([[1, *image(17), 6, *image(17), 7]])
    images = {**pixels(2, 1), "image_sizes": torch.tensor([[64, 64], [32, 64]]), "batch_num_images": torch.tensor([2])}
    got = explain(decoder.model, {"input_ids": ids, **images})
    assert got.image.shape == (2, 4, 4) and got.image_rows == [0, 0]
    for found, start in zip(got.image, (1, 19), strict=True):
        assert torch.equal(found.flatten(), got.relevancy["language"][0, start : start + 16])


@pytest.mark.parametrize("decoder", ["Idefics3ForConditionalGeneration"], indirect=True)
@pytest.mark.parametrize("labels", [[80, 80, 80], [81, 82, 80], None])
def test_tiles_of_no_complete_grid_are_maps_of_their_own(decoder, labels):
    """Tiles that are all named alike, rows of different lengths, and tiles without names between them."""
    tiles = [[90, label, *image(4)] for label in labels or []]
    prompt = [1, *tiles[0], *tiles[1], 89, 90, 83, *image(4), *tiles[2], 90, 7] if labels else [1, *image(16), 7]
    got = explain(decoder.model, {"input_ids": torch.tensor([prompt]), **pixels(1, 4)})
    of_image = got.relevancy["language"][0][torch.tensor(prompt) == IMAGE]
    assert got.image.shape == (4, 2, 2) and torch.equal(got.image.flatten(), of_image)


# --- videos ---


@pytest.mark.parametrize("decoder", ["Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"], indirect=True)
def test_frames_of_videos(decoder):
    """A video of two frames in front of an image; Qwen3-VL writes words between the frames."""
    apart = [96, 7, 95] if "Qwen3" in type(decoder.model).__name__ else []
    clip = [97] * 4
    ids = torch.tensor([[1, 95, *clip, *apart, *clip, 96, 6, 95, *image(8), 96, 8]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 8]]),
        "pixel_values_videos": torch.randn(32, 96),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == 97).int(),
    }
    got = explain(decoder.model, inputs)
    assert [tuple(found.shape) for found in got.image] == [(2, 2), (2, 2), (2, 4)] and got.image_rows == [0, 0, 0]
    row = got.relevancy["language"][0]
    of_video = row[ids[0] == 97]
    for found, expected in zip(got.image, (of_video[:4], of_video[4:], row[ids[0] == IMAGE]), strict=True):
        assert torch.equal(found.flatten(), expected)


@pytest.mark.parametrize("decoder", ["LlavaOnevisionForConditionalGeneration"], indirect=True)
def test_frames_and_the_token_behind_them(decoder):
    decoder.model.config.video_token_index = 97
    ids = torch.tensor([[1, *[97] * 9, 6, 7], [1, 5, *[97] * 9, 8]])
    got = explain(decoder.model, {"input_ids": ids, "pixel_values_videos": torch.randn(2, 2, 3, 32, 32)})
    assert got.image.shape == (4, 2, 2) and got.image_rows == [0, 0, 1, 1]
    row = got.relevancy["language"]
    assert torch.equal(got.image[:2].flatten(), row[0, 1:9]) and torch.equal(got.image[2:].flatten(), row[1, 2:10])


# --- Mllama: cross-attention to the vision tower's tokens ---


def stored_cross_maps(decoder: Decoder, inputs: dict[str, Any], form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rules 6 to 10 of Chefer et al. 2021 over the stored maps: the rows of the last real position. The vision tower's own R is
    the identity, since nothing is carried on into it."""
    model = decoder.model
    model.set_attn_implementation(form)
    maps: list[torch.Tensor] = []
    layers = model.get_submodule(decoder.layers)
    handles = [
        (layer.cross_attn if hasattr(layer, "cross_attn") else layer.self_attn).register_forward_hook(
            lambda m, a, o: maps.append(o[1])
        )
        for layer in layers
    ]
    score = next_logits(model(**inputs, use_cache=False), inputs).max(-1).values
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    gradients = torch.autograd.grad(score.sum(), maps)
    size, tokens = maps[0].shape[-1], maps[1].shape[-1]
    eye = torch.eye(size, dtype=maps[0].dtype)
    r_tt, r_ti = eye.expand(2, -1, -1), torch.zeros(2, size, tokens, dtype=eye.dtype)
    for layer, attention, gradient in zip(layers, maps, gradients, strict=True):
        step = (attention * gradient).clamp(min=0).mean(1)
        if hasattr(layer, "self_attn"):
            r_tt, r_ti = r_tt + step @ r_tt, r_ti + step @ r_ti
        else:
            beside = r_tt - eye
            sums = beside.sum(-1, keepdim=True)
            normalised = torch.where(sums == 0, 0.0, beside / sums) + eye
            r_ti = r_ti + normalised.transpose(1, 2) @ step
    row = last_real_row(inputs, size).to(eye.dtype)
    text = (row[:, None] @ r_tt)[:, 0].masked_fill(row.bool(), 0.0)
    return text.detach(), (row[:, None] @ r_ti)[:, 0].detach()


@pytest.mark.parametrize("form", ["eager", "literal"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("decoder", ["mllama"], indirect=True)
def test_cross_attention_equals_stored_maps(decoder, side, form):
    inputs = decoder.inputs(side)
    if form == "literal":
        inputs = in_double(decoder.case(inputs))
    got = explain(decoder.model, inputs)
    assert list(got.relevancy) == ["language", "vision"]
    for found, expected in zip(got.relevancy.values(), stored_cross_maps(decoder, inputs, form), strict=True):
        assert (expected != 0).sum(-1).min() > 2
        assert float((found - expected).abs().max() / expected.abs().max()) < (1e-5 if form == "eager" else 1e-10)


@pytest.mark.parametrize("decoder", ["mllama"], indirect=True)
def test_cross_attention_maps_are_the_tokens_of_their_place(decoder):
    inputs = decoder.inputs()
    got = explain(decoder.model, inputs)
    assert [tuple(image.shape) for image in got.image] == [(4, 8), (4, 4)] and got.image_rows == [0, 1]
    assert got.token_ids == [words(7, 20), [5, *words(3, 40)]]
    vision = FAMILIES["MllamaForConditionalGeneration"].towers[1]
    numbers = torch.arange(2 * 34).view(2, 34)
    maps, _ = image_maps(vision, decoder.model.config, inputs, numbers)
    check_places(decoder, inputs, maps, "cross_attention_states")
    for positions, values in zip(maps, got.image, strict=True):
        assert torch.equal(values, got.relevancy["vision"].flatten()[positions])


@pytest.mark.parametrize("method", ["weighted", "rollout", "attention", "gradcam"])
@pytest.mark.parametrize("decoder", ["mllama"], indirect=True)
def test_cross_attention_takes_the_gradient_rule_alone(decoder, method):
    with pytest.raises(ValueError, match="method must be 'gradient' for towers that attend to one another"):
        explain(decoder.model, decoder.inputs(), method=method)


# --- refused ---


def test_softcap_is_refused():
    decoder = text("Gemma2", attn_logit_softcapping=50.0, query_pre_attn_scalar=8)
    with pytest.raises(ValueError, match="must not use softcap"):
        explain(decoder.model.eval(), decoder.inputs())


@pytest.mark.parametrize("decoder", ["LlavaNextForConditionalGeneration", "Idefics3ForConditionalGeneration"], indirect=True)
def test_image_tokens_that_do_not_add_up(decoder):
    inputs = decoder.inputs()
    record = FAMILIES[type(decoder.model).__name__].towers[0]
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][1, -1] = IMAGE
    with pytest.raises(ValueError, match="inputs must have .* image tokens for maps"):
        image_maps(record, decoder.model.config, inputs, torch.zeros(inputs["input_ids"].shape))


# --- batches without rows, prompts without images ---


@pytest.mark.parametrize("decoder", [*DECODERS, "mllama"], indirect=True)
def test_empty_batches(decoder):
    inputs = decoder.inputs()
    got = explain(decoder.model, {name: value[:0] for name, value in inputs.items()})
    assert got.relevancy["language"].shape == (0, inputs["input_ids"].shape[1]) and got.target == []


@every
def test_prompts_without_images(decoder):
    if "BLIP" in type(decoder.model).__name__.upper():
        return  # it must see an image
    ids = torch.tensor([[1, *words(6)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **decoder.of_prompt(ids)}
    got = explain(decoder.model, inputs)
    assert got.image is None and got.token_ids == [words(6)]
    assert error(got.relevancy["language"], stored_maps(decoder, inputs), inputs) < 1e-5
