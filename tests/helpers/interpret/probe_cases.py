"""A model with a planted head, and texts and regions for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlattn_fast.interpret.probing import gathered, linear
from vlattn_fast.models import UNITER, UNITERConfig

REGIONS, CODES = 6, 8


def planted(head: int) -> UNITER:
    """A UNITER whose words and regions with the same code have the same state; in layer 0 one head goes from each region to the
    word with its code. Other heads have small random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 16, "num_hidden_layers": 2}
    model = UNITER(UNITERConfig(vocab_size=4 + CODES, region_dim=CODES, initializer_range=0.02, **sizes)).eval()
    inner = model.uniter
    with torch.no_grad():
        for module in (inner.embeddings, inner.img_embeddings):
            for parameter in module.parameters():
                if parameter.ndim == 2:
                    parameter.zero_()
        inner.embeddings.word_embeddings.weight[4:, :CODES] = torch.eye(CODES)
        inner.img_embeddings.img_linear.weight[:CODES] = torch.eye(CODES)
        inner.embeddings.token_type_embeddings.weight[0, 20] = 0.5  # of text
        inner.embeddings.token_type_embeddings.weight[1, 20] = -2.5  # of the image
        attention = inner.encoder.layer[0].attention.self
        rows = slice(8 * head, 8 * head + 8)
        for linear in (attention.query, attention.key):
            linear.weight[rows] = 0
            linear.bias[rows] = 0
        attention.query.weight[rows, :CODES] = attention.key.weight[rows, :CODES] = torch.eye(CODES) * 2
        attention.key.weight[rows, 20] = 4.0  # keys of text have more of everything that a query asks for
    return model


def scenes(count: int, seed: int = 0) -> list[tuple[dict[str, Tensor], list[dict[str, Any]]]]:
    """Texts [CLS] one two [SEP], of two codes among those of six regions."""
    random = np.random.default_rng(seed)
    ids, features, labels = [], [], []
    for _ in range(count):
        codes = random.permutation(CODES)[:REGIONS]
        named = random.permutation(REGIONS)[:2]
        ids.append([1, *(4 + codes[named]), 2])
        features.append(np.eye(CODES)[codes])
        labels.append({"phrases": [((1, 2), int(named[0])), ((2, 3), [int(named[1])])]})
    inputs = {"input_ids": torch.tensor(np.array(ids)), "region_features": torch.tensor(np.array(features)).float()}
    return [({**inputs, "region_positions": torch.zeros(count, REGIONS, 7)}, labels)]


def nearest_mean(features: linear.Array, labels: linear.Array, folds: linear.Array) -> float:
    """Held-out accuracy of the class with the nearest mean."""
    right = 0
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        present = np.unique(labels[train])
        means = np.stack([features[train & (labels == one)].mean(0) for one in present])
        distances = (features[test][:, None] - means) / (features[train].std(0) + 1e-12)
        right += int((present[np.square(distances).sum(-1).argmin(1)] == labels[test]).sum())
    return right / len(labels)


@contextmanager
def quick_fits() -> Iterator[None]:
    """A context in which probes take a hundredth of the time, for tests of what is handed to them and shown of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_held_out", nearest_mean)
        patch.setattr(gathered, "fusion", lambda states, image, seed, shuffled: (float(states[image].std()), 0.0))
        yield
