"""The attention calls of a model in one forward pass over its inputs, and their tokens.

The pass is that of `explain`'s trace, so what `explain` does not support raises the same errors here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.attach.events import edits_of
from vlattn_fast.attach.handwritten import defining_class
from vlattn_fast.attach.session import at_rest, named, unwrapped
from vlattn_fast.attach.tensor_parallel import HeadShare
from vlattn_fast.interpret.adapters.adapter import Adapter
from vlattn_fast.interpret.adapters.tokens import Text, Tokens, decoder_inputs
from vlattn_fast.interpret.explaining.answer import Answer, adapter_of, start_tokens
from vlattn_fast.interpret.explaining.inputs import check_inputs, is_empty, prepare_inputs
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.model_trace import Trace
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall


@dataclass(frozen=True, eq=False)
class TracedTower:
    """The tokens of several attention calls."""

    name: str
    tokens: Tokens
    answered: Tensor  # bool (B, N), the tokens of an answer in the inputs
    last: Tensor  # bool (B, N), the last real token of each sample; for inputs with an answer the tokens that predict it
    only_by_name: bool = False  # it is the vision tower before a connector, which counts only if it is named

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One attention call, from the tokens of `tower` to those of `source`, which are the same in self-attention."""

    path: str  # of the module that calls
    tower: TracedTower
    source: TracedTower
    layer: int  # its number in the tower, from 0
    share: HeadShare  # this process's heads of the queries
    keys: int
    columns: Tensor | None  # int64, which of the keys are tokens; None = all
    problem: str  # why its queries and keys have no groups; "" = they have
    by_hand: bool  # its module computes the softmax itself

    @property
    def heads(self) -> int:
        """The number of heads in all processes."""
        return self.share.heads

    @property
    def crosses(self) -> bool:
        return self.tower is not self.source


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A model without its wrappers, and its calls in the order in which they ran. `mixing`: those without a softmax, such as
    recurrences, which have no edges: the tower, the layer and the module's path of each. `arguments`: what the model ran on."""

    model: nn.Module
    adapter: Adapter
    calls: list[ModelCall]
    mixing: list[tuple[TracedTower, int, str]]
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The class of the model, also if FSDP2 derived a class from it."""
        return defining_class(type(self.model)).__name__

    @cached_property
    def towers(self) -> list[TracedTower]:
        """Those with queries, in the order of their first calls, then those with only keys."""
        return list(dict.fromkeys([call.tower for call in self.calls] + [call.source for call in self.calls]))

    @property
    def roots(self) -> list[nn.Module]:
        """The parts of the model with these calls."""
        adapter = self.adapter
        paths = [adapter.within] if not adapter.towers or adapter.bimodal else [tower.path for tower in adapter.towers]
        return [self.model.get_submodule(path) for path in dict.fromkeys(paths)]

    def tower(self, name: str) -> TracedTower:
        """The tower of this name; ValueError if there is none."""
        for tower in self.towers:
            if tower.name == name:
                return tower
        raise ValueError(f"tower must be one of {', '.join(repr(tower.name) for tower in self.towers)}; got {name!r}")


class NotesCalls(Method):
    """Notes the attention calls of the towers, and stores only the sizes of their tensors."""

    needs_score = False
    adds_parallel = True  # if a layer has a recurrence, too, only its attention is edited
    needs_mixer_rules = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[TowerTrace, TracedCall]] = []
        self.mixing: list[tuple[TowerTrace, int, str]] = []  # those without a softmax: layer and path of each

    def attend(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        return self._noted(tower, call)

    def cross(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        return self._noted(tower, call)

    def _noted(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        if call.is_mixing:
            self.mixing.append((tower, call.layer, call.path))
        else:
            query, key, value = (tensor.to("meta") for tensor in (call.query, call.key, call.value))
            sizes = replace(call, query=query, key=key, value=value, masks={}, vector=None, ran=None, lse=None)
            self.calls.append((tower, sizes))
        return self.output(call)

    def output(self, call: TracedCall) -> Tensor:
        """(B, H, N, Dv), which the model continues with."""
        return call.computed()


TowerName = str | tuple[str, str] | None


def trace_model(model: Any, inputs: Mapping[str, Any], towers: Iterable[TowerName] = ()) -> TracedModel:
    """The attention calls of `model(**inputs)`. `towers`: those that edits name.

    Raises:
        TypeError, ValueError: `model` is not a module, or its attention is not supported; `inputs` are not a mapping, or have no
            sample.
    """
    module = unwrapped(model)
    check_inputs(module, inputs)
    adapter = adapter_of(module)
    arguments, _ = prepare_inputs(module, with_start(module, inputs), adapter, _all_of_it)
    return trace_arguments(module, adapter, arguments, towers)


def with_start(module: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs, with the first token of an encoder-decoder's decoder if they have none for it."""
    answers = adapter_of(module).answers
    if answers in inputs or answers == "input_ids" or inputs.get("labels") is not None:
        return inputs
    return {**inputs, answers: start_tokens(module, inputs)}


def _all_of_it(outputs: Any) -> Any:
    """A target that neither pairs nor cuts inputs."""
    return outputs


def trace_arguments(
    model: nn.Module,
    adapter: Adapter,
    arguments: Mapping[str, Any],
    towers: Iterable[TowerName] = (),
    answer: Answer | None = None,
) -> TracedModel:
    """The same for the arguments of `prepare_inputs`, which may contain an answer."""
    with torch.no_grad():
        return run_traced(NotesCalls(), model, adapter, arguments, towers, answer)[0]


def run_traced(
    method: NotesCalls,
    model: nn.Module,
    adapter: Adapter,
    arguments: Mapping[str, Any],
    towers: Iterable[TowerName] = (),
    answer: Answer | None = None,
) -> tuple[TracedModel, Any]:
    """The same, and the outputs of the model; `method` notes and computes its attention calls."""
    edits_of(None)
    if adapter.vision is not None and any(
        adapter.vision.name in (name if isinstance(name, tuple) else (name,)) for name in towers
    ):
        adapter = replace(adapter, towers=(*adapter.towers, adapter.vision))
    if is_empty(arguments):
        raise ValueError("inputs must have a sample; got an empty batch")
    with torch.inference_mode(False), at_rest(model), Trace(model, adapter, method) as trace:
        outputs = model(**trace.prepare(arguments))
    trace.check()
    sources = {call.number: call.source for call in trace.calls}
    joint = {call.number for call in trace.calls if call.joint}
    crossing = {id(call.tower) for call in trace.calls if call.tower is not call.source}
    tokens_of: dict[int, TracedTower] = {}

    def traced(tower: TowerTrace) -> TracedTower:
        if id(tower) not in tokens_of:
            tokens = _tokens(tower, model, arguments, decodes=id(tower) in crossing)
            only_by_name = tower.entry is not None and tower.entry is adapter.vision
            predicts = tokens.predicts or id(tower) in crossing
            tokens_of[id(tower)] = TracedTower(tower.name, tokens, *_answered(tokens, answer if predicts else None), only_by_name)
        return tokens_of[id(tower)]

    calls = []
    for tower, call in method.calls:
        (batch, heads, queries, _), source, problem = call.query.shape, sources.get(call.number, tower), ""
        if call.number in joint:
            problem = "attends to tokens of several towers in one softmax"
        elif call.chunk or call.token_positions is not None:
            problem = "attends in windows or chunks, or to tokens in another order"
        elif (batch, queries) != tower.shape or call.tokens != source.size:
            problem = f"has {queries} queries and {call.tokens} keys of {tower.size} and {source.size} tokens"
        problem = problem and f"{named(call.path, model.get_submodule(call.path))} {problem}"
        share = HeadShare(heads if call.mesh is None else heads * call.mesh.size(), call.mesh)
        at = call.path, traced(tower), traced(source), call.layer
        calls.append(ModelCall(*at, share, call.key.shape[2], call.columns, problem, call.by_hand))
    mixing = [(traced(tower), layer, path) for tower, layer, path in method.mixing]
    return TracedModel(model, adapter, calls, mixing, arguments), outputs


def _tokens(tower: TowerTrace, model: nn.Module, arguments: Mapping[str, Any], decodes: bool) -> Tokens:
    """The tokens of a tower, by its adapter; without one it is a text if it has as many tokens as there are ids."""
    if tower.entry is not None or tower.hears:
        return tower.tokens_in(arguments)
    named = decoder_inputs(arguments) if decodes else arguments
    ids, mask = (named.get(name) for name in ("input_ids", "attention_mask"))
    if decodes and isinstance(mask, Tensor):  # it may begin with that of the encoder's tokens
        named = {**named, "attention_mask": mask[..., -tower.size :]}
    if isinstance(ids, Tensor) and tuple(ids.shape) == tower.shape:
        return Text(named, tower.shape, getattr(model, "config", None), attended=tower.attended)
    return Tokens({}, tower.shape, attended=tower.attended)


def _answered(tokens: Tokens, answer: Answer | None) -> tuple[Tensor, Tensor]:
    """Which tokens are an answer's, and which are the last ones: see the fields of a tower. Patches have neither."""
    answered, last = (torch.zeros(tokens.shape, dtype=torch.bool) for _ in range(2))
    samples = torch.arange(tokens.shape[0])[:, None]
    if answer is not None:
        rows, positions = samples.expand_as(answer.answer_positions)[answer.real], answer.answer_positions[answer.real]
        answered[rows, positions + tokens.before + 1] = True
        last[rows, positions + tokens.before] = True
    elif tokens.text or not tokens.image:
        last[samples, tokens.last_real().cpu()[:, None]] = True
    return answered, last
