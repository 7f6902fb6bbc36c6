"""Attention in which only the score function changes, and measures of its weights.

As in SCAN, AttnGAN and MAC, the score takes the features without a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_fast.interpret.evaluating.curves import area_under
from vlattn_fast.nn.score_attention import make_score

# Each score's name and options in `ScoreAttention`. The relu is MAC's.
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "dot": ("dot", {}),
    "scaled_dot": ("scaled_dot", {}),
    "cosine": ("cosine", {}),
    "general": ("general", {}),
    "biased_general": ("biased_general", {"projects": "query"}),
    "activated_general": ("activated_general", {"projects": "query", "activation": "sigmoid"}),
    "additive": ("additive", {}),
    "hadamard": ("hadamard", {"activation": "relu"}),
}
# Forms of general: the arm with q . (W k), and that with k . (W q). With projects="key" the bias cancels in the softmax.
GENERAL = {
    "general": ("general", "general_query"),
    "biased": ("general", "biased_general"),
    "sigmoid": ("sigmoid_key", "activated_general"),
    "tanh": ("tanh_key", "tanh_query"),
    "relu": ("relu_key", "relu_query"),
    "leaky_relu": ("leaky_relu_key", "leaky_relu_query"),
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {"general_query": ("general", {"projects": "query"})} | {
    arm: ("activated_general", {"projects": side, "activation": form})
    for form in list(GENERAL)[2:]
    for side, arm in zip(("key", "query"), GENERAL[form], strict=True)
    if arm not in PLAIN
}
SCORES = PLAIN | FORMS
# SCAN divides by a norm over the words, in which this bias does not cancel.
BIASED_KEY = {"biased_key": ("biased_general", {"projects": "key"})}
UNIFORM = "uniform"  # the control: every key has the same weight


class Seen(NamedTuple):
    """One call: weights (B, H, N, M), value (B, H, M, D / H), output (B, H, N, D / H)."""

    weights: Tensor
    value: Tensor
    output: Tensor


class Attend(nn.Module):
    """softmax(smooth * score(query, key)) value.

    Args:
        arm: one of SCORES or BIASED_KEY, or UNIFORM. size: D of query and key. backend: as in `score_attention`.
        heads: each has D / heads of the features. smooth: the inverse of a temperature.
    """

    def __init__(self, arm: str, size: int, backend: str = "auto", heads: int = 1, smooth: float = 1.0) -> None:
        super().__init__()
        self.uniform, self.backend, self.heads, self.smooth = arm == UNIFORM, backend, heads, smooth
        name, options = ("dot", {}) if self.uniform else (SCORES | BIASED_KEY)[arm]
        self.made = make_score(name, heads, size // heads, False, options)
        self.seen: list[Seen] | None = None

    @property
    def score(self) -> va.scores.Score:
        return va.scores.resolve(self.made() if isinstance(self.made, nn.Module) else self.made)

    def forward(self, query: Tensor, key: Tensor, value: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """query (B, N, D), key (B, M, D), value (B, M, Dv), which is the key where it is None -> (B, N, Dv)."""
        sides = query, key, key if value is None else value
        query, key, value = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in sides)
        query = torch.zeros_like(query) if self.uniform else query
        output = self.attention(query, key, value, key_mask)
        if self.seen is not None:
            every = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
            self.seen.append(Seen(self.attention(query, key, every, key_mask).detach(), value.detach(), output))
        return output.transpose(1, 2).flatten(2)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        """query (B, H, N, D / H), key (B, H, M, D / H), value (B, H, M, Dv) -> (B, H, N, Dv)."""
        score = self.score
        scale = self.smooth * score.default_scale(query.shape[-1])
        return va.score_attention(query, key, value, score=score, scale=scale, key_mask=key_mask, backend=self.backend)


def weights_and_relevancy(attend: Attend, run: Callable[[], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(weights A (B, H, N, M), relevancy relu(A * dA)) of each call of `attend` while `run` computes the scores (B); dA =
    dO V^T is the score's gradient at the weights (Chefer, Gur, Wolf, ICCV 2021, equation 5, before the mean over heads)."""
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


def points(weights: Tensor, target: Tensor) -> Tensor:
    """For weights (..., M), the share of the largest ones that are on `target`, bool (..., M): 0 or 1 without a tie."""
    largest = weights == weights.amax(-1, keepdim=True)
    return (largest & target).sum(-1).double() / largest.sum(-1)


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
