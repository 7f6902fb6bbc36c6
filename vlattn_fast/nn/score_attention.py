"""A multi-head attention layer with any score function, whose parameters it learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast import scores
from vlattn_fast._ground.checks import (
    check_bool,
    check_choice,
    check_device,
    check_integer,
    check_masks,
    check_number,
    check_softcap,
    check_tensor,
    describe,
)
from vlattn_fast._ground.tensors import as_dtype, cast_by_autocast, mask_padding, resolve_scale, without_autocast
from vlattn_fast.ops import BACKEND_NAMES
from vlattn_fast.ops._documents import Ids
from vlattn_fast.ops.attention_map import attention_map
from vlattn_fast.ops.core_scores import core_map
from vlattn_fast.ops.score_attention import score_attention

ScoreFactory = Callable[[int, int], nn.Module]


class LearnedScore(nn.Module):
    """Holds the parameters of one score function; a call returns the object of vlattn_fast.scores with these parameters.

    Args:
        kind: a name of `scores.layers()` whose score has parameters.
        num_heads, head_dim: sizes.
        per_head: separate parameters for each head.
        options: of the class in vlattn_fast.scores, such as projects="query"; they override the layer's own.
    """

    def __init__(self, kind: str, num_heads: int, head_dim: int, *, per_head: bool = False, **options: Any) -> None:
        super().__init__()
        learned = {name: layer for name, layer in scores.layers().items() if layer.learned}
        check_choice("kind", kind, tuple(learned))
        self.make, self.names, options_of_layer = learned[kind]
        self.options, self.head_dim = {**options_of_layer, **options}, head_dim
        heads = (num_heads,) if per_head else ()
        for name in self.names:
            setattr(self, name, nn.Parameter(torch.empty(self.make.parameters[name].shape(head_dim, heads))))
        self.reset_parameters()
        token = next(self.parameters()).new_zeros(1, num_heads, 1, head_dim)
        self().check(token, token)  # the class raises for wrong options

    def reset_parameters(self) -> None:
        """Sets the initial values that the score's class names."""
        for name in self.names:
            nn.init.uniform_(getattr(self, name), *self.make.parameters[name].first(self.head_dim))

    def forward(self) -> scores.Score:
        # by attribute: torch's pruning and parametrizations put the changed parameter under its name
        return self.make(**{name: getattr(self, name) for name in self.names}, **self.options)


def make_score(
    score: str | ScoreFactory, num_heads: int, head_dim: int, per_head: bool, options: dict[str, Any] | None
) -> nn.Module | str:
    """Returns the score of a layer: a module if the score has parameters, else its name. per_head only affects parameters."""
    if options is not None and not isinstance(options, dict):
        raise TypeError(f"score_options must be a dict or None; got {describe(options)}")
    options = {} if options is None else options
    if not isinstance(score, str) and callable(score):
        if options:
            raise ValueError(f"score_options must be None if score is a function; got {options!r}")
        made = score(num_heads, head_dim)
        if not isinstance(made, nn.Module):
            raise TypeError(f"score must make a torch.nn.Module; got {describe(made)}")
        return made
    layers = scores.layers()
    check_choice("score", score, tuple(layers))
    if layers[score].learned:
        return LearnedScore(score, num_heads, head_dim, per_head=per_head, **options)
    if options:
        raise ValueError(f"score_options must be None if score is {score!r}, which has none; got {options!r}")
    return score


class ScoreAttention(nn.Module):
    """Computes multi-head attention with any score function: softmax(scale * score(Q x, K y) + mask) V y, then a projection.

    Takes the place of nn.MultiheadAttention, whose state it loads, and has batch_first=True as its default. Memory is O(N + M)
    per head: no map is stored, unless you ask for need_weights, which returns one map (B, N, M) for all heads.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> layer = va.nn.ScoreAttention(32, 4, "additive", per_head=True)
        >>> layer(torch.randn(2, 5, 32)).shape, layer(torch.randn(2, 5, 32), torch.randn(2, 9, 32)).shape
        (torch.Size([2, 5, 32]), torch.Size([2, 5, 32]))

    Args:
        embed_dim: C of the query, and of key and value unless kdim and vdim differ.
        num_heads: divides embed_dim.
        score: "dot", "scaled_dot", "cosine", "general", "biased_general", "activated_general", "additive", "hadamard",
            "distance"; or a function (num_heads, head_dim) -> module whose call without arguments gives an object of
            vlattn_fast.scores.
        per_head: give each head its own score parameters.
        kdim, vdim: C of key and value. Default: embed_dim.
        dropout: probability of dropping an attention weight while training.
        bias: give the four projections a bias.
        batch_first: inputs and output are (B, N, C); False: (N, B, C).
        scale, softcap, backend: see vlattn_fast.score_attention.
        sink: give each head a learned logit in its softmax, the parameter `sink`, which starts at 0.
        score_options: options of the score's class in vlattn_fast.scores.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it).
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
        batch_first: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        sink: bool = False,
        backend: str = "auto",
        score_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        kdim, vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        for name, size in {"embed_dim": embed_dim, "num_heads": num_heads, "kdim": kdim, "vdim": vdim}.items():
            check_integer(name, size, low=1)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim = {embed_dim}; got {num_heads}")
        check_number("dropout", dropout, low=0.0, high=1.0, open_high=True)
        check_bool(per_head=per_head, bias=bias, batch_first=batch_first, sink=sink)
        check_softcap(softcap)
        check_choice("backend", backend, BACKEND_NAMES)
        if scale is not None:
            check_number("scale", scale)
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.kdim, self.vdim = kdim, vdim
        self.batch_first, self.scale, self.softcap, self.backend = batch_first, scale, softcap, backend
        self.sink = nn.Parameter(torch.zeros(num_heads)) if sink else None
        self.score = make_score(score, num_heads, embed_dim // num_heads, per_head, score_options)
        if softcap is not None and isinstance(score, str) and not scores.layers()[score].score.is_plain:
            raise ValueError(f"softcap must be None for scores other than 'dot' and 'scaled_dot'; got {softcap} for {score!r}")
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(kdim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(vdim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        query_groups: Tensor | None = None,
        key_groups: Tensor | None = None,
        group_bias: Tensor | None = None,
        head_gate: Tensor | None = None,
        document_ids: Ids = None,
        cu_seqlens: Ids = None,
    ) -> Any:
        """Computes attention (B, N, C) of query (B, N, C), key (B, M, kdim) and value (B, M, vdim).

        key defaults to query, value to key.

        Args:
            key_padding_mask: as in nn.MultiheadAttention: bool (B, M), True = padding, or float (B, M), which is added.
            key_mask: bool (B, M), True = a real token; excludes key_padding_mask.
            need_weights: also return the attention's head mean (B, N, M), without a gradient and computed without a map per head.
            attn_mask: bool, True = may attend (as in SDPA, the opposite of nn.MultiheadAttention), or float (added);
                broadcastable to (B, H, N, M).
            is_causal: query i attends to keys j <= i.
            query_groups, key_groups, group_bias, head_gate: see score_attention; a gate acts before out_proj.
            document_ids, cu_seqlens: see score_attention; not with need_weights.
        """
        check_bool(need_weights=need_weights)
        if need_weights and (document_ids is not None or cu_seqlens is not None):
            raise ValueError("need_weights must be False with document_ids or cu_seqlens, which have no common map; got True")
        key = query if key is None else key
        value = key if value is None else value
        q = self._heads("query", query, self.q_proj)
        k, v = self._heads("key", key, self.k_proj), self._heads("value", value, self.v_proj)
        if key_padding_mask is not None:
            if key_mask is not None:
                raise ValueError("key_mask must be None if key_padding_mask is given; got both")
            key_mask, attn_mask = _without_padding(key_padding_mask, attn_mask, q, k)
        score = scores.resolve(self.score() if isinstance(self.score, nn.Module) else self.score)
        masks: dict[str, Any] = {"attn_mask": attn_mask, "key_mask": key_mask, "is_causal": is_causal}
        if group_bias is not None or query_groups is not None or key_groups is not None:
            masks |= {"query_groups": query_groups, "key_groups": key_groups, "group_bias": group_bias}
        dropout_p = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"softcap": self.softcap, "sink": self.sink, "backend": self.backend, **masks}
        options |= {"document_ids": document_ids, "cu_seqlens": cu_seqlens, "head_gate": head_gate}
        out = score_attention(q, k, v, score=score, dropout_p=dropout_p, scale=self.scale, **options)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        out = out if self.batch_first else out.transpose(0, 1)
        return (out, self._weights(q, k, score, masks)) if need_weights else out

    @torch.no_grad()
    def _weights(self, query: Tensor, key: Tensor, score: scores.Score, masks: dict[str, Any]) -> Tensor:
        """Returns the head mean (B, N, M) of the attention."""
        scale = resolve_scale(self.scale, score.default_scale(query.shape[-1]))
        (key,) = mask_padding(masks["key_mask"], key, fill=score.masked_key)
        core, dtype = score.core(query, key), cast_by_autocast(query)[0].dtype
        features = core.query, core.key, core.vector
        query, key, vector = features if core.keeps_dtype else cast_by_autocast(*features)
        masks = {**masks, "scale": scale, "backend": "auto" if self.backend in ("sdpa", "cuda") else self.backend}  # without maps
        if core.kind == "dot" and (self.sink is None or score.is_plain):
            options: dict[str, Any] = {"softcap": self.softcap, "sink": self.sink}
            with without_autocast(query):
                return as_dtype(attention_map(query, key, **options, **masks), dtype)
        core = core._replace(query=query, key=key, vector=vector)
        logit = None if self.sink is None else self.sink[:, None] - scale * core.offset
        return as_dtype(core_map(core, rule="attention", sink=logit, **masks), dtype)

    def _heads(self, name: str, x: Tensor, project: nn.Linear) -> Tensor:
        check_tensor(name, x, rank=3, shape="(B, tokens, features)" if self.batch_first else "(tokens, B, features)")
        if x.shape[2] != project.in_features:
            raise ValueError(f"{name} must have {project.in_features} features; got {describe(x)}")
        x = x if self.batch_first else x.transpose(0, 1)
        return project(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Also takes the state of an nn.MultiheadAttention of the same sizes."""
        for kind in ("weight", "bias"):
            joint = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            parts = (None,) * 3 if joint is None else joint.chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                part = state_dict.pop(f"{prefix}{name}_proj_{kind}", None) if part is None else part
                if part is not None:
                    state_dict[f"{prefix}{name}_proj.{kind}"] = part
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        score = f", score={self.score!r}" if isinstance(self.score, str) else ""
        also = ("" if self.softcap is None else f", softcap={self.softcap}") + ("" if self.sink is None else ", sink=True")
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}{score}, dropout={self.dropout}{also}"


def _without_padding(
    padding: Tensor, attn_mask: Tensor | None, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """key_mask and attn_mask equivalent to nn.MultiheadAttention's key_padding_mask (B, M)."""
    shape = key.shape[0], key.shape[2]
    check_tensor("key_padding_mask", padding, rank=2, shape="(B, M)")
    if padding.shape != shape:
        raise ValueError(f"key_padding_mask must have shape {shape}; got {describe(padding)}")
    check_device("key_padding_mask", padding, "key", key)
    if padding.dtype == torch.bool:
        return ~padding, attn_mask
    if not padding.is_floating_point():
        raise TypeError(f"key_padding_mask must be bool or float; got {describe(padding)}")
    added = padding[:, None, None]
    if attn_mask is None:
        return None, added
    check_masks(query, key, attn_mask, None, False)
    if attn_mask.dtype == torch.bool:
        return None, added.expand(torch.broadcast_shapes(added.shape, attn_mask.shape)).masked_fill(~attn_mask, -torch.inf)
    return None, added + attn_mask
