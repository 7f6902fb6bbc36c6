"""What a call of `explain` promises beside its numbers: passes, batches, targets, options, refusals."""

import copy
import inspect

import numpy as np
import pytest
import torch
import transformers

import vlattn_fast as va
from tests.helpers.interpret.decoder_cases import DECODERS
from vlattn_fast.interpret import Adapter, Tower, explain, register_adapter
from vlattn_fast.interpret.adapters.registry import ADAPTERS
from vlattn_fast.interpret.relevancy.methods.registry import ABLATIONS, METHODS, method_of, with_options

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def close(got, want, tolerance=1e-5):
    assert list(got.relevancy) == list(want.relevancy)
    for tower, row in want.relevancy.items():
        torch.testing.assert_close(got.relevancy[tower], row, rtol=tolerance, atol=tolerance * float(row.abs().max()))


@pytest.mark.parametrize("method", ["gradient", "weighted", "rollout", "attention", "gradcam"])
@pytest.mark.parametrize("case", ["clip", "siglip", "bert", "llava"], indirect=True)
def test_one_forward_and_one_backward(case, method, monkeypatch):
    forwards, backwards = [], []
    handle = case.model.register_forward_hook(lambda *a: forwards.append(1))
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (backwards.append(1), grad(*a, **k))[1])
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("Tensor.backward was called"))
    explain(case.model, case.inputs, method=method)
    handle.remove()
    assert len(forwards) == 1
    assert len(backwards) == (0 if method == "attention" else 1)


@pytest.mark.parametrize("case", ["clip", "llava"], indirect=True)
def test_inputs_that_require_gradients(case):
    want = explain(case.model, case.inputs)
    inputs = dict(case.inputs, pixel_values=case.inputs["pixel_values"].requires_grad_())
    got = explain(case.model, inputs)
    close(got, want)
    assert inputs["pixel_values"].grad is None and not got.image.requires_grad


@pytest.mark.parametrize("case", ["clip", "bert"], indirect=True)
def test_batch_encoding(case):
    close(explain(case.model, transformers.BatchEncoding(case.inputs)), explain(case.model, case.inputs))


@pytest.mark.parametrize("method", ["gradient", "weighted", "rollout", "attention", "gradcam"])
def test_no_map_is_ever_held(method):
    from tests.helpers.compare import LargestAllocation

    config = transformers.ViTConfig(**dict(TINY, num_attention_heads=8), image_size=256, patch_size=8)
    model, pixels = transformers.ViTForImageClassification(config), torch.randn(1, 3, 256, 256)
    tokens = 32 * 32 + 1
    with LargestAllocation() as allocated:
        explain(model, {"pixel_values": pixels}, method=method)
    assert allocated.bytes < tokens * tokens * 4, allocated.by  # one head's map; there are eight
    assert allocated.peak < 8 * tokens * tokens * 4  # one layer's maps; there are two layers


@pytest.mark.parametrize("case", ["clip", "siglip"], indirect=True)
def test_one_image_and_many_texts(case):
    one = dict(case.inputs, pixel_values=case.inputs["pixel_values"][:1])
    texts = len(case.inputs["input_ids"])
    got = explain(case.model, one)
    repeated = explain(case.model, dict(one, pixel_values=one["pixel_values"].expand(texts, -1, -1, -1)))
    close(got, repeated)
    assert len(got) == texts and got.target == list(range(texts))
    assert (got.relevancy["vision"][0] - got.relevancy["vision"][1]).abs().max() > 1e-3
    single = explain(case.model, one, target=1)
    assert len(single) == 1 and single.target == [1]
    for tower in ("vision", "text"):
        torch.testing.assert_close(single.relevancy[tower][0], got.relevancy[tower][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_pairs(case):
    want = explain(case.model, case.inputs)
    close(explain(case.model, case.inputs, target=torch.tensor([0, 1, 2])), want)
    close(explain(case.model, case.inputs, target=lambda o: o.logits_per_image.diagonal()), want)
    crossed = explain(case.model, case.inputs, target=[2, 2, 0])
    assert crossed.token_ids == [want.token_ids[2], want.token_ids[2], want.token_ids[0]]
    many = explain(case.model, dict(case.inputs, input_ids=case.inputs["input_ids"][:1], attention_mask=None))
    assert len(many) == 3 and many.target == [0, 0, 0]
    with pytest.raises(ValueError, match="target must be from 0 to 2"):
        explain(case.model, case.inputs, target=3)
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        explain(case.model, dict(case.inputs, pixel_values=case.inputs["pixel_values"][:2]))
    with pytest.raises(ValueError, match="pixel_values"):
        explain(case.model, {"input_ids": case.inputs["input_ids"]})


@pytest.mark.parametrize("case", ["vit", "bert", "llava", "uniter"], indirect=True)
def test_targets(case):
    default = explain(case.model, case.inputs)
    batch = len(default)
    chosen = default.target
    assert isinstance(chosen, list) and len(chosen) == batch
    close(explain(case.model, case.inputs, target=torch.tensor(chosen)), default)
    close(explain(case.model, case.inputs, target=chosen), default)
    close(explain(case.model, case.inputs, target=np.array(chosen)), default)
    for b in range(batch):
        same = explain(case.model, case.inputs, target=chosen[b])
        for tower in default.relevancy:
            torch.testing.assert_close(same.relevancy[tower][b], default.relevancy[tower][b], rtol=1e-4, atol=1e-5)
    close(explain(case.model, case.inputs, target=lambda o: case.score(o, case.inputs)), default)
    other = explain(case.model, case.inputs, target=[(c + 1) % 2 for c in chosen])
    assert any((other.relevancy[t] - default.relevancy[t]).abs().max() > 1e-3 for t in default.relevancy)


@pytest.mark.parametrize("case", ["vit"], indirect=True)
@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (5, ValueError, "0 to 4"),
        (-1, ValueError, "got -1"),
        ([0, 9], ValueError, "got 9"),
        ([0, 1, 2], ValueError, "one index or 2"),
        ("cat", ValueError, "target must be one of 'LABEL_0', .* got 'cat'"),
        (1.5, TypeError, "1.5"),
        (torch.tensor([0.5, 1.0]), TypeError, "0.5"),
        (torch.tensor([True, False]), TypeError, "True"),
        (lambda o: 3.0, TypeError, "float"),
        (lambda o: o.logits, ValueError, r"\(2, 5\)"),
        (lambda o: o.logits[:, 0].detach(), ValueError, "depend on the explained layers"),
    ],
)
def test_bad_targets(case, target, error, words):
    with pytest.raises(error, match=words) as raised:
        explain(case.model, case.inputs, target=target)
    assert str(raised.value).startswith("target must ")


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_a_tensor_alone_is_refused_with_its_name(case):
    for name in ("pixel_values", "input_ids"):
        with pytest.raises(TypeError, match=rf"got Tensor. Pass \{{'{name}': ...\}}"):
            explain(case.model, case.inputs[name])


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_a_start_layer_counts_from_the_end_as_layers_of_edits_do(case):
    for kind in (va.methods.Gradient, va.methods.Rollout, va.methods.Glimpse):
        two, all_three = (explain(case.model, case.inputs, method=kind(start_layer=n)).relevancy["vision"] for n in (-2, -3))
        assert torch.equal(two, explain(case.model, case.inputs, method=kind(start_layer=1)).relevancy["vision"])
        assert torch.equal(all_three, explain(case.model, case.inputs, method=kind()).relevancy["vision"])


METHOD = "method must be one of gradient, .*, gradcam, .*; got"
LAYER = "start_layer must be from -3 to 2 for tower 'vision', -1 = the last layer; got"


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_bad_arguments(case):
    methods, pixels = va.methods, case.inputs["pixel_values"]
    options = r"got 'gradient\(freeze\)'. Options .*: method=va.methods.Gradient\(\.\.\.\)$"
    for make, error, words in (
        (lambda: {"method": "gradient(freeze)"}, ValueError, options),
        *((lambda method=method: {"method": method}, ValueError, METHOD) for method in ("grad", "", None, 3)),
        *((lambda n=n: {"method": methods.Gradient(start_layer=n)}, ValueError, LAYER) for n in (3, -4, 99)),
        (lambda: {"method": methods.Gradient(start_layer=1.0)}, TypeError, "start_layer"),
        (lambda: {"method": methods.Gradient(through_connector=0)}, TypeError, "through_connector must be True or False"),
        (lambda: {"method": methods.Weighted(weighting="mean")}, ValueError, "weighting"),
        (lambda: {"method": methods.Gradient(weighting="norm")}, TypeError, "unexpected keyword argument 'weighting'"),
        (lambda: {"method": methods.Rollout(weighting="norm")}, TypeError, "unexpected keyword argument 'weighting'"),
        (lambda: {"per_token": 0}, TypeError, "per_token must be True or False; got int 0"),
        (lambda: {"per_token": False}, ValueError, "answer must be given for per_token=False"),
        (lambda: {"model": "clip"}, TypeError, "model"),
        (lambda: {"inputs": pixels}, TypeError, "inputs"),
        (lambda: {"inputs": {"pixels": pixels}}, ValueError, r"inputs must have names of the model's forward .*; got"),
        (lambda: {"inputs": {"pixel_values": ["photo.png"]}}, TypeError, "inputs must hold tensors; .*return_tensors='pt'"),
        (lambda: {"inputs": {"pixel_values": pixels.numpy()}}, TypeError, "inputs must hold tensors; got .* in 'pixel_values'"),
        (lambda: {"inputs": {**case.inputs, "output_attentions": True}}, ValueError, "output_attentions"),
    ):
        with pytest.raises(error, match=words):
            explain(**{"model": case.model, "inputs": case.inputs, **make()})


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_weightings(case):
    weighted = explain(case.model, case.inputs, method="weighted")
    called = []

    def halves(residual, branch, gradient):
        called.append((residual.shape, branch.shape, gradient.shape))
        return torch.full(residual.shape[:2], 0.5), torch.full(residual.shape[:2], 0.5)

    half = explain(case.model, case.inputs, method=va.methods.Weighted(weighting=halves))
    assert called == [(torch.Size([2, 21, 32]),) * 3] * 3
    for other in (half, *(explain(case.model, case.inputs, method=va.methods.Weighted(weighting=w)) for w in ("norm", "equal"))):
        assert (other.relevancy["vision"] - weighted.relevancy["vision"]).abs().max() > 1e-3
    # Rows of Abar sum to one and a + b = 1, so the row keeps its sum, up to rows of Abar without a gradient.
    assert (half.relevancy["vision"].sum(-1) <= 1 + 1e-5).all()


def test_unknown_families_are_refused():
    with pytest.raises(ValueError, match="model must call attention .*; got a forward pass of Linear without a call"):
        explain(torch.nn.Linear(2, 2), {"input": torch.ones(1, 2)})
    mae = transformers.ViTMAEModel(transformers.ViTMAEConfig(**TINY, image_size=16, patch_size=8, mask_ratio=0.5))
    with pytest.raises(ValueError, match=r"got ViTMAEModel\. Its towers are tower0 \(layers: 3 tokens\)\. Pass .* position="):
        explain(mae, {"pixel_values": torch.randn(1, 3, 16, 16)})


def test_a_registered_adapter(monkeypatch):
    roberta = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TINY, vocab_size=50))
    with pytest.raises(TypeError, match="adapter must be a vlattn_fast.interpret.Adapter; got"):
        register_adapter("RobertaForSequenceClassification", "bert")
    tower = Tower("text", "roberta", "encoder.layer", "cls", "text")
    monkeypatch.setitem(ADAPTERS, "RobertaForSequenceClassification", None)  # taken out again after the test
    register_adapter("RobertaForSequenceClassification", Adapter((tower,), "class"))
    got = explain(roberta, {"input_ids": torch.randint(5, 50, (2, 6))})
    assert got.relevancy["text"].shape == (2, 6)
    wrong = Tower("text", "roberta", "encoder.blocks", "cls", "text")
    register_adapter("RobertaForSequenceClassification", Adapter((wrong,), "class"))
    with pytest.raises(ValueError, match="must have a module 'encoder.blocks' in tower 'text'; got RobertaModel"):
        explain(roberta, {"input_ids": torch.randint(5, 50, (2, 6))})


def test_bad_records():
    for record, words in (
        (("first", "text"), "position must be one of .*'cls'.*; got 'first'"),
        (("cls", "words", "attention"), "tokens"),
        (("pool", "text", "attention"), "pooling"),
    ):
        with pytest.raises(ValueError, match=words):
            Tower("text", "", "layers", *record)


class _Skips(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states, None


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_a_missed_layer_raises_and_is_named(case):
    case.model.vit.layers[1].attention.forward = _Skips().forward
    with pytest.raises(ValueError, match=r"no attention call was traced in layer 'vit\.layers\.1' .* of tower 'vision'"):
        explain(case.model, case.inputs)
    del case.model.vit.layers[1].attention.forward
    case.model.vit.layers[2].attention.forward = _Skips().forward
    with pytest.raises(ValueError, match=r"no attention call was traced in layer 'vit\.layers\.2'"):
        explain(case.model, case.inputs)


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_a_foreign_attention_raises(case):
    layer = case.model.vit.layers[1]
    case.model.vit.extra = extra = copy.deepcopy(layer.attention)
    layer.layernorm_before.register_forward_hook(lambda m, a, o: extra(o)[0])
    with pytest.raises(ValueError, match="'vit.extra', which is in none of them"):
        explain(case.model, case.inputs)


@pytest.mark.parametrize("case", ["llava"], indirect=True)
def test_a_cache_is_refused(case):
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    with torch.no_grad():
        past = case.model(**case.inputs, use_cache=True).past_key_values
    inputs = {"input_ids": ids[:, -1:], "attention_mask": torch.cat([mask, mask[:, :1]], 1), "past_key_values": past}
    with pytest.raises(ValueError, match="past_key_values"):
        explain(case.model, inputs)


def test_a_second_attention_in_a_layer_is_refused(monkeypatch):
    decoder = transformers.BertConfig(**TINY, vocab_size=50, is_decoder=True, add_cross_attention=True)
    inputs = {"input_ids": torch.randint(5, 50, (1, 4)), "encoder_hidden_states": torch.randn(1, 6, 32)}
    with pytest.raises(ValueError, match=r"4 queries and 6 keys in attention 'encoder\.layer\.0\.crossattention"):
        explain(transformers.BertModel(decoder), inputs, target=lambda o: o.pooler_output[:, 0])


def test_own_attention_names_do_nothing_outside_of_a_call():
    model = transformers.ViTModel(transformers.ViTConfig(**TINY, image_size=16, patch_size=8))
    explain(model, {"pixel_values": torch.randn(1, 3, 16, 16)}, target=lambda o: o.pooler_output[:, 0])
    model.set_attn_implementation("vlattn")
    with pytest.raises(ValueError, match="outside"):
        model(torch.randn(1, 3, 16, 16))


def test_a_tower_alone_needs_a_target():
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY, image_size=16, patch_size=8))
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    with pytest.raises(ValueError, match="no logits"):
        explain(model, pixels)
    assert explain(model, pixels, method="rollout").scores is None


def test_public_name():
    """The call and the package share a name; importing parts of the package must not put it in the call's place."""
    import vlattn_fast.interpret.result.figures.figure  # noqa: F401

    assert va.explain is explain


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
