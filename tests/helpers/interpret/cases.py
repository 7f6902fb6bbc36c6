"""Small random models of every family, with the places where the oracle of stored_maps.py looks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers

from tests.helpers.interpret.stored_maps import METHODS, Place, check, layer_sums

VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=(24), patch_size=6)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=60)
LLAMA = dict(TEXT, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)


@dataclass(frozen=True)
class TowerCase:
    """A Place for any inputs. In each layer `stream` is fed with x, and `summed` with y = x + o, or with `branch` it gives o."""

    layers: str
    stream: str
    summed: str
    row: Callable[[dict[str, Any], int], torch.Tensor]  # inputs, N -> (B, N)
    real: Callable[[dict[str, Any]], torch.Tensor] | None = None  # inputs -> bool (B, N)
    pool: str | None = None
    branch: bool = False

    def place(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Place:
        sums = layer_sums(self.layers, len(model.get_submodule(self.layers)), self.stream, self.summed)
        real = None if self.real is None else self.real(inputs)
        return Place(self.layers, partial(self.row, inputs), real, sums, self.pool, self.branch)


@dataclass(frozen=True)
class Case:
    model: torch.nn.Module
    inputs: dict[str, Any]
    towers: dict[str, TowerCase]
    score: Callable[[Any, dict[str, Any]], torch.Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def check(self, inputs: dict[str, Any], methods: Sequence[str] = METHODS, start_layer: int = 0, **options: Any) -> None:
        """What `explain` gives is what stored maps give."""
        places = {name: tower.place(self.model, inputs) for name, tower in self.towers.items()}
        check(self.model, inputs, places, lambda outputs: self.score(outputs, inputs), methods, start_layer, **options)


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that attention is uneven and its gradients count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.6 / parameter.shape[-1] ** 0.5))
            elif parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def one_hot(index: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(index, size).float()


def attention_mask(inputs: dict[str, Any]) -> torch.Tensor:
    return inputs["attention_mask"].bool()


def first_row(inputs: dict[str, Any], size: int) -> torch.Tensor:
    batch = (inputs["input_ids"] if "input_ids" in inputs and "pixel_values" not in inputs else inputs["pixel_values"]).shape[0]
    return one_hot(torch.zeros(batch, dtype=torch.long), size)


def first_and_mean_rows(inputs: dict[str, Any], size: int, before: int = 1) -> torch.Tensor:
    """Half of the first token and half of the mean of the patches, which stand behind `before` tokens."""
    mean = torch.cat([torch.zeros(before), torch.full((size - before,), 1 / (size - before))])
    return (first_row(inputs, size) + mean) / 2


def last_row(inputs: dict[str, Any], size: int) -> torch.Tensor:
    return one_hot(torch.full((inputs["input_ids"].shape[0],), size - 1), size)


def last_real_row(inputs: dict[str, Any], size: int) -> torch.Tensor:
    return one_hot(torch.tensor([max(row.nonzero()).item() for row in inputs["attention_mask"]]), size)


def diagonal(outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return outputs.logits_per_image.diagonal()


def largest(outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return outputs.logits.max(-1).values


def next_token(outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
    position = last_real_row(inputs, outputs.logits.shape[1])
    return (outputs.logits * position[..., None]).sum(1).max(-1).values


def clip() -> Case:
    config = transformers.CLIPConfig(
        text_config=dict(TEXT, max_position_embeddings=12, bos_token_id=57, eos_token_id=58, pad_token_id=0),
        vision_config=VISION,
        projection_dim=16,
    )
    ids = torch.randint(1, 50, (3, 9))
    ids[:, 0], ids[0, 8], ids[1, 5], ids[2, 6] = 57, 58, 58, 58
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 7:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 24, 24)}
    vision = TowerCase("vision_model.encoder.layers", "", "layer_norm2", first_row)
    eot = lambda i, n: (i["input_ids"] == 58).float()  # noqa: E731
    text = TowerCase("text_model.encoder.layers", "", "layer_norm2", eot, attention_mask)
    return Case(
        transformers.CLIPModel(config),
        inputs,
        {"vision": vision, "text": text},
        diagonal,
        {"image": (3, 4, 4), "text": (3, 7), "tokens": [ids[0, 1:8].tolist(), ids[1, 1:5].tolist(), ids[2, 1:6].tolist()]},
    )


def siglip() -> Case:
    config = transformers.SiglipConfig(
        text_config=dict(TEXT, max_position_embeddings=8, projection_size=32, bos_token_id=57, eos_token_id=58, pad_token_id=1),
        vision_config=VISION,
    )
    ids = torch.randint(2, 50, (2, 8))
    ids[0, 6:], ids[1, 7:] = 1, 58
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 24, 24)}
    vision = TowerCase(
        "vision_model.encoder.layers", "", "layer_norm2", lambda i, n: torch.ones(2, 1), pool="vision_model.head.attention"
    )
    text = TowerCase("text_model.encoder.layers", "", "layer_norm2", last_row)
    return Case(
        transformers.SiglipModel(config),
        inputs,
        {"vision": vision, "text": text},
        diagonal,
        {"image": (2, 4, 4), "text": (2, 7), "tokens": [ids[0, :6].tolist(), ids[1, :7].tolist()]},
    )


def vit() -> Case:
    config = transformers.ViTConfig(**dict(VISION, image_size=(24, 30)), num_labels=5)
    tower = TowerCase("vit.layers", "", "layernorm_after", first_row)
    inputs = {"pixel_values": torch.randn(2, 3, 24, 30)}
    return Case(transformers.ViTForImageClassification(config), inputs, {"vision": tower}, largest, {"image": (2, 4, 5)})


def dinov2() -> Case:
    config = transformers.Dinov2Config(**VISION, num_labels=5, layerscale_value=0.7)
    tower = TowerCase("dinov2.encoder.layer", "", "norm2", first_and_mean_rows)
    inputs = {"pixel_values": torch.randn(2, 3, 24, 24)}
    return Case(transformers.Dinov2ForImageClassification(config), inputs, {"vision": tower}, largest, {"image": (2, 4, 4)})


def bert() -> Case:
    config = transformers.BertConfig(**TEXT, num_labels=4, max_position_embeddings=16)
    ids = torch.randint(5, 50, (3, 10))
    mask = torch.ones_like(ids)
    for row, length in enumerate((10, 6, 8)):
        ids[row, 0], ids[row, length - 1], ids[row, length:], mask[row, length:] = 2, 3, 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    tower = TowerCase("bert.encoder.layer", "attention", "attention.output.LayerNorm", first_row, real=attention_mask)
    words = [ids[0, 1:9].tolist(), ids[1, 1:5].tolist(), ids[2, 1:7].tolist()]
    return Case(
        transformers.BertForSequenceClassification(config), inputs, {"text": tower}, largest, {"text": (3, 8), "tokens": words}
    )


def llava() -> Case:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**LLAMA),
        image_token_index=55,
        image_token_id=55,
    )
    ids = torch.randint(3, 50, (2, 24))
    ids[:, 0], ids[0, 2:18], ids[1, 4:20] = 1, 55, 55
    mask = torch.ones_like(ids)
    mask[1, 22:], ids[1, 22:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 24, 24)}
    tower = TowerCase("model.language_model.layers", "", "post_attention_layernorm", last_real_row, attention_mask)
    words = [[1, *range(18, 24)], [1, 2, 3, 20, 21]]
    return Case(
        transformers.LlavaForConditionalGeneration(config),
        inputs,
        {"language": tower},
        next_token,
        {"image": (2, 4, 4), "text": (2, 7), "tokens": [ids[row, index].tolist() for row, index in enumerate(words)]},
    )


def qwen2_5_vl() -> Case:
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=4,
            patch_size=4,
            spatial_merge_size=2,
            window_size=16,
            out_hidden_size=32,
            fullatt_block_indexes=[1],
            temporal_patch_size=2,
        ),
        image_token_id=55,
        video_token_id=56,
        vision_start_token_id=53,
        vision_end_token_id=54,
    )
    grid = torch.tensor([[1, 4, 8], [1, 8, 4]])
    ids = torch.randint(3, 50, (2, 16))
    mask = torch.ones_like(ids)
    for row, start in enumerate((1, 2)):
        ids[row, start], ids[row, start + 1 : start + 9], ids[row, start + 9] = 53, 55, 54
    mask[1, 14:], ids[1, 14:] = 0, 0
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(64, 3 * 2 * 4 * 4),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == 55).int(),
    }
    tower = TowerCase("model.language_model.layers", "", "post_attention_layernorm", last_real_row, attention_mask)
    words = [[0, *range(11, 16)], [0, 1, 12, 13]]
    return Case(
        transformers.Qwen2_5_VLForConditionalGeneration(config),
        inputs,
        {"language": tower},
        next_token,
        {"images": [(2, 4), (4, 2)], "text": (2, 6), "tokens": [ids[row, index].tolist() for row, index in enumerate(words)]},
    )


def uniter() -> Case:
    from vlattn_fast.models.uniter import UNITER, UNITERConfig

    config = UNITERConfig(**dict(TEXT, vocab_size=50), max_position_embeddings=12, region_dim=10, position_dim=7)
    case = bert()
    ids, mask = case.inputs["input_ids"].clamp(max=49), case.inputs["attention_mask"].bool()
    regions = torch.ones(3, 5, dtype=torch.bool)
    regions[0, 3:] = False
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "region_features": torch.randn(3, 5, 10),
        "region_positions": torch.rand(3, 5, 7),
        "region_mask": regions,
    }
    tower = TowerCase(
        "uniter.encoder.layer",
        "attention",
        "attention.output.LayerNorm",
        first_row,
        real=lambda i: torch.cat([i["attention_mask"], i["region_mask"]], 1),
    )
    words = [ids[0, 1:9].tolist(), ids[1, 1:5].tolist(), ids[2, 1:7].tolist()]
    return Case(UNITER(config), inputs, {"joint": tower}, largest, {"text": (3, 8), "tokens": words, "regions": (3, 5)})


CASES = {case.__name__: case for case in (clip, siglip, vit, dinov2, bert, llava, qwen2_5_vl, uniter)}


def in_double(case: Case) -> dict[str, Any]:
    """The case's inputs in float64, its model turned to float64."""
    case.model.double()
    return {name: value.double() if value.is_floating_point() else value for name, value in case.inputs.items()}
