"""DAAM (Tang et al., ACL 2023): heat maps of tokens over a small UNet and two denoising steps."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.published.authors import assert_equal, clone, published

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore")  # what their code warns of

STEPS, TOKENS = 2, 7  # [start], five words, [end]
LARGEST_GRID = ("down_blocks.0", "up_blocks.3")


def their_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Theirs. Spacy, which it imports, is for words' parents alone; what it writes goes to tmp_path."""
    tokens: Any = ModuleType("spacy.tokens")
    tokens.Token = tokens.Doc = tokens.Span = object
    spacy: Any = ModuleType("spacy")
    spacy.tokens = tokens
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    monkeypatch.setitem(sys.modules, "spacy.tokens", tokens)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(clone("castorini/daam")))
    return importlib.import_module("daam.trace").trace


def small_unet() -> torch.nn.Module:
    """Float64, with sharp attention."""
    down, up = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    sizes = {"sample_size": 64, "layers_per_block": 1, "block_out_channels": (16, 16, 16, 32), "norm_num_groups": 8}
    heads = {"cross_attention_dim": 32, "attention_head_dim": (2, 4, 4, 4)}
    unet = diffusers.UNet2DConditionModel(**sizes, **heads, down_block_types=down, up_block_types=up)
    for name, parameter in unet.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            parameter.data.normal_(0, 1.0)
    return unet.double().eval()


@pytest.mark.slow
@torch.no_grad()
def test_heat_maps_of_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unet = small_unet()
    torch.manual_seed(0)
    latents = torch.randn(STEPS, 1, 4, 64, 64, dtype=torch.float64).expand(-1, 2, -1, -1, -1)  # without and with the prompt
    states = 3 * torch.randn(2, 77, 32, dtype=torch.float64)
    tokenizer = SimpleNamespace(tokenize=str.split)
    pipeline = SimpleNamespace(
        unet=unet, vae_scale_factor=8, tokenizer=tokenizer, check_inputs=lambda prompt: None, image_processor=None
    )

    def denoise() -> None:
        for step, latent in enumerate(latents):
            unet(latent, 10 * step, encoder_hidden_states=states)

    def ours(chosen: Any) -> Tensor:
        with va.prompt_maps(unet, guidance="batch", layers=chosen) as maps:
            denoise()
        return STEPS * maps.token_maps(list(range(TOKENS)))[0]  # theirs are sums over the steps

    def compute() -> dict[str, Tensor]:
        with their_trace(monkeypatch, tmp_path)(pipeline) as traced:
            pipeline.check_inputs("a b c d e")
            denoise()
            one = traced.compute_global_heat_map(factors=[1]).heat_maps
            # they cut each head's resized map at 0, which cannot be done to a mean over heads
            monkeypatch.setattr(Tensor, "clamp_", lambda x, *_, **__: x)
            all_grids = traced.compute_global_heat_map().heat_maps
            monkeypatch.undo()
        return {"one grid": one, "all grids": all_grids}

    wanted = published("daam", compute)
    assert_equal(ours(lambda path: path.startswith(LARGEST_GRID)), wanted["one grid"], "one grid")
    assert_equal(ours(lambda path: "mid_block" not in path), wanted["all grids"], "all grids")
