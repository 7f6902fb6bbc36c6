"""FlexAttention's functions as calls of score_attention: outputs and gradients of the formula, or an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import vlattn_fast as va

B, H, N = 2, 4, 12
DOCUMENT, LENGTHS, SLOPES = torch.tensor([0] * 4 + [1] * 5 + [2] * 3), torch.tensor([12, 7]), 2.0 ** -torch.arange(1, H + 1)
TABLE, BIAS = torch.randn(2 * N, dtype=torch.float64, requires_grad=True), torch.randn(H, N, N, dtype=torch.float64)
PLACES = [torch.arange(n).view([-1 if i == dim else 1 for i in range(4)]) for dim, n in enumerate((B, H, N, N))]
Mod = Callable[..., Any] | None


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def hides_later(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, s, -torch.inf)


def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return DOCUMENT[i] == DOCUMENT[j]


OF_HEADS, OF_PAIRS, MASK = "numbers for each head, query, key", "numbers for each query, key", "a mask for each query, key"
PATTERNS: dict[str, tuple[Mod, Mod, dict[str, str]]] = {
    "nothing": (lambda s, b, h, i, j: s, None, {"score_mod": "nothing", "mask": "nothing"}),
    "causal": (None, causal, {"mask": "causal"}),
    "causal in a score": (hides_later, None, {"score_mod": "nothing", "mask": "causal"}),
    "window": (None, lambda b, h, i, j: (i >= j) & (i - j <= 3), {"mask": MASK}),
    "documents": (None, documents, {"mask": "documents"}),
    "causal documents": (None, lambda b, h, i, j: documents(b, h, i, j) & (i >= j), {"mask": "documents, causal"}),
    "padding": (None, lambda b, h, i, j: j < LENGTHS[b], {"mask": "a mask for each sample, key"}),
    "prefix": (None, lambda b, h, i, j: (j < 4) | (i >= j), {"mask": MASK}),
    "dilated": (None, lambda b, h, i, j: (i - j) % 2 == 0, {"mask": MASK}),
    "relative": (lambda s, b, h, i, j: s + (i - j), None, {"score_mod": OF_PAIRS}),
    "ALiBi": (lambda s, b, h, i, j: s + SLOPES[h] * (j - i), causal, {"score_mod": OF_HEADS, "mask": "causal"}),
    "bias": (lambda s, b, h, i, j: s + BIAS[h, i, j], documents, {"score_mod": OF_HEADS, "mask": "documents"}),
    "learned": (lambda s, b, h, i, j: s + TABLE[i - j + N], causal, {"score_mod": OF_PAIRS, "mask": "causal"}),
    "learned, documents": (lambda s, b, h, i, j: s + TABLE[i - j + N], documents, {"score_mod": OF_PAIRS, "mask": "documents"}),
    "softcap": (lambda s, b, h, i, j: 5 * torch.tanh(s / 5), causal, {"score_mod": "softcap 5", "mask": "causal"}),
    "softcap, ALiBi": (
        lambda s, b, h, i, j: 5 * torch.tanh(s / 5) + SLOPES[h] * (j - i),
        None,
        {"score_mod": "softcap 5 and numbers for each head, query, key"},
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_outputs_and_gradients(name: str) -> None:
    score_mod, mask_mod, found = PATTERNS[name]
    query, key, value = (torch.randn(B, H, N, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    attention = va.nn.flex_adapter(score_mod, mask_mod and create_block_mask(mask_mod, B, H, N, N, device="cpu"))
    assert attention.recognize(query, key).found == found
    scores = query @ key.mT * 8**-0.5
    scores = scores if score_mod is None else score_mod(scores, *PLACES)
    scores = scores if mask_mod is None else torch.where(mask_mod(*PLACES), scores, -torch.inf)
    inputs = [query, key, value, *[TABLE] * name.startswith("learned")]
    expected, got = scores.softmax(-1) @ value, attention(query, key, value)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(got)
    grads = [torch.autograd.grad(out, inputs, grad) for out in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("score_mod", "mask_mod", "error", "message"),
    [
        (lambda s, b, h, i, j: s * s, None, ValueError, r"score_mod must return the score plus numbers.*40 -> 1600"),
        (lambda s, b, h, i, j: s * SLOPES[h], None, ValueError, "score_mod must return the score plus numbers"),
        (lambda s, b, h, i, j: s if i > j else 2 * s, None, TypeError, "score_mod must work on tensors of places"),
        (None, lambda b, h, i, j: i - j, TypeError, "block_mask must return bool"),
        (None, 3, TypeError, "block_mask must be a function of places"),
    ],
)
def test_what_is_not_recognised(score_mod: Any, mask_mod: Any, error: type[Exception], message: str) -> None:
    x = torch.randn(B, H, N, 8)
    with pytest.raises(error, match=message):
        va.nn.flex_adapter(score_mod, mask_mod)(x, x, x)
