"""A press of kvpress whose scores are those of `token_scores`: the cache of a prompt is pruned without a map of attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_choice, check_number
from vlattn_fast._ground.extras import extra
from vlattn_fast.attach.written_scores import is_masked
from vlattn_fast.backends.reference.token_scores import RULES
from vlattn_fast.ops.token_scores import token_scores


def token_press(rule: str = "snapkv", compression_ratio: float = 0.0, **options: Any) -> Any:
    """A `ScorerPress` of kvpress (NVIDIA) that keeps the tokens with the largest `token_scores`:

        with va.nn.token_press("snapkv", 0.5, queries=64)(model):
            model(prompt, past_key_values=cache)

    It is a press as kvpress's own are: presses that wrap another, such as AdaKVPress, and its pipeline take it. Each layer's
    queries are computed from its states once more, those alone that the rule reads; no layer stores attention weights, so the
    model runs its fused attention. With rules that have one score for all heads, all heads keep the same tokens.

    `token_press("snapkv", queries=64)` keeps what kvpress's SnapKVPress keeps, and `token_press("tova", recent=1)` what its
    TOVAPress keeps. Its ObservedAttentionPress, which is near "h2o", divides by the number of queries that see a token. A prompt
    that is not longer than a window is refused by SnapKVPress, and pruned here to its last tokens.

    `pip install 'vlattn_fast[press]'` chooses the newest kvpress that takes the transformers of this package, which is 0.5.2:
    0.5.5 wants transformers below 5.3.

    Args:
        rule: a rule of `token_scores` for caches: "snapkv", "h2o" or "tova".
        compression_ratio: the part of the tokens that is removed, from 0 to below 1.
        options: those of `token_scores`: queries ("all", "last", "first" or a number of last ones), kernel_size, pooling, recent,
            per_head, backend.

    Raises:
        ModuleNotFoundError: kvpress is not installed.
        ValueError, TypeError: an argument is wrong (it is named).
    """
    check_choice("rule", rule, tuple(name for name, known in RULES.items() if known.of_cache))
    check_number("compression_ratio", compression_ratio, low=0.0, high=1.0, open_high=True)
    if isinstance(options.get("queries"), Tensor):
        raise ValueError("queries must be a name or a number for a press, which serves prompts of any length; got a tensor")
    token_scores(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), rule, **options)  # refuses what is wrong
    with extra("press"):
        from kvpress import ScorerPress
        from kvpress.utils import get_prerope_query_states

    @dataclass
    class TokenPress(ScorerPress):  # type: ignore[misc, unused-ignore]
        rule: str = "snapkv"
        options: dict[str, Any] = field(default_factory=dict)

        def forward_hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if kwargs.get("cache_position") is None:  # transformers 5.3 or newer gives a layer none
                states, cache = kwargs["hidden_states"], kwargs["past_key_values"]
                last = cache.get_seq_length(module.layer_idx) - 1
                kwargs = {**kwargs, "cache_position": torch.arange(last, last + 1, device=states.device)}
            return super().forward_hook(module, args, kwargs, output)

        def score(
            self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: dict[str, Any]
        ) -> Tensor:
            asked = self.options.get("queries", RULES[self.rule].queries)
            mask, key_mask = _masks(kwargs.get("attention_mask"), keys)
            rows = 1 if asked == "last" else asked
            if isinstance(rows, int) and key_mask is None:  # else the last real ones are not the last
                hidden_states = hidden_states[:, -rows:]
            queries = get_prerope_query_states(module, hidden_states)
            cos, sin = (x[:, None, -queries.shape[2] :] for x in kwargs["position_embeddings"])
            queries = _rotated(queries, cos, sin)
            if mask is not None and mask.shape[-2] > queries.shape[2]:
                mask = mask[..., -queries.shape[2] :, :]
            scores = token_scores(
                queries,
                keys,
                self.rule,
                attn_mask=mask,
                key_mask=key_mask,
                scale=getattr(module, "scaling", None),
                softcap=getattr(module, "attn_logit_softcapping", None),
                sink=getattr(module, "sinks", None),
                enable_gqa=True,
                **self.options,
            )
            return scores if scores.dim() == 3 else scores[:, None].expand(-1, keys.shape[1], -1)

    return TokenPress(float(compression_ratio), rule, options)


def _masks(mask: Any, keys: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The layer's mask (B or 1, H or 1, N, M), and which keys are real, (B, M), by either kind of mask in transformers."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None, None
    if mask.dim() == 2:
        return None, mask[:, -keys.shape[2] :].bool()
    mask = mask[..., -keys.shape[2] :]
    real = (~is_masked(mask)).any(2).any(1).expand(keys.shape[0], -1)
    return mask, None if bool(real.all()) else real


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries (B, H, N, D) turned by their positions, in the first features where cos has fewer than D."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)
