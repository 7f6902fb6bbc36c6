"""Question answering by reading, as in M4C (Hu et al., CVPR 2020): a classifier reads the digits of a scene, which become tokens
with a word and a place; sentence, words and tokens attend to one another, and the answer is a fixed word or a copied token."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_lab.experiments.scores import answering
from vlattn_lab.experiments.scores.answering import WORDS
from vlattn_lab.experiments.scores.attend import PLAIN, UNIFORM, Attend
from vlattn_lab.experiments.scores.material import Sizes, TextEncoder
from vlattn_lab.processor import DIGIT_WORDS, POSITION_DIM, DigitProcessor
from vlattn_lab.scenes import REGIONS
from vlattn_lab.texts import ANSWERS, PAD, TEXT_VOCABULARY

ARMS = (*PLAIN, UNIFORM)
SIZE, LAYERS = 32, 2
RATES = (5e-3,)  # one learning rate for all scores
SIZES, SMOKE = Sizes(1000, 16384, 500), answering.SMOKE
FIXED = (*DIGIT_WORDS[:REGIONS], "yes", "no")  # counts, yes and no; the digit that is asked for is copied
FIXED_ANSWERS = F.one_hot(torch.tensor([ANSWERS.index(word) for word in FIXED]), len(ANSWERS)).float()
DIGIT_ANSWERS = F.one_hot(torch.tensor([ANSWERS.index(word) for word in DIGIT_WORDS]), len(ANSWERS)).float()
DIGIT_IDS = torch.tensor([TEXT_VOCABULARY.index(word) for word in DIGIT_WORDS])


@torch.no_grad()
def tokens_of(net: nn.Sequential, images: Tensor, boxes: Tensor) -> Tensor:
    """(B, R, 1 + POSITION_DIM): the digit that the reader finds in each box, and the place of the box."""
    boxed = DigitProcessor().regions(images, boxes)
    return torch.cat([net(boxed["region_features"]).argmax(-1, keepdim=True), boxed["region_positions"]], dim=-1)


class M4C(nn.Module):
    see = staticmethod(tokens_of)

    def __init__(self, arm: str, backend: str = "auto") -> None:
        super().__init__()
        self.text, self.place = TextEncoder(WORDS, SIZE), nn.Linear(POSITION_DIM, SIZE)
        self.query = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(LAYERS + 1))
        self.mix = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(3 * SIZE), nn.Linear(3 * SIZE, 2 * SIZE), nn.ReLU(), nn.Linear(2 * SIZE, SIZE))
            for _ in range(LAYERS + 1)
        )
        self.copies, self.fixed = nn.Linear(SIZE, 1), nn.Linear(SIZE, len(FIXED))
        self.attend_all, self.attend = (Attend(arm, SIZE, backend) for _ in range(2))

    def forward(self, tokens: Tensor, ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, R, 1 + POSITION_DIM) and questions (B, WORDS) -> log-probabilities (B, answers)."""
        digits = tokens[..., 0].long()
        shown = torch.ones_like(digits, dtype=torch.bool) if key_mask is None else key_mask
        words, sentence = self.text(ids)
        named = self.text.embedding(DIGIT_IDS[digits]) + self.place(tokens[..., 1:])
        states = torch.cat([named, words, sentence[:, None]], dim=1)
        mask = F.pad(torch.cat([shown, ids != PAD], dim=1), (0, 1), value=True)
        *queries, last_query = self.query
        *mixes, last_mix = self.mix
        for query, mix in zip(queries, mixes, strict=True):
            states = states + _mixed(mix, states, self.attend_all(query(states), states, None, mask))
        read, answer = states[:, : tokens.shape[1]], states[:, -1:]
        # one attention gives what the answer sees of the tokens, and which token it copies
        values = torch.cat([read, DIGIT_ANSWERS[digits]], dim=-1)
        attended, copied = self.attend(last_query(answer), read, values, shown).split([SIZE, len(ANSWERS)], dim=-1)
        answer = answer + _mixed(last_mix, answer, attended)
        copies = self.copies(answer).sigmoid()
        chances = copies * copied + (1 - copies) * (self.fixed(answer).softmax(-1) @ FIXED_ANSWERS)
        return chances[:, 0].clamp(min=1e-9).log()


def _mixed(mix: nn.Module, states: Tensor, attended: Tensor) -> Tensor:
    mixed: Tensor = mix(torch.cat([states, attended, states * attended], dim=-1))
    return mixed


train = functools.partial(answering.train, make=M4C)
measure = answering.measure
