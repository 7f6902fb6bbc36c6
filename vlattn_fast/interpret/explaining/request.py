"""The first two stages of `explain`: the caller's arguments, with all errors that need no run, and the model's arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_bool, describe, is_transformed
from vlattn_fast.attach.session import at_rest, check_has_gradients, unwrapped
from vlattn_fast.interpret.adapters.actions import Action
from vlattn_fast.interpret.adapters.adapter import WITHOUT_ADAPTER, Adapter, Tower
from vlattn_fast.interpret.adapters.derived import classifies, generates, why_underived
from vlattn_fast.interpret.adapters.patch_grid import PatchGrid
from vlattn_fast.interpret.adapters.registry import find_adapter, listed_adapter, nearest_adapter
from vlattn_fast.interpret.explaining.answer import (
    Answer,
    block_decoder,
    custom_decoder,
    encoded,
    encoder_decoder,
    ids_in,
    prepare_answer,
    start_tokens,
)
from vlattn_fast.interpret.explaining.inputs import Packs, check_inputs, is_empty, opened, packing, prepare_inputs
from vlattn_fast.interpret.explaining.similarity import NAMED_POSITIONS, SIMILARITY, Similarity
from vlattn_fast.interpret.relevancy.embedding_trace import Origin, without_origin
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.methods.attention import Attention
from vlattn_fast.interpret.relevancy.methods.registry import method_of
from vlattn_fast.interpret.relevancy.model_trace import Trace

_OF_NO_SAMPLE = ("logits_to_keep", "cache_position")  # tensors without an entry for each sample
_MOST_VECTORS = 32  # so that the carriers of a long answer stay small compared with queries, keys and values
_OF_IMAGES = ("image_processor", "image_mean", "preprocess")  # what a tokenizer does not have
Target = None | int | str | Tensor | Sequence[int] | Sequence[str] | Action | Callable[..., Tensor]
Position = str | int | Tensor | Sequence[float]


@dataclass(frozen=True)
class Request:
    """The arguments of one `explain`, checked."""

    model: nn.Module  # without its wrappers
    adapter: Adapter  # the model's, or one without towers if they are found
    method: Method
    inputs: Mapping[str, Any] = field(default_factory=dict)  # with the entries of each dict of tensors instead of the dict
    packs: Packs = field(default_factory=dict)  # these dicts
    target: Target = None
    answer: Any = None  # None = a target is explained
    per_token: bool = True
    position: None | Position | Mapping[str, Position] = None
    processor: Any = None
    tokenizer: Any = None  # the processor's, which names tokens and encodes words
    patches: PatchGrid | None = None  # the grid of the patches in towers without an adapter
    vision: Tower | None = None  # that relevancy is carried on into through the model's connector; None = it ends in the decoder
    place: None | Position | Mapping[str, Position] = None  # `position`, for a score at a token: also of methods without one

    @property
    def special(self) -> frozenset[int] | None:
        """The ids of special tokens; None if the tokenizer does not say."""
        ids = getattr(self.tokenizer, "all_special_ids", None)
        return None if ids is None else frozenset(ids)

    @classmethod
    def check(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        method: str | Method,
        target: Target = None,
        answer: Any = None,
        per_token: bool = True,
        position: None | Position | Mapping[str, Position] = None,
        processor: Any = None,
        patches: PatchGrid | None = None,
    ) -> Request:
        """The request, with the errors of `explain`."""
        model = unwrapped(model)
        check_inputs(model, inputs)
        check_position(position)
        check_bool(per_token=per_token)
        check_patches(patches)
        (inputs, packs), chosen, tokenizer = opened(inputs), method_of(method), tokenizer_of(processor)
        check_has_gradients(model)
        _check_no_derivative()
        embedded_by = "mean" if position is None or isinstance(position, Mapping) else position
        place = position
        position = _checked_position(position, chosen, target, model)
        if answer is None:
            adapter = _adapter_of_target(model, inputs, packs, position, chosen, per_token)
        else:
            adapter = _adapter_of_answers(model, inputs, target, position)
        target = token_target(target, tokenizer, model, adapter, embedded_by)
        chosen.check_adapter(adapter, type(model).__name__)
        if adapter.bimodal:
            chosen.check_between(adapter.towers)
        if adapter.scoring.names_position and position is not None and not callable(target):
            raise ValueError(f"position must be None for a detector, whose explained token is the object query; got {position!r}")
        vision = _vision_of(model, adapter) if chosen.through_connector else None
        asked = target, answer, per_token, position, processor, tokenizer, patches, vision, place
        return cls(model, adapter, chosen, inputs, packs, *asked)


@dataclass(frozen=True)
class Prompt:
    """The model's arguments."""

    request: Request
    arguments: dict[str, Any]
    pairs: list[int] | None = None  # if images are compared with texts, the text of each sample
    answer: Answer | None = None  # the answer among the tokens; None if a target is explained
    origin: Origin = without_origin  # gives the embeddings of a baseline

    @cached_property
    def empty(self) -> bool:
        return is_empty(self.arguments)

    @property
    def n_vectors(self) -> int:
        """The number of tokens of an answer that a backward pass explains."""
        request = self.request
        if self.answer is None or not (request.method.carries_several and request.per_token and request.adapter.towers):
            return 1
        return max(1, min(_MOST_VECTORS, self.answer.answer_positions.shape[1]))

    @property
    def masked(self) -> Mapping[str, Any]:
        """The arguments, with a mask of padding among the tokens of an answer."""
        return self.arguments if self.answer is None else self.answer.masked(self.arguments)

    def about(self, target: Target) -> Prompt:
        """The same with another target."""
        return replace(self, request=replace(self.request, target=target))

    def repeated(self, copies: int, batch: int) -> Prompt:
        """The same of `copies` of the batch, which has `batch` samples, one after the other."""
        arguments = {name: _repeated(name, value, copies, batch) for name, value in self.arguments.items()}
        pairs = None if self.pairs is None else self.pairs * copies
        answer = None if self.answer is None else self.answer.repeated(copies)
        return replace(self, arguments=arguments, pairs=pairs, answer=answer)


def _repeated(name: str, value: Any, copies: int, batch: int) -> Any:
    """An argument of the model, of `copies` of a batch of `batch` samples."""
    if isinstance(value, list):
        return value * copies
    if not isinstance(value, Tensor) or value.ndim == 0 or name in _OF_NO_SAMPLE:
        return value
    if name == "position_ids":  # (B, N), (1, N) of all samples, or (3, B, N)
        dim = value.ndim - 2
        return value if value.shape[dim] == 1 < batch else torch.cat([value] * copies, dim)
    return torch.cat([value] * copies)


def lay_out(request: Request) -> Prompt:
    adapter, inputs, answer = request.adapter, request.inputs, None
    if request.answer is not None:
        answer = prepare_answer(request.answer, request.tokenizer, inputs, adapter, request.model)
        inputs = answer.arguments
    elif not adapter.towers and adapter.answers != "input_ids" and not callable(request.target):
        if inputs.get(adapter.answers) is None and inputs.get("labels") is None:
            inputs = {**inputs, adapter.answers: start_tokens(request.model, inputs)}
    positions = None if answer is None else answer.answer_positions
    whole = request.method.takes_logits
    return Prompt(request, *prepare_inputs(request.model, inputs, adapter, request.target, positions, whole), answer)


# --- what the call takes ---


def _checked_position(position: Any, method: Method, target: Any, model: nn.Module) -> Any:
    """`position` if the method has an explained position, else None, with a warning that it has no effect, unless it may be where
    the score is taken."""
    if method.uses_position and not method.takes_logits:
        return position
    names_embedding = isinstance(target, str) and target == SIMILARITY
    if position is not None and not names_embedding and (generates(model) or not _has_vocabulary(model)):
        warnings.warn(
            f"position={position!r} has no effect on method {method.name!r}, which has no explained token", stacklevel=3
        )
    return None


def _adapter_of_target(
    model: nn.Module, inputs: Mapping[str, Any], packs: Packs, position: Any, method: Method, per_token: bool
) -> Adapter:
    """The adapter of a model whose `target` is explained; WITHOUT_ADAPTER if its towers are found."""
    if not per_token:
        raise ValueError("answer must be given for per_token=False, which sums over its tokens; got none")
    adapter = find_adapter(model)
    if adapter is None:
        decodes = generates(model) and (encoder_decoder(model) or block_decoder(model))
        adapter = decodes or custom_decoder(model, inputs)
    finds = isinstance(position, Mapping) and listed_adapter(model) is None  # the caller names towers
    if adapter is not None and not (finds and not _names_towers(adapter, position)):
        return adapter
    if position is None and method.uses_position and not classifies(model):
        raise ValueError(_how_to_explain(model, inputs, packs))
    return WITHOUT_ADAPTER


def _adapter_of_answers(model: nn.Module, inputs: Mapping[str, Any], target: Any, position: Any) -> Adapter:
    """The adapter of a model that predicts tokens."""
    if target is not None or position is not None:
        raise ValueError("answer must be given without target and position, which it replaces; got both")
    listed = find_adapter(model) or encoder_decoder(model)
    adapter = custom_decoder(model, inputs, answers=True) if listed is None else listed
    if adapter is None or not adapter.scoring.predicts:
        name, is_callers = type(model).__name__, adapter is None and not hasattr(model, "can_generate")
        raise ValueError(
            "model must be a decoder with an adapter, or an encoder-decoder, if answer is given; got "
            f"{name}{_custom_ids(name, inputs) if is_callers else ''}{_like_the_nearest(model)}. "
            "For a class or another score pass target= in place of answer="
        )
    return adapter


def _custom_ids(name: str, inputs: Mapping[str, Any]) -> str:
    """How to name the input of a model called `name` to which an answer is appended."""
    names = ids_in(inputs)
    chosen = names[-1] if names else "decoder_input_ids"
    return (
        f", whose inputs of token ids (B, N) are {names}. Call the one that holds an answer 'decoder_input_ids', or name it: "
        f'va.register_adapter("{name}", va.interpret.Adapter((), "token", answers="{chosen}"))'
    )


# --- words ---


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer that a processor is, or has; None of an image processor, and of None. TypeError for anything else."""
    if processor is None:
        return None
    inner = getattr(processor, "tokenizer", processor)
    if callable(inner) and (hasattr(inner, "convert_ids_to_tokens") or not any(hasattr(inner, name) for name in _OF_IMAGES)):
        return inner
    if not any(hasattr(processor, name) for name in _OF_IMAGES):
        got = type(processor).__name__
        raise TypeError(f"processor must be a tokenizer, a processor or an image processor of Hugging Face; got {got}")
    return None


def token_target(target: Any, tokenizer: Any, model: nn.Module, adapter: Adapter, position: Any) -> Any:
    """`target` with its words, one or one a row, as indices: of tokens, or of classes by their names in the config. The word
    "similarity" is a callable, of encoders whose embedding `position` says. ValueError for a word of several tokens, or no
    class."""
    scored = adapter.scoring
    if isinstance(target, str) and target == SIMILARITY and not (scored.predicts or scored.pairs or target in _classes(model)):
        return Similarity(model, adapter, position)
    if isinstance(target, (list, tuple)) and target and all(isinstance(word, str) for word in target):
        return [_index(word, tokenizer, model, adapter) for word in target]
    return _index(target, tokenizer, model, adapter) if isinstance(target, str) else target


def _index(word: str, tokenizer: Any, model: nn.Module, adapter: Adapter) -> int:
    if not adapter.scoring.predicts and not _has_vocabulary(model):
        classes = {} if adapter.scoring.pairs else _classes(model)
        if word not in classes:
            names = list(classes)
            wanted = f"one of {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}" if names else "an index"
            raise ValueError(f"target must be {wanted} for {type(model).__name__}; got {word!r}")
        if len(classes[word]) > 1:
            which = " and ".join(map(str, classes[word]))
            raise ValueError(f"target must name one class; got {word!r}, the name of classes {which}. Pass the index")
        return classes[word][0]
    if tokenizer is None:
        raise ValueError(f"processor must have a tokenizer for a target that is a word; got none for {word!r}")
    ids = encoded("target", word, tokenizer)
    if not ids:
        raise ValueError(f"target must be one token; got {word!r}, which has none")
    if len(ids) != 1:
        more = f". Pass answer={word!r} to explain them all" if adapter.scoring.predicts else ""
        raise ValueError(f"target must be one token; got {word!r}, which has {len(ids)}{more}")
    return ids[0]


def _has_vocabulary(model: nn.Module) -> bool:
    """Whether its outputs are logits of tokens, as transformers says."""
    last = getattr(model, "get_output_embeddings", None)
    return callable(last) and last() is not None


def _classes(model: nn.Module) -> dict[str, list[int]]:
    """The classes of each name in the config: those that `id2label` gives outputs, and further names of `label2id`."""
    config = getattr(model, "config", None)
    classes: dict[str, list[int]] = {}
    for index, name in (getattr(config, "id2label", None) or {}).items():
        classes.setdefault(name, []).append(int(index))
    for name, index in (getattr(config, "label2id", None) or {}).items():
        classes.setdefault(name, [int(index)])
    return classes


# --- errors ---


def check_position(position: Any) -> None:
    """TypeError or ValueError unless `position` is None, a position, or a dict of positions."""
    if isinstance(position, Mapping) and not position:
        raise ValueError("position must name at least one tower; got an empty mapping")
    for value in position.values() if isinstance(position, Mapping) else [] if position is None else [position]:
        if isinstance(value, str) and value not in NAMED_POSITIONS:
            raise ValueError(f"position must be one of {', '.join(NAMED_POSITIONS)}, an index or weights; got {value!r}")
        if isinstance(value, bool) or not (isinstance(value, (str, int, Sequence)) or hasattr(value, "tolist")):
            raise TypeError(f"position must be a name, an index or weights; got {type(value).__name__}")


def check_patches(patches: Any) -> PatchGrid | None:
    """The argument of this name; TypeError unless it is None or a `PatchGrid`."""
    if patches is not None and not isinstance(patches, PatchGrid):
        raise TypeError(f"patches must be a va.PatchGrid(rows, columns, prefix=0); got {describe(patches)}")
    return patches


def _check_no_derivative() -> None:
    """RuntimeError within torch.func and forward mode."""
    if is_transformed():
        raise RuntimeError(
            "an explanation has no derivative: torch.func and torch.autograd.forward_ad.dual_level must be off. "
            "Use va.nn.capture_relevancy(model, higher_order=True) for a relevancy with derivatives"
        )


def _names_towers(adapter: Adapter, position: Mapping[str, Any]) -> bool:
    return not adapter.towers or set(position) <= {tower.name for tower in adapter.towers}


def _vision_of(model: nn.Module, adapter: Adapter) -> Tower:
    """The vision tower before an adapter's connector."""
    if adapter.vision is None:
        raise ValueError(f"model must have an adapter with a connector for through_connector=True; got {type(model).__name__}")
    return adapter.vision


def _how_to_explain(model: nn.Module, inputs: Mapping[str, Any], packs: Packs) -> str:
    """The error for a model without an adapter: the towers of its forward pass, and the line to write. An error of this forward
    pass is raised unchanged, since no argument of `explain` can avoid it."""
    problem = f"model must be of a class with an adapter if position is None; got {type(model).__name__}"
    with torch.inference_mode(False), torch.no_grad(), at_rest(model), packing(model, packs):
        with Trace(model, WITHOUT_ADAPTER, Attention()) as trace:
            model(**trace.prepare(prepare_inputs(model, inputs, WITHOUT_ADAPTER, None)[0]))
    trace.check()
    towers = [tower.described for tower in trace.towers if tower.calls.paths]
    line = f'va.explain(model, inputs, position={{"{trace.towers[0].name}": "cls"}}, target=lambda outputs: ...)'
    return (
        f"{problem}. Its towers are {', '.join(towers)}. Pass the explained token and the score: {line}, or target=1 for class 1 "
        f"if the output is one tensor of logits. No adapter could be derived: {why_underived(model)}{_like_the_nearest(model)}"
    )


def _like_the_nearest(model: nn.Module) -> str:
    """What to do if another class's adapter fits."""
    nearest = nearest_adapter(model)
    if nearest in (None, type(model).__name__):
        return ""
    return f". va.register_adapter({type(model).__name__}, like={nearest!r}) borrows the adapter of a class with the same towers"
