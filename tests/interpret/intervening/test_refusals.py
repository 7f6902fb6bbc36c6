"""Edits that a model has no place for are refused by name."""

import contextlib
import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

import vlattn_fast as va
from tests.helpers.interpret.decoder_cases import DECODERS
from tests.helpers.interpret.edited_maps import llama, made
from tests.helpers.interpret.encoder_cases import MADE
from tests.helpers.interpret.tower_cases import Heads
from vlattn_fast.attach.events import RUNNING


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: va.Knockout(queries="words"), ValueError, "queries must be one of 'image', .*'image:0'.*; got 'words'"),
        (lambda: va.Knockout(keys=(3, 3)), ValueError, "keys must be a name, spans .*; got"),
        (lambda: va.Knockout(keys=[(0, 2), (4,)]), ValueError, "keys must be a name, spans"),
        (lambda: va.Knockout(keys=torch.ones(2, 9)), ValueError, r"keys must be bool \(B, N\) or \(N,\)"),
        (lambda: va.Knockout(layers=[]), ValueError, "layers must be ints, at least one, -1 for the last"),
        (lambda: va.Knockout(layers=-1.0), TypeError, "layers must be a number, numbers, or None; got float"),
        (lambda: va.Knockout(heads="all"), TypeError, "heads must be a number, numbers, or None"),
        (lambda: va.Knockout(heads=[True]), ValueError, "heads must be ints, at least one"),
        (lambda: va.Knockout(), ValueError, "queries, keys or heads must be given, since Knockout without them edits all"),
        (lambda: va.Knockout(layers=[3]), ValueError, "queries, keys or heads must be given, since Knockout without"),
        (lambda: va.Steer(weight=2.0), ValueError, "queries, keys or heads must be given, since Steer without them edits all"),
        (lambda: va.Knockout(keys="last - words"), ValueError, "or one minus others, e.g. 'question - last'; got 'last - words'"),
        (lambda: va.Knockout(keys="last", tower=3), TypeError, "tower must be a name, a pair of names, or None"),
        (lambda: va.Steer(keys="image", weight=0.0), ValueError, r"weight must be above 0 \(va.Knockout cuts edges\)"),
        (lambda: va.Steer(keys="image", weight=-1.0), ValueError, "weight must be above 0"),
        (lambda: va.Steer(keys="image", weight=math.nan), ValueError, "weight must be a finite number"),
        (lambda: va.Steer(keys="image", weight=torch.ones(2)), TypeError, "weight must be a real number"),
        (lambda: va.ScaleHeads([3], 0.0), TypeError, r"heads must be a dict \{layer: heads\}"),
        (lambda: va.ScaleHeads({}, 0.0), ValueError, "heads must name a layer"),
        (lambda: va.ScaleHeads({0: [1.0]}, 0.0), ValueError, "heads must be ints, at least one"),
        (lambda: va.ScaleHeads({0: 0}, math.inf), ValueError, "factor must be a finite number"),
        (lambda: va.ScaleHeads({0: 0}, 0.0, mean=torch.ones(4)), TypeError, "mean must be a result of va.record_heads"),
        (lambda: va.Patch({}, {0: 0}), TypeError, "other_run must be a result of va.record_heads"),
        (lambda: va.Patch(va.HeadRecord(("a", "a"), {}, None, 3), {0: 0}), ValueError, "other_run must be of one run"),
        (lambda: va.Residual(1), ValueError, "Residual needs one of set, add and scale; got none"),
        (lambda: va.Mlp(1, set=0, scale=2.0), ValueError, "Mlp needs one of set, add and scale; got set, scale"),
        (lambda: va.Mlp([], scale=2.0), ValueError, "layers must be ints, at least one"),
        (lambda: va.Residual("last", scale=0.0), TypeError, "layers must be a number, numbers, or None; got str"),
        (lambda: va.Residual(1, "words", scale=0.0), ValueError, "positions must be one of 'image'"),
        (lambda: va.Residual(1, scale=torch.ones(3)), TypeError, "scale must be a real number"),
        (lambda: va.Residual(1, set=float("nan")), ValueError, "set must be a finite number"),
        (lambda: va.Residual(1, add=1.0), TypeError, r"add must be a tensor \(C\) or \(B, N, C\); got float"),
        (lambda: va.Residual(1, add=torch.ones(3, 4)), ValueError, r"add must be a floating-point tensor \(C\) or \(B, N, C\)"),
        (lambda: va.Residual(1, set=torch.ones(3).int()), ValueError, "set must be a floating-point tensor"),
        (lambda: va.Residual(1, set=va.StateRecord("mlp", "a", {}, {}, 1)), ValueError, "set must be recorded with of='residual"),
        (lambda: va.Residual(1, scale=0.0, tower=("a", "a")), TypeError, "tower must be a name, or None; got tuple"),
    ],
)
def test_an_edit_checks_itself(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([va.Knockout(keys="image", layers=3)], "layers must be from -3 to 2 in tower 'language', which has 3; got 3"),
        ([va.Knockout(keys="image", layers=-4)], "layers must be from -3 to 2 in tower 'language', which has 3; got -4"),
        ([va.Knockout(keys="image", heads=[0, 4])], "heads must be from -4 to 3 in layer 0 of tower 'language', which has 4"),
        ([va.Steer(keys="image", heads=-5, weight=2)], "heads must be from -4 to 3 in layer 0 of tower 'language', .*; got -5"),
        ([va.ScaleHeads({7: [0]}, 0.0)], "layers must be from -3 to 2 in tower 'language', which has 3; got 7"),
        ([va.ScaleHeads({0: [9]}, 0.0)], "heads must be from -4 to 3 in layer 0 of tower 'language', which has 4; got 9"),
        ([va.ScaleHeads({2: [0], -1: [0]}, 2.0)], "heads must name each layer once; got 2 and -1 of 3"),
        ([va.Knockout(keys="image", tower="text")], "tower must be one of 'language'; got 'text'"),
        ([va.Knockout(keys="image:1")], "keys must have a token; got 'image:1', which is empty in tower 'language' of 24 tokens"),
        ([va.Knockout(keys=(20, 25))], r"keys must end within tower 'language' of 24 tokens; got the span \(20, 25\)"),
        (
            [va.Knockout(keys=torch.ones(2, 9, dtype=torch.bool))],
            r"keys must have the shape \(B, N\) = \(2, 24\) of tower 'language'; got \(2, 9\)",
        ),
        ([va.Knockout(queries=torch.zeros(24, dtype=torch.bool))], "queries must have a token; got .*, which is empty"),
    ],
)
def test_what_a_model_lacks_is_named(edits: list[Any], message: str) -> None:
    model, inputs = made("llava")
    with pytest.raises(ValueError, match=message):
        va.intervene(model, inputs, edits)
    assert RUNNING.get() is None


def test_names_without_a_meaning_and_names_of_several_towers() -> None:
    model, inputs = llama()
    with pytest.raises(ValueError, match="keys='image' has no meaning in tower 'language' of 9 tokens"):
        va.intervene(model, inputs, va.Knockout(keys="image"))
    clip, pairs = made("clip")
    with pytest.raises(ValueError, match=r"Knockout needs tower=\(of the queries, .* such tokens; got \('vision', 'vision'\), "):
        va.intervene(clip, pairs, va.Knockout(keys="special"))
    with pytest.raises(
        ValueError, match="ScaleHeads needs tower= if the model does not have exactly one tower; got 'vision', 'text'"
    ):
        va.intervene(clip, pairs, va.ScaleHeads({0: 0}, 0.0))
    with pytest.raises(ValueError, match="Knockout must be of tokens that attend to one another"):
        va.intervene(clip, pairs, va.Knockout(queries="text", keys="image"))
    with pytest.raises(ValueError, match="tower must be a pair of which the first attends to the second"):
        va.intervene(clip, pairs, va.Knockout(keys="image", tower=("text", "vision")))


def test_contradictions_and_what_is_no_edit() -> None:
    model, inputs = llama()
    run = va.record_heads(model, inputs)
    patch, scale = va.Patch(run, {1: [0, 2]}), va.ScaleHeads({1: [2]}, 0.0)
    for edits in ([patch, scale], [scale, patch], [patch, patch]):
        with pytest.raises(ValueError, match="edits must set the outputs of a head once; got .* of head [02], layer 1"):
            va.intervene(model, inputs, edits)
    for edits in (None, "last", [3], {1: scale}):
        with pytest.raises(
            TypeError, match="edits must be va.Knockout, va.Steer, va.ScaleHeads, va.Patch, va.Residual or va.Mlp"
        ):
            va.intervene(model, inputs, edits)
    with pytest.raises(ValueError, match="edits must have at least one; got none"):
        va.intervene(model, inputs, [])
    shorter = {name: value[:, :7] for name, value in inputs.items()}
    with pytest.raises(ValueError, match=r"other_run must have 2 samples \(or one\) and 7 tokens; got 2 and 9"):
        va.intervene(model, shorter, patch)
    with pytest.raises(ValueError, match="mean must have recorded layer 0 of .* with 4 heads; got layers 2 of"):
        va.intervene(model, inputs, va.ScaleHeads({0: 0}, 0.0, mean=va.record_heads(model, inputs, layers=2)))
    of_another = dataclasses.replace(run, model="MistralForCausalLM")  # of the same sizes
    assert run.model == va.record_heads(model, [inputs]).model == "LlamaForCausalLM"
    for edit, name in ((va.Patch(of_another, {1: [0]}), "other_run"), (va.ScaleHeads({1: [0]}, 0.0, mean=of_another), "mean")):
        with pytest.raises(
            ValueError, match=f"{name} must be recorded of a LlamaForCausalLM, as .*; got one of a MistralForCausalLM"
        ):
            va.intervene(model, inputs, edit)
    with pytest.raises(ValueError, match="inputs must have at least one item"):
        va.record_heads(model, [])
    with pytest.raises(ValueError, match="inputs must have a sample"):
        va.intervene(model, {name: value[:0] for name, value in inputs.items()}, scale)


def test_runs_within_runs() -> None:
    model, inputs = llama()
    other, cut = copy.deepcopy(model), va.Knockout(keys=(0, 2))
    expected = model(**inputs).logits
    with (outer := va.intervene(model, inputs, cut)):
        edited = model(**inputs).logits
        with pytest.raises(ValueError, match="va.intervene must be entered where it was made"):
            outer.__enter__()  # within itself
        assert torch.equal(model(**inputs).logits, edited)
        for call in (
            lambda: va.intervene(other, inputs, cut),
            lambda: va.explain(other, inputs),
            lambda: va.explain(model, inputs, method="input_gradient"),  # which sees no attention
            lambda: va.attribute_edges(other, inputs, ["text", "last"]),
        ):
            with pytest.raises(ValueError, match="must not be inside of va.intervene when another run observes"):
                call()
        inside = va.intervene(model, inputs, cut)
    waiting = va.intervene(model, inputs, cut)
    for context in (inside, waiting):  # each in the other's place
        around = va.intervene(model, inputs, va.ScaleHeads({0: 0}, 0.5)) if context is waiting else contextlib.nullcontext()
        with around, pytest.raises(ValueError, match="va.intervene must be entered where it was made"):
            context.__enter__()
    # The second would run the model, and so this hook, before its context is entered.
    for call in (waiting.__enter__, lambda: va.intervene(model, inputs, cut)):
        hook = model.model.layers[1].register_forward_hook(lambda *_, call=call: call())
        with pytest.raises(ValueError, match="model must not be edited while explain runs it"):
            va.explain(model, inputs)
        hook.remove()
    assert RUNNING.get() is None and torch.equal(model(**inputs).logits, expected)


def test_other_inputs_than_those_of_the_context() -> None:
    model, inputs = llama()
    with va.intervene(model, inputs, va.Knockout(keys=(0, 2))):
        with pytest.raises(ValueError, match="model must run on the 9 tokens of tower 'language' .*; got 5"):
            model(input_ids=inputs["input_ids"][:, :5])
        with pytest.raises(ValueError, match="model must run on the 2 samples that va.intervene was given; got a batch of 3"):
            model(input_ids=inputs["input_ids"][[0, 1, 1]])
        model(**inputs)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Heads("exponentials", 16), Heads("exponentials", 16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, torch.ones(x.shape[:2], dtype=torch.bool))
        return x


def test_attention_that_is_not_seen() -> None:
    model, inputs = ByHand(), {"x": torch.randn(2, 5, 16)}
    with pytest.raises(ValueError, match="model must call attention through"):
        va.intervene(model, inputs, va.Knockout(keys=(0, 2)))
    with pytest.raises(ValueError, match="model must call attention through"):
        va.intervene(nn.Linear(3, 3), {"input": torch.randn(2, 3)}, va.Knockout(keys=(0, 2)))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        va.intervene(3, inputs, va.Knockout(keys=(0, 2)))
    with pytest.raises(TypeError, match="inputs must be a mapping of the model's keyword arguments; got Tensor"):
        va.intervene(model, inputs["x"], va.Knockout(keys=(0, 2)))


def test_attention_in_chunks_has_heads_and_no_edges() -> None:
    case = DECODERS["Qwen2VLForConditionalGeneration"]()
    model, inputs = case.model.eval(), case.inputs()
    with pytest.raises(ValueError, match="model must attend over whole inputs if edges are edited; got 'model.visual.blocks"):
        va.intervene(model, inputs, va.Knockout(keys=(0, 2), tower="vision"))
    before = model(**inputs).logits
    with va.intervene(model, inputs, va.ScaleHeads({0: 1}, 0.0, tower="vision")):
        assert not torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([(9, 0, "a", "a")], "layers must be from -3 to 2 in tower 'language', which has 3; got 9"),
        ([(0, 9, "a", "a")], "heads must be from -4 to 3"),
        ([(0, -5, "a", "a")], "heads must be from -4 to 3 in layer 0 of tower 'language', which has 4; got -5"),
        ([(0, 1.0, "a", "a")], "edges must have an int as their head, -1 for the last; got 1.0"),
        ([(True, 1, "a", "a")], "edges must have an int as their layer, -1 for the last; got True"),
        ([(None, 1, "a", "a")], "edges must have an int as their layer, -1 for the last; got None"),
        ([(0, 0, "a", "c")], "edges must go between groups among 'a', 'b'; got 'c'"),
        ([(0, 0, "a")], "edges must be va.Edge or tuples"),
        ([], "edges must have at least one; got none"),
    ],
)
def test_edges_are_checked(edges: list[Any], message: str) -> None:
    model, inputs = llama()
    with pytest.raises((ValueError, TypeError), match=message):
        va.intervene_each(model, inputs, edges, groups={"a": (0, 2), "b": "last"})


def test_arguments_of_effects() -> None:
    model, inputs = llama()
    for groups, message in (
        ("last", "groups must be a dict"),
        ({}, "groups must have at least one"),
        ({3: "last"}, "groups must have names"),
        ({"a": "lots"}, r"groups\['a'\] must be one of"),
        ({"a": "image"}, r"groups\['a'\]='image' has no meaning in tower 'language'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            va.attribute_edges(model, inputs, groups)
    table = va.attribute_edges(model, inputs, ["text", "last"])
    with pytest.raises(ValueError, match="edges must be given without groups, target, answer and tower if"):
        va.intervene_each(model, inputs, table, target=3)
    with pytest.raises(ValueError, match="groups must be given for edges"):
        va.intervene_each(model, inputs, [(0, 0, "text", "last")])
    with pytest.raises(ValueError, match="k must be"):
        table.top(0)
    with pytest.raises(ValueError, match="from_ must be one of 'text', 'last'; got 'image'"):
        table.matrix("image", "last")
    with pytest.raises(ValueError, match="target must give scores that depend on the attention"):
        va.attribute_edges(model, inputs, ["text"], target=lambda outputs: torch.ones(2))
    with pytest.raises(ValueError, match="target must give scores that are numbers; got nan for samples"):
        va.attribute_edges(model, inputs, ["text"], target=lambda outputs: outputs.logits[:, -1, 0] * torch.nan)


def test_names_in_other_records() -> None:
    """Regions, patches behind CLS, and several images of a prompt."""
    case = next(make for make in MADE if make.__name__ == "vilt")()
    case.model.eval()
    table = va.attribute_edges(case.model, case.inputs, ["text", "image", "special"], target=lambda o: o.logits[:, 0])
    assert {edge.to for edge in table} == {"text", "image", "special"}
    decoder = DECODERS["Gemma3ForConditionalGeneration"]()  # two images in the first prompt, one in the second
    model, inputs = decoder.model.eval(), decoder.inputs()
    both = [va.Knockout(queries="last", keys=keys) for keys in ("image:0", "image:1")]
    outputs = []
    for edits in (both, va.Knockout(queries="last", keys="image"), both[:1]):
        with torch.no_grad(), va.intervene(model, inputs, edits):
            outputs.append(model(**inputs).logits)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0][0], outputs[2][0])
    torch.testing.assert_close(outputs[0][1], outputs[2][1], rtol=0, atol=1e-5)
