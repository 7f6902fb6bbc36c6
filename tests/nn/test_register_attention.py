"""Score functions by name in transformers' interface: values, gradients, masks, caches, saved parameters, explanations."""

import copy
import io
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface

from tests.helpers.nn.models import DEEP, MODELS, answer, words
from tools.tiny_models.inputs import texts
from tools.tiny_models.shrink import small_model
from vlattn_fast import explain, scores
from vlattn_fast.nn import register_attention, replace_attention

NAMES = ["Llama, sdpa", "CLIP, sdpa", "BERT", "ViT"]
ATTENTION = {"CLIP, sdpa": 5}
LAYERS = scores.layers()


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    out = answer(model(**inputs))
    model.zero_grad()
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_name(model: nn.Module, score: str) -> dict[str, nn.Module]:
    """The parameters of the model, whose attention is called by the name of the score."""
    registered = register_attention(f"by_{score}", score)
    model.set_attn_implementation(registered.name)
    return registered.scores(model)


@pytest.mark.parametrize("name", NAMES)
def test_the_scaled_dot_product_is_sdpas(name: str) -> None:
    """With padding, and without a mask, where the module says whether it is causal; Llama has grouped heads."""
    for padded in (True, False):
        model, inputs = MODELS[name]()
        if not padded:
            inputs.pop("attention_mask", None)
        wanted = gradients(model.double().eval(), double(inputs))
        assert by_name(model, "scaled_dot") == {}
        torch.testing.assert_close(gradients(model, double(inputs)), wanted, rtol=1e-8, atol=1e-10)


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize("score", LAYERS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_replaced_model(name: str, score: str) -> None:
    """With the same parameters; values and all gradients, those of the score included."""
    model, inputs = MODELS[name]()
    model.double().eval()
    twin = copy.deepcopy(model)
    handle = replace_attention(twin, score=score)
    plain = answer(model(**double(inputs)))
    learned = by_name(model, score)
    assert len(learned) == (ATTENTION.get(name, 2) if bool(LAYERS[score].learned) else 0)
    for path, parameters in learned.items():
        parameters.load_state_dict(handle.scores[path].state_dict())  # type: ignore[union-attr]
    (out, grads), (wanted, of_twin) = gradients(model, double(inputs)), gradients(twin, double(inputs))
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)
    of_twin = {path.replace("attention_score.", f"attention_score_by_{score}."): grad for path, grad in of_twin.items()}
    torch.testing.assert_close(grads, of_twin, rtol=1e-8, atol=1e-10)
    assert any("attention_score" in path and grad.any() for path, grad in grads.items()) == (bool(LAYERS[score].learned))
    assert score == "scaled_dot" or (out - plain).abs().max() > 1e-9


def test_the_last_queries_of_a_causal_model() -> None:
    """Gemma 4 leaves out the queries whose logits nobody asks for; the keys of a static cache go beyond the prompt."""
    sizes = {"vocab_size": 99, "vocab_size_per_layer_input": 99, "head_dim": 8, "global_head_dim": 8, **DEEP}
    sizes |= {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**sizes, hidden_size_per_layer_input=8, pad_token_id=0)).eval()
    ids = torch.randint(1, 99, (2, 9))
    options: dict[str, Any] = {"max_new_tokens": 2, "cache_implementation": "static", "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    wanted, generated = answer(model(ids, logits_to_keep=2)), torch.stack(model.generate(ids, **options).logits)
    by_name(model, "scaled_dot")
    torch.testing.assert_close(answer(model(ids, logits_to_keep=2)), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(model.generate(ids, **options).logits), generated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BloomForCausalLM", "LukeModel"])
def test_models_that_write_attention_out_by_hand_are_refused(name: str) -> None:
    """They would add bool masks to their scores, and no score would be replaced."""
    register_attention("by_dot", "dot")
    model = small_model(getattr(hf, name), attention="by_dot")
    with pytest.raises(ValueError, match=f"{name[:4]}.*, which writes it out by hand, with attn_implementation='by_dot'"):
        model(**texts(model, "both"))


@pytest.mark.parametrize(("option", "value"), [("cache", object()), ("sliding_window", 3), ("chosen_tomorrow", 0)])
def test_what_no_operator_supports_is_refused_by_name(option: str, value: Any) -> None:
    register_attention("by_dot", "dot")
    query = torch.zeros(2, 4, 7, 8)
    with pytest.raises(ValueError, match="sliding window" if option == "sliding_window" else option):
        AttentionInterface()["by_dot"](nn.Identity(), query, query, query, None, **{option: value})


def test_softcaps_and_sinks_are_the_models() -> None:
    """A softcap belongs to the scaled dot product; a sink goes with every score."""
    sizes = {"vocab_size": 99, "head_dim": 8, "num_key_value_heads": 2, **DEEP}
    capped = hf.Gemma2ForCausalLM(hf.Gemma2Config(attn_logit_softcapping=0.3, query_pre_attn_scalar=8, **sizes))
    sunk = hf.GptOssForCausalLM(hf.GptOssConfig(num_local_experts=3, num_experts_per_tok=2, **sizes))
    sunk.set_experts_implementation("eager")  # others need rows of 16 bytes
    inputs = words()
    real = inputs["attention_mask"].bool()
    for layer in sunk.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    for model in (capped.eval(), sunk.eval()):
        model.set_attn_implementation("eager")
        wanted = answer(model(**inputs))[real]
        by_name(model, "scaled_dot")
        torch.testing.assert_close(answer(model(**inputs))[real], wanted, rtol=1e-4, atol=1e-5)
        by_name(model, "additive")
        if model is capped:
            with pytest.raises(ValueError, match="softcap must be None for scores other than 'dot' and 'scaled_dot'"):
                model(**inputs)
        else:
            assert not torch.allclose(answer(model(**inputs))[real], wanted, rtol=1e-3)


def test_from_config_and_from_pretrained(tmp_path: Any) -> None:
    """The name at the model's birth; parameters are saved with the model and loaded into them."""
    registered = register_attention("by_additive", "additive")
    model = hf.AutoModel.from_config(hf.BertConfig(vocab_size=99, **DEEP), attn_implementation="by_additive").eval()
    assert len(registered.scores(model)) == 2
    inputs = words()
    wanted = model(**inputs).last_hidden_state
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    model.save_pretrained(tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path, attn_implementation="by_additive").eval()
    registered.scores(again)
    assert not torch.equal(again(**inputs).last_hidden_state, wanted)  # from_pretrained knows the parameters of the class alone
    again.load_state_dict(torch.load(io.BytesIO(saved.getvalue())))
    assert torch.equal(again(**inputs).last_hidden_state, wanted)
    assert torch.equal(copy.deepcopy(again)(**inputs).last_hidden_state, wanted)


def test_parameters_of_the_first_call() -> None:
    """They can be trained though gradients were off, have the model's dtype, and are told of once."""
    register_attention("by_general", "general", per_head=False)
    model, inputs = MODELS["BERT"]()
    model.bfloat16().eval().set_attn_implementation("by_general")
    with torch.inference_mode(), pytest.warns(UserWarning, match="new parameters of 'by_general' were initialised"):
        model(**inputs)
    count = sum(1 for _ in model.parameters())
    _, grads = gradients(model, inputs)
    learned = {name: grad for name, grad in grads.items() if "attention_score_by_general" in name}
    assert len(learned) == 2 and {grad.dtype for grad in learned.values()} == {torch.bfloat16}
    model.set_attn_implementation("sdpa")
    explain(model.float(), inputs)  # the model's own attention again, with the parameters beside it
    model.set_attn_implementation("by_general")
    model(**inputs)
    assert sum(1 for _ in model.parameters()) == count


def test_a_score_with_tensors_of_its_own() -> None:
    """All layers share them; Hadamard with ones and no activation is the dot product."""
    model, inputs = MODELS["BERT"]()
    model.double().eval()
    ones = torch.ones(8, dtype=torch.float64)
    outs = []
    for activation in (None, "tanh", "sigmoid", "relu"):
        registered = register_attention(f"ones_{activation}", scores.Hadamard(ones, activation=activation))
        model.set_attn_implementation(registered.name)
        assert registered.scores(model) == {}
        outs.append(answer(model(**inputs)))
    by_name(model, "dot")
    torch.testing.assert_close(outs[0], answer(model(**inputs)), rtol=1e-9, atol=1e-11)
    assert not any(torch.equal(outs[0], out) for out in outs[1:])


def test_dropout_is_the_models() -> None:
    model, inputs = MODELS["Llama, sdpa"]()
    by_name(model.train(), "cosine")
    assert torch.equal(answer(model(**inputs)), answer(model(**inputs)))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert not torch.equal(answer(model(**inputs)), answer(model(**inputs)))
    model.eval()
    assert torch.equal(answer(model(**inputs)), answer(model(**inputs)))


@pytest.mark.slow
def test_compiled() -> None:
    model, inputs = MODELS["ViT"]()
    by_name(model.eval(), "general")
    wanted = answer(model(**inputs))
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(answer(compiled(**inputs)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["CLIP, sdpa", "BERT", "Llama, sdpa"])
@pytest.mark.parametrize("score", ["scaled_dot", "cosine", "additive"])
def test_explained(name: str, score: str) -> None:
    """As the replaced model is: a run leaves the score in its place."""
    model, inputs = MODELS[name]()
    model.double()
    twin = copy.deepcopy(model)
    handle = replace_attention(twin, score=score)
    for path, parameters in by_name(model, score).items():
        parameters.load_state_dict(handle.scores[path].state_dict())  # type: ignore[union-attr]
    got, wanted = explain(model, double(inputs)).relevancy, explain(twin, double(inputs)).relevancy
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def test_refusals() -> None:
    for wrong in ("sdpa", "my_flash", "a/b", "", "vlattn"):
        with pytest.raises(ValueError, match="name must be a Python identifier"):
            register_attention(wrong, "dot")
    with pytest.raises(TypeError, match="name must be a str"):
        register_attention(3, "dot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="score must be one of"):
        register_attention("nowhere")
    with pytest.raises(ValueError, match="per_head and score_options must be left out"):
        register_attention("shared", scores.Dot(), per_head=True)
    model, inputs = MODELS["BERT"]()
    with pytest.raises(ValueError, match=r"set_attn_implementation\('mine'\)"):
        register_attention("mine", "cosine").scores(model)


def test_a_name_may_change_its_meaning() -> None:
    """A model keeps no parameters of the earlier one without a word."""
    model, inputs = MODELS["BERT"]()
    model.eval()
    outs = []
    for score in ("dot", "cosine"):
        register_attention("changing", score)
        model.set_attn_implementation("changing")
        outs.append(answer(model(**inputs)))
    assert not torch.equal(*outs)
    for score in ("general", "general"):
        assert len(register_attention("changing", score).scores(model)) == 2
    register_attention("changing", "additive")
    with pytest.raises(ValueError, match="model must be a new one, since its parameters of 'changing' are of .'general'"):
        model(**inputs)
