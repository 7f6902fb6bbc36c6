"""A model, or several, whose answers and maps are computed again with heads scaled and edges cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlattn_fast._ground.checks import check_integer, describe
from vlattn_fast.attach.session import unwrapped
from vlattn_fast.interpret.explaining.explain import explain, without_progress
from vlattn_fast.interpret.explaining.loading import generate
from vlattn_fast.interpret.explaining.naming import tokenizer_of
from vlattn_fast.interpret.intervening.asking import Asked
from vlattn_fast.interpret.intervening.editing import Editing
from vlattn_fast.interpret.intervening.edges import EdgeTable
from vlattn_fast.interpret.intervening.edits import Edit, Knockout, ScaleHeads
from vlattn_fast.interpret.intervening.effects import attribute_edges
from vlattn_fast.interpret.intervening.plans import Plans
from vlattn_fast.interpret.intervening.seen_calls import SeenModel, see
from vlattn_fast.interpret.intervening.token_sets import TokenGroup
from vlattn_fast.interpret.records.registry import find_family
from vlattn_fast.interpret.relevancy.methods.registry import find_method
from vlattn_fast.interpret.result.explanation import Explanation

_SHOWN_CLASSES = 3  # of a classifier's answer
_KEYS = ({"layer", "head", "factor"}, {"layer", "head", "from", "to"})  # of a scaled head and of a cut edge, as messages have them


@dataclass(frozen=True, eq=False)
class State:
    """What models give with some edits."""

    edits: tuple[Edit, ...]
    explanations: dict[str, Explanation]  # by the name of a model and a method, see `Exploration.names`
    answers: dict[str, list[str]]  # by the name of a model: what it says of each sample; empty where it says nothing


class Exploration:
    """Models and an input; the arguments are those of `widget`."""

    def __init__(
        self,
        models: nn.Module | Mapping[str, nn.Module],
        inputs: Mapping[str, Any],
        groups: Mapping[str, TokenGroup] | Sequence[str],
        methods: str | Sequence[str],
        count: int,
        question: dict[str, Any],
    ) -> None:
        self.models = _checked_models(models)
        self.methods = _checked_methods(methods)
        check_integer("generate", count, low=0)
        self.inputs, self.count, self.question = inputs, count, question
        self.tables = {name: attribute_edges(model, inputs, groups, **question) for name, model in self.models.items()}
        self.groups: Mapping[str, Any] = next(iter(self.tables.values())).groups
        self._asked = {name: Asked.check(model, inputs, **question) for name, model in self.models.items()}
        pairs = [Plans(asked.seen).with_groups(self.groups, question["tower"])[0] for asked in self._asked.values()]
        # `Knockout` and `ScaleHeads` take this, also where several towers have such tokens.
        self.towers = pairs[0][0].name, pairs[0][1].name
        of_models = {name: _heads(table, pair) for (name, table), pair in zip(self.tables.items(), pairs, strict=True)}
        if len({str(facts) for facts in of_models.values()}) > 1:
            raise ValueError(f"models must have the same towers, layers and heads; got {of_models}")
        self.heads: dict[int, int] = next(iter(of_models.values()))[1]
        self._seen: dict[str, SeenModel] = {}
        self.plain = self._state(())

    @property
    def names(self) -> dict[str, tuple[str, str]]:
        """By its name each pair of a model and a method."""
        several = len(self.models) > 1, len(self.methods) > 1
        pairs = [(model, method) for model in self.models for method in self.methods]
        return {f"{one}, {two}" if all(several) else one if several[0] else two: (one, two) for one, two in pairs}

    def state(self, asked: Any) -> State:
        """What the models give with edits as a message names them: {"edits": [{"layer", "head", "factor"}, ...]} of heads that are
        scaled, and {"layer", "head", "from", "to"} of edges that are cut, where head None = all.

        Raises:
            TypeError, ValueError: another message; an unknown layer, head or group; an edit that is named twice.
        """
        legend = 'a message must be {"edits": [...]}'
        if not isinstance(asked, Mapping) or set(asked) != {"edits"} or not isinstance(asked["edits"], list):
            raise TypeError(f"{legend}; got {asked!r:.200}")
        edits = tuple(map(self._edit, asked["edits"]))
        places = [tuple(sorted((k, v) for k, v in one.items() if k != "factor" and v is not None)) for one in asked["edits"]]
        if len(set(places)) < len(places):
            raise ValueError(f"edits must name each head and edge once; got {asked['edits']!r:.200}")
        return self._state(edits) if edits else self.plain

    def _edit(self, one: Any) -> Edit:
        if not isinstance(one, Mapping) or set(one) not in _KEYS:
            raise ValueError(f"an edit must have the keys {' or '.join(str(sorted(keys)) for keys in _KEYS)}; got {one!r:.200}")
        layer, head = one["layer"], one["head"]
        if type(layer) is not int or layer not in self.heads:
            raise ValueError(f"layer must be among {', '.join(map(str, self.heads))}; got {layer!r:.80}")
        if not (head is None and "from" in one) and (type(head) is not int or not 0 <= head < self.heads[layer]):
            raise ValueError(f"head must be from 0 to {self.heads[layer] - 1}; got {head!r:.80}")
        if "factor" in one:
            return ScaleHeads({layer: [head]}, one["factor"], tower=self.towers)
        for side in ("from", "to"):
            if not isinstance(one[side], str) or one[side] not in self.groups:
                raise ValueError(f"{side} must be one of {', '.join(map(repr, self.groups))}; got {one[side]!r:.80}")
        queries, keys = self.groups[one["to"]], self.groups[one["from"]]
        return Knockout(queries=queries, keys=keys, layers=layer, heads=head, tower=self.towers)

    def _state(self, edits: tuple[Edit, ...]) -> State:
        explanations, answers = {}, {}
        for name, (model, method) in self.names.items():
            asked = self._asked[model]
            question = dict(self.question)
            tower = question.pop("tower")
            if edits and question["target"] is question["answer"] is asked.prompt.pairs is None:  # that of the model as it is
                question["target"] = self.plain.explanations[name].target
            with without_progress(), Editing(Plans(asked.seen, edits)) if edits else nullcontext():
                explanations[name] = explain(self.models[model], self.inputs, method=method, **question)
            if model not in answers:
                with self._editing(model, edits, tower):
                    answers[model] = self._answer(model)
        return State(edits, explanations, answers)

    def _editing(self, name: str, edits: Sequence[Edit], tower: Any) -> Any:
        """A context with the edits for the inputs without an answer."""
        if not edits:
            return nullcontext()
        if name not in self._seen:
            self._seen[name] = see(self.models[name], self.inputs, [tower])
        with torch.inference_mode(False):
            return Editing(Plans(self._seen[name], edits))

    def _answer(self, name: str) -> list[str]:
        """What a model says of each sample: a decoder's answer, or the likeliest classes; nothing where it does neither."""
        model: Any = unwrapped(self.models[name])
        record = find_family(model)
        if record is None or not self.count:
            return []
        if record.scoring.predicts:
            decode = _decoder(tokenizer_of(self.question["tokenizer"], self.question["processor"]))
            try:
                return [decode(ids) for ids in generate(model, self.inputs, self.count)]
            except ValueError as error:
                if "end of the text" not in str(error):
                    raise
                return [""] * self._asked[name].batch
        if record.scoring.pairs or record.scoring.names_row or callable(self.question["target"]):
            return []
        arguments = self._asked[name].prompt.arguments
        with torch.no_grad():
            outputs = model(**arguments)
            logits = record.scoring.per_row(record.scoring.logits(outputs), arguments)
        best = logits.double().softmax(-1).topk(min(_SHOWN_CLASSES, logits.shape[-1]))
        labels = getattr(model.config, "id2label", None) or {}
        return [
            ", ".join(f"{labels.get(i, i)} {p:.1%}" for p, i in zip(*row, strict=True))
            for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    decode = getattr(tokenizer, "decode", None)
    return decode if callable(decode) else lambda ids: "tokens " + " ".join(map(str, ids))


def _heads(table: EdgeTable, pair: Any) -> tuple[list[str], dict[int, int]]:
    """The names of the towers, and by its number how many heads each layer has."""
    heads: dict[int, int] = {}
    for edge in table:
        assert edge.head is not None
        heads[edge.layer] = max(heads.get(edge.layer, 0), edge.head + 1)
    return [tower.name for tower in pair], heads


def _checked_models(models: Any) -> dict[str, nn.Module]:
    named = dict(models) if isinstance(models, Mapping) and not isinstance(models, nn.Module) else {"model": models}
    if not named or not all(isinstance(name, str) for name in named):
        raise TypeError(f"models must be a model, or a dict from names to models; got {describe(models)}")
    return named


def _checked_methods(methods: Any) -> list[str]:
    listed = [methods] if isinstance(methods, str) else list(methods)
    if not listed or len(set(listed)) < len(listed):
        raise ValueError(f"methods must name at least one method, each once; got {methods!r}")
    for name in listed:
        if find_method(name).needs != "attention":
            raise ValueError(f"methods must see attention, which is edited; got {name!r}")
    return listed
