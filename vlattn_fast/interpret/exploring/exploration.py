"""Models whose answers and maps are computed again with heads scaled and edges cut."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from vlattn_fast._ground.checks import check_integer, describe
from vlattn_fast._ground.extras import without_progress
from vlattn_fast.attach.session import at_rest, unwrapped
from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.explaining.explain import explain
from vlattn_fast.interpret.explaining.inputs import packing
from vlattn_fast.interpret.explaining.request import tokenizer_of
from vlattn_fast.interpret.intervening.asking import Asked
from vlattn_fast.interpret.intervening.editing import EditedCalls
from vlattn_fast.interpret.intervening.edits import Edit, Knockout, ScaleHeads
from vlattn_fast.interpret.intervening.effects import attribute_edges
from vlattn_fast.interpret.intervening.intervene import intervene
from vlattn_fast.interpret.intervening.intervene_command import generated
from vlattn_fast.interpret.intervening.plans import Plans
from vlattn_fast.interpret.intervening.score_parts import split_scores
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.methods.registry import method_of
from vlattn_fast.interpret.result.explanation import Explanation

_CLASSES = 3  # of a classifier's answer
_PARTS = 8  # of a head's scores, the strongest ones
_EDGE = {"layer", "head", "from", "to"}
_KEYS = {"layer", "head", "factor"}, _EDGE  # of a scaled head and of a cut edge in a message


class State(NamedTuple):
    """Explanations and answers of models with some edits."""

    edits: tuple[Edit, ...]
    explanations: dict[str, Explanation]  # by the names of panes, see `Exploration`
    answers: dict[str, list[str]]  # by the name of a model: its answer for each sample, if it has one


class Exploration:
    """Models and an input; `question` has the arguments of `attribute_edges`, the others are those of `widget`. A pane is a model
    and a method, which `panes` has by the pane's name."""

    def __init__(self, models: Any, inputs: Mapping[str, Any], groups: Any, methods: Any, count: int, question: dict[str, Any]):
        self.models = dict(models) if isinstance(models, Mapping) else {"model": models}
        listed = [method_of(method) for method in ([methods] if isinstance(methods, (str, Method)) else methods)]
        labels = [method.label for method in listed]
        if not self.models or not all(isinstance(name, str) for name in self.models):
            raise TypeError(f"models must be a model, or a dict from names to models; got {describe(models)}")
        if not listed or len(set(labels)) < len(labels) or any(method.needs != "attention" for method in listed):
            raise ValueError(f"methods must name at least one method that uses attention, each once; got {methods!r}")
        check_integer("generate", count, low=0)
        several = len(self.models) > 1, len(listed) > 1
        self.panes: dict[str, tuple[str, Method]] = {}
        for model in self.models:
            for method in listed:
                pair = model, method.label
                self.panes[", ".join(pair) if all(several) else pair[not several[0]]] = model, method
        one = Asked.check(next(iter(self.models.values())), inputs, **question)
        if question["target"] is None and one.prompt.answer is None and one.prompt.pairs is None:
            with torch.no_grad():  # the target that the first model chooses is that of all, edited ones included
                question = {**question, "target": one.scores(one.run(Plans(one.traced)))[1]}
        self.inputs, self.count, self.question = inputs, count, question
        self.tables = {name: attribute_edges(model, inputs, groups, **question) for name, model in self.models.items()}
        self.groups = next(iter(self.tables.values())).groups
        self._asked = {name: Asked.check(model, inputs, **question) for name, model in self.models.items()}
        facts = {name: self._facts(name) for name in self.models}
        self.towers, self.heads = next(iter(facts.values()))
        if any(model_facts != (self.towers, self.heads) for model_facts in facts.values()):
            raise ValueError(f"models must have the same towers, layers and heads; got {facts}")
        self.plain = self._state(())

    def _facts(self, name: str) -> tuple[tuple[str, str], dict[int, int]]:
        """The towers between which the edges of a model go, and how many heads its layers have."""
        pair = Plans(self._asked[name].traced).with_groups(self.groups, self.question["tower"]).pair
        return (pair[0].name, pair[1].name), {edge.layer: (edge.head or 0) + 1 for edge in self.tables[name]}  # the last head's

    def state(self, message: Any) -> State:
        """Explanations and answers with the edits of a message, {"edits": [...]}: {"layer", "head", "factor"} scales a head, and
        {"layer", "head", "from", "to"} cuts an edge; head None = all heads. TypeError or ValueError for another message, an
        unknown layer, head or group, and a repeated edit."""
        if not isinstance(message, Mapping) or set(message) != {"edits"} or not isinstance(message["edits"], list):
            raise TypeError(f'a message must be {{"edits": [...]}}; got {message!r:.200}')
        edits = tuple(map(self._edit, message["edits"]))
        targets = {tuple(sorted((k, str(v)) for k, v in one.items() if k != "factor")) for one in message["edits"]}
        if len(targets) < len(edits):
            raise ValueError(f"edits must name each head and each edge once; got {message['edits']!r:.200}")
        return self._state(edits) if edits else self.plain

    def parts(self, message: Any) -> list[list[list[tuple[str, float, float]]]]:
        """The strongest parts of a head's scores, for a message {"parts": {"layer", "head", "from", "to"}}: for each model and
        sample (part, push of its keys, push of its queries), see `score_parts`; of the unedited models. TypeError or ValueError
        for another message, as in `state`, and for attention between two towers."""
        if not isinstance(message, Mapping) or set(message) != {"parts"}:
            raise TypeError(f'a message must be {{"parts": {{"layer", "head", "from", "to"}}}}; got {message!r:.200}')
        one = message["parts"]
        self._edit(one)
        if set(one) != _EDGE or one["head"] is None:
            raise ValueError(f"parts must be those of an edge of one head; got {one!r:.200}")
        if self.towers[0] != self.towers[1]:
            raise ValueError(f"parts must be of attention within a tower; got {self.towers[1]} -> {self.towers[0]}")
        groups: Any = {"groups": {"": self.groups[one["from"]]}, "queries": self.groups[one["to"]]}
        found = []
        for asked in self._asked.values():
            with packing(asked.traced.model, asked.request.packs):
                table = split_scores(asked.traced, one["layer"], (one["head"],), parts="heads", tower=self.towers[0], **groups)
            pushes = torch.stack([table.push[""], table.query_push[""]], -1)[:, 0].double()  # (B, P, 2)
            strongest = pushes.sum(-1).abs().argsort(dim=1, descending=True, stable=True)[:, :_PARTS].tolist()
            numbers = pushes.tolist()
            found.append([[(table.names[i], *numbers[b][i]) for i in order] for b, order in enumerate(strongest)])
        return found

    def _edit(self, one: Any) -> Edit:
        if not isinstance(one, Mapping) or set(one) not in _KEYS:
            raise ValueError(f"an edit must have the keys {' or '.join(str(sorted(keys)) for keys in _KEYS)}; got {one!r:.200}")
        layer, head = one["layer"], one["head"]
        if type(layer) is not int or layer not in self.heads:
            raise ValueError(f"layer must be among {', '.join(map(str, self.heads))}; got {layer!r:.80}")
        if not (head is None and "from" in one) and (type(head) is not int or not 0 <= head < self.heads[layer]):
            raise ValueError(f"head must be from 0 to {self.heads[layer] - 1}; got {head!r:.80}")
        if "factor" in one:
            return ScaleHeads({layer: head}, one["factor"], tower=self.towers)
        for side in ("from", "to"):
            if not isinstance(one[side], str) or one[side] not in self.groups:
                raise ValueError(f"{side} must be one of {', '.join(map(repr, self.groups))}; got {one[side]!r:.80}")
        queries, keys = self.groups[one["to"]], self.groups[one["from"]]
        return Knockout(queries=queries, keys=keys, layers=layer, heads=head, tower=self.towers)

    def _state(self, edits: tuple[Edit, ...]) -> State:
        explanations = {}
        for name, (model, method) in self.panes.items():
            question = {key: value for key, value in self.question.items() if key != "tower"}
            with torch.inference_mode(False):
                editing = EditedCalls(Plans(self._asked[model].traced, edits)).observer() if edits else nullcontext()
            with without_progress(), editing:
                explanations[name] = explain(self.models[model], self.inputs, method=method, **question)
        answers = {}
        for name, model in self.models.items():
            with at_rest(unwrapped(model)), intervene(model, self.inputs, edits) if edits and self.count else nullcontext():
                answers[name] = self._answer(name)
        return State(edits, explanations, answers)

    @torch.no_grad()
    def _answer(self, name: str) -> list[str]:
        """The answer of a model for each sample: a decoder's text, or the likeliest classes; nothing for other models."""
        model: Any = unwrapped(self.models[name])
        adapter, asked = find_adapter(model), self._asked[name]
        if adapter is None or not self.count:
            return []
        scoring = adapter.scoring
        if scoring.predicts and hasattr(model, "generation_config"):
            decode = getattr(tokenizer_of(self.question["processor"]), "decode", None)
            named = decode if callable(decode) else lambda ids: f"tokens {' '.join(map(str, ids))}"
            answers = generated(model, self.inputs, self.count)
            return ["nothing"] * asked.batch if answers is None else [named(ids) for ids in answers]
        if scoring.predicts or scoring.pairs or scoring.names_position or callable(self.question["target"]):
            return []
        logits = scoring.per_row(scoring.logits(model(**asked.prompt.arguments)), asked.prompt.arguments)
        best, labels = logits.double().softmax(-1).topk(min(_CLASSES, logits.shape[-1])), getattr(model.config, "id2label", {})
        rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [", ".join(f"{labels.get(i, i)} {p:.1%}" for p, i in zip(*row, strict=True)) for row in rows]
