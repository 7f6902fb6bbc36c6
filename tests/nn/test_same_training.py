"""A training run gives the same parameters to the bit in a second run with its seed, and others with another seed."""

import hashlib

import torch
from torch import Tensor

from tests.helpers.ops import backends
from vlattn_fast.nn.congruence_loss import CongruenceLoss
from vlattn_fast.nn.score_attention import ScoreAttention

HEADS, WORDS = 2, 5


def by_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def trained(seed: int) -> str:
    """The hash of the parameters after a few steps of two layers with dropout and the congruence of their outputs."""
    torch.manual_seed(seed)
    layers = torch.nn.ModuleList(ScoreAttention(16, HEADS, dropout=0.1, backend="cpu") for _ in range(2))
    congruence = CongruenceLoss(backend="cpu")
    optimizer = torch.optim.Adam(layers.parameters(), lr=0.01)
    for _ in range(3):
        x = target = torch.randn(4, 12, 16)
        for layer in layers:
            x = x + layer(x)[0]
        words, regions = by_heads(x[:, :WORDS]), by_heads(x[:, WORDS:])
        loss = (x - target.flip(1)).square().mean() + congruence((words, words), (regions, regions))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in layers.parameters())).hexdigest()


def test_same_training() -> None:
    with backends.ready("cpu"):
        hashes = [trained(seed) for seed in (0, 1, 0, 1)]
    assert hashes[:2] == hashes[2:] and hashes[0] != hashes[1]
