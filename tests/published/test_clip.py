"""The CLIP notebook of Chefer et al.: `interpret` on their copy of CLIP, and `explain` on transformers' with the same weights."""

import copy
import importlib
import json
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.published.authors import assert_equal, clone, drawn, on_cpu, published

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # what their code warns of

REPOSITORY = "hila-chefer/Transformer-MM-Explainability"
PROJECTED, PATCHES, WIDTH, VOCABULARY, LENGTH, LAYERS = 24, 3, {"visual": 128, "text": 32}, 50, 11, 3
IN_BLOCKS = {  # of OpenAI's names: those of transformers
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OTHERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}


def their_clip(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """In float64."""
    package = ModuleType("their_clip")  # without its __init__.py, which asks for torchvision
    package.__path__ = [str(clone(REPOSITORY) / "CLIP" / "clip")]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    module = importlib.import_module("their_clip.model")
    monkeypatch.setattr(module.LayerNorm, "forward", nn.LayerNorm.forward)  # theirs computes in float32
    sizes = (PROJECTED, 8 * PATCHES, LAYERS, WIDTH["visual"], 8, LENGTH, VOCABULARY, WIDTH["text"], 4, LAYERS)
    model: nn.Module = module.CLIP(*sizes).double().eval().requires_grad_()
    return model


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    found = drawn(shapes, lambda name: 0.5 if "embedding" in name else 0.15 if len(shapes[name]) > 1 else 0.1)
    for name, x in found.items():
        if name == "logit_scale":
            x.fill_(2.66)
        elif ".ln_" in f".{name}" and name.endswith("weight"):
            x += 1
    return found


def our_clip(state: dict[str, Tensor]) -> nn.Module:
    shared = {"num_hidden_layers": LAYERS, "projection_dim": PROJECTED, "hidden_act": "quick_gelu"}
    sizes = {part: {"hidden_size": width, "intermediate_size": 4 * width, **shared} for part, width in WIDTH.items()}
    text = {**sizes["text"], "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "num_attention_heads": 4}
    text |= {"eos_token_id": VOCABULARY - 1, "bos_token_id": VOCABULARY - 2, "pad_token_id": 0}
    vision = {**sizes["visual"], "image_size": 8 * PATCHES, "patch_size": 8, "num_attention_heads": WIDTH["visual"] // 64}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTED))
    found = {}
    for name, tensor in state.items():
        if name in ("visual.proj", "text_projection"):
            found["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = tensor.mT
            continue
        prefix, in_block, rest = name.partition("transformer.resblocks.")
        if in_block:
            number, _, part = rest.partition(".")
            block = f"{'vision' if prefix else 'text'}_model.encoder.layers.{number}"
            if part.startswith("attn.in_proj_"):
                for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{block}.self_attn.{letter}_proj.{part.removeprefix('attn.in_proj_')}"] = rows
                continue
            part, _, kind = part.rpartition(".")
            found[f"{block}.{IN_BLOCKS[part]}.{kind}"] = tensor
            continue
        whole, _, kind = name.rpartition(".")
        found[OTHERS[name] if name in OTHERS else f"{OTHERS[whole]}.{kind}"] = tensor
    model.double().load_state_dict(found)
    return model.eval()


@pytest.mark.parametrize("start_layer", [0, 1, -1])
def test_notebook(start_layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = published("clip", lambda: {"shapes": {name: [*x.shape] for name, x in their_clip(monkeypatch).state_dict().items()}})
    state = weights(shapes["shapes"])
    ids, ends = torch.zeros(3, LENGTH, dtype=torch.int64), torch.tensor([4, 7, 9])
    for row, end in zip(ids, ends, strict=True):
        row[0], row[end] = VOCABULARY - 2, VOCABULARY - 1
        row[1:end] = torch.randint(1, VOCABULARY - 2, (int(end) - 1,))
    pixels = torch.randn(1, 3, 8 * PATCHES, 8 * PATCHES, dtype=torch.float64)

    def compute() -> dict[str, Tensor]:
        theirs = their_clip(monkeypatch)
        theirs.load_state_dict(state)
        cells = json.loads((clone(REPOSITORY) / "CLIP_explainability.ipynb").read_text())["cells"]
        (source,) = ["".join(cell["source"]) for cell in cells if "def interpret" in "".join(cell["source"])]
        notebook: dict[str, Any] = {"torch": torch, "np": np, "start_layer": -1, "start_layer_text": -1}
        exec(source[source.index("def interpret") :], notebook)
        with on_cpu():
            words, patches = notebook["interpret"](pixels, ids, theirs, "cpu", start_layer, start_layer)
        return {"text": words[range(3), ends], "image": patches}

    wanted = published(f"clip {start_layer}", compute)
    ours = our_clip(state)
    for dtype in (torch.float64, torch.float32):
        inputs: dict[str, Tensor] = {"input_ids": ids, "pixel_values": pixels.to(dtype)}
        method = va.methods.Gradient(start_layer=start_layer, freeze=())
        explanation = va.explain(copy.deepcopy(ours).to(dtype), inputs, method=method)
        assert_equal(explanation.image.flatten(1), wanted["image"], "image")
        assert_equal(explanation.relevancy["text"], wanted["text"], "text")
