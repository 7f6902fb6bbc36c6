"""Train image-text matching with SCAN's loss and with DAMSM's: `va.nn.ScanLoss`, `va.nn.DamsmLoss`.

Scenes of DigitScenes, four handwritten digits each, and the two digits that their captions name. Regions and words become
vectors of one space, each by itself; only the similarity attends. Nothing tells which region a word names. The script trains with
each loss and looks for the words of each of 50 new scenes among those of all 50.
"""

import torch
from torch import Tensor, nn

import vlattn_fast as va

WIDTH, BATCH, STEPS, TESTED = 48, 32, 300, 50
VOCABULARY, PIXELS = len(va.lab.processor.VOCABULARY), va.lab.processor.REGION_DIM
LOSSES = {"SCAN": va.nn.ScanLoss(hardest=False), "DAMSM": va.nn.DamsmLoss()}


class Encoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, WIDTH)
        self.region = nn.Sequential(nn.Linear(PIXELS, 96), nn.ReLU(), nn.Linear(96, WIDTH))

    def forward(self, scenes: va.lab.Scenes) -> tuple[Tensor, Tensor]:
        """Regions (B, 4, C) and words (B, 2, C), of length 1."""
        inputs = scenes.inputs()
        regions, words = self.region(inputs["region_features"]), self.word(inputs["input_ids"][:, [1, 5]])
        return nn.functional.normalize(regions, dim=-1), nn.functional.normalize(words, dim=-1)


def train(loss: nn.Module) -> Encoders:
    torch.manual_seed(0)
    model = Encoders()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        value = loss(*model(va.lab.digit_scenes(BATCH, split="train", seed=step)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return model


@torch.no_grad()
def found(model: Encoders) -> float:
    """Share of new scenes that show both digits of the words which fit them best."""
    scenes = va.lab.digit_scenes(TESTED, split="test", seed=0)
    regions, words = model(scenes)
    best = va.stacked_cross_attention(regions, words).argmax(1)
    digits = scenes.input_ids[best][:, [1, 5]] - va.lab.processor.VOCABULARY.index("zero")
    shown = (digits[:, :, None] == scenes.digits[:, None, :]).any(2)
    return shown.all(1).double().mean().item()


results = {name: found(train(loss)) for name, loss in LOSSES.items()}
for name, share in results.items():
    print(f"{name:6} right digits in {share:.0%} of {TESTED} new scenes (by chance: 13%)")
