"""Relevancy in a transformer of your own: thread a carrier through `va.relevancy_attention`.

The model reads twelve random tokens. One token has a mark, and the class is the sign of that token's first feature. After a short
training, one backward pass shows which token the answer rests on, which should be the marked token.
"""

import torch
from torch import Tensor, nn

import vlattn_fast as va

TOKENS, WIDTH, HEADS, LAYERS = 12, 32, 4, 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor, carrier: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        attended, carrier = va.relevancy_attention(query, key, value, carrier)  # the only line for relevancy
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x), carrier


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Linear(2, WIDTH), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor, carrier: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.cls.expand(len(tokens), -1, -1), self.embed(tokens)], dim=1)
        for layer in self.layers:
            x, carrier = layer(x, carrier)
        return self.head(x[:, 0]), carrier


def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, 12, 2), class (B), index of the marked token (B)."""
    tokens, marked = torch.randn(size, TOKENS, 2), torch.randint(TOKENS, (size,))
    tokens[..., 1] = nn.functional.one_hot(marked, TOKENS)
    return tokens, (tokens[torch.arange(size), marked, 0] > 0).long(), marked


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(150):
    tokens, labels, _ = batch(64)
    logits, _ = model(tokens, torch.zeros(64, 1, 1 + TOKENS))  # training does not read the carrier
    optimizer.zero_grad()
    nn.functional.cross_entropy(logits, labels).backward()
    optimizer.step()

tokens, labels, marked = batch(200)
start = torch.zeros(200, 1, 1 + TOKENS, requires_grad=True)  # (B, T, N): one row of relevancy for each sequence
logits, carrier = model(tokens, start)
score = logits.max(1).values.sum()
cls_row = torch.zeros_like(start)
cls_row[:, 0, 0] = 1.0  # read the class token's row of the relevancy matrix
(relevancy,) = torch.autograd.grad([score, carrier], [start], [torch.ones_like(score), cls_row])

accuracy = (logits.argmax(1) == labels).double().mean().item()
pointing = (relevancy[:, 0, 1:].argmax(1) == marked).double().mean().item()
print(f"accuracy on new sequences: {accuracy:.0%}")
print(f"the marked token is the most relevant one in {pointing:.0%} of 200 sequences (chance: {1 / TOKENS:.0%})")
