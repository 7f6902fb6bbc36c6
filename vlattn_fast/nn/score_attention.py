"""Multi-head attention with any score function, as a layer that learns the score's parameters too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast import scores
from vlattn_fast._checks import check_bool, check_choice, check_number, check_tensor, describe
from vlattn_fast.ops.score_attention import score_attention

FIXED = ("dot", "scaled_dot", "cosine")
LEARNED: dict[str, tuple[type, tuple[str, ...]]] = {
    "general": (scores.General, ("weight",)),
    "biased_general": (scores.General, ("weight", "bias")),
    "activated_general": (scores.General, ("weight", "bias")),
    "additive": (scores.Additive, ("vector", "query_weight", "key_weight", "bias")),
    "hadamard": (scores.Hadamard, ("vector", "weight", "bias")),
}  # names as in Cao et al., COLING 2022: the class, and which of its tensors are learned

ScoreFactory = Callable[[int, int], nn.Module]


class LearnedScore(nn.Module):
    """The parameters of one score function; calling it gives the object of vlattn_fast.scores made of them.

    Args:
        kind: a key of LEARNED.
        num_heads, head_dim: sizes. per_head: parameters of its own for each head instead of shared ones.
        options: of the class in vlattn_fast.scores, such as projects="query" or activation="tanh"; activated_general has
            activation="sigmoid" unless told otherwise.
    """

    def __init__(self, kind: str, num_heads: int, head_dim: int, *, per_head: bool = False, **options: Any) -> None:
        super().__init__()
        check_choice("kind", kind, tuple(LEARNED))
        self.make, self.names = LEARNED[kind]
        self.options = {"activation": "sigmoid", **options} if kind == "activated_general" else options
        for name in self.names:
            shape = (head_dim,) if name in ("vector", "bias") else (head_dim, head_dim)
            setattr(self, name, nn.Parameter(torch.empty(num_heads, *shape) if per_head else torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices and vector with variance 1/D, which keeps the size of what they are applied to; bias 0."""
        for name, parameter in self.named_parameters():
            bound = 0.0 if name == "bias" else math.sqrt(3.0 / parameter.shape[-1])
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self) -> scores.Score:
        return self.make(**dict(self.named_parameters()), **self.options)


class ScoreAttention(nn.Module):
    """Multi-head attention softmax(scale * score(Q x, K y) + mask) V y, with projections in and out, batch first.

    Args:
        embed_dim: C of the query, and of key and value unless kdim and vdim say otherwise. num_heads: divides embed_dim.
        score: "dot", "scaled_dot", "cosine", "general", "biased_general", "activated_general", "additive", "hadamard"; or
            a function (num_heads, head_dim) -> module whose call without arguments gives an object of vlattn_fast.scores.
        per_head: whether each head has score parameters of its own.
        dropout: probability of dropping an attention weight while training.
        bias: whether the four projections have one.
        scale, backend: as in vlattn_fast.score_attention.
        score_options: options of the score's class in vlattn_fast.scores.

    Raises:
        ValueError, TypeError: an argument is wrong (it is named).

    >>> layer = ScoreAttention(32, 4, "additive", per_head=True)
    >>> layer(torch.randn(2, 5, 32)).shape, layer(torch.randn(2, 5, 32), torch.randn(2, 9, 32)).shape
    (torch.Size([2, 5, 32]), torch.Size([2, 5, 32]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        score: str | ScoreFactory = "scaled_dot",
        *,
        per_head: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
        score_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kdim": kdim, "vdim": vdim}
        for name, size in sizes.items():
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} must be a positive integer; got {describe(size)}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim = {embed_dim}; got {num_heads}")
        check_number("dropout", dropout, low=0.0, high=1.0, open_high=True)
        check_bool(per_head=per_head, bias=bias)
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.scale, self.backend = scale, backend
        self.score = self._score(score, per_head, score_options or {})
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def _score(self, score: str | ScoreFactory, per_head: bool, options: dict[str, Any]) -> nn.Module | str:
        head_dim = self.embed_dim // self.num_heads
        if not isinstance(score, str) and callable(score):
            made = score(self.num_heads, head_dim)
            if not isinstance(made, nn.Module):
                raise TypeError(f"score must make a torch.nn.Module; got {describe(made)}")
            return made
        check_choice("score", score, (*FIXED, *LEARNED))
        if score in LEARNED:
            return LearnedScore(score, self.num_heads, head_dim, per_head=per_head, **options)
        if per_head or options:
            raise ValueError(f"per_head and score_options belong to scores with parameters; score is {score!r}")
        return score

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """query (B, N, C), key (B, M, kdim), value (B, M, vdim) -> (B, N, C). key defaults to query, value to key.

        key_mask: bool (B, M), True = a real token. attn_mask: bool or float, broadcastable to (B, H, N, M).
        """
        key = query if key is None else key
        value = key if value is None else value
        q = self._heads("query", query, self.q_proj)
        k, v = self._heads("key", key, self.k_proj), self._heads("value", value, self.v_proj)
        out = score_attention(
            q,
            k,
            v,
            score=self.score() if isinstance(self.score, nn.Module) else self.score,
            attn_mask=attn_mask,
            key_mask=key_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
            backend=self.backend,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, name: str, x: Tensor, project: nn.Linear) -> Tensor:
        check_tensor(name, x, rank=3, shape="(B, tokens, features)")
        if x.shape[2] != project.in_features:
            raise ValueError(f"{name} must have {project.in_features} features; got {describe(x)}")
        return project(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        score = f", score={self.score!r}" if isinstance(self.score, str) else ""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}{score}, dropout={self.dropout}"
