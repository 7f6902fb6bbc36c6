"""The training of the small UNITER of DigitScenes.

Three losses: image-text matching, masked words, and the centre of the digit that each digit word names, from the word's
final state. Without the last one the model needs about twice as many steps to learn relations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_fast.lab.processor import VOCABULARY
from vlattn_fast.lab.scenes import CANVAS, Scenes, sample_scenes
from vlattn_fast.lab.train.fit import check_steps, fit
from vlattn_fast.lab.uniter import CONFIG, matching_accuracy, winoground_scores
from vlattn_fast.models.uniter import UNITER

# Of 256 scenes 64 have a masked word. Half of the others are true; the false ones are of each kind in equal parts.
KINDS = torch.tensor([0] * 160 + [1] * 32 + [2] * 32 + [3] * 32)
MASKED = 64
NOISE = 0.15  # standard deviation added to the pixels, without it the model memorises the 1,437 training scans
MASK_ID = VOCABULARY.index("[MASK]")
ZERO_ID = VOCABULARY.index("zero")
FIRST, RELATION, SECOND = (1,), (2, 3), (5,)  # where a caption has its words


class TrainingHeads(nn.Module):
    """The heads that only training uses: a masked-word classifier and a regression of box centres."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.word = nn.Linear(hidden_size, len(VOCABULARY))
        self.centre = nn.Linear(hidden_size, 2)


def mask_words(input_ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks the first digit, the relation or the second digit of each caption (B, 7): (masked ids, bool (B, 7) where)."""
    table = torch.zeros(3, input_ids.shape[1], dtype=torch.bool)
    for row, positions in enumerate((FIRST, RELATION, SECOND)):
        table[row, list(positions)] = True
    where = table[torch.randint(0, 3, (len(input_ids),), generator=generator)]
    return input_ids.masked_fill(where, MASK_ID), where


def losses(model: UNITER, heads: TrainingHeads, scenes: Scenes, generator: torch.Generator) -> dict[str, Tensor]:
    """The three losses on scenes of which the first MASKED have true captions and get a word masked."""
    inputs = scenes.inputs()
    masked_ids, where = mask_words(scenes.input_ids[:MASKED], generator)
    inputs["input_ids"] = torch.cat([masked_ids, scenes.input_ids[MASKED:]])
    features = inputs["region_features"]
    inputs["region_features"] = features + NOISE * torch.randn(features.shape, generator=generator)
    output = model(**inputs)
    words = output.last_hidden_state[:, : scenes.input_ids.shape[1]]

    names = scenes.input_ids[:, [*FIRST, *SECOND], None] - ZERO_ID == scenes.digits[:, None, :]
    centres = (scenes.boxes[..., :2] + scenes.boxes[..., 2:]) / (2 * CANVAS)
    predicted = heads.centre(words[:, [*FIRST, *SECOND]])
    present = names.any(-1)
    return {
        "matching": F.cross_entropy(output.logits[MASKED:], scenes.label[MASKED:]),
        "word": F.cross_entropy(heads.word(words[:MASKED][where]), scenes.input_ids[:MASKED][where]),
        "box": F.smooth_l1_loss(predicted[present], (names.float() @ centres)[present], beta=0.1),
    }


def train(steps: int = 3000, *, seed: int = 0, log_every: int = 100) -> UNITER:
    """A model trained for `steps` steps of 256 scenes with AdamW, one learning-rate cycle up to 1e-3; eval mode."""
    check_steps(steps)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, heads = UNITER(CONFIG), TrainingHeads(CONFIG.hidden_size)
    parameters = [*model.parameters(), *heads.parameters()]
    weights = {"matching": 1.0, "word": 1.0, "box": 10.0}

    def drawn() -> dict[str, Tensor]:
        return losses(model, heads, sample_scenes(KINDS, "train", None, generator), generator)

    fit(parameters, drawn, weights, steps, learning_rate=1e-3, log_every=log_every)
    return model.eval()


def evaluate(model: UNITER, *, count: int, seed: int = 0) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracies per kind of wrong caption and swapped-pair scores on test scans, for all captions, those seen in
    training and those held out from it."""
    return {
        measure.__name__: {pairs: measure(model, count=count, seed=seed, pairs=pairs) for pairs in ("all", "seen", "held_out")}
        for measure in (matching_accuracy, winoground_scores)
    }
