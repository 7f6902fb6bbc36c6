"""Swap the score function of an attention layer and train: `va.nn.ScoreAttention`.

A small classifier reads a handwritten digit as eight rows of eight pixels. Only the score function of its attention changes from
one run to the next. The figures show that each score function trains, not which one is better.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vlattn_fast as va

SCORES = ("scaled_dot", "cosine", "general", "additive", "hadamard")


class Classifier(nn.Module):
    def __init__(self, score: str, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        self.norm, self.attention = nn.LayerNorm(width), va.nn.ScoreAttention(width, heads, score)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.embed(rows) + self.position  # (B, 8, width)
        return self.head((x + self.attention(self.norm(x))).flatten(1))


data = load_digits()
images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
test = torch.arange(len(labels)) % 5 == 0

accuracy: dict[str, float] = {}
for score in SCORES:
    torch.manual_seed(0)
    model = Classifier(score)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        index = torch.randint(int((~test).sum()), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[~test][index]), labels[~test][index]).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy[score] = (model(images[test]).argmax(1) == labels[test]).double().mean().item()
    learned = sum(p.numel() for name, p in model.named_parameters() if name.startswith("attention.score."))
    print(f"{score:12} {learned:5} parameters of the score, test accuracy {accuracy[score]:.1%}")
