"""The first two stages of `explain`: what the caller asks, with all refusals that need no run, and the model's arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_bool
from vlattn_fast.attach.session import at_rest, check_has_gradients, unwrapped
from vlattn_fast.backends.reference.relevancy_residual import Weighting
from vlattn_fast.interpret.explaining.answer import (
    Answer,
    block_decoder,
    encoder_decoder,
    ids_in,
    own_decoder,
    prepare_answer,
    start_tokens,
)
from vlattn_fast.interpret.explaining.inputs import Packs, check_inputs, is_empty, opened, packed, packing, prepare_inputs
from vlattn_fast.interpret.explaining.naming import special_ids, token_target
from vlattn_fast.interpret.explaining.patch_grid import PatchGrid
from vlattn_fast.interpret.explaining.similarity import NAMED_ROWS, SIMILARITY
from vlattn_fast.interpret.records.actions import Action
from vlattn_fast.interpret.records.derived import classifies, generates, why_underived
from vlattn_fast.interpret.records.record import UNRECORDED, Family, Tower
from vlattn_fast.interpret.records.registry import borrowed_family, find_family, listed_family, nearest_family
from vlattn_fast.interpret.relevancy.layer_maps import LayerMaps, Selection
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.methods.registry import find_method, method_of
from vlattn_fast.interpret.relevancy.model_trace import Trace
from vlattn_fast.interpret.relevancy.sinks import KEEP

_OF_NO_SAMPLE = ("logits_to_keep", "cache_position")  # tensors without an entry for each sample
Target = None | int | str | Tensor | Sequence[int] | Sequence[str] | Action | Callable[..., Tensor]
Read = str | int | Tensor | Sequence[float]


@dataclass(frozen=True)
class Request:
    """The arguments of one `explain`, checked."""

    model: nn.Module  # without its wrappers
    record: Family  # the model's, or one without towers, where they are found
    target: Target
    method: Method  # of this call alone
    start_layer: int
    read: None | Read | Mapping[str, Read]
    answer: Any  # None = a target is explained
    each: bool
    selection: Selection | None  # the maps of layers or heads; None = one row of all
    tokenizer: Any  # names tokens and encodes words; None = nothing does
    vision: Tower | None  # that relevancy is carried on into through the model's connector; None = it ends in the decoder
    patches: PatchGrid  # where the tokens of towers without a record lie in the picture

    @cached_property
    def special(self) -> frozenset[int] | None:
        """The ids of special tokens; None where the tokenizer does not say."""
        return special_ids(self.tokenizer)

    @classmethod
    def check(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        target: Target,
        method: str | Method,
        start_layer: int,
        weighting: str | Weighting,
        steps: int | None,
        per: str | None,
        layers: Sequence[int] | None,
        heads: Sequence[int] | None,
        read: None | Read | Mapping[str, Read],
        answer: Any,
        each: bool,
        tokenizer: Any,
        through_connector: bool,
        patches: PatchGrid,
        like: str | None = None,
        sinks: str = KEEP,
    ) -> Request:
        """The request, with the errors of `explain`."""
        check_inputs(model, inputs)
        check_read(read)
        check_bool(each=each, through_connector=through_connector)
        selection = Selection.check(per, layers, heads)
        if selection is not None:
            _check_one_pass(selection, through_connector, answer is not None and each)
        chosen = _method_of_call(method, weighting, steps, selection)
        chosen.take_sinks(sinks)
        _check_start_layer(chosen, start_layer)
        model = unwrapped(model)
        check_has_gradients(model)
        embedded_by = "mean" if read is None or isinstance(read, Mapping) else read
        read = _row_to_read(read, chosen, target)
        borrowed = None if like is None else borrowed_family(model, like)
        if answer is None:
            record = _record_of_target(model, inputs, borrowed, read, chosen, each)
        else:
            record = _record_of_answers(model, opened(inputs)[0], borrowed, target, read)
        target = token_target(target, tokenizer, model, record, embedded_by)
        _check_fits(chosen, record, model, start_layer)
        if record.scoring.names_row and read is not None and not callable(target):
            raise ValueError(f"read must be None where target is the object query that is read; got {read!r}")
        vision = _vision_of(model, record, chosen, start_layer) if through_connector else None
        return cls(model, record, target, chosen, start_layer, read, answer, each, selection, tokenizer, vision, patches)


@dataclass(frozen=True)
class Prompt:
    """The model's arguments."""

    arguments: dict[str, Any]
    pairs: list[int] | None  # where images are compared with texts, the text of each row
    answer: Answer | None  # the answer among the tokens; None where a target is explained
    packs: Packs = field(default_factory=dict)  # the arguments that stand in a dict when the model is called

    @property
    def empty(self) -> bool:
        return is_empty(self.arguments)

    def repeated(self, copies: int, batch: int) -> Prompt:
        """The same of `copies` of the batch, which has `batch` samples, one behind the other."""
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
    record, (inputs, packs) = request.record, opened(inputs)
    if request.answer is None:
        decodes = not record.towers and record.answers != "input_ids" and not callable(request.target)
        if decodes and inputs.get(record.answers) is None and inputs.get("labels") is None:
            inputs = {**inputs, record.answers: start_tokens(request.model, inputs)}
        whole = request.method.takes_logits
        return Prompt(*prepare_inputs(request.model, inputs, record, request.target, None, whole, packs), None, packs)
    answer = prepare_answer(request.answer, request.tokenizer, inputs, request.record, request.model)
    positions, whole = answer.answer_positions, request.method.takes_logits
    arguments, pairs = prepare_inputs(request.model, answer.arguments, record, None, positions, whole, packs)
    return Prompt(arguments, pairs, answer, packs)


# --- what the call takes ---


def _method_of_call(method: str | Method, weighting: str | Weighting, steps: int | None, selection: Selection | None) -> Method:
    """The method, or its maps of layers or heads."""
    if isinstance(method, str):
        whole = find_method(method).of_arguments(weighting, steps)  # with the errors of its arguments
    else:
        whole = method_of(method)
        if weighting != "contribution" or steps is not None:
            raise ValueError(
                f"weighting and steps must be options of the method where it is an object; got them beside {whole!r}"
            )
    return whole if selection is None else LayerMaps(whole, selection)


def _row_to_read(read: Any, method: Method, target: Any) -> Any:
    """`read` where the method reads a row, else None; a warning where it is then without any effect."""
    if method.reads_row and not method.takes_logits:
        return read
    if read is not None and not (isinstance(target, str) and target == SIMILARITY):  # whose embedding it is
        warnings.warn(f"read={read!r} has no effect on method {method.name!r}, which reads no row", stacklevel=3)
    return None


def _record_of_target(
    model: nn.Module, inputs: Mapping[str, Any], borrowed: Family | None, read: Any, method: Method, each: bool
) -> Family:
    """The record of a model whose `target` is explained; UNRECORDED where its towers are found."""
    if not each:
        raise ValueError("each=False needs answer=, over whose tokens it sums; got none")
    known = borrowed or find_family(model)
    if known is None:
        decodes = generates(model) and (encoder_decoder(model) or block_decoder(model))
        known = decodes or own_decoder(model, opened(inputs)[0])
    finds = isinstance(read, Mapping) and borrowed is None and listed_family(model) is None  # the caller names towers
    if known is not None and not (finds and not _names_towers(known, read)):
        return known
    if read is None and method.reads_row and not classifies(model):
        raise ValueError(_how_to_read(model, inputs))
    return UNRECORDED


def _record_of_answers(model: nn.Module, inputs: Mapping[str, Any], borrowed: Family | None, target: Any, read: Any) -> Family:
    """The record of a model that predicts tokens."""
    if target is not None or read is not None:
        raise ValueError("answer must be given without target and read, which it takes the place of; got both")
    known = borrowed or find_family(model) or encoder_decoder(model)
    record = own_decoder(model, inputs, answers=True) if known is None else known
    if record is None or not record.scoring.predicts:
        name, of_caller = type(model).__name__, record is None and not hasattr(model, "can_generate")
        raise ValueError(
            "answer must be of a decoder with a record, which predicts the next token, or of an encoder-decoder; got "
            f"{name}{_own_ids(name, inputs) if of_caller else ''}{_like_the_nearest(model)}"
        )
    return record


def _own_ids(name: str, inputs: Mapping[str, Any]) -> str:
    """How a model of the caller's, called `name`, says which of its inputs an answer is put into."""
    names = ids_in(inputs)
    chosen = names[-1] if names else "decoder_input_ids"
    return (
        f", whose inputs of token ids (B, N) are {names}, where an answer is put into one. Name it 'decoder_input_ids', or say "
        f'va.interpret.register_family("{name}", va.interpret.Family((), "token", answers="{chosen}"))'
    )


# --- refusals ---


def _check_start_layer(method: Method, start_layer: Any) -> None:
    if not isinstance(start_layer, int) or isinstance(start_layer, bool):
        raise TypeError(f"start_layer must be an int; got {type(start_layer).__name__}")
    method.check_start_layer(start_layer)


def _check_one_pass(selection: Selection, through_connector: bool, one_by_one: bool) -> None:
    if through_connector or one_by_one:
        needs = "through_connector=False" if through_connector else "each=False where an answer is explained"
        raise ValueError(f"per needs {needs}, since its maps are those of one backward pass; got per={selection.per!r}")


def _check_fits(method: Method, record: Family, model: nn.Module, start_layer: int) -> None:
    """ValueError where the method cannot go through the towers of the record."""
    method.check_record(record, type(model).__name__)
    if record.bimodal:
        method.check_between(start_layer, record.towers)


def check_read(read: Any) -> None:
    """TypeError or ValueError unless `read` is None, or one way to read a row, or a dict of them."""
    if isinstance(read, Mapping) and not read:
        raise ValueError("read must name at least one tower; got an empty mapping")
    for value in read.values() if isinstance(read, Mapping) else [] if read is None else [read]:
        if isinstance(value, str) and value not in NAMED_ROWS:
            raise ValueError(f"read must be one of {', '.join(NAMED_ROWS)}, an index or weights; got {value!r}")
        if isinstance(value, bool) or not (isinstance(value, (str, int, Sequence)) or hasattr(value, "tolist")):
            raise TypeError(f"read must be a name, an index or weights; got {type(value).__name__}")


def _names_towers(record: Family, read: Mapping[str, Any]) -> bool:
    return not record.towers or set(read) <= {tower.name for tower in record.towers}


def _vision_of(model: nn.Module, record: Family, method: Method, start_layer: int) -> Tower:
    """The vision tower behind a record's connector."""
    if record.vision is None:
        raise ValueError(
            f"through_connector=True needs a record of the model's connector, which {type(model).__name__} does not have"
        )
    if method.name != "gradient" or start_layer != 0:
        raise ValueError(
            "through_connector=True supports method='gradient' with start_layer=0 only; got "
            f"method={method.name!r} with start_layer={start_layer}"
        )
    return record.vision


def _how_to_read(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """The refusal of a model without a record: the towers that its forward pass shows, and the line that explains it. An error of
    this forward pass is raised as it is, since no argument of `explain` mends it."""
    problem = f"model must be of a known family where read is None; got {type(model).__name__}"
    method = find_method("attention")()
    inputs, packs = opened(inputs)
    with torch.inference_mode(False), torch.no_grad(), at_rest(model), packing(model, packs):
        with Trace(model, UNRECORDED, method) as trace:
            model(**trace.prepare(prepare_inputs(model, inputs, UNRECORDED, None, packs=packs)[0]))
    trace.check()
    towers = [tower.described for tower in trace.towers if tower.calls.paths]
    line = f'va.explain(model, inputs, read={{"{trace.towers[0].name}": "cls"}}, target=lambda outputs: ...)'
    return (
        f"{problem}. Its towers are {', '.join(towers)}. Say which row is read and what the score is, as in {line}. "
        f"No record is derived: {why_underived(model)}{_like_the_nearest(model)}"
    )


def _like_the_nearest(model: nn.Module) -> str:
    """The way out where another class's record fits."""
    nearest = nearest_family(model)
    if nearest in (None, type(model).__name__):
        return ""
    return f". like={nearest!r} borrows the record of a class that has the same towers"
