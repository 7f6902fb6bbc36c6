"""DAAM (Tang et al., ACL 2023): heat maps of tokens over a small UNet and two denoising steps.

What the authors' code computes is recorded here; none of it is part of this repository. With VLATTN_PUBLISHED=/folder/of/clones
the test runs it again, from castorini/daam at 09564e048cf5ffc1523aa0605736e7f178ca505a.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_lab as lab

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore")  # what their code warns of

STEPS, TOKENS = 2, 7  # [start], five words, [end]
LARGEST_GRID = ("down_blocks.0", "up_blocks.3")
RECORDED = {  # three weighted sums and the largest number of their maps, (7, 64, 64) each
    "one grid": ([0.07543334929324791, 0.03103203920668966, 0.013269141601096657], 0.4999915725679464),
    "all grids": ([0.02410725023668656, 0.005351972307913076, 0.0029028694912087887], 0.13548482254410743),
}


def sums(x: Tensor) -> list[float]:
    """Weighted sums, as large as a number of `x`. A fault in one number shows in all of them."""
    place = torch.arange(x.numel(), dtype=torch.float64)
    return [float((x.flatten().double() * torch.cos((0.7 + k) * place)).sum()) / x.numel() ** 0.5 for k in range(3)]


def their_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Theirs. Spacy, which it imports, is for words' parents alone; what it writes goes to tmp_path."""
    tokens: Any = ModuleType("spacy.tokens")
    tokens.Token = tokens.Doc = tokens.Span = object
    spacy: Any = ModuleType("spacy")
    spacy.tokens = tokens
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    monkeypatch.setitem(sys.modules, "spacy.tokens", tokens)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(os.environ["VLATTN_PUBLISHED"]) / "daam"))
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
        with lab.prompt_maps(unet, guidance="batch", layers=chosen) as maps:
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

    made = {"one grid": ours(lambda path: path.startswith(LARGEST_GRID)), "all grids": ours(lambda path: "mid_block" not in path)}
    if "VLATTN_PUBLISHED" in os.environ:
        torch.testing.assert_close(made, compute(), rtol=0, atol=1e-9)
    for name, (numbers, largest) in RECORDED.items():
        assert made[name].shape == (TOKENS, 64, 64)
        assert max(abs(x - y) for x, y in zip(sums(made[name]), numbers, strict=True)) <= 1e-9 * largest, name
