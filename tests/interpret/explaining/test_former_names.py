"""The parameters of `explain`, and former names, which show what you write now."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

import vlattn_fast as va
from vlattn_fast.interpret.relevancy.methods.registry import ABLATIONS, METHODS, with_options

EXPLAIN = ["model", "inputs", "target", "answer", "per_token", "method", "position", "processor", "patches"]


def test_the_parameters_of_explain() -> None:
    parameters = inspect.signature(va.explain).parameters
    assert list(parameters) == EXPLAIN
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in EXPLAIN[2:])
    defaults = {"per_token": True, "method": "gradient"}
    assert {name: parameters[name].default for name in EXPLAIN[2:]} == {**dict.fromkeys(EXPLAIN[2:]), **defaults}
    assert list(inspect.signature(va.find_sinks).parameters) == ["model", "inputs", "processor", "patches"]
    of_layers = [*EXPLAIN[:2], "per", "layers", "heads", *(name for name in EXPLAIN[2:] if name != "per_token")]
    assert list(inspect.signature(va.explain_layers).parameters) == of_layers


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"read": "cls"}, "position='cls'"),
        ({"read": torch.ones(200)}, "position=..."),
        ({"each": False}, "per_token=False"),
        ({"tokenizer": None}, "processor=None"),
        ({"grid": (4, 6), "prefix": 1}, "patches=va.PatchGrid(4, 6, prefix=1)"),
        ({"grid": (4, 6)}, "patches=va.PatchGrid(4, 6)"),
        ({"prefix": 2}, "patches=va.PatchGrid(prefix=2)"),
        ({"like": "Llama"}, "va.register_adapter(type(model), like='Llama') once before the call"),
        ({"sinks": "report"}, "va.find_sinks(model, inputs)"),
        ({"sinks": "remove"}, "method=va.methods.Gradient(sinks='remove')"),
        ({"per": "head", "layers": [1]}, "va.explain_layers(model, inputs, per='head', layers=[1])"),
        ({"heads": [0]}, "va.explain_layers(model, inputs, per='layer', heads=[0])"),
        ({"start_layer": -1}, "method=va.methods.Gradient(start_layer=-1)"),
        ({"start_layer": -1, "method": "rollout"}, "method=va.methods.Rollout(start_layer=-1)"),
        ({"start_layer": 2, "method": va.methods.Glimpse()}, "method=va.methods.Glimpse(start_layer=2)"),
        ({"start_layer": 2, "method": "attention"}, "method=va.methods.Gradient(start_layer=2)"),
        ({"weighting": "norm"}, "method=va.methods.Weighted(weighting='norm')"),
        ({"steps": 4}, "method=va.methods.IntegratedGradients(n_steps=4)"),
        ({"steps": 4, "method": "smoothgrad"}, "method=va.methods.SmoothGrad(n_samples=4)"),
        ({"through_connector": True}, "method=va.methods.Gradient(through_connector=True)"),
        ({"of": "logit", "method": "weighted"}, "method=va.methods.Weighted(of='logit')"),
    ],
)
def test_a_former_name_shows_the_new_line(given: dict[str, Any], line: str) -> None:
    former = re.escape(next(name for name in given if name != "method"))
    with pytest.raises(TypeError, match=rf"^explain\(\) has no parameter '{former}'; write {re.escape(line)}$"):
        va.explain(torch.nn.Identity(), {}, **given)


def test_a_name_that_never_was() -> None:
    with pytest.raises(TypeError, match="explain.*unexpected keyword argument 'tokens'"):
        va.explain(torch.nn.Identity(), {}, tokens=3)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (va.explain_layers, "explain_layers"),
        (va.find_sinks, "find_sinks"),
        (va.evaluate, "evaluate"),
        (va.probe, "probe"),
        (va.attribute_edges, "attribute_edges"),
        (va.intervene_each, "intervene_each"),
        (va.information_flow, "information_flow"),
        (va.widget, "widget"),
        (va.nn.capture_relevancy, "capture_relevancy"),
    ],
)
def test_all_that_explain_say_it(call: Any, name: str) -> None:
    assert not {"read", "tokenizer", "like", "grid", "prefix", "each"} & set(inspect.signature(call).parameters)
    with pytest.raises(TypeError, match=rf"^{name}\(\) has no parameter 'read'; write position='cls'$"):
        call(torch.nn.Identity(), read="cls")


def test_prompt_maps_say_it() -> None:
    with pytest.raises(TypeError, match=r"^prompt_maps\(\) has no parameter 'grid'; write patches=va.PatchGrid\(4, 6\)$"):
        va.prompt_maps(torch.nn.Identity(), grid=(4, 6))
    with va.prompt_maps(torch.nn.Identity(), guidance="none") as maps:
        for call in (maps.word_map, maps.explanation):
            with pytest.raises(TypeError, match=rf"^{call.__name__}\(\) has no parameter 'tokenizer'; write processor=None$"):
                call(tokenizer=None)


@pytest.mark.parametrize("name", [*METHODS, *ABLATIONS])
def test_options_are_keywords_that_the_label_shows(name: str) -> None:
    kind = {**METHODS, **ABLATIONS}[name]
    assert kind().label == name and kind().options == {}
    others = {"start_layer": -1, "sinks": "remove", "freeze": ("attention",), "of": "margin", "weighting": "norm"}
    others |= {"n_steps": 3, "n_samples": 3, "noise": 0.5, "seed": 1, "window": 2, "stride": 2, "baseline": 7, "fill": 7}
    for option in kind.option_names():
        parameter = inspect.signature(kind).parameters[option]
        if option in ("start_layer", "sinks", "freeze", "of", "weighting", "through_connector", "batch_size"):
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        if option in others:
            beside = {"window": 2} if option == "stride" else {}
            method = with_options(name, **{option: others[option], **beside})
            shown = "attention" if option == "freeze" else others[option]
            assert method.options[option] == others[option] and f"{option}={shown}" in method.label
            assert method.for_call().label == method.label
