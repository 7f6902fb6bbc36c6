"""CLIPMapper: a mapper over the two encoders of a CLIP-like model, for answers and captions (Huang et al., "Generic
Attention-model Explainability by Weighted Relevance Accumulation", 2023). The authors published no code: the order of the
parts within a layer is ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_bool, check_integer, check_number, readable
from vlattn_fast.models._attention import ProjectedAttention
from vlattn_fast.models._checks import check_ids, check_length, check_mask, check_states


@dataclass(frozen=True)
class CLIPMapperOutput:
    """Holds the logits and the mapper's text states.

    logits: (B, num_answers), or (B, T, vocab_size) for each next token. last_hidden_state: (B, T, C).
    """

    logits: Tensor
    last_hidden_state: Tensor


class CLIPMapperAttention(ProjectedAttention):
    """Attention from states to `context`."""

    def __init__(self, hidden_size: int, num_heads: int, *, is_causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__(hidden_size, num_heads, dropout, is_causal)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, context: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.output(super().forward(hidden_states, context, attention_mask))


class CLIPMapperMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.intermediate = nn.Linear(hidden_size, intermediate_size)
        self.output = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.output(F.gelu(self.intermediate(hidden_states)))


class CLIPMapperResidual(nn.Module):
    """Computes stream + dropout(branch), as a module, so that a hook gets both terms and the sum."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    def forward(self, stream: Tensor, branch: Tensor) -> Tensor:
        return stream + self.dropout(branch)


class CLIPMapperImageLayer(nn.Module):
    """Pre-norm: self-attention over the image tokens, ended by its residual sum."""

    def __init__(self, hidden_size: int, num_heads: int, *, dropout: float) -> None:
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(hidden_size)
        self.self_attention = CLIPMapperAttention(hidden_size, num_heads, dropout=dropout)
        self.self_attention_residual = CLIPMapperResidual(dropout)

    def forward(self, image_states: Tensor) -> Tensor:
        normed = self.self_attention_norm(image_states)
        states: Tensor = self.self_attention_residual(image_states, self.self_attention(normed, normed))
        return states


class CLIPMapperLayer(nn.Module):
    """Pre-norm: self-attention over the text, cross-attention to the image, MLP, each ended by its residual sum.
    cross_first: cross-attention comes first."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        is_causal: bool,
        dropout: float,
        cross_first: bool = False,
    ) -> None:
        super().__init__()
        self.cross_first = cross_first
        self.self_attention_norm = nn.LayerNorm(hidden_size)
        self.self_attention = CLIPMapperAttention(hidden_size, num_heads, is_causal=is_causal, dropout=dropout)
        self.self_attention_residual = CLIPMapperResidual(dropout)
        self.cross_attention_norm = nn.LayerNorm(hidden_size)
        self.cross_attention = CLIPMapperAttention(hidden_size, num_heads, dropout=dropout)
        self.cross_attention_residual = CLIPMapperResidual(dropout)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = CLIPMapperMLP(hidden_size, intermediate_size)
        self.mlp_residual = CLIPMapperResidual(dropout)

    def forward(self, hidden_states: Tensor, image_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.cross_first:
            hidden_states = self._attend_to_image(hidden_states, image_states)
            hidden_states = self._attend_to_text(hidden_states, attention_mask)
        else:
            hidden_states = self._attend_to_text(hidden_states, attention_mask)
            hidden_states = self._attend_to_image(hidden_states, image_states)
        return self.mlp_residual(hidden_states, self.mlp(self.mlp_norm(hidden_states)))

    def _attend_to_text(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        normed = self.self_attention_norm(hidden_states)
        return self.self_attention_residual(hidden_states, self.self_attention(normed, normed, attention_mask))

    def _attend_to_image(self, hidden_states: Tensor, image_states: Tensor) -> Tensor:
        normed = self.cross_attention_norm(hidden_states)
        return self.cross_attention_residual(hidden_states, self.cross_attention(normed, image_states))


class CLIPMapper(nn.Module):
    """Predicts answers or texts from an image and a text, with layers over the states of CLIP's two encoders.

    Every text state is a token of the mapper; each layer attends to the text, then to the image tokens. Attention is torch's
    SDPA, so no map is stored. With frozen encoders their states can be computed once for a whole training.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        >>> vision = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8))
        >>> text = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=99, eos_token_id=98))
        >>> model = va.models.CLIPMapper(vision, text, hidden_size=16, num_layers=1, num_heads=2, num_answers=5)
        >>> model(torch.rand(2, 3, 16, 16), torch.tensor([[1, 5, 98], [1, 7, 98]])).logits.shape
        torch.Size([2, 5])

    With `num_answers` the logits of the answer are those at the end-of-text token. With `vocab_size` the mapper's self-attention
    is causal and every token gives the logits of the next one; the text encoder must be causal, too, as CLIP's is.

    Args:
        vision, text: the encoders, such as CLIPVisionModel and CLIPTextModel of transformers or `vision_model` and `text_model`
            of a CLIPModel: called with pixel_values, or with input_ids and attention_mask, they return `last_hidden_state`;
            `config.hidden_size` is its size.
        hidden_size, num_layers, num_heads: of the mapper.
        num_answers, vocab_size: exactly one of them.
        intermediate_size: of the mapper's MLPs. Default: 4 * hidden_size.
        dropout: of the mapper's attention and residual branches.
        image_self_attention: the image tokens attend to themselves before each layer of the mapper; the layers attend to the
            result.
        cross_first: in each layer cross-attention to the image comes before self-attention over the text, and not after.
        freeze_encoders: the encoders' parameters get no gradient, and train() leaves the encoders in eval mode, so that
            the states of `encode_image` and `encode_text` can be stored for the whole training.
        eos_token_id: the end-of-text token. Default: `text.config.eos_token_id`. As in transformers' CLIP, a sample's logits are
            those at its first end-of-text token, and 2 stands for a sample's highest id. If the config has no id, they are those
            of the last real token.

    Reference: Huang et al., "Generic Attention-model Explainability by Weighted Relevance Accumulation", 2023.
    """

    def __init__(
        self,
        vision: nn.Module,
        text: nn.Module,
        *,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        num_answers: int | None = None,
        vocab_size: int | None = None,
        intermediate_size: int | None = None,
        dropout: float = 0.0,
        image_self_attention: bool = False,
        cross_first: bool = False,
        freeze_encoders: bool = True,
        eos_token_id: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {name: _hidden_size(name, encoder) for name, encoder in (("vision", vision), ("text", text))}
        _check_sizes(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads)
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads ({num_heads}); got {hidden_size}")
        if (num_answers is None) == (vocab_size is None):
            raise ValueError(f"num_answers or vocab_size must be given, and not both; got {num_answers} and {vocab_size}")
        optional = {"num_answers": num_answers, "vocab_size": vocab_size, "intermediate_size": intermediate_size}
        _check_sizes(**{name: size for name, size in optional.items() if size is not None})
        known = getattr(text.config, "vocab_size", None)
        if vocab_size is not None and known is not None and vocab_size > known:
            raise ValueError(f"vocab_size must be at most text's, {known}, since text encodes generated tokens; got {vocab_size}")
        check_number("dropout", dropout, low=0.0, high=1.0, open_high=True)
        check_bool(image_self_attention=image_self_attention, cross_first=cross_first)
        self.vision, self.text = vision, text
        self.num_answers, self.vocab_size = num_answers, vocab_size
        self.freeze_encoders = freeze_encoders
        self.eos_token_id = getattr(text.config, "eos_token_id", None) if eos_token_id is None else eos_token_id
        self.vision_norm = nn.LayerNorm(sizes["vision"])
        self.vision_projection = nn.Linear(sizes["vision"], hidden_size)
        self.text_projection = nn.Linear(sizes["text"], hidden_size)
        inner = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.layers = nn.ModuleList(
            CLIPMapperLayer(
                hidden_size, num_heads, inner, is_causal=vocab_size is not None, dropout=dropout, cross_first=cross_first
            )
            for _ in range(num_layers)
        )
        self.image_layers = nn.ModuleList(
            CLIPMapperImageLayer(hidden_size, num_heads, dropout=dropout) for _ in range(num_layers * image_self_attention)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, num_answers or vocab_size or 0)
        for part in (self.vision_projection, self.text_projection, self.layers, self.image_layers, self.head):
            part.apply(_initialize)
        if freeze_encoders:
            for encoder in (vision, text):
                encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> CLIPMapper:
        super().train(mode)
        if self.freeze_encoders:
            self.vision.eval()
            self.text.eval()
        return self

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Returns the vision encoder's states (B, N, Cv), which `forward` and `generate` take as image_states."""
        states: Tensor = self.vision(pixel_values=pixel_values).last_hidden_state
        return states

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns the text encoder's states (B, T, Ct), which `forward` takes as text_states."""
        mask = None if attention_mask is None else attention_mask.long()  # the dtype of transformers' tokenizers
        states: Tensor = self.text(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return states

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        image_states: Tensor | None = None,
        text_states: Tensor | None = None,
    ) -> CLIPMapperOutput:
        """Answers a text about an image, or continues the text.

        Args:
            pixel_values: as the vision encoder takes them, float (B, channels, height, width).
            input_ids: int64 (B, T).
            attention_mask: (B, T), bool or 0/1, True = a real token. Default: all tokens are real with vocab_size, and all up to
                the end-of-text token with num_answers.
            image_states, text_states: results of `encode_image` and `encode_text`, which save a run of the encoders;
                image_states replace pixel_values, text_states need input_ids as well.
        """
        ids = self._check(pixel_values, input_ids, attention_mask, image_states, text_states)
        end = self._end_of_text(ids, attention_mask) if self.num_answers is not None else None
        real = None if attention_mask is None else attention_mask.bool()
        if end is not None and real is None:
            real = torch.arange(ids.shape[1], device=ids.device) <= end[:, None]
        if image_states is None:
            assert pixel_values is not None
            image_states = self.encode_image(pixel_values)
        if text_states is None:
            text_states = self.encode_text(ids, attention_mask)
        image_states = self.vision_projection(self.vision_norm(image_states))
        hidden_states = self.text_projection(text_states)
        mask = self._mask(real)
        for number, layer in enumerate(self.layers):
            if self.image_layers:
                image_states = self.image_layers[number](image_states)
            hidden_states = layer(hidden_states, image_states, mask)
        hidden_states = self.norm(hidden_states)
        explained = hidden_states if end is None else hidden_states[torch.arange(len(end), device=end.device), end]
        return CLIPMapperOutput(self.head(explained), hidden_states)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        image_states: Tensor | None = None,
        max_new_tokens: int | None = None,
        stop_token: int | None = None,
    ) -> Tensor:
        """Generates the tokens int64 (B, up to max_new_tokens) that follow prompts (B, T), the likeliest one each time.

        Args:
            pixel_values, input_ids, attention_mask, image_states: see `forward`; shorter prompts are padded on the right.
            max_new_tokens: the largest number of tokens. Default: as many as the text encoder has positions for.
            stop_token: ends a sample, and fills the rest of it. Default: the eos_token_id, unless this is 2, which stands for
                another id.
        """
        if self.vocab_size is None:
            raise ValueError("generate must be called on a model with vocab_size, which writes texts; got one with num_answers")
        ids = self._check(pixel_values, input_ids, attention_mask, image_states, None)
        if max_new_tokens is None:
            if self._most_tokens is None:
                raise ValueError("max_new_tokens must be given if text has no config.max_position_embeddings; got None")
            max_new_tokens = self._most_tokens - ids.shape[1] + 1
        _check_sizes(max_new_tokens=max_new_tokens)
        stop = self.eos_token_id if stop_token is None else stop_token
        if stop_token is None and stop == 2:  # configs from before transformers 4.31, see `_end_of_text`
            raise ValueError("stop_token must be given if eos_token_id is 2, which stands for the highest id; got None")
        if not isinstance(stop, int) or not 0 <= stop < self.vocab_size:
            raise ValueError(f"stop_token must be an int from 0 to {self.vocab_size - 1}; got {stop!r}")
        check_length("input_ids and max_new_tokens", ids.shape[1] + max_new_tokens - 1, self._most_tokens)
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if bool((real[:, 1:] & ~real[:, :-1]).any() | ~real[:, 0].all()):
            raise ValueError("attention_mask must have real tokens first and padding on the right; got another order")
        if image_states is None:
            assert pixel_values is not None
            image_states = self.encode_image(pixel_values)
        lengths, samples, prompt = real.sum(1), torch.arange(len(ids), device=ids.device), ids.shape[1]
        ids = F.pad(ids, (0, max_new_tokens))
        columns = torch.arange(ids.shape[1], device=ids.device)
        generated: list[Tensor] = []
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for count in range(max_new_tokens):
            length = prompt + count
            mask = columns[:length] < lengths[:, None]
            logits = self(input_ids=ids[:, :length], attention_mask=mask, image_states=image_states).logits
            token = logits[samples, lengths - 1].argmax(-1).masked_fill(done, stop)
            generated.append(token)
            done = done | (token == stop)
            if bool(done.all()):
                break
            ids[samples, lengths] = token.to(ids.dtype)
            lengths = lengths + 1
        return torch.stack(generated, dim=1)

    def _mask(self, real: Tensor | None) -> Tensor | None:
        """Returns the mask of self-attention from bool (B, T); None for causal attention without padding."""
        if real is None:
            return None
        mask = real[:, None, None, :]
        if self.vocab_size is None:
            return mask
        length = real.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
        # padding attends to itself: a row with nothing to attend to would be NaN
        return (mask & earlier) | torch.eye(length, dtype=torch.bool, device=real.device)

    def _end_of_text(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Returns int64 (B), the position whose state gives each sample's logits."""
        eos = self.eos_token_id
        if eos is None:
            if attention_mask is None:
                return torch.full_like(ids[:, 0], ids.shape[1] - 1, dtype=torch.int64)
            return (attention_mask.long() * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1)
        if eos == 2:  # configs from before transformers 4.31 say 2, whatever the tokenizer's id is
            return ids.argmax(1)
        ends = torch.isin(ids, torch.as_tensor(eos, dtype=ids.dtype, device=ids.device))
        if ids.device.type == "cpu" and readable(ids) and not bool(ends.any(1).all()):
            raise ValueError(f"input_ids must have the end-of-text token {eos} in every sample; got samples without it")
        return ends.int().argmax(1)

    def _check(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        image_states: Tensor | None,
        text_states: Tensor | None,
    ) -> Tensor:
        if (pixel_values is None) == (image_states is None):
            raise ValueError(
                f"pixel_values or image_states must be given, and not both; got {'neither' if pixel_values is None else 'both'}"
            )
        check_ids(input_ids, getattr(self.text.config, "vocab_size", None))
        assert input_ids is not None
        batch, length = input_ids.shape
        check_length("input_ids", length, self._most_tokens)
        states: dict[str, tuple[Any, tuple[int | None, ...]]] = {
            "pixel_values": (pixel_values, (batch, None, None, None)),
            "image_states": (image_states, (batch, None, self.vision_projection.in_features)),
            "text_states": (text_states, (batch, length, self.text_projection.in_features)),
        }
        for name, (value, sizes) in states.items():
            if value is not None:
                check_states(name, value, sizes)
        check_mask("attention_mask", attention_mask, input_ids.shape)
        return input_ids

    @property
    def _most_tokens(self) -> int | None:
        return getattr(self.text.config, "max_position_embeddings", None)


def _hidden_size(name: str, encoder: Any) -> int:
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"{name} must be a module; got {type(encoder).__name__}")
    size = getattr(getattr(encoder, "config", None), "hidden_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{name} must have config.hidden_size; got {type(encoder).__name__} without it")
    return size


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        check_integer(name, size, low=1)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)
