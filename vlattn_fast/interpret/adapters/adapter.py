"""Adapters: what `explain` cannot trace in a model's forward pass.

It traces every attention call and finds the towers. An adapter adds the names of the towers, the explained position, the score,
and what the tokens stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlattn_fast.interpret.adapters.connector_maps import Connector, squares
from vlattn_fast.interpret.adapters.image_grids import Grid
from vlattn_fast.interpret.adapters.tokens import Decoded, Named, Tokens, real_words

NAMES = ("pixel_values", "input_ids")  # of images and texts, in transformers


@dataclass(frozen=True)
class Tower:
    """Describes one stack of self-attention layers over one sequence of tokens.

    Examples:
        >>> from vlattn_fast.interpret import Adapter, Tower
        >>> vit = Tower("vision", path="vit", layers="layers", position="cls", tokens="patches", prefix=1)
        >>> adapter = Adapter((vit,), score="class")  # of a classifier

    Args:
        name: its key in `Explanation.relevancy`.
        path: the path of the tower in the model, "" for the model itself.
        layers: the path of its list of layers in the tower; "*" stands for any number (lists that run one after the other). "" =
            tokens without layers, which others only attend to.
        position: the explained token, a key of `POSITION_RULES`: "cls" = token 0; "eot" = CLIP's pooled end-of-text token;
            "last" = the last position; "target" = the position that predicts the target token; "before_sep" = the token before
            the text's last real one; "mean" and "patch_mean" = 1/N of each real token, or of each patch; "cls_and_patch_mean" =
            half of each; "pool" = an attention-pooling head; "query" = the object query that the target names; "gradient" =
            the token, or the mean of tokens, that the score's gradient shows.
        tokens: the kind of its tokens, which decides what becomes `.image` and `.text`: "patches", "last_patches" (after any
            number of other tokens), "packed_patches", "text", "clip_text", "bert_text", "prompted_text" (after learned tokens),
            "image_text" (text with image tokens in it), "image" (only image tokens), "regions" and "text_patches" (BERT's text,
            then regions or patches), "patches_text", "boxes" (only regions), "features" (a backbone's), "queries" (of objects),
            "decoded" (a decoder's text after an encoder's prompt), "sound" (in the order of time) or "actions" (a robot's state,
            then the steps of its actions).
        prefix: the number of tokens of the image before its patches (CLS); register tokens are added from the config.
        grid: for "image_text" and "image", a function of (config, inputs) that gives the grids of the image tokens, see
            `image_grids`. None = the tokens are not patches, such as the queries of a Q-Former.
        pooling: for position "pool", the path in the tower of the module that calls the attention of the pooling head.
        further: the paths in the model of further lists of layers, which run after `layers`.

    Raises:
        ValueError: `position` or `tokens` is unknown, or only one of `pooling` and position "pool" is given.
    """

    name: str
    path: str
    layers: str
    position: str
    tokens: str
    prefix: int = 0
    pooling: str | None = None
    grid: Grid | None = None
    further: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.position not in tuple(POSITION_RULES):
            raise ValueError(f"position must be one of {tuple(POSITION_RULES)}; got {self.position!r}")
        Tokens.check_name("tokens", self.tokens)
        if (self.position == "pool") != (self.pooling is not None):
            raise ValueError(
                f"pooling must be given if, and only if, position is 'pool'; got {self.pooling!r} and {self.position!r}"
            )

    @property
    def kind(self) -> type[Tokens]:
        return Tokens.named[self.tokens]

    @property
    def rule(self) -> PositionRule:
        return POSITION_RULES[self.position]

    def tokens_in(self, model: nn.Module, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Tokens:
        """Its tokens (B, N) in a batch of inputs of the model."""
        model_config = getattr(model, "config", None)
        tower_config = getattr(model.get_submodule(self.path), "config", model_config)
        whole = self.grid is not None or (self.kind.text and self.kind.image)
        names_images = hasattr(model_config, "image_token_id") or not hasattr(tower_config, "image_token_id")
        config = model_config if whole and names_images else tower_config
        prefix = self.prefix + (getattr(config, "num_register_tokens", 0) or 0)
        end = getattr(model, "eos_token_id", getattr(tower_config, "eos_token_id", None))
        return self.kind(inputs, shape, config, prefix, self.grid, self.rule.predicts, end)


@dataclass(frozen=True)
class Adapter:
    """Describes a class of models: its towers, and how the default score is computed from the outputs.

    Pass it to `va.register_adapter`; `va.interpret.ADAPTERS` has the listed ones.

    Examples:
        >>> import vlattn_fast as va
        >>> tower = va.interpret.Tower("language", path="model", layers="layers", position="target", tokens="text")
        >>> adapter = va.interpret.Adapter((tower,), score="token")  # then va.register_adapter(MyDecoder, adapter)
        >>> adapter.answers
        'input_ids'

    Args:
        towers: the towers to explain; other parts of the model run unchanged.
        score: "class" = `logits[b, class]`; "token" = `logits[b, position, token]`; "pair" = `logits_per_image[i, i]`; "query" =
            the largest logit of an object query, `max logits[b, query, :-1]`, the last of which means "no object"; "velocity" =
            `-logits[b, step, dimension]` of a flow-matching policy.
        bimodal: True = the towers attend to one another, and relevancy follows the rules for two modalities (Chefer et al. 2021,
            equations 5 to 11). The first tower has the explained position.
        logits: the field of the outputs that holds the logits.
        answers: the input to which an answer is appended; "decoder_input_ids" for encoder-decoders.
        vision: the tower from whose tokens a connector makes the image tokens; explained only with `through_connector=True`.
        connector: which of its tokens make each image token, see `connector_maps`.
        within: the path of the part of a bimodal model in which attention is explained; other parts run unchanged.
        background: for "query": True = the last logit means "no object"; False = all are objects.
        names: for "pair": the inputs that hold the images and the texts.
        answer_type: the `token_type_ids` of an answer's tokens, for models in which these decide which tokens attend to each
            other in both directions. None = those of the prompt's last token. Unless it is 0, the inputs must have
            `token_type_ids`.
        generating: the adapter of those models of the class that have a vocabulary (`vocab_size`) and predict its tokens.
        others: the adapters of those models of the class that have other parts, such as another language model. A model that
            fits none of them is explained like a model without an adapter.

    Raises:
        ValueError: `score` is unknown.
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
    names: tuple[str, str] = NAMES
    answer_type: int | None = None
    generating: Adapter | None = None
    others: tuple[Adapter, ...] = ()

    def __post_init__(self) -> None:
        TargetScore.check_name("score", self.score)

    def standard(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with the names that transformers gives images and texts."""
        named = dict(zip(self.names, NAMES, strict=True))
        return {named.get(name, name): value for name, value in inputs.items()}

    def called(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with the names that the model gives images and texts."""
        named = dict(zip(NAMES, self.names, strict=True))
        return {named.get(name, name): value for name, value in inputs.items()}

    @property
    def scoring(self) -> TargetScore:
        """How the default score is computed."""
        kind = self.towers[0].kind if self.towers else Tokens if self.answers == "input_ids" else Decoded
        return TargetScore.named[self.score](self.logits, kind, self.background)


# --- explained positions ---


@dataclass(frozen=True)
class PositionRule:
    """Which position of a tower is explained: one token, the mean of tokens, or half of each."""

    label: str  # for people
    token: Callable[[Tokens], Tensor] | None = None  # gives the token (B,)
    skipped: Callable[[Tokens], int] | None = None  # gives how many tokens at the beginning are left out of the mean
    predicts: bool = False  # the token predicts the next one
    by_gradient: bool = False  # the score's gradient names the tokens
    asks: bool = False  # the token belongs to the prompt: without it, the prompt would be another one

    def weights(self, tokens: Tokens, like: Tensor) -> Tensor:
        """The weights (B, 1, N) of the tokens, in the shape of `like` (after a pooling head N is its number of probes)."""
        weights = []
        if self.token is not None:
            weights.append(torch.zeros_like(like).scatter_(2, self.token(tokens).to(like.device)[:, None, None], 1.0))
        if self.skipped is not None:
            real = tokens.real()
            counts = torch.ones_like(like) if real is None else real[:, None].to(like)
            counts[:, :, : self.skipped(tokens)] = 0.0
            weights.append(counts / counts.sum(-1, keepdim=True).clamp(min=1))
        return torch.stack(weights).mean(0) if weights else torch.ones_like(like)


def _first(tokens: Tokens) -> Tensor:
    return torch.zeros(tokens.shape[0], dtype=torch.long)


POSITION_RULES = {
    "cls": PositionRule("first token", _first),
    "eot": PositionRule("end-of-text token", lambda tokens: tokens.end_of_text()),
    "last": PositionRule(
        "last position", lambda tokens: torch.full((tokens.shape[0],), tokens.shape[1] - 1)
    ),  # of padding or not
    "target": PositionRule("position that predicts the token", lambda tokens: tokens.last_real(), predicts=True, asks=True),
    "before_sep": PositionRule(
        "token before [SEP]", lambda tokens: (real_words(tokens.inputs).sum(-1) - 2).clamp(min=0), asks=True
    ),
    "mean": PositionRule("mean of all", skipped=lambda tokens: 0),
    "patch_mean": PositionRule("mean of the patches", skipped=lambda tokens: tokens.prefix),
    "cls_and_patch_mean": PositionRule("first token and mean of the patches, half each", _first, lambda tokens: tokens.prefix),
    "pool": PositionRule("pooling head"),  # its probes
    "query": PositionRule("object query", by_gradient=True),  # unless a target names it
    "gradient": PositionRule("what the score's gradient names", by_gradient=True),
}


# --- scores ---


@dataclass(frozen=True)
class TargetScore(Named):
    """Which number of the outputs is explained: `logits[b, class]`. Subclasses with a name are other kinds."""

    field: str  # of the outputs, which holds the logits
    kind: type[Tokens]  # of the tokens of the first tower
    background: bool  # of object queries: the last logit is that of no object

    named: ClassVar[dict[str, type[Any]]] = {}
    among: ClassVar[str] = "classes"  # what a target's index counts
    pairs: ClassVar[bool] = False  # a sample is an image with a text
    predicts: ClassVar[bool] = False  # the next token is scored, so that an answer can be
    names_position: ClassVar[bool] = False  # a target names the explained position
    among_logits: ClassVar[bool] = True  # it is one of the logits (B, classes) of its sample, so it has a log-probability

    def logits(self, outputs: Any) -> Tensor | None:
        """The logits, by name or as the model's only output; None without logits."""
        return outputs if isinstance(outputs, Tensor) else getattr(outputs, self.field, None)

    def at_places(self, outputs: Any) -> bool:
        """Whether each token has logits (B, N, classes) of its own, such as those of a masked language model, in which `position`
        chooses."""
        if self.predicts or not self.among_logits:
            return False
        logits = self.logits(outputs)
        return isinstance(logits, Tensor) and logits.ndim == 3

    def per_row(self, logits: Any, arguments: Mapping[str, Any], position: Any = None) -> Tensor:
        """The logits (B, classes) that a target chooses from, of a model called with `arguments`."""
        if self.at_places(logits):
            logits = _at_place(logits, position)
        if not isinstance(logits, Tensor):
            raise ValueError(
                "target must be a callable(outputs) -> (B,) scores, or 'similarity' of two texts or images, if the outputs have "
                "no logits; got none"
            )
        if logits.ndim != 2:
            raise ValueError(f"target must be a callable if logits are not (B, classes); got logits {tuple(logits.shape)}")
        return logits

    def prepared(self, inputs: Mapping[str, Any], target: Any) -> Mapping[str, Any]:
        """The inputs as the score of a target needs them."""
        return inputs

    def measured(self, inputs: Mapping[str, Any], target: Any) -> tuple[Mapping[str, Any], Any]:
        """Inputs and target, for scores of inputs like these too."""
        return inputs, target

    def pick(self, logits: Tensor, target: Any) -> list[int]:
        """The index of each sample of logits (B, classes): `target`, by default the largest."""
        return logits.argmax(-1).tolist() if target is None else indices(target, len(logits), logits.shape[1], self.among)

    def choose(
        self, outputs: Any, target: Any, arguments: Mapping[str, Any], position: Any = None
    ) -> tuple[Tensor, list[int] | None]:
        """Scores (B,) and the index that each belongs to, if there is one."""
        logits = self.per_row(self.logits(outputs), arguments, position)
        chosen = self.pick(logits, target)
        return logits.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0], chosen


class Class(TargetScore, name="class"):
    pass


class Token(TargetScore, name="token"):
    """The next token after a prompt: `logits[b, position, token]`."""

    among = "tokens"
    predicts = True

    def per_row(self, logits: Any, arguments: Mapping[str, Any], position: Any = None) -> Tensor:
        if isinstance(logits, Tensor) and logits.ndim == 3:
            # All logits have the length of the sequence, which may begin with patches, or be that of an encoder's decoder.
            kept = arguments.get("logits_to_keep")
            shape = prompt_shape(arguments) if isinstance(kept, Tensor) else (logits.shape[0], logits.shape[1])
            position = self.kind(arguments, shape).last_real().to(logits.device)
            if isinstance(kept, Tensor):
                position = torch.searchsorted(kept.to(logits.device), position)
            logits = logits[torch.arange(len(logits), device=logits.device), position]
        return super().per_row(logits, arguments)


class Pair(TargetScore, name="pair"):
    """The similarity of an image and a text: `logits_per_image[i, i]`."""

    among = "texts"
    pairs = True
    among_logits = False

    def logits(self, outputs: Any) -> Tensor:
        """The field of the model; for CLIP's authors' models the first output, before the logits per text; for the features of
        open_clip their products times the scale, plus a bias if there is one."""
        if hasattr(outputs, "logits_per_image"):
            return outputs.logits_per_image
        values = list(outputs.values()) if isinstance(outputs, Mapping) else list(outputs)
        if len(values) == 2:
            return values[0]
        images, texts, scale, *bias = values
        return sum(bias, scale * images @ texts.T)

    def pick(self, logits: Tensor, target: Any) -> list[int]:
        """The text of each image of logits (images, texts): by default its own, if they are equally many."""
        images, texts = logits.shape
        return list(range(images)) if target is None and images == texts else super().pick(logits, target)

    def choose(self, outputs: Any, target: Any, arguments: Mapping[str, Any], position: Any = None) -> tuple[Tensor, list[int]]:
        """Images and texts are paired already: a target is the text of each sample."""
        return self.logits(outputs).diagonal(), target


class Query(TargetScore, name="query"):
    """The largest class logit of an object query: `max logits[b, query, :-1]`."""

    among = "object queries"
    names_position = True
    among_logits = False

    def choose(self, outputs: Any, target: Any, arguments: Mapping[str, Any], position: Any = None) -> tuple[Tensor, list[int]]:
        """By default the query that is surest of its class."""
        logits = getattr(outputs, self.field)
        objects = logits[..., :-1] if self.background else logits
        # If one logit means "no object", the probabilities compare; else each logit by itself.
        sure = logits.softmax(-1)[..., :-1] if self.background else logits
        chosen = self.pick(sure.amax(-1), target)
        return objects[torch.arange(len(chosen), device=logits.device), chosen].max(-1).values, chosen


def _at_place(logits: Tensor, position: Any) -> Tensor:
    """The logits (B, classes) of one token of each sample, of those (B, N, classes) of all tokens; `position` is its index, or
    weights of which one is not 0."""
    batch, size, _ = logits.shape
    if isinstance(position, Mapping) and len(position) == 1:
        (position,) = position.values()
    if position is None or isinstance(position, (str, Mapping)):
        raise ValueError(
            f"position must be the index of one token, or target a callable, if each token has logits {tuple(logits.shape)}, "
            f"as in a masked language model; got position={position!r}"
        )
    if isinstance(position, int):
        if not -size <= position < size:
            raise ValueError(f"position must be from {-size} to {size - 1}; got {position}")
        position = functional.one_hot(torch.tensor(position % size), size)
    weights = torch.as_tensor(position, device=logits.device).expand(batch, size)
    if not bool(((weights != 0).sum(-1) == 1).all()):
        raise ValueError("position must be one token of each sample if each token has logits; got weights of several, or of none")
    return logits[torch.arange(batch, device=logits.device), (weights != 0).int().argmax(-1)]


def prompt_shape(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """(B, N) of the prompts, which are ids or embeddings."""
    prompts = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
    return prompts.shape[0], prompts.shape[1]


def indices(target: Any, batch: int, size: int, what: str) -> list[int]:
    """`target` as one index for each sample: an int for all, or (B,) ints. TypeError or ValueError for anything else."""
    if hasattr(target, "tolist"):  # torch's and NumPy's tensors and scalars
        target = target.tolist()
    chosen = [target] * batch if isinstance(target, int) else target
    if not isinstance(chosen, (list, tuple)) or not all(isinstance(i, int) and not isinstance(i, bool) for i in chosen):
        raise TypeError(f"target must be None, an int, (B,) ints or a callable; got {target!r}")
    if len(chosen) != batch:
        raise ValueError(f"target must be one index or {batch} indices, one for each sample; got {len(chosen)}")
    for index in chosen:
        if not 0 <= index < size:
            raise ValueError(f"target must be from 0 to {size - 1} ({what}); got {index}")
    return list(chosen)


WITHOUT_ADAPTER = Adapter((), "class")  # of a model without an adapter: every tower is found
