"""Models and the state of libraries for the tests with Trainer of transformers, Lightning and accelerate."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """accelerate keeps the first choices of a process, also in the environment."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def model_of(term: str) -> Any:
    torch.manual_seed(0)
    if term == "congruence":
        config = transformers.VisualBertConfig(**SIZES, **NO_DROPOUT, visual_embedding_dim=20, vocab_size=99, num_labels=4)
        return transformers.VisualBertForQuestionAnswering(config)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, **NO_DROPOUT, image_size=32, patch_size=8, num_labels=4)
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([x.detach().flatten() for x in model.parameters()])
