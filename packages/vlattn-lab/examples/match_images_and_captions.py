"""Train image-text matching with SCAN's loss and with DAMSM's: `va.nn.ScanLoss`, `va.nn.DamsmLoss`.

A scene of DigitScenes has four handwritten digits, and its caption names two of them. Two encoders turn each region and each
word into a vector of one space; only the similarity attends. No label says which region a word names. The script trains with
each loss, and then looks for the words of each of 50 new scenes among the words of all 50.
"""

import torch
from torch import Tensor, nn

import vlattn_fast as va
import vlattn_lab as lab

WIDTH, BATCH, STEPS, TESTED = 48, 32, 300, 50
VOCABULARY, PIXELS = len(lab.processor.VOCABULARY), lab.processor.REGION_DIM
LOSSES = {"SCAN": va.nn.ScanLoss(hardest=False), "DAMSM": va.nn.DamsmLoss()}


class Encoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, WIDTH)
        self.region = nn.Sequential(nn.Linear(PIXELS, 96), nn.ReLU(), nn.Linear(96, WIDTH))

    def forward(self, scenes: lab.Scenes) -> tuple[Tensor, Tensor]:
        """Regions (B, 4, C) and words (B, 2, C), of length 1."""
        inputs = scenes.inputs()
        regions, words = self.region(inputs["region_features"]), self.word(inputs["input_ids"][:, [1, 5]])
        return nn.functional.normalize(regions, dim=-1), nn.functional.normalize(words, dim=-1)


def train(loss: nn.Module) -> Encoders:
    torch.manual_seed(0)
    model = Encoders()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        value = loss(*model(lab.digit_scenes(BATCH, split="train", seed=step)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return model


@torch.no_grad()
def share_of_right_digits(model: Encoders) -> float:
    """The share of new scenes whose best pair of words names two digits of the scene."""
    scenes = lab.digit_scenes(TESTED, split="test", seed=0)
    regions, words = model(scenes)
    best = va.stacked_cross_attention(regions, words).argmax(1)
    digits = scenes.input_ids[best][:, [1, 5]] - lab.processor.VOCABULARY.index("zero")
    shown = (digits[:, :, None] == scenes.digits[:, None, :]).any(2)
    return shown.all(1).double().mean().item()


results = {name: share_of_right_digits(train(loss)) for name, loss in LOSSES.items()}
for name, share in results.items():
    print(f"{name:6} right digits in {share:.0%} of {TESTED} new scenes (by chance: 13%)")
