"""UNITER: one transformer over words and image regions (Chen et al., "UNITER: UNiversal Image-TExt Representation
Learning", ECCV 2020). Parameters are named as in the checkpoints the authors published (ChenRocks/UNITER)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_integer, check_number
from vlattn_fast.models._attention import ProjectedAttention
from vlattn_fast.models._checks import check_ids, check_length, check_mask, check_states

LAYER_NORM_EPS = 1e-12  # of the published models
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}


@dataclass(frozen=True)
class UNITERConfig:
    """Holds the sizes of a `UNITER`; the defaults are UNITER-base. Names are those of the published JSON, if it has one.

    region_dim: features per region (2048, the detector's); position_dim: box features per region (7: x1, y1, x2, y2,
    width, height and area, all relative to the image); initializer_range: standard deviation of all initial weights;
    masked_words: whether the model has the head that predicts masked words.
    """

    vocab_size: int = 28996
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    region_dim: int = 2048
    position_dim: int = 7
    masked_words: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":  # text of an annotation
                check_integer(field.name, getattr(self, field.name), low=2 if field.name == "type_vocab_size" else 1)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads ({self.num_attention_heads}); got {self.hidden_size}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {sorted(ACTIVATIONS)}; got {self.hidden_act!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            check_number(name, getattr(self, name), low=0.0, high=1.0, open_high=True)
        check_number("initializer_range", self.initializer_range, low=0.0)


@dataclass(frozen=True)
class UNITEROutput:
    """Holds the logits and the last states.

    logits: (B, 2), image-text matching, class 1 = the text matches the image. last_hidden_state: (B, L+R, C), words, then
    regions.
    """

    logits: Tensor
    last_hidden_state: Tensor


class UNITERResidual(nn.Module):
    """Linear, dropout, residual sum, LayerNorm: the end of both halves of a post-norm layer."""

    def __init__(self, in_features: int, config: UNITERConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, branch: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(branch)))


class UNITERAttention(nn.Module):
    def __init__(self, config: UNITERConfig) -> None:
        super().__init__()
        self.self = ProjectedAttention(config.hidden_size, config.num_attention_heads, config.attention_probs_dropout_prob)
        self.output = UNITERResidual(config.hidden_size, config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.output(self.self(hidden_states, hidden_states, attention_mask), hidden_states)


class UNITERIntermediate(nn.Module):
    def __init__(self, config: UNITERConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.hidden_act = config.hidden_act

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ACTIVATIONS[self.hidden_act](self.dense(hidden_states))


class UNITERLayer(nn.Module):
    def __init__(self, config: UNITERConfig) -> None:
        super().__init__()
        self.attention = UNITERAttention(config)
        self.intermediate = UNITERIntermediate(config)
        self.output = UNITERResidual(config.intermediate_size, config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        hidden_states = self.attention(hidden_states, attention_mask)
        return self.output(self.intermediate(hidden_states), hidden_states)


class UNITEREncoder(nn.Module):
    def __init__(self, config: UNITERConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(UNITERLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask)
        return hidden_states


class UNITERTextEmbeddings(nn.Module):
    def __init__(self, config: UNITERConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        embeddings = self.word_embeddings(input_ids) + self.position_embeddings.weight[: input_ids.shape[1]]
        return self.dropout(self.LayerNorm(embeddings + self.token_type_embeddings.weight[0]))


class UNITERImageEmbeddings(nn.Module):
    def __init__(self, config: UNITERConfig) -> None:
        super().__init__()
        self.img_linear = nn.Linear(config.region_dim, config.hidden_size)
        self.img_layer_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.pos_layer_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.pos_linear = nn.Linear(config.position_dim, config.hidden_size)
        self.mask_embedding = nn.Embedding(2, config.region_dim, padding_idx=0)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, features: Tensor, positions: Tensor, type_embedding: Tensor, masked: Tensor | None) -> Tensor:
        if masked is not None:
            features = torch.where(masked.bool()[..., None], self.mask_embedding.weight[1], features)
        image = self.img_layer_norm(self.img_linear(features))
        position = self.pos_layer_norm(self.pos_linear(positions))
        return self.dropout(self.LayerNorm(image + position + type_embedding))


class UNITERPooler(nn.Module):
    def __init__(self, config: UNITERConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class UNITERWordTransform(nn.Module):
    def __init__(self, config: UNITERConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.hidden_act = config.hidden_act

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(ACTIVATIONS[self.hidden_act](self.dense(hidden_states)))


class UNITERWordPredictions(nn.Module):
    """The decoder shares the weight of the word embeddings."""

    def __init__(self, config: UNITERConfig, embeddings: nn.Embedding) -> None:
        super().__init__()
        self.transform = UNITERWordTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decoder.weight = embeddings.weight
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states)) + self.bias


class UNITERModel(nn.Module):
    """The encoder without a task head; published names begin with `uniter.`."""

    def __init__(self, config: UNITERConfig) -> None:
        super().__init__()
        self.embeddings = UNITERTextEmbeddings(config)
        self.img_embeddings = UNITERImageEmbeddings(config)
        self.encoder = UNITEREncoder(config)
        self.pooler = UNITERPooler(config)


class UNITER(nn.Module):
    """Scores how well texts and images match, with UNITER's single transformer over words and image regions.

    Words and regions form one sequence, the words first. Attention is torch's SDPA, so no map is stored. Load a published
    checkpoint with `from_published`.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> model = va.models.UNITER(va.models.UNITERConfig(99, 32, 2, 4, 64, region_dim=8))
        >>> words = torch.ones(2, 5, dtype=torch.int64)
        >>> model(words, region_features=torch.randn(2, 3, 8), region_positions=torch.rand(2, 3, 7)).logits.shape
        torch.Size([2, 2])

    The model has its image-text matching head and, if the config has `masked_words`, its head of masked words. Each layer's
    `uniter.encoder.layer[i].attention.self.attention_function` has the signature of Hugging Face's attention functions and may be
    replaced on the instance.

    Reference: Chen et al., ECCV 2020, sections 3.1 and 3.2.
    """

    def __init__(self, config: UNITERConfig) -> None:
        super().__init__()
        if not isinstance(config, UNITERConfig):
            raise TypeError(f"config must be a UNITERConfig; got {type(config).__name__}")
        self.config = config
        self.uniter = UNITERModel(config)
        self.itm_output = nn.Linear(config.hidden_size, 2)
        words = self.uniter.embeddings.word_embeddings
        self.cls = nn.ModuleDict({"predictions": UNITERWordPredictions(config, words)}) if config.masked_words else None
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    @classmethod
    def from_published(cls, state_dict: Mapping[str, Tensor], *, num_attention_heads: int | None = None) -> UNITER:
        """Returns a model in eval mode, in the dtype of its weights, from the state dict of a published checkpoint
        (`torch.load("uniter-base.pt")`).

        Tensors give all sizes except num_attention_heads, which defaults to hidden_size // 64, as published. The head of masked
        words is loaded if the checkpoint has it; tensors of heads for other pre-training tasks are ignored. A checkpoint that was
        fine-tuned for retrieval, including with IAIS or CACR, has the head `rank_output` instead of `itm_output`; its logits are
        0 and the score of `rank_output`. Raises ValueError if a tensor of this model is missing, or if dtypes differ.
        """
        state = {name.replace("gamma", "weight").replace("beta", "bias"): tensor for name, tensor in state_dict.items()}
        for name in ("weight", "bias"):
            if (rank := state.get(f"rank_output.{name}")) is not None:
                state[f"itm_output.{name}"] = torch.cat([torch.zeros_like(rank), rank])
        layers = {int(name.split(".")[3]) for name in state if name.startswith("uniter.encoder.layer.")}
        try:
            vocab_size, hidden_size = state["uniter.embeddings.word_embeddings.weight"].shape
            config = UNITERConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                num_hidden_layers=len(layers),
                num_attention_heads=hidden_size // 64 if num_attention_heads is None else num_attention_heads,
                intermediate_size=state["uniter.encoder.layer.0.intermediate.dense.weight"].shape[0],
                max_position_embeddings=state["uniter.embeddings.position_embeddings.weight"].shape[0],
                type_vocab_size=state["uniter.embeddings.token_type_embeddings.weight"].shape[0],
                region_dim=state["uniter.img_embeddings.img_linear.weight"].shape[1],
                position_dim=state["uniter.img_embeddings.pos_linear.weight"].shape[1],
                masked_words="cls.predictions.bias" in state,
            )
        except KeyError as error:
            raise ValueError(f"state_dict must be a published UNITER checkpoint; got none of {error.args[0]!r}") from None
        model = cls(config)
        needed = model.state_dict().keys()
        if missing := sorted(needed - state.keys()):
            raise ValueError(f"state_dict must be a published UNITER checkpoint; got none of {missing}")
        dtypes = {state[name].dtype for name in needed}
        if len(dtypes) > 1:
            raise ValueError(f"state_dict must have tensors of one dtype; got {', '.join(sorted(map(str, dtypes)))}")
        model.to(dtypes.pop()).load_state_dict({name: state[name] for name in needed})
        return model.eval()

    def forward(
        self,
        input_ids: Tensor,
        region_features: Tensor,
        region_positions: Tensor,
        attention_mask: Tensor | None = None,
        region_mask: Tensor | None = None,
        masked_regions: Tensor | None = None,
    ) -> UNITEROutput:
        """Scores how well texts and images match.

        Args:
            input_ids: int64 (B, L), [CLS] w1 .. wn [SEP] then padding.
            region_features: float (B, R, region_dim).
            region_positions: float (B, R, position_dim), box features; `UNITERConfig` lists those of the published models.
            attention_mask: (B, L), bool or 0/1, True = a real word; None = all are.
            region_mask: (B, R), bool or 0/1, True = a real region; None = all are.
            masked_regions: bool (B, R), True = the features are replaced by the mask embedding (masked-region modelling).

        The content of padded words and regions never reaches the logits.
        """
        config = self.config
        check_ids(input_ids, config.vocab_size)
        batch, words = input_ids.shape
        check_length("input_ids", words, config.max_position_embeddings)
        check_states("region_features", region_features, (batch, None, config.region_dim))
        regions = region_features.shape[1]
        check_states("region_positions", region_positions, (batch, regions, config.position_dim))
        check_mask("attention_mask", attention_mask, (batch, words))
        check_mask("region_mask", region_mask, (batch, regions))
        check_mask("masked_regions", masked_regions, (batch, regions))
        text_mask = None if attention_mask is None else attention_mask.bool()
        image_mask = None if region_mask is None else region_mask.bool()
        mask = None
        if text_mask is not None or image_mask is not None:
            text_mask = torch.ones_like(input_ids, dtype=torch.bool) if text_mask is None else text_mask
            if image_mask is None:
                image_mask = torch.ones(region_features.shape[:2], dtype=torch.bool, device=input_ids.device)
            # 0 x NaN is NaN inside attention, so the features of padded regions become zeros
            region_features = region_features.masked_fill(~image_mask[..., None], 0.0)
            region_positions = region_positions.masked_fill(~image_mask[..., None], 0.0)
            mask = torch.cat([text_mask, image_mask], dim=1)[:, None, None, :]
        text = self.uniter.embeddings(input_ids)
        image_type = self.uniter.embeddings.token_type_embeddings.weight[1]
        image = self.uniter.img_embeddings(region_features, region_positions, image_type, masked_regions)
        hidden_states = self.uniter.encoder(torch.cat([text, image], dim=1), mask)
        return UNITEROutput(self.itm_output(self.uniter.pooler(hidden_states)), hidden_states)

    def word_logits(self, hidden_states: Tensor) -> Tensor:
        """Returns the logits (..., vocab_size) of states (..., C), such as the last hidden states of masked words.

        Raises ValueError without `masked_words`.
        """
        if self.cls is None:
            raise ValueError("config.masked_words must be True for the logits of words; got False")
        logits: Tensor = self.cls["predictions"](hidden_states)
        return logits
