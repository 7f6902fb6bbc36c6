"""A layer that `capture_attention` has captured: its queries and keys, and the model's scale and mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import describe
from vlattn_fast._ground.tensors import joined, scaled_dot_default
from vlattn_fast.attach.written import is_masked
from vlattn_fast.ops.token_scores import token_scores

Positions = Tensor | Sequence[int]


class QueryKey(tuple[Tensor, Tensor]):
    """Holds (query, key) of one attention of the model, (B, H, N, D) and (B, H, M, D).

    Keys have as many heads as queries. The attributes complete the attention softmax(scale * query key^T + attn_mask), causal if
    is_causal.

    Raises:
        ValueError: when you read an attribute, if the model also changes the product in another way, such as with a soft cap.
    """

    # attn_mask, is_causal and scale, and a softcap or a sink that the model has; None = the model does something else
    _options: Mapping[str, Any] | None = None
    _score = "dot"

    @property
    def scale(self) -> float:
        """Returns the factor of the product, as the model has it."""
        scale = self._option("scale")
        return scaled_dot_default(self[0].shape[-1]) if scale is None else float(scale)

    @property
    def attn_mask(self) -> Tensor | None:
        """Returns the model's mask, bool (True = may attend) or float (added), broadcastable to (B, H, N, M); None = no mask."""
        mask: Tensor | None = self._option("attn_mask")
        return mask

    @property
    def is_causal(self) -> bool:
        """Returns whether no query attends to a later key, by the model's flag or by its mask."""
        flag, mask, (queries, keys) = bool(self._option("is_causal")), self.attn_mask, (x.shape[2] for x in self)
        if flag or mask is None or queries < 2 or mask.shape[-2:] != (queries, keys):
            return flag
        earlier = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
        return bool((is_masked(mask) | earlier).all())

    @property
    def key_mask(self) -> Tensor | None:
        """Returns bool (B, M), False = a key that no query attends to, such as padding; None if the model has no mask."""
        return self.real_keys(self.attn_mask)

    def token_scores(self, rule: str = "visionzip", **options: Any) -> Tensor:
        """Computes `vlattn_fast.token_scores` of this attention with the model's scale, mask, soft cap and sink.

        Returns (B, M) or (B, H, M).

        For the tokens of a vision tower that runs its own fused attention, as VisionZip takes them from the last layer but one of
        CLIP:

            with va.nn.capture_attention(tower, layers=-2) as captured:
                features = tower(pixel_values=pixels).last_hidden_state
            best = captured.image.token_scores("visionzip").topk(64).indices  # CLS and 63 patches

        A tower without CLS, such as SigLIP's, needs queries="all". `options` are those of `vlattn_fast.token_scores`.
        """
        if self._options is None or self._score != "dot":
            raise ValueError("token_scores needs a softmax of products of queries and keys; this layer's attention does more")
        call_options = {name: x for name, x in self._options.items() if name in ("attn_mask", "scale", "softcap", "sink")}
        if self._options["is_causal"]:
            call_options["is_causal"] = True
        causal = options.get("is_causal", call_options.get("is_causal", rule != "visionzip"))
        if causal or self[0].shape[2] == self[1].shape[2]:  # other queries are not tokens; the mask hides padding from them
            call_options["key_mask"] = self.real_keys(call_options["attn_mask"])
        return token_scores(*self, rule, **{**call_options, **options})

    def real_keys(self, mask: Tensor | None) -> Tensor | None:
        """Returns bool (B, M), False = a key that no query attends to under the mask."""
        if mask is None:
            return None
        visible = ~is_masked(_with_four_dims(mask))
        return visible.any(2).any(1).expand(self[1].shape[0], self[1].shape[2])

    def _option(self, name: str) -> Any:
        options = self._options or {}
        also = [f"a {name}" for name in ("softcap", "sink") if name in options]
        if self._options is None or also or self._score != "dot":
            kind = f"the score {self._score!r}" if self._options else "other scores, written out by hand"
            kind = " and ".join(also) or kind
            raise ValueError(
                f"a layer has {name} only if it does no more than scale and mask the product of queries and keys; this one has "
                f"{kind}: pass scale, text_mask and image_mask to the loss"
            )
        return options[name]


@dataclass(frozen=True)
class CapturedLayer:
    """Holds one layer's queries and keys.

    Each pair is a `QueryKey`, and None if the model has no such attention.

    Attributes:
        text: self-attention over words only.
        image: self-attention over image tokens only.
        cross: ((text query, image key), (image query, text key)), if the model has cross-attention both ways.
        joint: self-attention over words and image tokens together.
        is_image: bool (N) or (B, N), which tokens of `joint` belong to the image; None if the model's run does not show it.
    """

    text: QueryKey | None = None
    image: QueryKey | None = None
    cross: tuple[QueryKey, QueryKey] | None = None
    joint: QueryKey | None = None
    is_image: Tensor | None = None

    @property
    def sequence(self) -> QueryKey:
        """Returns the pair of the joint sequence, or of the only sequence. Raises ValueError if the layer has two sequences."""
        if self.joint is None and self.text is not None and self.image is not None:
            raise ValueError("the captured layer has two sequences; read text or image")
        pair = self.joint or self.text or self.image
        assert pair is not None
        return pair

    @property
    def query(self) -> Tensor:
        """Returns the query (B, H, N, D) of `sequence`."""
        return self.sequence[0]

    @property
    def key(self) -> Tensor:
        """Returns the key (B, H, N, D) of `sequence`."""
        return self.sequence[1]

    @property
    def attn_mask(self) -> Tensor | None:
        """Returns the model's mask of `sequence`; see `QueryKey`."""
        return self.sequence.attn_mask

    @property
    def is_causal(self) -> bool:
        """Returns whether no token of `sequence` attends to a later one."""
        return self.sequence.is_causal

    @property
    def scale(self) -> float:
        """Returns the model's factor of the products of queries and keys. Raises ValueError if text and image differ."""
        pairs = (self.joint,) if self.joint is not None else (self.text, self.image, *(self.cross or ()))
        scales = {pair.scale for pair in pairs if pair is not None}
        if len(scales) > 1:
            raise ValueError(f"text and image have different scales, {sorted(scales)}; read text.scale and image.scale")
        return scales.pop()

    def split(
        self, num_text_tokens: int | None = None, *, text: Positions | None = None, image: Positions | None = None
    ) -> tuple[QueryKey, QueryKey, None]:
        """Splits a joint sequence into (text, image, cross), the arguments of `congruence_loss`.

        cross is None, since all share one attention. Without arguments, the tokens are split by `is_image`, as the model joined
        them.

        Args:
            num_text_tokens: the number of words, which come before all image tokens.
            text, image: positions (int), or bool (N) or (B, N); if one is None, it has all other tokens. The order stays.

        Raises:
            ValueError: if the model attends to words and image separately; if the image does not come after `num_text_tokens`
                words; if samples of a batch differ in the number of words.
        """
        if self.joint is None:
            has = " and over ".join(x for x in ("text", "image") if getattr(self, x) is not None)
            raise ValueError(f"split() needs a sequence of words and image; the captured layer has attention over {has}")
        shape = self.joint[0].shape[0], self.joint[0].shape[2]
        if num_text_tokens is not None:
            if text is not None or image is not None:
                raise ValueError("text and image must be None if num_text_tokens is given; got both")
            after = self._after_words(num_text_tokens, shape[1])
            return _at(self.joint, ~after, "text"), _at(self.joint, after, "image"), None
        is_text, is_image = _chosen("text", text, shape), _chosen("image", image, shape)
        if is_text is None and is_image is None:
            if self.is_image is None:
                raise ValueError(
                    "num_text_tokens, text or image must be given if the model's run does not show the image tokens; got None"
                )
            is_image = self.is_image.cpu()
        if is_text is None:
            assert is_image is not None
            is_text = ~is_image
        is_image = ~is_text if is_image is None else is_image
        if bool((is_text & is_image).any()):
            raise ValueError("text and image must have no token in common; got some that both choose")
        return _at(self.joint, is_text, "text"), _at(self.joint, is_image, "image"), None

    def _after_words(self, num_text_tokens: int, size: int) -> Tensor:
        """Returns bool (N), the tokens after the words. Raises ValueError if the image is elsewhere."""
        if isinstance(num_text_tokens, bool) or not isinstance(num_text_tokens, int) or not 0 <= num_text_tokens <= size:
            raise ValueError(f"num_text_tokens must be from 0 to {size}, the tokens; got {num_text_tokens!r}")
        after = torch.arange(size) >= num_text_tokens
        if self.is_image is not None and not bool((self.is_image.cpu() == after).all()):
            first = int(self.is_image.reshape(-1, size).any(0).int().argmax())
            raise ValueError(
                f"num_text_tokens must be the number of words before the image; got {num_text_tokens}, and an image token at "
                f"{first}: leave it out to split the tokens as the model joined them"
            )
        return after


def pair_of(query: Tensor, key: Tensor, options: Mapping[str, Any] | None, score: str) -> QueryKey:
    pair = QueryKey((query, key))
    if options is not None and (key_mask := options.get("key_mask")) is not None:
        options = {**options, "attn_mask": joined(options["attn_mask"], key_mask[:, None, None]), "key_mask": None}
    pair._options, pair._score = options, score
    return pair


# --- parts of a sequence ---


def _chosen(name: str, positions: Any, shape: tuple[int, int]) -> Tensor | None:
    """Returns `positions` as bool (N) or (B, N)."""
    if positions is None:
        return None
    legend = f"positions from 0 to {shape[1] - 1}, or bool (N) or (B, N) = {shape}"
    try:
        chosen = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be {legend}; got {describe(positions)}") from None
    if chosen.dtype == torch.bool and tuple(chosen.shape) in (shape, shape[1:]):
        return chosen.cpu()
    if chosen.dtype not in (torch.int64, torch.int32) and chosen.numel() or chosen.ndim != 1:
        raise ValueError(f"{name} must be {legend}; got {describe(positions)}")
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < shape[1]:
        raise ValueError(f"{name} must be {legend}; got {int(chosen.min())} to {int(chosen.max())}")
    return torch.zeros(shape[1], dtype=torch.bool).index_fill(0, chosen.long().cpu(), True)


def _at(pair: QueryKey, chosen: Tensor, name: str) -> QueryKey:
    """Returns the chosen tokens, bool (N) or (B, N), of a self-attention."""
    counts = sorted(set(chosen.reshape(-1, chosen.shape[-1]).sum(1).tolist()))
    if len(counts) > 1:
        raise ValueError(
            f"{name} must have as many tokens in each sample; got {counts[0]} to {counts[-1]}: pass samples one by one"
        )
    index = chosen.nonzero()[:, -1].view(-1 if chosen.ndim == 2 else 1, counts[0] if counts else 0)
    positions = index.to(pair[0].device)  # (B or 1, L)
    options = pair._options
    if options is not None and (mask := options["attn_mask"]) is not None:
        mask = _with_four_dims(mask)
        mask = torch.take_along_dim(mask, positions[:, None, :, None], 2) if mask.shape[2] > 1 else mask
        mask = torch.take_along_dim(mask, positions[:, None, None, :], 3) if mask.shape[3] > 1 else mask
        options = {**options, "attn_mask": mask}
    query, key = (torch.take_along_dim(x, positions[:, None, :, None], 2) for x in pair)
    return pair_of(query, key, options, pair._score)


def _with_four_dims(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.ndim)]
