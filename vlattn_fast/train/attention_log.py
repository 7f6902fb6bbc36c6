"""Logs the entropy of attention and its mass on groups of tokens, layer by layer, during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.attachments import add_pre_hook
from vlattn_fast._ground.checks import check_callable, check_tensor, check_token_mask, describe
from vlattn_fast.attach.events import AttentionEvent
from vlattn_fast.attach.session import uncompiled
from vlattn_fast.attach.token_kinds import IMAGE, TEXT, TokenKinds, check_modality
from vlattn_fast.attach.written import is_masked
from vlattn_fast.ops.attention_statistics import attention_statistics
from vlattn_fast.train.attached import Attached, Mean

Groups = Callable[[dict[str, Any]], Mapping[str, Tensor]]
_KINDS = {TEXT: "text", IMAGE: "image", TEXT | IMAGE: "joint"}


class AttentionLog(Attached):
    """Logs, for each layer of `model`, the mean entropy of its attention and the mean mass on groups of tokens.

    Steps that are not logged run the model unchanged, including compiled code. A logged step also runs `attention_statistics`,
    which stores no map, and runs the model uncompiled.

        trainer.add_callback(va.train.AttentionLog(model, every=50).trainer_callback(trainer))

    In your own loop, every pass within `with log:` counts, and `log.take()` returns the means.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> layer = va.nn.ScoreAttention(16, 2)
        >>> log = va.train.AttentionLog(layer)
        >>> with log:
        ...     _ = layer(torch.randn(2, 5, 16))
        >>> list(log.take())
        ['attention/other/0/entropy']

    Names are "attention/joint/3/entropy" and "attention/joint/3/mass_image": the tokens of the queries (text, image, joint,
    or other if the inputs do not tell), and the layer among those of such tokens, from 0. A number is the mean over heads, real
    queries and the training passes of a step, in this process. Entropy is in nats, over a sample's keys.

    Args:
        model: any model whose attention is torch's scaled_dot_product_attention or nn.MultiheadAttention, this package's, or
            written out by hand; wrappers are supported.
        every: steps from one log to the next.
        groups: batch -> {name: bool (B, M)}, from the model's inputs by name; layers with other numbers of keys have no mass.
            Default: "image" and "text" if the model joins both.
        modality: see `capture_attention`.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it); if attention does more than scale and mask its
            logits.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 50, groups: Groups | None = None, modality: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(model, every)
        if groups is not None:
            check_callable(groups=groups)
        self.groups, self._modality = groups, check_modality(modality)
        self._means: dict[str, Mean] = {}
        self._layers: dict[str, int] = {}  # of the pass under way, by tokens
        self._batch: dict[str, Any] = {}

    def take(self) -> dict[str, float]:
        """Returns the means since the last call."""
        means = {name: mean.take() for name, mean in self._means.items()}
        return {name: mean for name, mean in means.items() if mean is not None}

    def _enter(self, stack: ExitStack) -> None:
        self._means.clear()
        stack.callback(add_pre_hook(self.model, self._begin_pass, with_kwargs=True))
        stack.enter_context(uncompiled(self.model))
        stack.enter_context(TokenKinds(self.model, self._modality, sees=self._see, needs_graph=False).observer())

    def _begin_training(self) -> None:
        """Does nothing: the context is that of a logged step, and not of the training."""

    def _begin_step(self, step: int) -> None:
        if step % self.every == 0 and self._ways_back is None:
            self.__enter__()

    def _end_step(self, step: int, is_first_process: bool) -> dict[str, float]:
        if self._ways_back is None or (step - 1) % self.every:
            return {}
        self.__exit__()
        means = self.take()
        if not means:
            raise self._no_pass()
        return means

    def _begin_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._layers, self._batch = {}, kwargs

    @torch.no_grad()
    def _see(self, number: int, call: AttentionEvent) -> None:
        if not self.model.training:  # an evaluation
            return
        kind = _KINDS.get(call.kinds, "other")
        layer = self._layers[kind] = self._layers.get(kind, -1) + 1
        if call.masks is None or call.score != "dot":
            raise ValueError(
                f"attention must only scale and mask its logits for AttentionLog; got layer {layer} of {kind}, which does more"
            )
        query, key, options = call.query.detach(), call.key.detach(), dict(call.masks)
        options["enable_gqa"] = key.shape[1] != query.shape[1]
        names, groups = self._groups_of(call)
        if names:
            options |= {"key_groups": groups, "num_groups": len(names)}
        statistics = attention_statistics(query, key, statistics=["entropy", *(["mass"] if names else [])], **options)
        weight = _real_queries(query, key, options)
        self._add(f"attention/{kind}/{layer}/entropy", statistics.entropy, weight)
        for i, name in enumerate(names):
            self._add(f"attention/{kind}/{layer}/mass_{name}", statistics.mass[..., i], weight)

    def _groups_of(self, call: AttentionEvent) -> tuple[list[str], Tensor | None]:
        """Returns names of groups of keys, and the group (M) or (B, M) of each key."""
        num_keys, device = call.key.shape[2], call.key.device
        if self.groups is None:
            if call.image is None or call.image.shape[-1] != num_keys:
                return [], None
            return ["text", "image"], call.image.to(device).long()
        names: list[str] = []
        groups = torch.full((call.key.shape[0], num_keys), -1, device=device)
        chosen = self.groups(self._batch)
        if not isinstance(chosen, Mapping):
            raise TypeError(f"groups must return a mapping of names to bool (B, M); got {describe(chosen)}")
        for name, mask in chosen.items():
            check_tensor(f"groups[{name!r}]", mask, shape="(B, M)")
            if mask.shape[-1:] == (num_keys,):
                mask = mask.to(device)
                check_token_mask(f"groups[{name!r}]", mask, "query", call.query, num_keys, "(B, M)")
                if bool((mask & (groups >= 0)).any()):
                    raise ValueError(f"groups must not share tokens; got {name!r} and {', '.join(map(repr, names))}, which do")
                groups = groups.masked_fill(mask, len(names))
                names.append(name)
        return names, groups

    def _add(self, name: str, values: Tensor, weight: Tensor | None) -> None:
        """Adds values (B, H, N), weight bool (B, N)."""
        mean = values.mean() if weight is None else values.mean(1)[weight].mean()
        self._means.setdefault(name, Mean()).add(mean)


def _real_queries(query: Tensor, key: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    """Returns bool (B, N), the queries of tokens that are visible as keys; None = all."""
    mask = options.get("key_mask")
    if mask is None and (pairs := options.get("attn_mask")) is not None:
        pairs = pairs[(None,) * (4 - pairs.dim())]
        mask = (~is_masked(pairs)).any(2).any(1).expand(key.shape[0], key.shape[2])
    return mask if mask is not None and query.shape[2] == key.shape[2] and bool(mask.any()) else None
