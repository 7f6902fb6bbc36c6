"""Records: what `explain` cannot see in a model's forward pass.

It sees every attention call and finds the towers. A record says how towers are called, which row of the relevancy matrix is
read, what the tokens stand for, and where the residual sum is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vlattn_fast.interpret.records.connector_maps import Connector, squares
from vlattn_fast.interpret.records.image_grids import Grid
from vlattn_fast.interpret.records.readouts import READOUTS, ReadOut
from vlattn_fast.interpret.records.scores import Score
from vlattn_fast.interpret.records.tokens import Tokens


@dataclass(frozen=True)
class Tower:
    """One stack of self-attention layers whose relevancy is read.

    Args:
        name: key in `Explanation.relevancy`.
        path: the tower inside the model, "" for the model itself.
        layers: the list of layers inside the tower, first to last, where "*" stands for any number (lists that run one after the
            other); "" for tokens without, which others only attend to.
        readout: the row that is read: "cls" token 0, "eot" CLIP's pooled end-of-text token, "last" the last position,
            "target" the position that predicts the target token, "before_sep" the token before the text's last real one,
            "mean" and "patch_mean" 1/N over all (patch) tokens,
            "pool" the row of an attention-pooling head, "query" the object query that the target names.
        tokens: the kind of its tokens, a class of `vlattn_fast.interpret.records.tokens` by name, which decides how `.image` and
            `.text` are cut: "patches", "packed_patches", "text", "clip_text", "bert_text", "image_text" (text with image tokens
            in it), "image" (image tokens alone, as `grid` has them), "regions" and "text_patches" (BERT's text, then regions or
            patches), "patches_text", "boxes" (regions alone), "features" (a backbone's), "queries" (of objects) or "decoded" (a
            decoder's text, whose prompt an encoder reads).
        branch: inside a layer, the module whose output o is added to the residual stream, y = x + o. Method "weighted" needs it.
        stream: inside a layer, the module whose first input is x; "" for the layer itself.
        prefix: tokens of the image before its patches (CLS); register tokens are added from the config.
        pooling: inside the tower, the module that calls the attention of the pooling head (readout "pool").
        grid: how the image tokens of "image_text" and "image" lie in their images, a function of (config, inputs), see `grids`;
            None where they have no place in it, as the queries of a Q-Former.
        further: lists of layers, by their path in the model, that the tokens go on through behind `layers`.
        sums: inside a layer of `further`, modules called with x and o that return x + o, one behind each attention. Method
            "weighted" needs them.
    """

    name: str
    path: str
    layers: str
    readout: str
    tokens: str
    branch: str | None = None
    stream: str = ""
    prefix: int = 0
    pooling: str | None = None
    grid: Grid | None = None
    further: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.readout not in tuple(READOUTS):
            raise ValueError(f"readout must be one of {tuple(READOUTS)}; got {self.readout!r}")
        Tokens.called(self.tokens, "tokens")
        if (self.readout == "pool") != (self.pooling is not None):
            raise ValueError(f"pooling must be set if, and only if, readout is 'pool'; got {self.pooling!r} and {self.readout!r}")

    @property
    def kind(self) -> type[Tokens]:
        """The kind of its tokens."""
        return Tokens.called(self.tokens, "tokens")

    @property
    def row(self) -> ReadOut:
        """Which row is read."""
        return READOUTS[self.readout]

    def tokens_in(self, model: nn.Module, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Tokens:
        """Its tokens (B, N) in a batch of inputs of the model."""
        of_model = getattr(model, "config", None)
        of_tower = getattr(model.get_submodule(self.path), "config", of_model)
        config = of_model if self.grid is not None or (self.kind.text and self.kind.image) else of_tower
        prefix = self.prefix + (getattr(config, "num_register_tokens", 0) or 0)
        end = getattr(model, "eos_token_id", getattr(of_tower, "eos_token_id", None))
        return self.kind(inputs, shape, config, prefix, self.grid, self.row.predicts, end)


@dataclass(frozen=True)
class Family:
    """Towers of a model class and how its default score is read from the outputs.

    Args:
        towers: the towers to explain; other parts of the model run as they are.
        score: "pair" = `logits_per_image[i, i]`, "class" = `logits[b, class]`, "token" = `logits[b, position, token]`, "query" =
            the largest logit of an object query, `max logits[b, query, :-1]`, the last of which says that there is none.
        bimodal: the towers attend to one another, and relevancy follows the rules for two modalities (Chefer et al. 2021,
            equations 5 to 11). The row of the first tower is read.
        logits: the field of the outputs that holds the logits.
        vision: the tower whose tokens a connector makes the image tokens of; explained where the caller asks for it.
        connector: what it makes of them, see `merging`.
        within: the part of a bimodal model where attention is explained; other parts run as they are.
        background: of "query" scores: the last logit is that of no object. Without, all are objects.
        answers: the input that an answer is put into, behind the prompt; "decoder_input_ids" of encoder-decoders.
        answer_type: the `token_type_ids` of an answer's tokens, where models tell by them which tokens see one another both ways;
            None = those of the last token of the prompt. Where it is not 0, the inputs must have `token_type_ids`.
        generating: the record of those models of the class that have a vocabulary (`vocab_size`) and predict its tokens.
        others: records of those models of the class that have other parts, as another language model. One that fits none of them
            is explained as a model without a record.
    """

    towers: tuple[Tower, ...]
    score: str
    bimodal: bool = False
    logits: str = "logits"
    vision: Tower | None = None
    connector: Connector = squares
    within: str = ""
    background: bool = True
    answers: str = "input_ids"
    answer_type: int | None = None
    generating: Family | None = None
    others: tuple[Family, ...] = ()

    def __post_init__(self) -> None:
        Score.called(self.score, "score")

    @property
    def scoring(self) -> Score:
        """How the default score is read."""
        kind = self.towers[0].kind if self.towers else Tokens
        return Score.called(self.score, "score")(self.logits, kind, self.background)


UNRECORDED = Family((), "class")  # of a model without a record: every tower is found


def alone(tower: Tower) -> Family:
    """The family of a model that is this tower alone."""
    return Family((replace(tower, path=""),), "class")
