"""Edits of the residual stream and of MLPs, next to hooks of one's own on the modules that have these states."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import LLAMA, lively
from tests.helpers.interpret.edited_maps import decoder, llama, made, small

CLOSE = {"rtol": 0, "atol": 1e-9}


def of_config(kind: str, config: Any, **inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    model: Any = lively(getattr(transformers, kind)(config)).double().eval()
    return model, {"input_ids": torch.randint(3, 50, (2, 9)), **inputs}


def t5() -> tuple[nn.Module, dict[str, Any]]:
    sizes = dict(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0, pad_token_id=0)
    return of_config(
        "T5ForConditionalGeneration", transformers.T5Config(**sizes), decoder_input_ids=torch.tensor([[0, 5], [0, 7]])
    )


def albert() -> tuple[nn.Module, dict[str, Any]]:
    sizes = dict(hidden_size=32, embedding_size=16, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    return of_config("AlbertForSequenceClassification", transformers.AlbertConfig(vocab_size=60, **sizes))


# The model; the module of layer n, that of its MLP, the tower if there are several, and the runs of the module before layer 1's.
Family = tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], str, str, str | None, int]
FAMILIES: dict[str, Family] = {
    "llama": (llama, "model.layers.{}", "mlp", None, 0),
    "llava": (lambda: made("llava"), "model.language_model.layers.{}", "mlp", None, 0),
    "clip": (lambda: made("clip"), "vision_model.encoder.layers.{}", "mlp", "vision", 0),
    "dinov2, a factor after the MLP": (lambda: made("dinov2"), "dinov2.encoder.layer.{}", "layer_scale2", None, 0),
    "bert, a norm of the sum": (lambda: made("bert"), "bert.encoder.layer.{}", "output.dense", None, 0),
    "uniter": (lambda: made("uniter"), "uniter.encoder.layer.{}", "output.dense", None, 0),
    "gemma3, a norm after the MLP": (
        lambda: decoder("Gemma3ForConditionalGeneration"),
        "model.language_model.layers.{}",
        "post_feedforward_layernorm",
        None,
        0,
    ),
    "opt, states (B * N, C)": (lambda: decoder("OPTForCausalLM"), "model.decoder.layers.{}", "fc2", None, 0),
    "gpt_neox, parallel": (lambda: decoder("GPTNeoXForCausalLM"), "gpt_neox.layers.{}", "mlp", None, 0),
    "llama4, experts": (lambda: decoder("Llama4ForCausalLM"), "model.layers.{}", "feed_forward", None, 0),
    "t5, a norm and a sum in the MLP's layer": (t5, "encoder.block.{}", "layer.1.DenseReluDense", "tower0", 0),
    "t5's decoder": (t5, "decoder.block.{}", "layer.2.DenseReluDense", "tower1", 0),
    "albert, one module for all layers": (albert, "albert.encoder.albert_layer_groups.0.albert_layers.0", "ffn_output", None, 1),
}
families = pytest.mark.parametrize("family", FAMILIES)


def logits(outputs: Any) -> Tensor:
    found: Tensor = getattr(outputs, "logits", None) if hasattr(outputs, "logits") else outputs.logits_per_image
    return found.detach()


@contextlib.contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor], run: int | None = None) -> Iterator[None]:
    """A context in which the states (B, N, C) that a module returns, in one of its runs or in all, are changed."""
    runs = itertools.count()

    def edited(_: nn.Module, args: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        if next(runs) != run and run is not None:
            return output
        samples = 2 if state.ndim == 2 else len(state)
        state = change(state.reshape(samples, -1, state.shape[-1]).clone()).reshape(state.shape)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    hook = module.register_forward_hook(edited)
    try:
        yield
    finally:
        hook.remove()


def module_of(family: str, model: nn.Module, of: str, layer: int = 1) -> nn.Module:
    _, layers, mlp, _, _ = FAMILIES[family]
    return model.get_submodule(layers.format(layer) + (f".{mlp}" if of == "mlp" else ""))


def changes(channels: int) -> dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]]:
    """An edit's arguments, and what it does to states at tokens 1 and 3."""
    torch.manual_seed(3)
    vector, tokens = torch.randn(channels, dtype=torch.float64), [1, 3]

    def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def of(state: Tensor) -> Tensor:
            those = [token for token in tokens if token < state.shape[1]]
            state[:, those] = change(state[:, those])
            return state

        return of

    return {
        "zero": ({"set": 0}, changed(torch.zeros_like)),
        "vector": ({"set": vector}, changed(lambda x: vector.expand_as(x))),
        "add": ({"add": vector}, changed(lambda x: x + vector)),
        "scale": ({"scale": -0.5}, changed(lambda x: -0.5 * x)),
    }


@families
@pytest.mark.parametrize("of", ["residual", "mlp"])
def test_an_edit_is_a_hook_on_the_module(family: str, of: str) -> None:
    make, _, _, tower, run = FAMILIES[family]
    model, inputs = make()
    kind = {"residual": va.Residual, "mlp": va.Mlp}[of]
    with torch.no_grad():
        before = logits(model(**inputs))
        positions = [(1, 2)] if family == "t5's decoder" else [(1, 2), (3, 4)]
        for name, (arguments, change) in changes(32).items():
            with hooked(module_of(family, model, of), change, run):
                expected = logits(model(**inputs))
            with va.intervene(model, inputs, kind(1, positions, tower=tower, **arguments)):
                torch.testing.assert_close(logits(model(**inputs)), expected, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
            assert not torch.allclose(expected, before, atol=1e-4), name
        assert torch.equal(logits(model(**inputs)), before)


@families
@pytest.mark.parametrize("of", ["residual", "mlp"])
def test_recorded_states_are_those_that_modules_return(family: str, of: str) -> None:
    make, _, _, tower, run = FAMILIES[family]
    model, inputs = make()
    kept: list[Tensor] = []
    with torch.no_grad(), hooked(module_of(family, model, of), lambda x: kept.append(x) or x, run):
        model(**inputs)
    record = va.record_states(model, inputs, 1, of=of, tower=tower)
    assert record.of == of and record.states is not None and list(record.states) == [1]
    torch.testing.assert_close(record.states[1], kept[0], **CLOSE)


def test_states_of_another_run_take_the_place_of_these() -> None:
    model, inputs = made("llava")
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    run, image = va.record_states(model, other), inputs["input_ids"] == 55
    assert run.states is not None

    def patched(state: Tensor) -> Tensor:
        state[image] = run.states[1][image]
        return state

    with torch.no_grad(), hooked(model.get_submodule("model.language_model.layers.1"), patched):
        expected = logits(model(**inputs))
    with torch.no_grad(), va.intervene(model, inputs, va.Residual(1, "image", set=run)):
        torch.testing.assert_close(logits(model(**inputs)), expected, **CLOSE)
    with torch.no_grad(), va.intervene(model, inputs, va.Residual(None, set=run)):  # all layers and positions: the other run
        torch.testing.assert_close(logits(model(**inputs)), logits(model(**other)), **CLOSE)


def test_means_of_a_data_set_leave_out_padding() -> None:
    model, inputs = llama()
    inputs["attention_mask"][0, :3] = 0
    other = {name: value.flip(0) for name, value in inputs.items()}
    record, each = va.record_states(model, [inputs, other], of="mlp"), va.record_states(model, inputs, of="mlp")
    assert record.states is None and record.count == 2 * 15 and each.states is not None
    mean = each.states[2][inputs["attention_mask"].bool()].mean(0)
    torch.testing.assert_close(record.means[2], mean, **CLOSE)

    def meaned(state: Tensor) -> Tensor:
        state[:, -1] = mean
        return state

    with torch.no_grad(), hooked(model.get_submodule("model.layers.2.mlp"), meaned):
        expected = logits(model(**inputs))
    with torch.no_grad(), va.intervene(model, inputs, va.Mlp(-1, "last", set=record)):
        torch.testing.assert_close(logits(model(**inputs)), expected, **CLOSE)


def test_edits_of_a_state_act_one_after_the_other_and_next_to_those_of_attention() -> None:
    model, inputs = llama()
    vector, cut = torch.randn(32, dtype=torch.float64), va.Knockout(keys=(0, 2), layers=2)
    layer = model.get_submodule("model.layers.0")
    with torch.no_grad(), va.intervene(model, inputs, cut), hooked(layer, lambda x: 2 * (x + vector)):
        expected = logits(model(**inputs))
    with torch.no_grad(), va.intervene(model, inputs, [va.Residual(0, add=vector), cut, va.Residual(0, scale=2.0)]):
        torch.testing.assert_close(logits(model(**inputs)), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["LlavaForConditionalGeneration", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("positions", ["last", "answer", None, "text", (2, 4)])
def test_positions_follow_the_cache(kind: str, positions: Any) -> None:
    """As in runs of whole sequences, one for each new token, in which a hook changes the positions."""
    model, inputs = decoder(kind)
    inputs["attention_mask"][:] = 1
    inputs["input_ids"][inputs["input_ids"] == 0] = 40  # was padding
    vector, prompt, new = torch.randn(32, dtype=torch.float64), inputs["input_ids"].shape[1], 4
    words = (inputs["input_ids"] != 98) if kind.startswith("Llava") else torch.ones_like(inputs["input_ids"], dtype=torch.bool)

    def changed(state: Tensor) -> Tensor:
        places, size = torch.zeros(state.shape[:2], dtype=torch.bool), state.shape[1]
        if positions == (2, 4):
            places[:, 2:4] = True
        elif positions == "text":
            places[:, :prompt] = is_text
            places[:, prompt:] = True
        else:
            places[:, {"last": prompt - 1, "answer": prompt, None: 0}[positions] :] = True
        return torch.where(places[..., None], state + vector, state) if size else state

    edit = va.Residual(1, positions, add=vector)
    layer = "model.language_model.layers.1" if kind.startswith("Llava") else "model.layers.1"
    with torch.no_grad(), va.intervene(model, inputs, edit):
        made = model.generate(**inputs, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True)
    is_text = words & (inputs["input_ids"] != model.config.get_text_config().bos_token_id)
    ids = inputs["input_ids"]
    for step in range(new):
        with torch.no_grad(), hooked(model.get_submodule(layer), changed):
            whole = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False).logits[:, -1]
        torch.testing.assert_close(made.logits[step].double(), whole, rtol=0, atol=1e-5)  # generate has float32
        ids = made.sequences[:, : prompt + step + 1]


@pytest.mark.parametrize("edit", [va.Residual(1, "question", scale=0.3), va.Mlp(1, (2, 9), set=0)])
def test_a_prompt_in_a_batch_is_edited_as_it_is_alone(edit: Any) -> None:
    """Prompts are padded on the left, and a span counts the tokens of the whole row."""
    model, inputs = llama()
    inputs["attention_mask"][1, :2] = 0
    with va.intervene(model, inputs, edit), torch.no_grad():
        both = logits(model(**inputs))[:, -1]
    for row, start in enumerate((0, 2)):
        one = {name: value[row : row + 1, start:] for name, value in inputs.items()}
        single = va.Mlp(1, (2 - start, 9 - start), set=0) if isinstance(edit, va.Mlp) else edit
        with va.intervene(model, one, single), torch.no_grad():
            torch.testing.assert_close(logits(model(**one))[:, -1], both[row : row + 1], rtol=0, atol=1e-5)  # float32 norms
        assert not torch.allclose(logits(model(**one))[:, -1], both[row : row + 1], atol=1e-3)


def test_beams_are_copies_of_their_prompt() -> None:
    chosen: Any = {
        "max_new_tokens": 3,
        "do_sample": False,
        "num_beams": 2,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    model, inputs = llama()
    model.generation_config.eos_token_id, size = None, inputs["input_ids"].shape[1]
    values = torch.randn(2, size, 32, dtype=torch.float64)
    with torch.no_grad():
        with hooked(model.get_submodule("model.layers.1"), lambda x: torch.cat([values.repeat_interleave(2, 0), x[:, size:]], 1)):
            expected = model.generate(**inputs, **chosen, use_cache=False).sequences_scores
        with va.intervene(model, inputs, va.Residual(1, set=values)):
            torch.testing.assert_close(model.generate(**inputs, **chosen).sequences_scores, expected)


def test_gradients_reach_the_values_and_the_model() -> None:
    model, inputs = llama()
    vector = torch.randn(32, dtype=torch.float64, requires_grad=True)
    with va.intervene(model, inputs, va.Residual(1, "last", add=vector)):
        loss = model(**inputs).logits.square().sum()
        loss.backward()
    got, weight = vector.grad, model.get_submodule("model.layers.0.mlp.up_proj").weight
    of_weight, vector.grad, weight.grad = weight.grad.clone(), None, None

    def changed(state: Tensor) -> Tensor:
        return torch.cat([state[:, :-1], state[:, -1:] + vector], 1)

    with hooked(model.get_submodule("model.layers.1"), changed):
        model(**inputs).logits.square().sum().backward()
    torch.testing.assert_close(got, vector.grad, **CLOSE)
    torch.testing.assert_close(of_weight, weight.grad, **CLOSE)


def test_bfloat16_states_take_float32_values() -> None:
    model, inputs = llama()
    model = model.bfloat16()
    vector = torch.randn(32)
    with torch.no_grad(), hooked(model.get_submodule("model.layers.1"), lambda x: (x.float() + vector).bfloat16()):
        expected = logits(model(**inputs))
    with torch.no_grad(), va.intervene(model, inputs, va.Residual(1, add=vector)):
        assert torch.equal(logits(model(**inputs)), expected)


def test_layers_without_attention_have_states() -> None:
    """The first layer of a hybrid recurs: generation counts the tokens of the cache there, too."""
    sizes = dict(LLAMA, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=0, num_hidden_layers=2)
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
    config = transformers.Qwen3NextConfig(**sizes, **linear, mlp_only_layers=[0, 1])
    model, inputs = of_config("Qwen3NextForCausalLM", config)
    model.generation_config.eos_token_id = None
    vector = torch.randn(32, dtype=torch.float64)
    chosen = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def of_prompt(state: Tensor) -> Tensor:
        state[:, 1:3] += vector
        return state

    with torch.no_grad():
        with hooked(model.get_submodule("model.layers.0"), of_prompt):
            expected = model.generate(**inputs, **chosen)
        with va.intervene(model, inputs, va.Residual(0, (1, 3), add=vector)):
            made = model.generate(**inputs, **chosen)
    for one, other in zip(made.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_states_that_transformers_collects_are_edited() -> None:
    """LLaVA goes on with the states that transformers has collected of its vision tower, not with the tower's output."""
    model, inputs = made("llava")
    last = len(model.get_submodule("model.vision_tower.encoder.layers")) + model.config.vision_feature_layer  # type: ignore[arg-type, operator, union-attr]
    layer: Any = model.get_submodule(f"model.vision_tower.encoder.layers.{last}")
    with torch.no_grad():
        before, plain = logits(model(**inputs)), layer.forward
        layer.forward = lambda *args, **kwargs: 0.5 * plain(*args, **kwargs)
        expected = logits(model(**inputs))
        layer.forward = plain
        with va.intervene(model, inputs, va.Residual(last, scale=0.5, tower="vision")):
            torch.testing.assert_close(logits(model(**inputs)), expected, **CLOSE)
    assert not torch.allclose(expected, before, atol=1e-4)


class TokensFirst(nn.Module):
    """torch's encoder over states (N, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=False)
        self.encoder, self.head = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.transpose(0, 1))).mean(0)


@pytest.mark.parametrize("sizes", [(4, 4), (2, 6), (1, 5)])  # of B = N only the layers tell
def test_states_whose_first_size_is_that_of_tokens(sizes: tuple[int, int]) -> None:
    model = lively(TokensFirst()).double().eval()
    inputs, values = {"x": torch.randn(*sizes, 32, dtype=torch.float64)}, torch.randn(*sizes, 32, dtype=torch.float64)

    def edited(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1:3] = 0.5 * output[1:3]
        return output + values.transpose(0, 1)

    for kind, path in ((va.Residual, "encoder.layers.1"), (va.Mlp, "encoder.layers.1.linear2")):
        handle = model.get_submodule(path).register_forward_hook(edited)
        with torch.no_grad(), va.intervene(model, inputs, va.ScaleHeads({0: None}, 1.0)):  # without torch's fused layer
            expected = model(**inputs)
        handle.remove()
        with torch.no_grad(), va.intervene(model, inputs, [kind(1, (1, 3), scale=0.5), kind(1, add=values)]):
            torch.testing.assert_close(model(**inputs), expected, **CLOSE)
        states = va.record_states(model, inputs, 1, of=kind.of).states
        assert states is not None and states[1].shape == (*sizes, 32)


class FlatLayer(nn.Module):
    """Its MLP takes the tokens of all samples as one row of them, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x.flatten(0, 1)).view_as(x)


def test_an_mlp_over_flattened_tokens() -> None:
    model, x = lively(nn.Sequential(FlatLayer(), FlatLayer())).double().eval(), torch.randn(2, 6, 16, dtype=torch.float64)
    with torch.no_grad(), hooked(model[1].mlp, lambda output: 0.5 * output):
        expected = model(x)
    with torch.no_grad(), va.intervene(model, {"input": x}, va.Mlp(1, scale=0.5)):
        torch.testing.assert_close(model(x), expected, **CLOSE)


class Apart(nn.Module):
    """Attention and MLPs in lists of their own: no module returns the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList([nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2)])
        self.mlps = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in zip(self.attention, self.mlps, strict=True):
            x = x + attention(x, x, x, need_weights=False)[0]
            x = x + mlp(x)
        return x


def test_attention_in_a_list_is_no_layer() -> None:
    model, inputs = Apart().eval(), {"x": torch.randn(2, 6, 16)}
    with pytest.raises(ValueError, match=r"'attention.0' \(MultiheadAttention\) is attention and no layer"):
        va.intervene(model, inputs, va.Residual(1, scale=0.5))


def test_a_layer_that_returns_two_states_is_named() -> None:
    """As in layers that leave the sum to the next layer's norm: neither state is the stream."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, both: Any) -> Any:
            x = sum(both) if isinstance(both, tuple) else both
            return self.attention(x, x, x, need_weights=False)[0], x

    model, inputs = nn.Sequential(Two(), Two()).eval(), {"input": torch.randn(2, 6, 16)}
    with pytest.raises(ValueError, match=r"'0' \(Two\) returns several states of \(B, N, C\) = \(2, 6, 16\)"):
        va.intervene(model, inputs, va.Residual(1, scale=0.5))


class Returns(nn.Module):
    """A layer whose output is a dict or a named tuple."""

    def __init__(self, of: Callable[..., Any]) -> None:
        super().__init__()
        self.attention, self.of = nn.MultiheadAttention(16, 4, batch_first=True), of

    def forward(self, x: Any) -> Any:
        x = x["last_hidden_state"] if isinstance(x, dict) else x.last_hidden_state if isinstance(x, Named) else x
        return self.of(last_hidden_state=x + self.attention(x, x, x, need_weights=False)[0])


class Named(NamedTuple):
    last_hidden_state: Tensor
    others: int = 3


def test_layers_that_return_dicts_and_named_tuples() -> None:
    for of in (dict, transformers.modeling_outputs.BaseModelOutput, Named):
        model, inputs = nn.Sequential(Returns(of), Returns(of)).eval(), {"input": torch.randn(2, 6, 16)}
        with torch.no_grad(), va.intervene(model, inputs, va.Residual(1, (1, 3), set=2.0)):
            edited = model(**inputs)
        outputs = model(**inputs)
        states = [each.last_hidden_state if isinstance(each, Named) else each["last_hidden_state"] for each in (edited, outputs)]
        states[1][:, 1:3] = 2.0
        assert type(edited) is of
        torch.testing.assert_close(*states)
        assert not isinstance(edited, Named) or edited.others == 3


class Looped(nn.Module):
    """A layer that runs twice, each time with a cache of its own."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 2}, attn_implementation="sdpa")
        self.rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList([transformers.models.llama.modeling_llama.LlamaDecoderLayer(config, 0)])

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        start = 0 if cache is None else cache.get_seq_length()
        turns = self.rotary(x, torch.arange(start, start + x.shape[1])[None])
        for number in range(2):
            self.layers[0].self_attn.layer_idx = number
            mask = torch.ones(x.shape[1], start + x.shape[1]).tril(start).bool()[None, None]
            x = self.layers[0](x, attention_mask=mask, position_embeddings=turns, past_key_values=cache)
        return x


def test_a_layer_that_runs_again_has_filled_its_cache() -> None:
    model, vector = lively(Looped()).double().eval(), torch.randn(32, dtype=torch.float64)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    with torch.no_grad(), va.intervene(model, {"x": x[:, :4]}, va.Residual(1, (1, 3), add=vector)):
        whole, cache = model(x), transformers.DynamicCache()
        steps = [model(part, cache=cache) for part in (x[:, :4], x[:, 4:5], x[:, 5:])]
    with torch.no_grad():
        plain = model(x)
    plain[:, 1:3] += vector
    torch.testing.assert_close(whole, plain, rtol=0, atol=1e-6)  # transformers' RMSNorm computes in float32
    torch.testing.assert_close(torch.cat(steps, 1), plain, rtol=0, atol=1e-6)


def test_an_mlp_is_the_layers_only_one() -> None:
    """A layer of Gemma 4 ends with two projections more, and norms of AXK2 have gates with two matrices. A layer of Granite has
    two MLPs, and one of Zamba 2 ends with a mixer. XLM has no modules for whole layers, and those of Zaya return two states to be
    added."""
    for kind, path in (("Gemma4ForCausalLM", "post_feedforward_layernorm"), ("AXK2ForCausalLM", "mlp")):
        model, inputs = small(kind)
        with torch.no_grad(), hooked(model.get_submodule(f"model.layers.1.{path}"), lambda x: 0.5 * x):
            expected = logits(model(**inputs))
        with torch.no_grad(), va.intervene(model, inputs, va.Mlp(1, scale=0.5)):
            torch.testing.assert_close(logits(model(**inputs)), expected, **CLOSE)
    for kind, layer, message in (
        ("XLMWithLMHeadModel", 1, r"'transformer.attentions.0' \(MultiHeadAttention\) is attention and no layer"),
        ("ZayaForCausalLM", 1, r"\(ZayaDecoderLayer\) returns several states of"),
        ("GraniteMoeHybridForCausalLM", 1, "has several MLPs, or other parts with weights: GraniteMoeHybridMoE, GraniteMoeHybri"),
        ("Zamba2ForCausalLM", 3, r"\(Zamba2HybridLayer\) has no MLP after its attention"),
    ):
        model, inputs = small(kind)
        with pytest.raises(ValueError, match=message):
            va.intervene(model, inputs, va.Mlp(layer, scale=0.5))


def test_what_a_model_lacks_is_named() -> None:
    model, inputs = llama()
    run = va.record_states(model, inputs, 2)
    shorter = {name: value[:, :7] for name, value in inputs.items()}
    for edit, of, message in [
        (va.Residual(3, scale=0.0), inputs, "layers must be from -3 to 2 in tower 'language', which has 3; got 3"),
        (va.Residual(1, "image", scale=0.0), inputs, "positions='image' has no meaning in tower 'language' of 9 tokens"),
        (va.Residual(1, (8, 10), scale=0.0), inputs, r"positions must end within tower 'language' of 9 tokens; got .*\(8, 10\)"),
        (va.Residual(1, add=torch.ones(16)), inputs, r"add must be a number, or have the shape \(C\) = \(32\) or .*; got"),
        (va.Residual(1, set=run), inputs, "set must have recorded layer 1 of .*; got layers 2 of"),
        (va.Residual(2, set=run), shorter, r"set must .* \(B, N, C\) = \(2, 7, 32\) in layer 2 .*; got \(2, 9, 32\)"),
        (va.Residual(1, scale=0.0, tower="text"), inputs, "tower must be one of 'language'; got 'text'"),
    ]:
        with pytest.raises(ValueError, match=message):
            va.intervene(model, of, edit)
    with pytest.raises(ValueError, match="set must be recorded of a LlamaForCausalLM, as .*; got one of a MistralForCausalLM"):
        va.intervene(model, inputs, va.Residual(2, set=va.StateRecord("residual", "language", {}, {}, 1, "MistralForCausalLM")))
    with pytest.raises(ValueError, match="of must be one of"):
        va.record_states(model, inputs, of="stream")
    clip, pairs = made("clip")
    with pytest.raises(ValueError, match="Mlp needs tower= if the model does not have exactly one tower; got 'vision', 'text'"):
        va.intervene(clip, pairs, va.Mlp(1, scale=0.0))
