"""Small random encoders and single-stream models, with the places where a test looks and the score that it explains."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers

from tests.helpers.interpret.cases import TEXT, VISION, one_hot
from tests.helpers.interpret.stored_maps import Place, layer_sums

T5 = dict(TEXT, max_position_embeddings=32)
PATCHES, WORDS, IMAGE = 16, 9, 17


@dataclass(frozen=True)
class Encoder:
    """A model, its inputs, where the test looks, and the score that `explain` takes by itself, or by `target`."""

    model: torch.nn.Module
    inputs: dict[str, Any]
    places: dict[str, Place]
    score: Callable[[Any], torch.Tensor]
    target: Callable[[Any], torch.Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def text(size: int = WORDS, last: int | None = None) -> dict[str, torch.Tensor]:
    """Two texts, the second with three tokens of padding; `last` stands at the end of each."""
    ids = torch.randint(5, 50, (2, size))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    if last is not None:
        ids[0, -1] = ids[1, -4] = last
        ids[1, -3:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 24, 24)}


def rows(size: int, *positions: int) -> torch.Tensor:
    return one_hot(torch.tensor(positions if len(positions) == 2 else positions * 2), size)


def largest(outputs: Any) -> torch.Tensor:
    return outputs.logits.max(-1).values


def diagonal(outputs: Any) -> torch.Tensor:
    return outputs.logits_per_image.diagonal()


def pooled(outputs: Any) -> torch.Tensor:
    return outputs.pooler_output.square().sum(-1)


def vision_model(model: torch.nn.Module, layers: str, size: int, summed: str, score: Any = largest, **options: Any) -> Encoder:
    place = Place(layers, rows(size, 0), sums=layer_sums(layers, 3, "", summed))
    return Encoder(model, pixels(), {"vision": place}, score, facts={"image": (2, 4, 4)}, **options)


def text_model(
    model: torch.nn.Module, layers: str, stream: str = "attention", summed: str = "attention.output.LayerNorm", **options: Any
) -> Encoder:
    inputs = text(last=3)
    sums = layer_sums(layers, 3, stream, summed)
    place = Place(layers, rows(WORDS, 0), inputs["attention_mask"], sums)
    words = [inputs["input_ids"][0, 1:-1].tolist(), inputs["input_ids"][1, 1:-4].tolist()]
    return Encoder(model, inputs, {"text": place}, options.pop("score", largest), facts={"words": words}, **options)


def dual(model: torch.nn.Module, layers: str = "text_model.encoder.layers", eot: bool = True, **options: Any) -> Encoder:
    """A CLIP-like model: the text's end-of-text token is read, or its first."""
    inputs = {**text(last=58 if eot else 3), **pixels()}
    vision = Place("vision_model", rows(IMAGE, 0), sums=layer_sums("vision_model.encoder.layers", 3, "", "layer_norm2"))
    stream, summed = ("", "layer_norm2") if eot else ("attention", "attention.output.LayerNorm")
    row, sums = rows(WORDS, 8, 5) if eot else rows(WORDS, 0), layer_sums(layers, 3, stream, summed)
    places = {"vision": vision, "text": Place("text_model", row, inputs["attention_mask"], sums)}
    words = [inputs["input_ids"][0, 1:-1].tolist(), inputs["input_ids"][1, 1:-4].tolist()]
    return Encoder(model, inputs, places, diagonal, facts={"words": words, "image": (2, 4, 4)}, **options)


def both(kind: str, **config: Any) -> torch.nn.Module:
    made = getattr(transformers, f"{kind}Config")(
        text_config={**T5, "eos_token_id": 58, "bos_token_id": 57, "pad_token_id": 1, **config},
        vision_config=VISION,
        projection_dim=16,
    )
    return getattr(transformers, f"{kind}Model")(made)


def deit() -> Encoder:
    config = transformers.DeiTConfig(**VISION, num_labels=3)
    return vision_model(transformers.DeiTForImageClassification(config), "deit.layers", 18, "layernorm_after")


def deit_with_teacher() -> Encoder:
    config = transformers.DeiTConfig(**VISION, num_labels=3)
    return vision_model(transformers.DeiTForImageClassificationWithTeacher(config), "deit.layers", 18, "layernorm_after")


def dinov3() -> Encoder:
    config = transformers.DINOv3ViTConfig(**VISION, num_register_tokens=2)
    return vision_model(transformers.DINOv3ViTModel(config), "model.layer", 19, "norm2", pooled, target=pooled)


def roberta() -> Encoder:
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**T5, num_labels=3))
    return text_model(model, "roberta.encoder.layer")


def distilbert() -> Encoder:
    config = transformers.DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4, vocab_size=60, num_labels=3)
    model = transformers.DistilBertForSequenceClassification(config)
    return text_model(model, "distilbert.transformer.layer", "", "sa_layer_norm")


def electra() -> Encoder:
    config = transformers.ElectraConfig(**T5, embedding_size=16, num_labels=3)
    return text_model(transformers.ElectraForSequenceClassification(config), "electra.encoder.layer")


def albert() -> Encoder:
    """One layer that is called three times."""
    config = transformers.AlbertConfig(**T5, embedding_size=16, num_labels=3)
    model = transformers.AlbertForSequenceClassification(config)
    layers = "albert.encoder.albert_layer_groups.0.albert_layers"
    made = text_model(model, layers)
    place = replace(made.places["text"], sums=layer_sums(layers, 1, "attention", "attention.LayerNorm"))
    return replace(made, places={"text": place})


def albert_groups() -> Encoder:
    """Two groups of a layer, which are called twice each."""
    config = transformers.AlbertConfig(**{**T5, "num_hidden_layers": 4}, embedding_size=16, num_labels=3, num_hidden_groups=2)
    groups = "albert.encoder.albert_layer_groups"
    made = text_model(transformers.AlbertForSequenceClassification(config), groups)
    sums = (s for i in range(2) for s in layer_sums(f"{groups}.{i}.albert_layers", 1, "attention", "attention.LayerNorm"))
    return replace(made, places={"text": replace(made.places["text"], sums=tuple(sums))})


def mpnet() -> Encoder:
    model = transformers.MPNetForSequenceClassification(transformers.MPNetConfig(**T5, num_labels=3))
    return text_model(model, "mpnet.encoder.layer", summed="attention.LayerNorm")


def align_text() -> Encoder:
    model = transformers.AlignTextModel(transformers.AlignTextConfig(**T5))
    return text_model(model, "encoder.layer", score=pooled, target=pooled)


def align() -> Encoder:
    """Its images go through convolutions."""
    small = dict(image_size=32, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=32)
    model = transformers.AlignModel(transformers.AlignConfig(text_config=T5, vision_config=small, projection_dim=32))
    made = text_model(model, "text_model.encoder.layer", score=diagonal)
    return replace(made, inputs={**made.inputs, "pixel_values": torch.randn(2, 3, 64, 64)})


def chinese_clip() -> Encoder:
    return dual(both("ChineseCLIP"), "text_model.encoder.layer", eot=False)


def alt_clip() -> Encoder:
    return dual(both("AltCLIP", project_dim=16), "text_model.roberta.encoder.layers", eot=False)


def owlvit() -> Encoder:
    return dual(both("OwlViT"))


def blip() -> Encoder:
    return dual(both("Blip", encoder_hidden_size=32), "text_model.encoder.layer", eot=False)


def siglip2() -> Encoder:
    """Images of different sizes in rows of patches, the second with four of padding."""
    vision = {name: value for name, value in VISION.items() if name != "image_size"}
    words = dict(T5, max_position_embeddings=WORDS, bos_token_id=57, eos_token_id=58, pad_token_id=1)
    config = transformers.Siglip2Config(text_config=words, vision_config=dict(vision, num_patches=PATCHES))
    mask = torch.ones(2, PATCHES, dtype=torch.long)
    mask[1, 12:] = 0
    inputs = {
        "input_ids": text(last=58)["input_ids"],
        "pixel_values": torch.randn(2, PATCHES, 108),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[2, 8], [4, 3]]),
    }
    places = {
        "vision": Place(
            "vision_model",
            torch.ones(2, 1),
            mask,
            layer_sums("vision_model.encoder.layers", 3, "", "layer_norm2"),
            pool="vision_model.head.attention",
        ),
        "text": Place("text_model", rows(WORDS, 8), None, layer_sums("text_model.encoder.layers", 3, "", "layer_norm2")),
    }
    return Encoder(transformers.Siglip2Model(config), inputs, places, diagonal, facts={"images": [(2, 8), (4, 3)]})


def joined(model: torch.nn.Module, layers: str, inputs: dict[str, Any], row: Any, real: Any, stream: str, summed: str) -> Encoder:
    place = Place(layers, row, real, layer_sums(layers, 3, stream, summed))
    words = [inputs["input_ids"][0, 1:-1].tolist(), inputs["input_ids"][1, 1:-4].tolist()]
    return Encoder(model, inputs, {"joint": place}, largest, facts={"words": words})


def vilt() -> Encoder:
    """The second image has two columns of patches and two of padding; its patches come in their order."""
    model = transformers.ViltForQuestionAnswering(transformers.ViltConfig(**{**VISION, **T5}, qkv_bias=True, num_labels=3))
    mask = torch.ones(2, 24, 24, dtype=torch.long)
    mask[1, :, 12:] = 0
    inputs = {**text(last=3), **pixels(), "pixel_mask": mask}
    real = torch.cat([inputs["attention_mask"], torch.ones(2, IMAGE, dtype=torch.long)], 1)
    real[1, WORDS + 9 :] = 0
    made = joined(model, "vilt.encoder.layer", inputs, rows(WORDS + IMAGE, 0), real, "", "layernorm_after")
    return replace(made, facts={**made.facts, "images": [(4, 4), (4, 2)], "first": WORDS + 1})


def visual_bert(kind: str = "VisualBertForVisualReasoning") -> Encoder:
    config = transformers.VisualBertConfig(**T5, visual_embedding_dim=10, num_labels=3)
    regions = torch.ones(2, 5)
    regions[0, 3:] = 0
    inputs = {**text(last=3), "visual_embeds": torch.randn(2, 5, 10), "visual_attention_mask": regions}
    real = torch.cat([inputs["attention_mask"], regions], 1)
    row = rows(WORDS + 5, 7, 4) if kind == "VisualBertForQuestionAnswering" else rows(WORDS + 5, 0)
    model = getattr(transformers, kind)(config)
    made = joined(model, "visual_bert.encoder.layer", inputs, row, real, "attention", "attention.output.LayerNorm")
    return replace(made, facts={**made.facts, "regions": (2, 5)})


def visual_bert_vqa() -> Encoder:
    return visual_bert("VisualBertForQuestionAnswering")


def layoutlmv3() -> Encoder:
    options = dict(input_size=24, patch_size=6, coordinate_size=6, shape_size=4)
    biases = dict(has_relative_attention_bias=True, has_spatial_attention_bias=True)
    config = transformers.LayoutLMv3Config(**T5, num_labels=3, **options, **biases)
    inputs = {**text(last=3), **pixels(), "bbox": torch.randint(0, 100, (2, WORDS, 4)).sort(-1).values}
    real = torch.cat([inputs["attention_mask"], torch.ones(2, IMAGE, dtype=torch.long)], 1)
    model = transformers.LayoutLMv3ForSequenceClassification(config)
    row = rows(WORDS + IMAGE, 0)
    made = joined(model, "layoutlmv3.encoder.layer", inputs, row, real, "attention", "attention.output.LayerNorm")
    return replace(made, facts={**made.facts, "image": (2, 4, 4), "first": WORDS + 1})


def flava() -> Encoder:
    config = transformers.FlavaConfig(
        text_config=T5, image_config=VISION, multimodal_config=TEXT, hidden_size=32, projection_dim=16
    )
    inputs = {**text(last=3), **pixels()}
    row, layers = rows(1 + IMAGE + WORDS, 0), "multimodal_model.encoder.layer"
    inputs["attention_mask"][:] = 1  # the multimodal encoder gets no mask
    made = joined(transformers.FlavaModel(config), layers, inputs, row, None, "", "layernorm_after")
    words = [ids[1:-1][ids[1:-1] != ids[-1]].tolist() for ids in inputs["input_ids"]]
    score = lambda outputs: outputs.multimodal_output.pooler_output[:, 3]  # noqa: E731
    return replace(made, score=score, target=score, facts={"words": words, "image": (2, 4, 4), "first": 2})


def git() -> Encoder:
    config = transformers.GitConfig(**T5, vision_config=VISION, bos_token_id=57, eos_token_id=58, pad_token_id=1)
    inputs = {**text(), **pixels()}
    row = rows(IMAGE + WORDS, IMAGE + 8, IMAGE + 5)
    real = torch.cat([torch.ones(2, IMAGE, dtype=torch.long), inputs["attention_mask"]], 1)
    place = Place("git.encoder", row, real, layer_sums("git.encoder.layer", 3, "attention", "attention.output.LayerNorm"))
    score = lambda outputs: (outputs.logits * row[..., None].to(outputs.logits)).sum(1).max(-1).values  # noqa: E731
    words = [inputs["input_ids"][0].tolist(), inputs["input_ids"][1, :-3].tolist()]
    facts = {"words": words, "image": (2, 4, 4), "first": 1}
    return Encoder(transformers.GitForCausalLM(config), inputs, {"language": place}, score, facts=facts)


MADE = [deit, deit_with_teacher, dinov3, roberta, distilbert, electra, albert, albert_groups, mpnet, align_text, align]
MADE += [chinese_clip, alt_clip, owlvit, blip, siglip2]
MADE += [vilt, visual_bert, visual_bert_vqa, layoutlmv3, flava, git]
