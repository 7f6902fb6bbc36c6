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
    encoder_decoder,
    ids_in,
    prepare_answer,
    start_tokens,
)
from vlattn_fast.interpret.explaining.inputs import Packs, check_inputs, is_empty, opened, packed, packing, prepare_inputs
from vlattn_fast.interpret.explaining.naming import special_ids, token_target, tokenizer_of
from vlattn_fast.interpret.explaining.similarity import NAMED_POSITIONS, SIMILARITY
from vlattn_fast.interpret.relevancy.layer_maps import LayerMaps, Selection
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.methods.attention import Attention
from vlattn_fast.interpret.relevancy.methods.registry import method_of
from vlattn_fast.interpret.relevancy.model_trace import Trace

_OF_NO_SAMPLE = ("logits_to_keep", "cache_position")  # tensors without an entry for each sample
Target = None | int | str | Tensor | Sequence[int] | Sequence[str] | Action | Callable[..., Tensor]
Position = str | int | Tensor | Sequence[float]


@dataclass(frozen=True)
class Request:
    """The arguments of one `explain`, checked."""

    model: nn.Module  # without its wrappers
    adapter: Adapter  # the model's, or one without towers if they are found
    method: Method  # a copy for this call, with its options
    target: Target = None
    answer: Any = None  # None = a target is explained
    per_token: bool = True
    position: None | Position | Mapping[str, Position] = None
    processor: Any = None
    patches: PatchGrid | None = None  # the grid of the patches in towers without an adapter
    vision: Tower | None = None  # that relevancy is carried on into through the model's connector; None = it ends in the decoder

    @property
    def selection(self) -> Selection | None:
        """The maps of layers or heads that are asked for; None = one row of all."""
        return self.method.selection if isinstance(self.method, LayerMaps) else None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, which names tokens and encodes words; None without one."""
        return tokenizer_of(self.processor)

    @cached_property
    def special(self) -> frozenset[int] | None:
        """The ids of special tokens; None if the tokenizer does not say."""
        return special_ids(self.tokenizer)

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
        check_inputs(model, inputs)
        check_position(position)
        check_bool(per_token=per_token)
        check_patches(patches)
        chosen = method_of(method)
        model, tokenizer = unwrapped(model), tokenizer_of(processor)
        check_has_gradients(model)
        _check_no_derivative()
        embedded_by = "mean" if position is None or isinstance(position, Mapping) else position
        position = _checked_position(position, chosen, target)
        if answer is None:
            adapter = _adapter_of_target(model, inputs, position, chosen, per_token)
        else:
            adapter = _adapter_of_answers(model, opened(inputs)[0], target, position)
        target = token_target(target, tokenizer, model, adapter, embedded_by)
        chosen.check_adapter(adapter, type(model).__name__)
        if adapter.bimodal:
            chosen.check_between(adapter.towers)
        if adapter.scoring.names_position and position is not None and not callable(target):
            raise ValueError(f"position must be None for a detector, whose explained token is the object query; got {position!r}")
        vision = _vision_of(model, adapter) if chosen.through_connector else None
        return cls(model, adapter, chosen, target, answer, per_token, position, processor, patches, vision)


@dataclass(frozen=True)
class Prompt:
    """The model's arguments."""

    arguments: dict[str, Any]
    pairs: list[int] | None  # if images are compared with texts, the text of each sample
    answer: Answer | None  # the answer among the tokens; None if a target is explained
    packs: Packs = field(default_factory=dict)  # the arguments that stand in a dict when the model is called

    @property
    def empty(self) -> bool:
        return is_empty(self.arguments)

    def repeated(self, copies: int, batch: int) -> Prompt:
        """The same of `copies` of the batch, which has `batch` samples, one after the other."""
        arguments = {name: _repeated(name, value, copies, batch) for name, value in self.arguments.items()}
        pairs = None if self.pairs is None else self.pairs * copies
        answer = None if self.answer is None else self.answer.repeated(copies)
        return replace(self, arguments=arguments, pairs=pairs, answer=answer)

    @property
    def called(self) -> dict[str, Any]:
        """The arguments as `forward` takes them."""
        return packed(self.arguments, self.packs)


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


def lay_out(request: Request, inputs: Mapping[str, Any]) -> Prompt:
    adapter, (inputs, packs) = request.adapter, opened(inputs)
    if request.answer is None:
        decodes = not adapter.towers and adapter.answers != "input_ids" and not callable(request.target)
        if decodes and inputs.get(adapter.answers) is None and inputs.get("labels") is None:
            inputs = {**inputs, adapter.answers: start_tokens(request.model, inputs)}
        whole = request.method.takes_logits
        return Prompt(*prepare_inputs(request.model, inputs, adapter, request.target, None, whole, packs), None, packs)
    answer = prepare_answer(request.answer, request.tokenizer, inputs, request.adapter, request.model)
    positions, whole = answer.answer_positions, request.method.takes_logits
    arguments, pairs = prepare_inputs(request.model, answer.arguments, adapter, None, positions, whole, packs)
    return Prompt(arguments, pairs, answer, packs)


# --- what the call takes ---


def _checked_position(position: Any, method: Method, target: Any) -> Any:
    """`position` if the method has an explained position, else None, with a warning that it has no effect."""
    if method.uses_position and not method.takes_logits:
        return position
    if position is not None and not (isinstance(target, str) and target == SIMILARITY):  # it names the embedding
        warnings.warn(
            f"position={position!r} has no effect on method {method.name!r}, which has no explained token", stacklevel=3
        )
    return None


def _adapter_of_target(model: nn.Module, inputs: Mapping[str, Any], position: Any, method: Method, per_token: bool) -> Adapter:
    """The adapter of a model whose `target` is explained; WITHOUT_ADAPTER if its towers are found."""
    if not per_token:
        raise ValueError("answer must be given for per_token=False, which sums over its tokens; got none")
    known = find_adapter(model)
    if known is None:
        decodes = generates(model) and (encoder_decoder(model) or block_decoder(model))
        known = decodes or custom_decoder(model, opened(inputs)[0])
    finds = isinstance(position, Mapping) and listed_adapter(model) is None  # the caller names towers
    if known is not None and not (finds and not _names_towers(known, position)):
        return known
    if position is None and method.uses_position and not classifies(model):
        raise ValueError(_how_to_explain(model, inputs))
    return WITHOUT_ADAPTER


def _adapter_of_answers(model: nn.Module, inputs: Mapping[str, Any], target: Any, position: Any) -> Adapter:
    """The adapter of a model that predicts tokens."""
    if target is not None or position is not None:
        raise ValueError("answer must be given without target and position, which it replaces; got both")
    known = find_adapter(model) or encoder_decoder(model)
    adapter = custom_decoder(model, inputs, answers=True) if known is None else known
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


def _how_to_explain(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """The error for a model without an adapter: the towers of its forward pass, and the line to write. An error of this forward
    pass is raised unchanged, since no argument of `explain` can avoid it."""
    problem = f"model must be of a class with an adapter if position is None; got {type(model).__name__}"
    inputs, packs = opened(inputs)
    with torch.inference_mode(False), torch.no_grad(), at_rest(model), packing(model, packs):
        with Trace(model, WITHOUT_ADAPTER, Attention()) as trace:
            model(**trace.prepare(prepare_inputs(model, inputs, WITHOUT_ADAPTER, None, packs=packs)[0]))
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
