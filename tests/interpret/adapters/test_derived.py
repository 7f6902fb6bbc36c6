"""Records that nobody lists: derived from the model, its config and its inputs."""

import pytest
import torch
import transformers

import vlattn_fast as va
from tests.helpers.interpret.cases import TEXT, last_real_row, lively
from tests.helpers.interpret.decoder_cases import DECODERS, LLAMA, Decoder, next_logits, two_images, words
from tests.helpers.interpret.stored_maps import BOUNDS, Place, check
from tests.helpers.interpret.tower_cases import METHODS
from tools.tiny_models.inputs import inputs_of
from tools.tiny_models.shrink import small_model
from vlattn_fast.interpret import ADAPTERS, explain
from vlattn_fast.interpret.adapters import registry
from vlattn_fast.interpret.adapters.derived import derive_adapter
from vlattn_fast.interpret.adapters.registry import listed_adapter


def test_a_dual_encoder_without_an_adapter():
    """Its towers are named as those of listed ones, and its patches lie behind CLS and registers."""
    model = small_model(transformers.Tipsv2Model)
    inputs = next(inputs_of("zero-shot", model))()
    got = explain(model, inputs)
    assert listed_adapter(model) is None and list(got.relevancy) == ["vision", "text"] and got.image.shape == (2, 4, 4)
    assert torch.equal(got.image.flatten(1), got.relevancy["vision"][:, -16:])
    assert [len(words) for words in got.token_ids] == [7, 5]


@pytest.mark.parametrize(
    ("mapping", "name"),
    [
        ("zero-shot", "Tipsv2Model"),
        ("text", "CamembertForSequenceClassification"),
        ("image", "IJepaForImageClassification"),
        ("sequence", "BartForConditionalGeneration"),
    ],
)
def test_methods_without_a_gradient_read_the_row_that_the_gradient_names(mapping, name):
    model = small_model(getattr(transformers, name))
    inputs = next(inputs_of(mapping, model))()
    named = explain(model, inputs)
    read = {tower: named.relevancy[tower] for tower in named.position}
    read = {tower: torch.nn.functional.one_hot(named.position[tower], row.shape[1]).float() for tower, row in read.items()}
    for method in ("rollout", "attention"):
        want = explain(model, inputs, method=method, position=read or "mean")
        got = explain(model, inputs, method=method)
        assert set(got.relevancy) >= set(want.relevancy)
        for tower, row in want.relevancy.items():
            torch.testing.assert_close(got.relevancy[tower], row)


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name in ADAPTERS], indirect=True)
def test_derived_as_listed(decoder):
    listed, derived = listed_adapter(decoder.model).towers[0], derive_adapter(decoder.model).towers[0]
    assert f"{derived.path}.{derived.layers}".strip(".") == f"{listed.path}.{listed.layers}" and not derived.further
    assert (derived.position, derived.tokens) == (listed.position, listed.tokens)
    if listed.grid is None:
        return
    inputs = decoder.inputs()
    layouts = derived.grid(decoder.model.config, inputs)
    if layouts is None:  # tiles with tokens between them, pooled patches: nothing tells how they lie
        assert listed.grid.__name__ in ("labelled", "pooled")
        return
    if listed.grid.__name__ != "separated":  # tiles apart from one another, which the tokens between them would join
        for one, another in zip(layouts, listed.grid(decoder.model.config, inputs), strict=True):
            assert one.size == another.size and all(map(torch.equal, one.maps, another.maps))


GPT = dict(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=99, bos_token_id=1, eos_token_id=2)


def gpt_oss() -> transformers.GptOssForCausalLM:
    """A softmax with a sink in each layer, and a sliding window in every other one."""
    sizes = {**LLAMA, "model_type": "gpt_oss", "sliding_window": 4, "num_local_experts": 3, "num_experts_per_tok": 2}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))
    model.set_experts_implementation("eager")  # others have no float64
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


UNLISTED = {
    "sinks": gpt_oss,
    "interface": lambda: transformers.StableLmForCausalLM(transformers.StableLmConfig(**{**LLAMA, "model_type": "stablelm"})),
    "written out": lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**GPT)),
}


@pytest.fixture(params=UNLISTED)
def unlisted(request) -> Decoder:
    torch.manual_seed(0)
    model = lively(UNLISTED[request.param]()).eval().double()
    assert listed_adapter(model) is None
    layers = "transformer.h" if request.param == "written out" else "model.layers"
    return Decoder(model, [[1, *words(9)], [1, *words(5, 30)]], {}, layers=layers, summed=None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_targets_of_an_unlisted_language_model(unlisted, side):
    inputs = unlisted.inputs(side)
    place = Place(unlisted.layers, last_real_row(inputs, 10), inputs["attention_mask"])
    for token in (None, 7):
        score = lambda o, t=token: next_logits(o, inputs).max(-1).values if t is None else next_logits(o, inputs)[:, t]  # noqa: E731
        check(unlisted.model, inputs, {"language": place}, score, METHODS, target=token)
    unlisted.model.double()
    got = explain(unlisted.model, inputs, target=[7, 8])
    assert got.target == [7, 8]
    assert got.token_ids == [words(9), words(5, 30)]


def test_a_masked_language_model_is_not_read_as_a_causal_one():
    """Each token has logits of its own. A callable score names the row by its gradient."""
    model = lively(transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))).eval()
    inputs = {"input_ids": torch.tensor([[1, *words(4)]])}
    with pytest.raises(
        ValueError, match="position must be the index of one token, or target a callable, if each token has logits"
    ):
        explain(model, inputs)
    got = explain(model, inputs, target=lambda o: o.logits[:, 2, 7])
    assert got.position["tower0"].tolist() == [2]
    want = explain(model, inputs, target=lambda o: o.logits[:, 2, 7], position=2)
    assert torch.equal(got.relevancy["tower0"], want.relevancy["tower0"])
    with pytest.raises(ValueError, match=r"after the last attention the score depends on \[2\] of its 5 tokens"):
        explain(model, inputs, target=lambda o: o.logits[:, 2, 7] + 2 * o.logits[:, 3, 7])
    rows = torch.tensor([0, 0, 0.5, 0.5, 0])
    want = explain(model, inputs, target=lambda o: o.logits[:, 2, 7] + o.logits[:, 3, 7], position=rows)
    got = explain(model, inputs, target=lambda o: o.logits[:, 2, 7] + o.logits[:, 3, 7])
    assert torch.equal(got.relevancy["tower0"], want.relevancy["tower0"])


def test_image_tokens_without_a_grid_are_flat():
    """A picture's tokens that do not add up to its patches, or to squares of them that the config names, have no map."""
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8)
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=LLAMA, image_token_index=98, vision_feature_layers=[-1]
    )
    model = lively(transformers.VipLlavaForConditionalGeneration(config)).eval()
    decoder = Decoder(model, two_images(16), {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert explain(model, decoder.inputs()).image.shape == (2, 4, 4)
    config.vision_config.patch_size = 5  # so that nothing adds up
    got = explain(model, decoder.inputs())
    assert got.image is None and got.text is not None


class OwnDecoder(torch.nn.Module):
    """A class of a user's own, with a language model of transformers where that has its parts."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head, self.config = model.model, model.lm_head, model.config

    def forward(self, input_ids, attention_mask=None, **options):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(states))


class Heir(OwnDecoder):
    """A subclass of a class of the caller's."""


def test_a_borrowed_adapter(monkeypatch):
    monkeypatch.setattr(registry, "BORROWED", {})
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{name: value for name, value in LLAMA.items() if name != "model_type"})
    model = lively(transformers.LlamaForCausalLM(config)).eval().double()
    inputs = {"input_ids": torch.tensor([words(5)]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    own, heir = OwnDecoder(model), Heir(model)
    for options in ({}, {"answer": [7, 9]}, {"method": "weighted"}):
        want = explain(model, inputs, **options)
        for name in ("LlamaForCausalLM", "MistralForCausalLM"):  # listed, derived
            va.register_adapter(OwnDecoder if name == "LlamaForCausalLM" else "OwnDecoder", like=name)
            for each in (own, heir):
                got = explain(each, inputs, **options)
                assert torch.allclose(want.relevancy["language"], got.relevancy["language"], atol=BOUNDS[torch.float64])
                assert want.token_ids == got.token_ids
        registry.BORROWED.clear()
        if "answer" in options:  # the only ids are those of a decoder
            got = explain(own, inputs, **options)
            assert torch.allclose(want.relevancy["language"], got.relevancy["tower0"], atol=BOUNDS[torch.float64])
            assert got.token_ids == [[7, 9]] and got.text_positions == [[5, 6]]  # no tokenizer says which of the prompt are words
    with pytest.raises(ValueError, match=r"got OwnDecoder.*va.register_adapter\(OwnDecoder, like='\w+'\) borrows"):
        explain(own, {**inputs, "question": inputs["input_ids"]}, answer=[7])
    with pytest.raises(ValueError, match=r"like must be the name of a class with an adapter, such as 'LlamaForC.*got 'LamaForCa"):
        va.register_adapter(OwnDecoder, like="LamaForCausalLM")
    with pytest.raises(TypeError, match="like must be the name of a class with an adapter; got type"):
        va.register_adapter(OwnDecoder, like=transformers.LlamaForCausalLM)
    with pytest.raises(TypeError, match="cls must be a subclass of torch.nn.Module, or its name; got OwnDecoder"):
        va.register_adapter(own, like="LlamaForCausalLM")
    with pytest.raises(ValueError, match="like must name a class other than 'LlamaForCausalLM'"):
        va.register_adapter(transformers.LlamaForCausalLM, like="LlamaForCausalLM")
    with pytest.raises(ValueError, match="must be given either adapter or like; got neither"):
        va.register_adapter(OwnDecoder)
    with pytest.raises(ValueError, match="must be given either adapter or like; got both"):
        va.register_adapter(OwnDecoder, ADAPTERS["LlamaForCausalLM"], like="LlamaForCausalLM")
    va.register_adapter(OwnDecoder, like="GPT2LMHeadModel")  # the last one counts, and that of a nearer class
    va.register_adapter(Heir, like="LlamaForCausalLM")
    assert torch.equal(explain(heir, inputs).relevancy["language"], explain(model, inputs).relevancy["language"])
    with pytest.raises(ValueError, match=r"must name a class with the towers of OwnDecoder; GPT2LMHeadModel has 'transformer"):
        explain(own, inputs)
    va.interpret.register_adapter("OwnDecoder", ADAPTERS["LlamaForCausalLM"])
    monkeypatch.delitem(ADAPTERS, "OwnDecoder")  # after what follows
    assert "OwnDecoder" not in registry.BORROWED


def test_pictures_beside_a_decoder_with_gates():
    """One picture is the vision tower's tokens, and has a map. Several stand in one call that the tower saw apart."""
    model = small_model(transformers.IdeficsForVisionText2Text)
    inputs = next(iter(inputs_of("image-text", model)))()
    inputs |= {"pixel_values": inputs["pixel_values"].reshape(2, 1, 3, 32, 32)}
    inputs["image_attention_mask"] = torch.ones(*inputs["input_ids"].shape, 1)
    single = explain(model, inputs)
    assert list(single.relevancy) == ["language", "vision"] and single.image.shape == (2, 4, 4)
    assert (single.image > 0).any()
    several = {"pixel_values": inputs["pixel_values"].expand(-1, 2, -1, -1, -1)}
    several["image_attention_mask"] = torch.ones(*inputs["input_ids"].shape, 2)
    with pytest.raises(ValueError, match="tower 'vision' on whole inputs; got a batch of 4 for 2 scores"):
        explain(model, inputs | several)
