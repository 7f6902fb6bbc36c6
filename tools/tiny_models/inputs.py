"""Inputs that a tiny model may take: texts, and texts with pictures in the forms that processors of transformers make."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.adapters.derived import drafts

PADDINGS = ("both", "right", "none")  # some models give NaN where a padded token sees none
SIDE = 32  # of a picture


def inputs_of(mapping: str, model: nn.Module) -> Iterator[Callable[[], dict[str, Any]]]:
    """Functions that make inputs to try, in this order, until the model runs."""
    accepted = inspect.signature(model.forward).parameters
    if mapping == "image-text" and ("pixel_values" in accepted or "flattened_patches" in accepted):
        named = picture_token(model) is not None or "image_embeds_position_mask" in accepted
        for pictures in pictures_of(model):
            for count in counts(model, pictures) if named else (0,):
                for padded in PADDINGS:
                    yield partial(prompts, model, pictures, padded, count)
    elif mapping == "zero-shot":
        for pictures in pictures_of(model):
            yield partial(pairs, model, pictures)
    elif "input_ids" in accepted:
        for padded in PADDINGS:
            yield partial(texts, model, padded)
    else:
        for pictures in pictures_of(model):
            yield partial(dict, pictures)


def texts(model: Any, padded: str) -> dict[str, Tensor]:
    """Three prompts, of which two are padded: "both" = one on either side."""
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padded == "both":
        mask[1, :3] = 0
    if padded != "none":
        mask[2, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not getattr(model.config, "is_encoder_decoder", False):
        if not drafts(model):
            return inputs
        drafted = decoded(model, 3)
        masks = [mask, torch.ones_like(drafted["decoder_input_ids"])]
        return inputs | drafted | {"decoder_attention_mask": torch.cat(masks, 1)}
    if isinstance(end := model.config.eos_token_id, int):  # classifiers read it
        ids[ids == end] = 61
        ids[torch.arange(3), torch.tensor([8, 8, 8 if padded == "none" else 5])] = end
    return inputs | decoded(model, 3)


def pairs(model: Any, pictures: dict[str, Any]) -> dict[str, Any]:
    """Two pictures with a text each, which an end token ends."""
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(2))
    end = getattr(getattr(model.config, "text_config", None), "eos_token_id", None)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[0, 6] = ids[1, 4] = end if isinstance(end, int) else 60
    return {"input_ids": ids, "attention_mask": mask, **pictures}


def decoded(model: Any, batch: int) -> dict[str, Tensor]:
    """The answer so far of an encoder-decoder that generates."""
    if not model.can_generate():
        return {}
    return {"decoder_input_ids": torch.randint(3, 60, (batch, 4), generator=torch.Generator().manual_seed(5))}


def pictures_of(model: Any) -> Iterator[dict[str, Any]]:
    """Two pictures in each form that the model's forward names."""
    accepted = inspect.signature(model.forward).parameters
    vision: Any = getattr(model.config, "vision_config", None)
    names = ("model_patch_size", "patch_size")
    patch = next((size for part in (vision, model.config) for n in names if (size := getattr(part, n, None))), 8)
    patch = patch if isinstance(patch, int) else patch[0]
    torch.manual_seed(3)
    whole = torch.randn(2, 3, SIDE, SIDE)
    if "image_grid_thw" in accepted:
        grid = {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
        grid |= {"image_merge_sizes": torch.tensor([2, 2])} if "image_merge_sizes" in accepted else {}
        for frames in (getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1) or 1, 2, 1):
            yield {"pixel_values": torch.randn(32, 3 * frames * patch * patch), **grid}
        yield {"pixel_values": torch.randn(32, 3, patch, patch), **grid}
        yield {"pixel_values": torch.randn(1, 32, 3, patch, patch), **grid}
        side = patch * (getattr(vision, "spatial_merge_size", None) or 1)
        yield {"pixel_values": torch.randn(32, side, side, 3), **grid}
    if "image_grid_hw" in accepted:
        yield {"pixel_values": torch.randn(32, 3 * patch * patch), "image_grid_hw": torch.tensor([[4, 4]] * 2)}
    if "image_sizes" in accepted:
        yield {"pixel_values": whole, "image_sizes": torch.tensor([[SIDE, SIDE]] * 2)}
        sizes = torch.tensor([[SIDE, 2 * SIDE]] * 2)  # a thumbnail and two tiles
        yield {"pixel_values": torch.randn(2, 3, 3, SIDE, SIDE), "image_sizes": sizes}
    if "spatial_shapes" in accepted:
        packed = {"pixel_values": torch.randn(2, 16, 3 * patch * patch), "spatial_shapes": torch.tensor([[4, 4]] * 2)}
        yield packed | {"pixel_attention_mask": torch.ones(2, 16, dtype=torch.long)}
    if "image_position_ids" in accepted:
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(1, 16, 2).repeat(2, 1, 1)
        yield {"pixel_values": torch.randn(2, 16, 3 * patch * patch), "image_position_ids": places}
    if "image_token_pooling" in accepted:
        pooled = {"image_token_pooling": torch.arange(32).view(8, 4), "image_grids": torch.tensor([[2, 2, 0, 0]] * 2)}
        yield {"pixel_values": torch.randn(2, 16, 3 * patch * patch), **pooled, "image_num_crops": torch.tensor([1, 1])}
    if "target_sizes" in accepted:
        yield {"pixel_values": torch.randn(1, 3, patch, 32 * patch), "target_sizes": torch.tensor([[4, 4]] * 2)}
    if "image_patches" in accepted:
        yield {"pixel_values": torch.randn(2, 16, 3 * patch * patch)}
    if "high_res_pixel_values" in accepted:
        yield {"pixel_values": whole, "high_res_pixel_values": whole}
    if "flattened_patches" in accepted:
        places = torch.stack(torch.meshgrid(torch.arange(1.0, 5), torch.arange(1.0, 5), indexing="ij"), -1).view(1, 16, 2)
        features = getattr(vision, "patch_embed_hidden_size", 3 * patch * patch)
        yield {"flattened_patches": torch.cat([places.expand(2, -1, -1), torch.randn(2, 16, features)], -1)}
    if "aspect_ratio_ids" in accepted:  # the second and third tile pad
        tiles = torch.zeros(2, 1, vision.max_num_tiles, dtype=torch.long)
        tiles[:, :, 0] = 1
        pictures = torch.randn(2, 1, vision.max_num_tiles, 3, SIDE, SIDE)
        yield {"pixel_values": pictures, "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long), "aspect_ratio_mask": tiles}
    yield {"pixel_values": whole}
    if "pixel_attention_mask" in accepted:
        for shape in ((2, 1, SIDE, SIDE), (2, 1)):
            yield {"pixel_values": whole[:, None], "pixel_attention_mask": torch.ones(shape, dtype=torch.bool)}
    yield {"pixel_values": whole[:, None]}
    if frames := getattr(vision, "temporal_patch_size", None):
        yield {"pixel_values": torch.randn(32, frames, patch, patch, 3)}


def picture_token(model: Any) -> int | None:
    """The id of the tokens that stand for a picture, or for a video of one."""
    parts = (model.config, getattr(model.config, "vlm_config", None))
    ids = (getattr(part, name, None) for name in ("image_token_id", "video_token_id") for part in parts)
    return next((token for token in ids if isinstance(token, int)), None)


def prompts(model: Any, pictures: dict[str, Any], padded: str, count: int) -> dict[str, Any]:
    """Two prompts with a picture each, of `count` image tokens."""
    token = picture_token(model)
    token = 7 if token is None else token
    after = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(2))
    after[after == token] = 61
    picture = torch.full((2, count), token)
    before = [getattr(model.config, name, None) for name in ("vision_start_token_id", "boi_token_id")]
    first = next((each for each in before if isinstance(each, int)), 5)
    ids = torch.cat([torch.tensor([[1, first]] * 2), picture, after], 1)
    mask = torch.ones_like(ids)
    if padded == "both":
        pad = torch.zeros(1, 2, dtype=torch.long)
        ids = torch.cat([torch.cat([pad, ids[:1]], 1), torch.cat([ids[1:], pad], 1)])
        mask = torch.cat([torch.cat([pad, mask[:1]], 1), torch.cat([mask[1:], pad], 1)])
    elif padded == "right":
        mask[1, -2:] = 0
    accepted = inspect.signature(model.forward).parameters
    inputs = {"input_ids": ids, "attention_mask": mask} if "input_ids" in accepted else {}
    inputs |= pictures
    if any(getattr(part, "is_encoder_decoder", False) for part in (model.config, getattr(model.config, "text_config", None))):
        inputs |= decoded(model, 2)
    if "image_attention_mask" in accepted:
        inputs["image_attention_mask"] = mask[..., None]
    if "cross_attention_mask" in accepted and "aspect_ratio_mask" in pictures:
        inputs["cross_attention_mask"] = mask[..., None, None] * pictures["aspect_ratio_mask"][:, None]
    if "noise" in accepted:
        config = model.config
        inputs |= {"state": torch.randn(2, config.max_state_dim), "timestep": torch.tensor([0.5, 0.25])}
        inputs["noise"] = torch.randn(2, config.chunk_size, config.max_action_dim)
    if "bbox" in accepted:
        inputs["bbox"] = torch.rand(*ids.shape, 4, generator=torch.Generator().manual_seed(6)).sort(-1).values
    types = (ids == token).long()
    if "qformer_input_ids" in accepted:
        inputs["qformer_input_ids"] = torch.randint(3, 29, (2, 5), generator=torch.Generator().manual_seed(4))
    names = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids", "image_embeds_position_mask")
    return inputs | {name: types for name in names if name in accepted}


def counts(model: Any, pictures: dict[str, Any]) -> list[int]:
    """How many image tokens a picture may be: as many features as the model says, else some to try."""
    parts: list[Any] = [model, getattr(model, "model", None)]
    for part in parts:
        try:
            with torch.no_grad():
                return [_rows(part.get_image_features(**pictures)) // 2]
        except Exception:
            continue
    return [16, 4, 1, 17, 64, 14]


def _rows(features: Any) -> int:
    """How many rows (tokens) image features hold, in any form that models give them."""
    if isinstance(features, Tensor):
        return features[..., 0].numel()
    if isinstance(features, (list, tuple)):
        return sum(_rows(part) for part in features)
    pooled = getattr(features, "pooler_output", None)
    return _rows(features.last_hidden_state if pooled is None else pooled)
