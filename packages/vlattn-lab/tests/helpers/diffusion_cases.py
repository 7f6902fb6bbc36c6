"""Small diffusion models of diffusers with random weights, and which part of their stored maps lies between picture and text."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
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
HALF = (HEIGHT // 2, WIDTH // 2)
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


def with_floats(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs, their floats in `dtype`."""
    return {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def lively(model: nn.Module) -> Any:
    """Weights so large that attention is uneven; diffusers begins some with zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and any(part in name for part in ("to_q", "to_k", "add_q", "add_k", "attn")):
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            elif parameter.ndim > 1 and not parameter.any():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def across(probabilities: Tensor) -> Cut | None:
    """Cross-attention, whose keys are the text."""
    grids = {HEIGHT * WIDTH: (HEIGHT, WIDTH), HEIGHT * WIDTH // 4: HALF}
    if probabilities.shape[3] in grids:
        return None
    return probabilities, grids[probabilities.shape[2]]


def text_first(probabilities: Tensor) -> Cut | None:
    text = probabilities.shape[3] - HEIGHT * WIDTH // 4
    return probabilities[:, :, text:, :text], HALF


def ids(columns: int) -> Tensor:
    """Picture, row and column of each token; a fourth counts those of the text."""
    sides = [torch.zeros(1), torch.arange(HEIGHT / 2), torch.arange(WIDTH / 2), torch.zeros(1)]
    return torch.cartesian_prod(*sides[:columns])


def transformer(
    model: nn.Module,
    cut: Callable[[Tensor], Cut | None] = text_first,
    grid: tuple[int, int] = HALF,
    step: float = 0.5,
    packed: bool = True,
    registers: int = 0,
    **options: Callable[[int, int], Any],
) -> Case:
    """A transformer over picture tokens (B, N, C), or latents, with further arguments by (batch, length)."""

    def inputs(batch: int, dtype: torch.dtype = torch.float32, length: int = LENGTH, real: int | None = None) -> dict[str, Any]:
        shape = (HEIGHT * WIDTH // 4, 4) if packed else (4, HEIGHT, WIDTH)
        return {
            "hidden_states": torch.randn(batch, *shape, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, length, 12, dtype=dtype),
            "timestep": torch.full((batch,), step, dtype=None if isinstance(step, int) else dtype),
            **with_floats({name: option(batch, length) for name, option in options.items()}, dtype),
            **mask(batch, length, real),
        }

    return Case(lively(model), inputs, cut, {grid}, registers)


def mask(batch: int, length: int, real: int | None) -> dict[str, Tensor]:
    if real is None:
        return {}
    keep = torch.ones(batch, length)
    keep[-1, real:] = 0
    return {"encoder_attention_mask": keep}


def unet(**blocks: Any) -> Case:
    names = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    heads = {"attention_head_dim": (2, 4)}  # as diffusers reads it: they differ between resolutions
    sizes = dict(sample_size=8, layers_per_block=1, block_out_channels=(16, 32), cross_attention_dim=16, norm_num_groups=4)
    model = UNet2DConditionModel(**sizes, **{**names, **heads, **blocks})

    def inputs(batch: int, dtype: torch.dtype = torch.float32, length: int = LENGTH, real: int | None = None) -> dict[str, Any]:
        picture, text = torch.randn(batch, 4, HEIGHT, WIDTH, dtype=dtype), torch.randn(batch, length, 16, dtype=dtype)
        return {"sample": picture, "timestep": 10, "encoder_hidden_states": text, **mask(batch, length, real)}

    return Case(lively(model), inputs, across, {(HEIGHT, WIDTH), HALF})


def added() -> Case:
    """A UNet whose image queries attend to text and picture, with the text first (DeepFloyd IF)."""
    kind = "SimpleCrossAttn{}Block2D".format
    case = unet(
        down_block_types=(kind("Down"),) * 2,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(kind("Up"),) * 2,
        attention_head_dim=8,
    )

    def cut(probabilities: Tensor) -> Cut | None:
        rows = probabilities.shape[2]
        return probabilities[:, :, :, :-rows], (HEIGHT, WIDTH) if rows == HEIGHT * WIDTH else HALF

    return replace(case, cut=cut)


WIDE = dict(in_channels=4, num_attention_heads=2, attention_head_dim=8)
JOINT = dict(in_channels=4, num_attention_heads=2, joint_attention_dim=12)
ROTARY = dict(attention_head_dim=16, axes_dims_rope=(4, 6, 6))


def pixart() -> Case:
    sizes = dict(num_layers=2, cross_attention_dim=16, sample_size=8, caption_channels=12)
    model = PixArtTransformer2DModel(**WIDE, **sizes, out_channels=8, patch_size=2, use_additional_conditions=False)
    conditions = {"resolution": None, "aspect_ratio": None}
    return transformer(model, across, step=10, packed=False, added_cond_kwargs=lambda batch, length: conditions)


def sana() -> Case:
    """Linear self-attention, which is no softmax, and cross-attention."""
    cross = dict(num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16)
    model = SanaTransformer2DModel(
        **WIDE, **cross, out_channels=4, num_layers=2, caption_channels=12, sample_size=8, patch_size=1
    )
    return transformer(model, across, (HEIGHT, WIDTH), step=10, packed=False)


def sd3() -> Case:
    """The first block has self-attention of the picture as well (SD3.5)."""
    sizes = dict(sample_size=8, patch_size=2, num_layers=2, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4)
    blocks = dict(attention_head_dim=8, pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm")
    model = SD3Transformer2DModel(**JOINT, **sizes, **blocks)

    def cut(probabilities: Tensor) -> Cut | None:
        picture = HEIGHT * WIDTH // 4
        return None if probabilities.shape[3] == picture else (probabilities[:, :, :picture, picture:], HALF)

    return transformer(model, cut, packed=False, pooled_projections=lambda batch, length: torch.randn(batch, 8))


def auraflow() -> Case:
    """Text tokens with eight register tokens before them, then the picture's."""
    sizes = dict(sample_size=8, patch_size=2, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8)
    model = AuraFlowTransformer2DModel(**JOINT, **sizes, caption_projection_dim=16, out_channels=4, pos_embed_max_size=64)
    return transformer(model, packed=False, registers=8)


def flux() -> Case:
    model = FluxTransformer2DModel(**JOINT, **ROTARY, patch_size=1, num_layers=1, num_single_layers=2, pooled_projection_dim=8)
    return transformer(
        model,
        img_ids=lambda batch, length: ids(3),
        txt_ids=lambda batch, length: torch.zeros(length, 3),
        pooled_projections=lambda batch, length: torch.randn(batch, 8),
    )


def chroma() -> Case:
    approximator = dict(approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers calls what it deprecates
        model = ChromaTransformer2DModel(**JOINT, **ROTARY, **approximator, patch_size=1, num_layers=1, num_single_layers=1)
    return transformer(model, img_ids=lambda batch, length: ids(3), txt_ids=lambda batch, length: torch.zeros(length, 3))


def flux2() -> Case:
    rotary = dict(attention_head_dim=16, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16)
    return transformer(
        Flux2Transformer2DModel(**JOINT, **rotary, patch_size=1, num_layers=1, num_single_layers=1),
        img_ids=lambda batch, length: ids(4).expand(batch, -1, -1),
        txt_ids=lambda batch, length: torch.zeros(batch, length, 4),
        guidance=lambda batch, length: torch.ones(batch),
    )


def qwen() -> Case:
    model = QwenImageTransformer2DModel(**JOINT, **ROTARY, patch_size=2, out_channels=1, num_layers=2)
    return transformer(model, img_shapes=lambda batch, length: [[(1, *HALF)]] * batch)


MADE = (unet, added, pixart, sana, sd3, auraflow, flux, flux2, chroma, qwen)
CASES: dict[str, Callable[[], Case]] = {make.__name__: make for make in MADE}


def stable_diffusion() -> StableDiffusionPipeline:
    """A pipeline around the small UNet; prompts come as embeddings."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(**blocks, block_out_channels=(4, 4, 4), norm_num_groups=2, latent_channels=4)
    none = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipeline = StableDiffusionPipeline(vae=vae, unet=unet().model, scheduler=scheduler, **none, requires_safety_checker=False)
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
