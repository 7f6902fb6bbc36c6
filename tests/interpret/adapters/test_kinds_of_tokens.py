"""A new kind of tokens is one class: the one that CONTRIBUTING shows."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vlattn_fast.interpret import ADAPTERS, Adapter, Tower, explain, register_adapter
from vlattn_fast.interpret.adapters.adapter import POSITION_RULES
from vlattn_fast.interpret.adapters.tokens import Tokens

ROOT = Path(__file__).resolve().parents[3]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x, mask):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).movedim(1, 3).unbind(1)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Listener(nn.Module):
    """Reads spectrograms (B, bands, frames) cell by cell, of which frames behind `lengths` (B,) are masked."""

    def __init__(self):
        super().__init__()
        self.cell, self.layers, self.head = nn.Linear(1, 8), nn.ModuleList([Layer(), Layer()]), nn.Linear(8, 3)

    def forward(self, spectrogram, lengths):
        real = (torch.arange(spectrogram.shape[2]) < lengths[:, None])[:, None].expand(spectrogram.shape).flatten(1)
        x = nn.functional.pad(self.cell(spectrogram.flatten(1)[..., None]), (0, 0, 1, 0), value=1.0)
        for layer in self.layers:
            x = layer(x, nn.functional.pad(real, (1, 0), value=True)[:, None, None])
        return SimpleNamespace(logits=self.head(x[:, 0]))


@pytest.fixture
def listener(monkeypatch):
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Add a kind of tokens\n")[1].split("\n## ")[0]
    monkeypatch.setattr(Tokens, "named", dict(Tokens.named))
    exec(re.findall(r"```python\n(.*?)```", section, re.S)[0], {"__name__": "contributing"})
    (tower,) = re.findall(r"`(Tower\(.*?\))`", section)
    monkeypatch.setitem(ADAPTERS, "Listener", None)
    register_adapter("Listener", Adapter((eval(tower, {"Tower": Tower}),), "class"))
    torch.manual_seed(0)
    return Listener().double(), {"spectrogram": torch.randn(2, 3, 5, dtype=torch.float64), "lengths": torch.tensor([5, 2])}


def test_its_maps_are_cut_from_the_row(listener):
    model, inputs = listener
    got = explain(model, inputs)
    assert got.image.shape == (2, 3, 5) and got.image_samples == [0, 1] and got.text is None
    assert torch.equal(got.image.flatten(1), got.relevancy["ear"][:, 1:])
    assert bool((got.image[1, :, :2] != 0).any()) and not got.image[1, :, 2:].any()


@pytest.mark.parametrize("method", ["gradient", "gradcam"])
def test_its_padding_counts_for_nothing(listener, method):
    """Grad-CAM weighs heads by a mean over real pairs: a padded input has the map of the input without its padding."""
    model, inputs = listener
    padded = explain(model, inputs, method=method).image[1, :, :2]
    alone = explain(model, {"spectrogram": inputs["spectrogram"][1:, :, :2], "lengths": torch.tensor([2])}, method=method)
    torch.testing.assert_close(padded, alone.image[0])
    assert bool((padded != 0).any())


def test_names_are_those_of_the_classes(listener):
    assert Tower("ear", "", "layers", "cls", "sound").kind is Tokens.named["sound"]
    with pytest.raises(ValueError, match="tokens must be one of .*'patches'.*'sound'.*; got 'smell'"):
        Tower("ear", "", "layers", "cls", "smell")
    with pytest.raises(ValueError, match="score must be one of .*'class'.*; got 'logit'"):
        Adapter((), "logit")
    for position in POSITION_RULES:
        assert (
            Tower("ear", "", "layers", position, "sound", pooling="head" if position == "pool" else None).rule
            is POSITION_RULES[position]
        )
