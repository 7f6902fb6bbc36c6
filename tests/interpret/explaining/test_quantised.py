"""Quantised and adapted models: the explanation is that of a plain model with the same weights (docs/guides/quantised.md).

Packages that are not installed skip their tests by name; `make test` installs none of them.
"""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

from vlattn_fast.interpret import explain
from vlattn_fast.nn import CongruenceLoss, RelevancyLoss, capture_attention, capture_relevancy, replace_attention

# the packages' own
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"input_ids": torch.tensor([[1, 2, 3, 98]])}


def clip() -> tuple[nn.Module, dict[str, Tensor]]:
    text = {**SIZES, "vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    return model.eval(), {**TEXT, "pixel_values": torch.randn(1, 3, 32, 32)}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(**SIZES, vocab_size=99, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval(), TEXT


MODELS = {"CLIP": clip, "Llama": llama}


def optional(name: str) -> object:
    """The package, or a test that says that it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages' own, at their import
        return pytest.importorskip(name)


def plain_weight(module: nn.Module) -> Tensor:
    return module.weight.dequantize() if type(module.weight) is not nn.Parameter else module.weight


def torchao(model: nn.Module) -> Callable[[nn.Module], Tensor]:
    package = optional("torchao.quantization")
    package.quantize_(model, package.Int8WeightOnlyConfig())
    return plain_weight


def quanto(model: nn.Module) -> Callable[[nn.Module], Tensor]:
    package = optional("optimum.quanto")
    package.quantize(model, weights=package.qint8)
    package.freeze(model)
    return plain_weight


def four_bits(model: nn.Module) -> Callable[[nn.Module], Tensor]:
    package = optional("bitsandbytes")
    for name, linear in [(name, each) for name, each in model.named_modules() if type(each) is nn.Linear]:
        made = package.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        made.load_state_dict(linear.state_dict())
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to("cpu"))

    def weight_of(module: nn.Module) -> Tensor:
        state = getattr(module.weight, "quant_state", None)
        return module.weight if state is None else package.functional.dequantize_4bit(module.weight.data, state)

    return weight_of


WAYS = {"torchao": torchao, "quanto": quanto, "bitsandbytes 4 bits": four_bits}


def quantised(name: str, way: str) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """The quantised model, a plain one with the same weights, and inputs."""
    model, inputs = MODELS[name]()
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight_of = WAYS[way](model)
    changed = 0
    for path, linear in plain.named_modules():
        if isinstance(linear, (nn.Linear, nn.Conv2d)):
            weight = weight_of(model.get_submodule(path)).detach()
            changed += not torch.equal(weight, linear.weight)
            linear.weight.data.copy_(weight)
    assert changed > 0
    return model, plain, inputs


@pytest.mark.parametrize("method", ["gradient", "attention"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_quantised_weights(name: str, way: str, method: str) -> None:
    model, plain, inputs = quantised(name, way)
    got, wanted = explain(model, inputs, method=method), explain(plain, inputs, method=method)
    assert got.relevancy.keys() == wanted.relevancy.keys()
    for tower, relevancy in wanted.relevancy.items():
        error = (got.relevancy[tower] - relevancy).norm() / relevancy.norm()
        # in eval mode bitsandbytes keeps scales, and multiplies, in fewer bits than it gives weights back in
        assert error < (2e-3 if way.startswith("bits") else 2e-5), f"{tower}: {error}"


@pytest.mark.parametrize("way", WAYS)
def test_another_score_in_a_quantised_model(way: str) -> None:
    model, plain, inputs = quantised("Llama", way)
    for one in (model, plain):
        replace_attention(one, score="cosine")
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_quantised_activations_have_no_gradient() -> None:
    """A method that needs one is refused by the modules' names; one that needs none runs."""
    package = optional("torchao.quantization")
    model, inputs = llama()
    package.quantize_(model, package.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match=r"gradients end in 'model\.layers\.0\.self_attn\.o_proj'.*before you quantise it"):
        explain(model, inputs)
    assert explain(model, inputs, method="attention").relevancy["language"].isfinite().all()


def adapted(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """By LoRA with adapters that change the result."""
    peft = optional("peft")
    model, inputs = MODELS[name]()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval(), inputs


@pytest.mark.parametrize("method", ["gradient", "attention"])
@pytest.mark.parametrize("name", MODELS)
def test_adapters(name: str, method: str) -> None:
    model, inputs = adapted(name)
    got = explain(model, inputs, method=method)
    wanted = explain(copy.deepcopy(model).merge_and_unload(), inputs, method=method)
    for tower, relevancy in wanted.relevancy.items():
        torch.testing.assert_close(got.relevancy[tower], relevancy, rtol=1e-4, atol=1e-6)
    with model.disable_adapter():
        without = explain(model, inputs, method=method)
    assert any(not torch.allclose(got.relevancy[tower], each, rtol=1e-2) for tower, each in without.relevancy.items())


@pytest.mark.parametrize("of", ["attention", "relevancy"])
def test_a_loss_trains_the_adapters_alone(of: str) -> None:
    """That on relevancy has the gradients of the model in which the adapters are merged into the weights."""
    model, inputs = adapted("Llama")
    model.train()

    def loss_of(network: nn.Module) -> Tensor:
        if of == "attention":
            with capture_attention(network) as captured:
                network(**inputs)
            layer = captured.layer
            words, regions = ((layer.query[:, :, part], layer.key[:, :, part]) for part in (slice(0, 2), slice(2, 4)))
            return CongruenceLoss("cacr")(words, regions)
        with capture_relevancy(network) as traced:
            logits = network(**inputs).logits
        relevancy = traced.relevancy(score=logits[:, -1, 5].sum(), position="last")
        return RelevancyLoss("mse")(relevancy, torch.zeros_like(relevancy))

    loss = loss_of(model)
    torch.testing.assert_close(loss, loss_of(copy.deepcopy(model).merge_and_unload()))
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None and bool(parameter.grad.any())}
    assert trained and all("lora_" in name for name in trained)
