"""Attention in which only the score function changes, and measures of its weights.

As in SCAN, AttnGAN and MAC, the score takes the features without a projection. There is one head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlattn_fast import score_attention
from vlattn_fast.interpret.evaluating.curves import area_under
from vlattn_fast.nn.score_attention import make_score

# Names and options as `ScoreAttention` has them. With projects="key" the bias of general would cancel in the softmax. The relu is
# MAC's.
SCORES: dict[str, dict[str, Any]] = {
    "dot": {},
    "scaled_dot": {},
    "cosine": {},
    "general": {},
    "biased_general": {"projects": "query"},
    "activated_general": {"projects": "query", "activation": "sigmoid"},
    "additive": {},
    "hadamard": {"activation": "relu"},
}
UNIFORM = "uniform"  # the control: every key has the same weight
ARMS = (*SCORES, UNIFORM)


class Seen(NamedTuple):
    """One call: weights (B, N, M), value (B, M, D), output (B, N, D)."""

    weights: Tensor
    value: Tensor
    output: Tensor


class Attend(nn.Module):
    """softmax(score(query, key)) value.

    Args:
        arm: one of ARMS. size: D of query and key. backend: as in `score_attention`.
    """

    def __init__(self, arm: str, size: int, backend: str = "auto") -> None:
        super().__init__()
        self.uniform, self.backend = arm == UNIFORM, backend
        self.score = "dot" if self.uniform else make_score(arm, 1, size, False, SCORES[arm])
        self.seen: list[Seen] | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """query (B, N, D), key (B, M, D), value (B, M, Dv), which is the key where it is None -> (B, N, Dv)."""
        value = key if value is None else value
        output = self._attention(query, key, value, key_mask)
        if self.seen is not None:
            every = torch.eye(key.shape[1], dtype=key.dtype).expand(len(key), -1, -1)
            self.seen.append(Seen(self._attention(query, key, every, key_mask).detach(), value.detach(), output))
        return output

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        score = self.score() if isinstance(self.score, nn.Module) else self.score
        query = torch.zeros_like(query) if self.uniform else query
        heads = (x[:, None] for x in (query, key, value))
        attended: Tensor = score_attention(*heads, score=score, key_mask=key_mask, backend=self.backend)[:, 0]
        return attended


def weights_and_relevancy(attend: Attend, run: Callable[[], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(weights A (B, N, M), relevancy relu(A * dA)) of each call of `attend` while `run` computes the scores (B); dA =
    dO V^T is the score's gradient at the weights (Chefer, Gur, Wolf, ICCV 2021, equation 5)."""
    attend.seen = []
    try:
        with torch.enable_grad():
            score = run()
            calls = attend.seen
            gradients = torch.autograd.grad(score.sum(), [call.output for call in calls])
        return [
            (call.weights, (call.weights * (gradient @ call.value.mT)).clamp(min=0))
            for call, gradient in zip(calls, gradients, strict=True)
        ]
    finally:
        attend.seen = None


def perturbation(values: Tensor, accuracy: Callable[[Tensor], float], seed: int) -> dict[str, float]:
    """Areas under the accuracy while entries are removed one by one until none is left: largest values first ("auc_most"),
    least values first ("auc_least"), random order ("auc_random").

    Args:
        values: (B, M). accuracy: takes a mask, bool (B, M), True = the entry is kept.
    """
    number = values.shape[1]
    random = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))
    steps = [k / number for k in range(number + 1)]
    whole, none = (accuracy(torch.full(values.shape, stays)) for stays in (True, False))
    areas = {}
    for name, order in (("auc_most", -values), ("auc_least", values), ("auc_random", random)):
        place = order.argsort(dim=1, stable=True).argsort(1)
        between = [accuracy(place >= removed) for removed in range(1, number)]
        areas[name] = area_under(steps, [whole, *between, none])
    return areas
