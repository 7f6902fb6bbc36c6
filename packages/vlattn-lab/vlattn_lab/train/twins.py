"""The training of twins: statements about grids whose cue tells the answer, or is drawn at random."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast.models import UNITER
from vlattn_lab.grids import STEPS, sample_grids
from vlattn_lab.scenes import joined
from vlattn_lab.train.fit import check_steps, fit, seeded
from vlattn_lab.twins import CONFIG, colour_logits, twin_accuracy

GRIDS = 32  # of each number of steps, in a step of the training


def train(steps: int = 6000, *, seed: int = 0, log_every: int = 100, cue: str = "frame", told: bool = False) -> UNITER:
    """A model trained for `steps` steps of AdamW with one learning-rate cycle up to 1e-3; eval mode. The models of one seed begin
    alike. cue, told: of the statements, see `grid_statements`; told statements make the twin that takes the shortcut."""
    check_steps(steps)
    generator = torch.Generator().manual_seed(seed)
    model = seeded(seed, lambda: UNITER(CONFIG))

    def drawn() -> dict[str, Tensor]:
        grids = joined([sample_grids(GRIDS, number, cue, told, generator) for number in STEPS])
        return {"colour": F.cross_entropy(colour_logits(model, grids.inputs()), grids.label)}

    fit(model.parameters(), drawn, {"colour": 1.0}, steps, learning_rate=1e-3, log_every=log_every, warmup=0.2)
    return model.eval()


def evaluate(model: Any, *, count: int) -> dict[str, Any]:
    return {"twin_accuracy": twin_accuracy(model, count=count)}
