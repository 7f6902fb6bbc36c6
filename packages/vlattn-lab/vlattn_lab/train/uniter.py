"""The training of the small UNITER of DigitScenes.

Beside image-text matching and masked words the model learns the parts of a true caption. The first layer's states of regions
learn the digit of the region; the second layer's states of words learn whether the named digit is there, and its centre; the
state that matching reads learns the distance of the two named digits. True and false alone teach all these slowly. Scans are bent
at random, so that the model recognises new scans.

"pretraining" is a recipe without what tells the model where named digits are (centre, distance, presence). It has the tasks of
published pre-training: matching, masked words, and masked regions, whose digit and pixels the last states predict. Published
models see features of a detector, which tell an object's name; here the first layer's states of unmasked regions learn the digit.

The sizes of the model, the masked words, the centres and the learning rate come from an older recipe, which was chosen with a
view of test scans. All the rest was chosen with --validate: trained on "fit" scans, compared on "validation" scans (see
`digit_scans`) and captions seen in training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_fast.models import UNITER
from vlattn_lab.processor import VOCABULARY
from vlattn_lab.scenes import CANVAS, DIGIT, PAIRS, Scenes, sample_scenes
from vlattn_lab.train.fit import check_steps, fit, seeded
from vlattn_lab.uniter import CONFIG, matching_accuracy, winoground_scores

MASKED = 32  # of 128 scenes have a masked word
NOISE = 0.1  # standard deviation added to the pixels
BEND, MOVE = 0.1, 0.1  # standard deviations of a bent scan: of the entries of its linear map, of its move over half its side
MASK_ID = VOCABULARY.index("[MASK]")
ZERO_ID = VOCABULARY.index("zero")
FIRST, RELATION, SECOND = (1,), (2, 3), (5,)  # where a caption has its words

Model = TypeVar("Model", bound=nn.Module)


class Recipe(NamedTuple):
    """What a training learns from.

    kinds: of the captions of a batch: MASKED true ones with masked words, as many as `regions` true ones of a masked region, and
    for matching half true ones and equal parts of each kind of false ones. weights: of the losses.
    """

    kinds: Tensor
    regions: int
    weights: dict[str, float]


RECIPES = {
    "located": Recipe(
        torch.tensor([0] * 80 + [1] * 16 + [2] * 16 + [3] * 16),
        0,
        {"matching": 1.0, "word": 1.0, "box": 10.0, "digit": 1.0, "there": 1.0, "apart": 5.0},
    ),
    "pretraining": Recipe(
        torch.tensor([0] * 92 + [1] * 12 + [2] * 12 + [3] * 12),
        24,
        {"matching": 1.0, "word": 1.0, "digit": 1.0, "region": 1.0, "pixels": 5.0},
    ),
}


class Observed(NamedTuple):
    """What the losses need of a pass over B captions and scenes."""

    logits: Tensor  # (B, 2)
    regions: Tensor  # (B, n R, C), after the first layer over regions, and after others from which regions tell their digit
    words: Tensor  # (B, L, C), after the second last layer over words
    final: Tensor  # (B, L, C), after the last one
    final_regions: Tensor  # (B, R, C), after the last layer over regions


class TrainingHeads(nn.Module):
    """The heads that only training uses: masked words, the digit of a region, whether a named digit is there, its centre, the
    distance of two named digits, and a masked region's digit and pixels."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.word = nn.Linear(hidden_size, len(VOCABULARY))
        self.digit = nn.Linear(hidden_size, 10)
        self.there = nn.Linear(hidden_size, 1)
        self.centre = nn.Linear(hidden_size, 2)
        self.apart = nn.Linear(hidden_size, 2)
        self.region = nn.Linear(hidden_size, 10)
        self.pixels = nn.Linear(hidden_size, DIGIT * DIGIT)


def mask_words(input_ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks the first digit, the relation or the second digit of each caption (B, 7): (masked ids, bool (B, 7) where)."""
    table = torch.zeros(3, input_ids.shape[1], dtype=torch.bool)
    for part, places in enumerate((FIRST, RELATION, SECOND)):
        table[part, list(places)] = True
    where = table[torch.randint(0, 3, (len(input_ids),), generator=generator)]
    return input_ids.masked_fill(where, MASK_ID), where


def bent(features: Tensor, generator: torch.Generator) -> Tensor:
    """Crops (B, R, 64), each turned, slanted, stretched and shifted a little at random."""
    crops = features.view(-1, 1, DIGIT, DIGIT)
    change = torch.randn(len(crops), 2, 3, generator=generator) * torch.tensor([BEND, BEND, MOVE])
    grid = F.affine_grid(torch.eye(2, 3) + change, list(crops.shape), align_corners=False)
    return F.grid_sample(crops, grid, align_corners=False).view_as(features)


@contextlib.contextmanager
def layer_states(model: UNITER) -> Iterator[list[Tensor]]:
    """The outputs of the layers, first to last, in the run inside."""
    states: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for layer in model.uniter.encoder.layer:
            stack.enter_context(layer.register_forward_hook(lambda _, __, output: states.append(output)))
        yield states


def observe(model: UNITER, inputs: dict[str, Tensor]) -> Observed:
    """The states that the losses need."""
    with layer_states(model) as states:
        output = model(**inputs)
    length = inputs["input_ids"].shape[1]
    words, regions = output.last_hidden_state[:, :length], output.last_hidden_state[:, length:]
    return Observed(output.logits, states[0][:, length:], states[-2][:, :length], words, regions)


def losses(
    model: Any,
    heads: TrainingHeads,
    scenes: Scenes,
    generator: torch.Generator,
    observe: Callable[[Any, dict[str, Tensor]], Observed] = observe,
    recipe: str = "located",
) -> dict[str, Tensor]:
    """The losses on scenes of which the first MASKED have true captions and get a word masked, and the next ones, as many as the
    recipe says, a region."""
    inputs, masked_regions = scenes.inputs(), RECIPES[recipe].regions
    masked_ids, where = mask_words(scenes.input_ids[:MASKED], generator)
    inputs["input_ids"] = torch.cat([masked_ids, scenes.input_ids[MASKED:]])
    features = bent(inputs["region_features"], generator)
    inputs["region_features"] = features + NOISE * torch.randn(features.shape, generator=generator)
    whole = slice(MASKED + masked_regions, None)  # nothing is masked
    if masked_regions:
        rows = torch.arange(MASKED, MASKED + masked_regions)
        hidden = rows, torch.randint(0, scenes.digits.shape[1], rows.shape, generator=generator)
        inputs["region_features"][hidden] = 0.0
    seen = observe(model, inputs)
    found = {
        "matching": F.cross_entropy(seen.logits[whole], scenes.label[whole]),
        "word": F.cross_entropy(heads.word(seen.final[:MASKED][where]), scenes.input_ids[:MASKED][where]),
    }
    if masked_regions:
        seen_regions = seen.regions[:, : scenes.digits.shape[1]]
        told = torch.ones_like(scenes.digits, dtype=torch.bool).index_put_(hidden, torch.tensor(False))
        found["digit"] = F.cross_entropy(heads.digit(seen_regions[told]), scenes.digits[told])
        found["region"] = F.cross_entropy(heads.region(seen.final_regions[hidden]), scenes.digits[hidden])
        found["pixels"] = F.mse_loss(heads.pixels(seen.final_regions[hidden]), features[hidden])
        return found
    named = seen.words[:, [*FIRST, *SECOND]]
    digits = scenes.digits.repeat(1, seen.regions.shape[1] // scenes.digits.shape[1])
    names = scenes.input_ids[:, [*FIRST, *SECOND], None] - ZERO_ID == scenes.digits[:, None, :]
    centres = names.float() @ ((scenes.boxes[..., :2] + scenes.boxes[..., 2:]) / (2 * CANVAS))
    present = names.any(-1)
    both = present.all(1)
    return found | {
        "box": F.smooth_l1_loss(heads.centre(named)[present], centres[present], beta=0.1),
        "digit": F.cross_entropy(heads.digit(seen.regions).flatten(0, 1), digits.flatten()),
        "there": F.binary_cross_entropy_with_logits(heads.there(named[MASKED:]).squeeze(-1), present[MASKED:].float()),
        "apart": F.smooth_l1_loss(heads.apart(seen.final[both, 0]), (centres[:, 0] - centres[:, 1])[both], beta=0.1),
    }


def train(steps: int = 3000, *, seed: int = 0, split: str = "train", log_every: int = 100, recipe: str = "located") -> UNITER:
    """A model trained for `steps` steps of 128 scenes with AdamW, one learning-rate cycle up to 1e-3; eval mode."""
    return train_matching(lambda: UNITER(CONFIG), observe, steps, seed, split, log_every, recipe)


def train_matching(
    make: Callable[[], Model],
    observe: Callable[[Model, dict[str, Tensor]], Observed],
    steps: int,
    seed: int,
    split: str,
    log_every: int,
    recipe: str,
) -> Model:
    """The model that `make` draws at random, trained as `train` says; `observe` gives the states that the losses need."""
    check_steps(steps)
    generator = torch.Generator().manual_seed(seed)
    model, heads = seeded(seed, lambda: (make(), TrainingHeads(CONFIG.hidden_size)))
    parameters = [*model.parameters(), *heads.parameters()]

    kinds, _, weights = RECIPES[recipe]

    def drawn() -> dict[str, Tensor]:
        return losses(model, heads, sample_scenes(kinds, split, None, generator), generator, observe, recipe)

    fit(parameters, drawn, weights, steps, learning_rate=1e-3, log_every=log_every, warmup=0.2)
    return model.eval()


def evaluate(model: Any, *, count: int, seed: int = 0, split: str = "test") -> dict[str, dict[str, dict[str, float]]]:
    """Accuracies per kind of wrong caption and swapped-pair scores: on test scans for all captions, captions seen in training and
    held-out captions; on every other split for captions seen in training alone."""
    told = PAIRS if split == "test" else ("seen",)
    return {
        measure.__name__: {pairs: measure(model, count=count, seed=seed, split=split, pairs=pairs) for pairs in told}
        for measure in (matching_accuracy, winoground_scores)
    }
