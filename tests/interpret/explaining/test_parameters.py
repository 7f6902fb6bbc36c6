"""The parameters of `explain`, and the options of methods."""

import copy
import inspect

import pytest

import vlattn_fast as va
from tests.helpers.interpret.decoder_cases import DECODERS
from vlattn_fast.interpret.relevancy.methods.registry import ABLATIONS, METHODS, method_of, with_options

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


@pytest.mark.parametrize("name", [*METHODS, *ABLATIONS])
def test_options_are_keywords_that_the_label_shows(name: str) -> None:
    kind = {**METHODS, **ABLATIONS}[name]
    assert kind().label == name and kind().options == {}
    others = {"start_layer": -1, "sinks": "remove", "freeze": ("attention",), "of": "margin", "weighting": "norm"}
    others |= {"n_steps": 3, "n_samples": 3, "noise": 0.5, "seed": 1, "window": 2, "stride": 2, "baseline": 7, "fill": 7}
    others["one_hot"] = True
    for option in kind.option_names():
        parameter = inspect.signature(kind).parameters[option]
        if option in ("start_layer", "sinks", "freeze", "of", "weighting", "through_connector", "batch_size"):
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        if option in others:
            beside = {"window": 2} if option == "stride" else {}
            method = with_options(name, **{option: others[option], **beside})
            shown = "attention" if option == "freeze" else others[option]
            assert method.options[option] == others[option] and f"{option}={shown}" in method.label
            named = method_of(method.label)  # as tables and explanations print it
            assert type(named) is kind and named.options == method.options


def test_a_label_names_options_as_an_object_does() -> None:
    both = {"freeze": ("norms", "attention"), "of": "logit"}
    for label in ("smoothgrad(freeze=norms+attention, of=logit)", "smoothgrad(of='logit', freeze=('norms', 'attention'))"):
        assert method_of(label).options == va.methods.SmoothGrad(**both).options
    assert method_of("gradient(freeze=())").freeze == ()
    for label in ("gradient(", "gradient(3)", "gradient(freeze)", "gradient(of=f())"):
        with pytest.raises(ValueError, match=r"got '.*'. Options belong to an object: method=va.methods.Gradient\(...\)"):
            method_of(label)
    with pytest.raises(ValueError, match="freez must be an option of method 'gradient', which has freeze"):
        method_of("gradient(freez=())")


@pytest.mark.parametrize("name", METHODS)
def test_a_call_changes_nothing_in_its_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several calls, and several threads, may share one object."""
    decoder = DECODERS["LlavaForConditionalGeneration"]()
    method = with_options(name, **({"n_steps": 2} if name == "integrated_gradients" else {}))
    model, inputs = decoder.model.eval(), decoder.inputs()

    def refuse(changed: va.methods.Method, name: str, value: object) -> None:
        raise AssertionError(f"{name} of {changed} is set during a call")

    before = copy.deepcopy(vars(method))
    monkeypatch.setattr(va.methods.Method, "__setattr__", refuse)
    va.explain(model, inputs, method=method)
    assert vars(method) == before
