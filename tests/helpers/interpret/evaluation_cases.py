"""Models for the tests of `evaluate`, one of them planted, and rows of its table by what they are of."""

from types import SimpleNamespace

import torch
from torch import nn

from tests.helpers.interpret.cases import CASES, lively


def made(name):
    torch.manual_seed(0)
    case = CASES[name]()
    lively(case.model).eval()
    return case.model, case.inputs


def rows(evaluation):
    return {(row["method"], row["test"], row["part"]): row for row in evaluation.table}


class Planted(nn.Module):
    """Says class 1 while any of four patches has ink, and while any of two words is there. Nothing in it attends."""

    cells = [(0, 1), (1, 1), (2, 3), (3, 0)]
    words = [11, 12]

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(1, 1)

    def forward(self, pixel_values, input_ids, attention_mask=None):
        ink = pixel_values.unflatten(3, (4, 2)).unflatten(2, (4, 2)).abs().sum((1, 3, 5))
        seen = torch.stack([ink[:, y, x] > 0 for y, x in self.cells], 1).double().mean(1)
        said = torch.stack([(input_ids == word).any(1) for word in self.words], 1).double().mean(1)
        logit = 8 * seen * said - 2
        return SimpleNamespace(logits=torch.stack([-logit, logit], 1))


def planted_data(count=3):
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        pixels = 1 + torch.rand(2, 3, 8, 8, generator=generator)
        ids = torch.tensor([[1, 11, 20, 21, 12, 22, 2, 0], [1, 30, 31, 11, 32, 12, 33, 2]])
        boxes = [[[x / 4, y / 4, (x + 1) / 4, (y + 1) / 4] for y, x in Planted.cells]] * 2
        yield {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids > 0}, 1, boxes


def truth(sign=1.0):
    def method(model, inputs, target):
        image = torch.zeros(2, 4, 4)
        for y, x in Planted.cells:
            image[:, y, x] = sign
        ids = inputs["input_ids"]
        words = [row[(row > 2)] for row in ids]
        text = nn.utils.rnn.pad_sequence([torch.isin(w, torch.tensor(Planted.words)) * sign for w in words], batch_first=True)
        return SimpleNamespace(image=image, text=text)

    return method
