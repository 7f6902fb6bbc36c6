"""Small random decoders with prompts, images and the places of the maps that they have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as t

from tests.helpers.interpret.cases import Case, TowerCase, attention_mask, last_real_row
from tests.helpers.releases import LLAMA4_FAILS

IMAGE, VOCABULARY = 98, 99
IDS = dict(vocab_size=VOCABULARY, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GPT = dict(IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
LLAMA = dict(GPT, model_type="llama", num_key_value_heads=2, head_dim=8)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
OPT = dict(IDS, model_type="opt", hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32)
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
    summed: str | None = "post_attention_layernorm"  # None: no module is fed with the sum of stream and attention

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

    def case(self, inputs: dict[str, Any], token: int | None = None) -> Case:
        """The score is the last real position's logit of a token, or its largest one."""
        second, branch = self.summed or self.attention, self.summed is None
        tower = TowerCase(self.layers, "", second, last_real_row, attention_mask, branch=branch)
        score = lambda o, i: next_logits(o, i).max(-1).values if token is None else next_logits(o, i)[:, token]  # noqa: E731
        return Case(self.model, inputs, {"language": tower}, score)


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


def blip2(kind: str = "Blip2", words: dict[str, Any] = OPT, **more: Any) -> Decoder:
    config = getattr(t, f"{kind}Config")(
        vision_config=VISION, qformer_config=Q_FORMER, text_config=words, num_query_tokens=4, image_token_index=IMAGE
    )
    over_opt = words is OPT
    layers = "language_model.model.decoder.layers" if over_opt else "language_model.model.layers"
    model = getattr(t, f"{kind}ForConditionalGeneration")(config)
    summed = None if over_opt else "post_attention_layernorm"
    return Decoder(model, two_images(4), {**pixels(2), **more}, vision="vision_model", layers=layers, summed=summed)


def instructblip(words: dict[str, Any] = OPT) -> Decoder:
    ones = torch.ones(2, 5, dtype=torch.long)
    return blip2("InstructBlip", words, qformer_input_ids=torch.randint(3, 29, (2, 5)), qformer_attention_mask=ones)


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


def text(kind: str, layers: str = "model.layers", name: str = "{}ForCausalLM", parts: Any = LLAMA, **options: Any) -> Decoder:
    places = {key: options.pop(key) for key in ("attention", "summed") if key in options}
    config = getattr(t, f"{kind}Config")(**{key: value for key, value in parts.items() if key != "model_type"}, **options)
    model = getattr(t, name.format(kind))(config)
    return Decoder(model, [[1, *words(9)], [1, *words(5, 30)]], {}, layers=layers, **places)


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
    **({} if LLAMA4_FAILS else {"Llama4ForConditionalGeneration": llama4}),
    "Blip2ForConditionalGeneration": blip2,
    "InstructBlipForConditionalGeneration": instructblip,
    "instructblip over llama": lambda: instructblip(LLAMA),
    "Idefics2ForConditionalGeneration": idefics2,
    "LlamaForCausalLM": lambda: text("Llama"),
    "Llama4ForCausalLM": lambda: text("Llama4Text", name="Llama4ForCausalLM", parts=LLAMA4),
    "MistralForCausalLM": lambda: text("Mistral", sliding_window=4),
    "Qwen2ForCausalLM": lambda: text("Qwen2"),
    "Qwen3ForCausalLM": lambda: text("Qwen3"),
    "GemmaForCausalLM": lambda: text("Gemma"),
    "Gemma2ForCausalLM": lambda: text("Gemma2", sliding_window=4, attn_logit_softcapping=0.3, **GEMMA),
    "Gemma3ForCausalLM": lambda: text("Gemma3Text", name="Gemma3ForCausalLM", sliding_window=4, **GEMMA),
    "PhiForCausalLM": lambda: text("Phi", parts=GPT, num_key_value_heads=4, summed=None),
    "GPT2LMHeadModel": lambda: text("GPT2", "transformer.h", "{}LMHeadModel", GPT, attention="attn", summed="ln_2"),
    "OPTForCausalLM": lambda: text("OPT", "model.decoder.layers", parts=OPT, summed=None),
    "GPTNeoXForCausalLM": lambda: text("GPTNeoX", "gpt_neox.layers", parts=GPT, attention="attention", summed=None),
}


every = pytest.mark.parametrize("decoder", DECODERS, indirect=True)


def next_logits(outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """(B, vocabulary) at the last real position."""
    last = last_real_row(inputs, inputs["input_ids"].shape[1]).to(outputs.logits)
    return (outputs.logits * last[..., None]).sum(1)
