"""Small random models of the kinds that are captured and replaced, with their inputs. Two words of the second row are padding."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from vlattn_fast.models import UNITER, UNITERConfig

SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 37}
DEEP = {**SIZES, "num_hidden_layers": 2}
PATCHES = {"image_size": 32, "patch_size": 8}
WORDS, BOXES, HEADS, HEAD_DIM = 7, 7, 4, 8  # as many boxes as words: nothing may tell them apart by their number


def words() -> dict[str, Tensor]:
    mask = torch.ones(2, WORDS, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(5, 90, (2, WORDS)), "attention_mask": mask}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def visual_bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.VisualBertConfig(vocab_size=99, visual_embedding_dim=20, **DEEP)
    of_boxes = {"visual_embeds": torch.randn(2, BOXES, 20), "visual_attention_mask": torch.ones(2, BOXES)}
    types = {"visual_token_type_ids": torch.ones(2, BOXES, dtype=torch.int64)}
    return hf.VisualBertForQuestionAnswering(config), {**words(), **of_boxes, **types}


def lxmert() -> tuple[nn.Module, dict[str, Tensor]]:
    layers = {"l_layers": 2, "r_layers": 1, "x_layers": 2}
    config = hf.LxmertConfig(vocab_size=99, visual_feat_dim=20, num_qa_labels=5, **layers, **SIZES)
    boxes = {"visual_feats": torch.randn(2, BOXES, 20), "visual_pos": torch.rand(2, BOXES, 4)}
    return hf.LxmertForQuestionAnswering(config), {**words(), **boxes}


def vilt() -> tuple[nn.Module, dict[str, Tensor]]:
    return hf.ViltForQuestionAnswering(hf.ViltConfig(vocab_size=99, **DEEP, **PATCHES)), {**words(), **pixels()}


def clip(implementation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    text = {"vocab_size": 99, "max_position_embeddings": 20, "bos_token_id": 97, "eos_token_id": 98, **DEEP}
    config = hf.CLIPConfig(text_config=text, vision_config={**DEEP, **PATCHES, "num_hidden_layers": 3}, projection_dim=16)
    model = hf.CLIPModel(config)
    model.set_attn_implementation(implementation)
    return model, {**words(), **pixels()}


def llama(implementation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=99, num_key_value_heads=2, pad_token_id=0, **DEEP))
    model.set_attn_implementation(implementation)
    return model, words()


def gpt_neox() -> tuple[nn.Module, dict[str, Tensor]]:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(vocab_size=99, **DEEP)), words()


def uniter() -> tuple[nn.Module, dict[str, Tensor]]:
    config = UNITERConfig(vocab_size=99, num_hidden_layers=2, region_dim=20, initializer_range=0.2, **SIZES)
    boxes = {"region_features": torch.randn(2, BOXES, 20), "region_positions": torch.rand(2, BOXES, 7)}
    given = words()
    return UNITER(config), {**given, "attention_mask": given["attention_mask"].bool(), **boxes}


class Joined(nn.Module):
    """torch's own layers over words and image tokens, in one sequence or in two."""

    def __init__(self, joint: bool, kdim: int | None = None) -> None:
        super().__init__()
        self.joint = joint
        self.embed, self.project = nn.Embedding(99, 32), nn.Linear(20, 32)
        self.attention = nn.MultiheadAttention(32, 4, kdim=kdim, vdim=kdim, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 37, batch_first=True), 2)

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        text, image = self.embed(input_ids), self.project(features)
        if self.joint:
            text = torch.cat([text, image], 1)
            return self.encoder(text)
        text = self.encoder(text) + self.attention(text, image, image, need_weights=False)[0]
        return self.encoder(text) + self.encoder(image).mean(1, keepdim=True)


Make = Callable[[], tuple[nn.Module, dict[str, Tensor]]]
MODELS: dict[str, Make] = {
    "VisualBERT": visual_bert,
    "LXMERT": lxmert,
    "ViLT": vilt,
    "CLIP, sdpa": lambda: clip("sdpa"),
    "CLIP, eager": lambda: clip("eager"),
    "UNITER": uniter,
    "Llama, sdpa": lambda: llama("sdpa"),
    "Llama, eager": lambda: llama("eager"),
    "GPT-NeoX": gpt_neox,
    "BERT": lambda: (hf.BertForSequenceClassification(hf.BertConfig(vocab_size=99, **DEEP)), words()),
    "ViT": lambda: (hf.ViTForImageClassification(hf.ViTConfig(**DEEP, **PATCHES)), pixels()),
}


def answer(outputs: Any) -> Tensor:
    """What the model says, (B, ...)."""
    names = ("logits", "question_answering_score", "logits_per_image")
    return next(getattr(outputs, name) for name in names if getattr(outputs, name, None) is not None)
