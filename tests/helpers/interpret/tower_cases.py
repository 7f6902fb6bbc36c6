"""Small towers whose layers attend in different ways."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from tests.helpers.interpret.cases import TEXT, lively, one_hot
from vlattn_fast.nn import ScoreAttention

METHODS = ("gradient", "rollout", "attention", "gradcam")  # without an adapter
HEADS = 4


def second(outputs: Tensor) -> Tensor:
    return outputs[:, 1]


def first_rows(size: int, batch: int = 2) -> Tensor:
    return one_hot(torch.zeros(batch, dtype=torch.long), size)


class Heads(nn.Module):
    """Self-attention of one kind; `visible` (B, N) says which keys are real."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.qkv, self.out = kind, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.kind == "one head":
            mask = visible[:, None].expand(-1, x.shape[1], -1)
            return self.out(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        mask = visible[:, None, None]
        if self.kind == "by name":
            y = scaled_dot_product_attention(q, k, v, mask)
        elif self.kind == "one key head":  # for all queries, as multi-query attention calls torch
            y = functional.scaled_dot_product_attention(q, k[:, 1:2], v[:, 1:2], attn_mask=mask)
        elif self.kind == "torch":
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
            y = self.times(self.weights(scores), v)
        return self.out(y.transpose(1, 2).flatten(2))

    def times(self, weights: Tensor, v: Tensor) -> Tensor:
        if self.kind == "einsum":
            return torch.einsum("bhnm,bmhd->nhdb", weights, v.transpose(1, 2)).permute(3, 1, 0, 2)
        if self.kind == "einsum of a list":
            return torch.einsum("a h i j, a h j c -> a h i c", [weights, v])
        if self.kind == "its shape is read":
            assert weights.shape == (*v.shape[:3], v.shape[2])
        return weights @ v

    def weights(self, scores: Tensor) -> Tensor:
        if self.kind == "a layer made on the way":
            return nn.Softmax(-1)(scores)
        if self.kind == "three dimensions":
            return torch.softmax(scores.flatten(0, 1), -1).view_as(scores)
        if self.kind == "keywords":
            return torch.softmax(input=scores, dim=-1)
        if self.kind == "exponentials":
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            return weights / weights.sum(-1, keepdim=True)
        return scores.softmax(-1)


class Multihead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.MultiheadAttention(width, HEADS, batch_first=True)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.inside(x, x, x, key_padding_mask=~visible, need_weights=False)[0]


class Scored(nn.Module):
    def __init__(self, score: str, width: int) -> None:
        super().__init__()
        self.inside = ScoreAttention(width, HEADS, score)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.inside(x, key_mask=visible)


class TimmLike(nn.Module):
    """timm's Attention: by hand where `fused_attn` is off."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fused_attn, self.qkv, self.proj = False, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.scale = nn.LayerNorm(width // HEADS), (width // HEADS) ** -0.5

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, mask = self.q_norm(q), visible[:, None, None]
        if self.fused_attn:
            x = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            x = (q * self.scale @ k.transpose(-2, -1)).masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        made = {"nn.MultiheadAttention": Multihead, "timm": TimmLike}
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        if kind.startswith("score "):
            self.attend: nn.Module = Scored(kind.removeprefix("score "), width)
        else:
            self.attend = made[kind](width) if kind in made else Heads(kind, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attend(self.norm(x), visible)
        return x + self.mlp(x)


class Stack(nn.Module):
    """Classifies a sequence by its first token."""

    def __init__(self, *kinds: str, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(10, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(Block(kind, width) for kind in kinds)

    def forward(self, x: Tensor, attention_mask: Tensor, read: int = 0) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = self.run(block, x, attention_mask.bool())
        return self.head(x[:, read])

    def run(self, block: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
        return block(x, visible)


def stack(*kinds: str, make: type[Stack] = Stack) -> nn.Module:
    torch.manual_seed(0)
    return lively(make(*kinds)).eval()


def sequences() -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"x": torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(3)), "attention_mask": mask}


T5 = dict(TEXT, max_position_embeddings=32)


def text(batch: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (batch, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def made(model: nn.Module) -> nn.Module:
    return lively(model).eval()
