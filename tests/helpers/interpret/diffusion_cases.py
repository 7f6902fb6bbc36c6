"""Small diffusion models of diffusers with random weights, and which part of their stored maps lies between picture and text."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    ChromaTransformer2DModel,
    DDIMScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

HEIGHT, WIDTH, LENGTH = 8, 12, 9  # of the latents, and of the text: 7 x 11 tokens nowhere, 96 and 24 for the picture
Cut = tuple[Tensor, tuple[int, int]]


@dataclass
class Case:
    """A network.

    Args:
        model: itself, in eval mode.
        inputs: batch=, dtype=, length= and, where it takes a mask, real= (tokens of the last row that are no padding) to keyword
            arguments of its forward pass.
        cut: (B, H, N, M) to the part between picture and text, and its grid; None for other attention.
        grids: of all layers.
        registers: tokens of its own that stand before the text.
    """

    model: Any
    inputs: Callable[..., Any]
    cut: Callable[[Tensor], Cut | None]
    grids: set[tuple[int, int]]
    registers: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return max(self.grids)


def lively(model: nn.Module) -> Any:
    """Weights so large that attention is uneven; diffusers begins some with zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and any(part in name for part in ("to_q", "to_k", "add_q", "add_k", "attn")):
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            elif parameter.ndim > 1 and not parameter.any():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def mask(batch: int, length: int, real: int | None) -> dict[str, Tensor]:
    if real is None:
        return {}
    keep = torch.ones(batch, length)
    keep[-1, real:] = 0
    return {"encoder_attention_mask": keep}


def across(probabilities: Tensor) -> Cut | None:
    """Cross-attention, whose keys are the text."""
    grids = {HEIGHT * WIDTH: (HEIGHT, WIDTH), HEIGHT * WIDTH // 4: (HEIGHT // 2, WIDTH // 2)}
    if probabilities.shape[3] in grids:
        return None
    return probabilities, grids[probabilities.shape[2]]


def unet() -> Case:
    model = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=(2, 4),  # heads, as diffusers reads it: they differ between resolutions
        norm_num_groups=4,
    )

    def inputs(batch: int, dtype: torch.dtype = torch.float32, length: int = LENGTH, real: int | None = None) -> dict[str, Any]:
        return {
            "sample": torch.randn(batch, 4, HEIGHT, WIDTH, dtype=dtype),
            "timestep": 10,
            "encoder_hidden_states": torch.randn(batch, length, 16, dtype=dtype),
            **mask(batch, length, real),
        }

    return Case(lively(model), inputs, across, {(HEIGHT, WIDTH), (HEIGHT // 2, WIDTH // 2)})


def pixart() -> Case:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=12,
        use_additional_conditions=False,
    )

    def inputs(batch: int, dtype: torch.dtype = torch.float32, length: int = LENGTH, real: int | None = None) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(batch, 4, HEIGHT, WIDTH, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, length, 12, dtype=dtype),
            "timestep": torch.full((batch,), 10),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            **mask(batch, length, real),
        }

    return Case(lively(model), inputs, across, {(HEIGHT // 2, WIDTH // 2)})


def sd3() -> Case:
    """The first block has self-attention of the picture as well (SD3.5)."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )

    def inputs(batch: int, dtype: torch.dtype = torch.float32, length: int = LENGTH) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(batch, 4, HEIGHT, WIDTH, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, length, 12, dtype=dtype),
            "pooled_projections": torch.randn(batch, 8, dtype=dtype),
            "timestep": torch.full((batch,), 10, dtype=dtype),
        }

    def cut(probabilities: Tensor) -> Cut | None:
        picture = HEIGHT * WIDTH // 4
        if probabilities.shape[3] == picture:
            return None
        return probabilities[:, :, :picture, picture:], (HEIGHT // 2, WIDTH // 2)

    return Case(lively(model), inputs, cut, {(HEIGHT // 2, WIDTH // 2)})


def flux() -> Case:
    height, width = HEIGHT // 2, WIDTH // 2
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )

    def inputs(batch: int, dtype: torch.dtype = torch.float32, length: int = LENGTH) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(batch, height * width, 4, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, length, 12, dtype=dtype),
            "pooled_projections": torch.randn(batch, 8, dtype=dtype),
            "timestep": torch.full((batch,), 0.5, dtype=dtype),
            "img_ids": ids(3),
            "txt_ids": torch.zeros(length, 3),
        }

    return Case(lively(model), inputs, text_first, {(height, width)})


def added() -> Case:
    """A UNet whose image queries attend to text and picture, with the text first (DeepFloyd IF)."""
    made = unet()
    blocks = {
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2,
        "attention_head_dim": 8,
    }
    model = UNet2DConditionModel(**{name: value for name, value in made.model.config.items() if name[0] != "_"} | blocks)

    def cut(probabilities: Tensor) -> Cut | None:
        rows = probabilities.shape[2]
        grid = (HEIGHT, WIDTH) if rows == HEIGHT * WIDTH else (HEIGHT // 2, WIDTH // 2)
        return probabilities[:, :, :, :-rows], grid

    return Case(lively(model), made.inputs, cut, made.grids)


def sana() -> Case:
    """Linear self-attention, which is no softmax, and cross-attention."""
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        patch_size=1,
    )

    def inputs(batch: int, dtype: torch.dtype = torch.float32, length: int = LENGTH) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(batch, 4, HEIGHT, WIDTH, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, length, 12, dtype=dtype),
            "timestep": torch.full((batch,), 10),
        }

    return Case(lively(model), inputs, across, {(HEIGHT, WIDTH)})


def auraflow() -> Case:
    """Text tokens with eight register tokens before them, then the picture's."""
    model = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )

    def inputs(batch: int, dtype: torch.dtype = torch.float32, length: int = LENGTH) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(batch, 4, HEIGHT, WIDTH, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, length, 12, dtype=dtype),
            "timestep": torch.full((batch,), 0.5, dtype=dtype),
        }

    return Case(lively(model), inputs, text_first, {(HEIGHT // 2, WIDTH // 2)}, registers=8)


def packed(model: nn.Module, **options: Callable[[int, int], Any]) -> Case:
    """A transformer over picture tokens (B, N, C), with further arguments by (batch, length)."""
    height, width = HEIGHT // 2, WIDTH // 2

    def inputs(batch: int, dtype: torch.dtype = torch.float32, length: int = LENGTH) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(batch, height * width, 4, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, length, 12, dtype=dtype),
            "timestep": torch.full((batch,), 0.5, dtype=dtype),
            **{name: option(batch, length) for name, option in options.items()},
        }

    return Case(lively(model), inputs, text_first, {(height, width)})


def text_first(probabilities: Tensor) -> Cut | None:
    picture = HEIGHT * WIDTH // 4
    text = probabilities.shape[3] - picture
    return probabilities[:, :, text:, :text], (HEIGHT // 2, WIDTH // 2)


def ids(columns: int) -> Tensor:
    """Picture, row and column of each token; a fourth counts those of the text."""
    sides = [torch.zeros(1), torch.arange(HEIGHT / 2), torch.arange(WIDTH / 2), torch.zeros(1)]
    return torch.cartesian_prod(*sides[:columns])


def chroma() -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers calls what it deprecates
        model = ChromaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    return packed(model, img_ids=lambda batch, length: ids(3), txt_ids=lambda batch, length: torch.zeros(length, 3))


def flux2() -> Case:
    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return packed(
        model,
        img_ids=lambda batch, length: ids(4).expand(batch, -1, -1),
        txt_ids=lambda batch, length: torch.zeros(batch, length, 4),
        guidance=lambda batch, length: torch.ones(batch),
    )


def qwen() -> Case:
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=1,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    return packed(model, img_shapes=lambda batch, length: [[(1, HEIGHT // 2, WIDTH // 2)]] * batch)


CASES: dict[str, Callable[[], Case]] = {
    "unet": unet,
    "added": added,
    "pixart": pixart,
    "sana": sana,
    "sd3": sd3,
    "auraflow": auraflow,
    "flux": flux,
    "flux2": flux2,
    "chroma": chroma,
    "qwen": qwen,
}


def stable_diffusion() -> StableDiffusionPipeline:
    """A pipeline around the small UNet; prompts come as embeddings."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet().model,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Words:
    """A tokenizer as Hugging Face's: a token per word, but two for a giraffe; special tokens around."""

    vocabulary = ["<s>", "</s>", "a", "cat", "two", "small", "dogs", "gir", "##affe", "by", "tree"]
    all_special_ids = [0, 1]

    def __call__(self, text: str) -> dict[str, list[int]]:
        pieces = text.lower().replace("giraffe", "gir ##affe").split()
        return {"input_ids": [0, *(self.vocabulary.index(piece) for piece in pieces), 1]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.vocabulary[i] for i in ids]
