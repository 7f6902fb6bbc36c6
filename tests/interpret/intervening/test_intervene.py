"""`intervene` beside eager attention with edited scores, and beside hooks on the heads' outputs."""

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.decoder_cases import DECODERS
from tests.helpers.interpret.edited_maps import Cut, biased, hooked, llama, made
from tests.helpers.interpret.encoder_cases import MADE
from tests.interpret.relevancy.test_found_towers import TwoBranches, sequences, stack
from vlattn_fast.attach.session import dispatched
from vlattn_fast.interpret.intervening.traced_model import trace_model

CLOSE = {"rtol": 0, "atol": 1e-9}
TOWERS = {
    "llava": ("model.language_model.layers", "self_attn", "o_proj", "logits"),
    "clip": ("vision_model.encoder.layers", "self_attn", "out_proj", "logits_per_image"),
    "llama": ("model.layers", "self_attn", "o_proj", "logits"),
}
families = pytest.mark.parametrize("family", TOWERS)


def model_of(family: str) -> tuple[Any, dict[str, Any], nn.ModuleList]:
    model, inputs = llama() if family == "llama" else made(family)
    return model, inputs, model.get_submodule(TOWERS[family][0])


def output(family: str, model: Any, inputs: Any) -> Tensor:
    return getattr(model(**inputs), TOWERS[family][3]).detach()


def projection(family: str, layer: nn.Module) -> nn.Module:
    _, attention, name, _ = TOWERS[family]
    return layer.get_submodule(f"{attention}.{name}")


def heads_of_run(family: str, layer: nn.Module, model: nn.Module, inputs: Any) -> Tensor:
    """The outputs of the heads of a layer, as its output projection takes them, (B, N, H, Dv)."""
    recorded: list[Tensor] = []
    with hooked(projection(family, layer), lambda x: recorded.append(x) or x, 4):
        model(**inputs)
    return recorded[0]


def edges(batch: int, size: int, rows: Any, columns: Any) -> Tensor:
    """bool (B, 1, N, M), True in `rows` and `columns` (one index for all, or (B, N) masks)."""
    masks = [torch.zeros(batch, size, dtype=torch.bool) for _ in range(2)]
    for mask, index in zip(masks, (rows, columns), strict=True):
        mask[index] = True
    return masks[0][:, None, :, None] & masks[1][:, None, None]


# name of the family -> edges as a caller names them, and as places
EDGES = {
    "llava": ({"queries": "last", "keys": "image"}, lambda i: edges(2, 24, ([0, 1], [23, 21]), i["input_ids"] == 55)),
    "clip": ({"queries": "special", "keys": "image"}, lambda i: edges(3, 17, (slice(None), 0), (slice(None), slice(1, 17)))),
    "llama": (
        {"queries": (5, 9), "keys": [(1, 3), (4, 5)]},
        lambda i: edges(2, 9, (slice(None), slice(5, 9)), (slice(None), [1, 2, 4])),
    ),
}


@families
@pytest.mark.parametrize("heads", [None, [1, 3]])
def test_a_knockout_is_eager_attention_with_a_masked_score(family: str, heads: list[int] | None) -> None:
    model, inputs, layers = model_of(family)
    names, places = EDGES[family]
    cut = places(inputs).expand(-1, 4, -1, -1).clone()
    if heads is not None:
        cut[:, [head for head in range(4) if head not in heads]] = False
    edited = [layer.get_submodule(TOWERS[family][1]) for layer in layers][1:3]
    bias = lambda module, n, m: torch.zeros(cut.shape).masked_fill(cut, -torch.inf) if module in edited else 0.0  # noqa: E731
    with biased(model, bias):
        expected = output(family, model, inputs)
    before = output(family, model, inputs)
    with va.intervene(model, inputs, va.Knockout(**names, layers=range(1, 3), heads=heads)):
        actual = output(family, model, inputs)
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert torch.equal(output(family, model, inputs), before)


@families
def test_steering_multiplies_the_attention_in_front_of_the_rows_sums(family: str) -> None:
    model, inputs, _ = model_of(family)
    names, places = EDGES[family]
    cut = places(inputs)
    size = cut.shape[-1]
    bias = lambda module, n, m: cut.double() * math.log(6.0) if n == size else 0.0  # noqa: E731
    with biased(model, bias):
        expected = output(family, model, inputs)
    edits = [va.Steer(**names, weight=2.0), va.Steer(**names, weight=3.0)]  # biases add up
    with va.intervene(model, inputs, edits):
        torch.testing.assert_close(output(family, model, inputs), expected, **CLOSE)


@families
def test_scaled_heads_are_slices_in_front_of_the_output_projection(family: str) -> None:
    model, inputs, layers = model_of(family)

    def changed(states: Tensor) -> Tensor:
        states[..., 0, :], states[..., 3, :] = 0.0, states[..., 3, :] * 3.0
        return states

    with hooked(projection(family, layers[1]), changed, 4):
        expected = output(family, model, inputs)
    tower = {"tower": "vision"} if family == "clip" else {}
    edits = [va.ScaleHeads({1: [0]}, 0.0, **tower), va.ScaleHeads({1: [3]}, 2.0, **tower), va.ScaleHeads({1: [3]}, 1.5, **tower)]
    with va.intervene(model, inputs, edits):
        torch.testing.assert_close(output(family, model, inputs), expected, **CLOSE)


@families
def test_means_take_the_place_of_heads(family: str) -> None:
    model, inputs, layers = model_of(family)
    tower = None if family != "clip" else "vision"
    heads = heads_of_run(family, layers[2], model, inputs)
    real = torch.ones(heads.shape[:2], dtype=torch.bool)
    if family != "clip":
        real &= inputs.get("attention_mask", real).bool()
    mean = heads[real].mean(0)

    def changed(states: Tensor) -> Tensor:
        states[..., 2, :] = 3.0 * (mean[2] + 0.25 * (states[..., 2, :] - mean[2]))
        return states

    with hooked(projection(family, layers[2]), changed, 4):
        expected = output(family, model, inputs)
    record = va.record_heads(model, inputs, tower=tower)
    torch.testing.assert_close(record.means[2], mean.detach(), **CLOSE)
    assert record.count == int(real.sum())
    edits = [va.ScaleHeads({2: 2}, 0.25, mean=record), va.ScaleHeads({2: 2}, 3.0, tower=tower)]
    with va.intervene(model, inputs, edits):
        torch.testing.assert_close(output(family, model, inputs), expected, **CLOSE)


@families
def test_a_patch_puts_the_outputs_of_another_run_in(family: str) -> None:
    model, inputs, layers = model_of(family)
    tower = None if family != "clip" else "vision"
    name = "input_ids" if family == "llama" else "pixel_values"
    other = {**inputs, name: inputs[name].flip(-1)}
    heads = heads_of_run(family, layers[1], model, other)

    def changed(states: Tensor) -> Tensor:
        states[:, 2:5, [1, 2]] = heads[:, 2:5, [1, 2]]
        return states

    with hooked(projection(family, layers[1]), changed, 4):
        expected = output(family, model, inputs)
    run = va.record_heads(model, other, layers=1, tower=tower)
    assert run.outputs is not None and list(run.outputs) == [1]
    with va.intervene(model, inputs, va.Patch(run, {1: [1, 2]}, queries=(2, 5))):
        actual = output(family, model, inputs)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert not torch.allclose(actual, output(family, model, inputs), atol=1e-3)


def test_means_of_a_data_set_are_those_of_its_tokens_and_one_item_is_a_run() -> None:
    model, inputs, _ = model_of("llama")
    inputs["attention_mask"][1, 6:] = 0
    rows = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(2)]
    record, whole = va.record_heads(model, rows), va.record_heads(model, inputs)
    assert record.outputs is None and record.count == whole.count == 15
    one, states, whole_states = va.record_heads(model, [inputs]), *(va.record_states(model, x) for x in ([inputs], inputs))
    assert states.states is not None and states.means.keys() == whole_states.means.keys()
    assert all(torch.equal(states.means[layer], means) for layer, means in whole_states.means.items())
    assert one.outputs is not None and whole.outputs is not None and one.count == 15
    for layer, means in whole.means.items():
        torch.testing.assert_close(record.means[layer], means, **CLOSE)
        assert torch.equal(one.means[layer], means) and torch.equal(one.outputs[layer], whole.outputs[layer])


def test_a_record_of_an_encoder_decoder_needs_no_decoder_tokens() -> None:
    """As va.intervene does, which adds those that `generate` begins with."""
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = lively(transformers.T5ForConditionalGeneration(config)).double().eval()
    inputs = {"input_ids": torch.randint(3, 50, (2, 9))}
    encoder = trace_model(model, inputs).towers[0].name
    outputs = va.record_heads(model, inputs, tower=encoder).outputs
    expected = va.record_heads(model, {**inputs, "decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)}, tower=encoder).outputs
    assert outputs is not None and expected is not None and torch.equal(outputs[1], expected[1])


def test_gradients_go_through_edits() -> None:
    model, inputs, layers = model_of("llava")
    names, places = EDGES["llava"]
    cut = places(inputs)
    attention = layers[0].self_attn
    grads = []
    bias = lambda module, n, m: torch.zeros(cut.shape).masked_fill(cut, -torch.inf) if module is attention else 0.0  # noqa: E731
    for context in (biased(model, bias), va.intervene(model, inputs, va.Knockout(**names, layers=0))):
        model.zero_grad()
        with context:
            model(**inputs).logits[0, -1].logsumexp(0).backward()
        grads.append(attention.v_proj.weight.grad.clone())
    assert grads[0].abs().max() > 1e-6
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


def t5() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    inputs = {"input_ids": torch.randint(3, 50, (2, 7)), "decoder_input_ids": torch.randint(3, 50, (2, 4))}
    return transformers.T5ForConditionalGeneration(config), inputs


def first_tensor(outputs: Any) -> Tensor:
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(getattr(outputs, name) for name in names if getattr(outputs, name, None) is not None)


@pytest.mark.parametrize("kind", ["t5", "siglip2", "vilt"])
def test_every_tower_and_pair_of_towers_is_cut_as_by_dense_masks(kind: str) -> None:
    """tests/model_classes/test_edited_models.py has the last tower of other classes."""
    if kind == "t5":
        model, inputs = t5()
    else:
        encoder = next(make for make in MADE if make.__name__ == kind)()
        model, inputs = encoder.model, encoder.inputs
    lively(model).double().eval()
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    seen = trace_model(model, inputs)
    pairs = list(dict.fromkeys((call.tower, call.source) for call in seen.calls))
    assert len(pairs) == {"siglip2": 2, "t5": 3}.get(kind, 1)
    before = first_tensor(model(**inputs)).detach()
    for tower, source in pairs:
        queries, keys = (torch.zeros(of.shape, dtype=torch.bool) for of in (tower, source))
        queries[:, 1:], keys[:, :2] = True, True
        layers = {call.layer for call in seen.calls if (call.tower, call.source) == (tower, source)}
        assert layers == set(range(max(layers) + 1))
        cut = Cut(queries, keys)
        with dispatched(model), cut:
            expected = first_tensor(model(**inputs)).detach()
        assert cut.count == len([call for call in seen.calls if (call.tower, call.source) == (tower, source)]) > 0
        explained = []

        def target(outputs: Any, explained: list[Tensor] = explained) -> Tensor:
            explained.append(first_tensor(outputs))
            return explained[0].flatten(1)[:, -7:].sum(1)

        with va.intervene(model, inputs, va.Knockout(queries=queries, keys=keys, heads=[0, 1], tower=(tower.name, source.name))):
            actual = first_tensor(model(**inputs)).detach()
            va.explain(model, inputs, target=target, method="attention")
        for result in (actual, explained[0].detach()):
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
        assert float((actual - before).abs().max()) > 1e-6
    torch.testing.assert_close(first_tensor(model(**inputs)).detach(), before, rtol=0, atol=1e-12)  # ViLT draws an order


def test_a_run_behind_one_that_an_error_ended() -> None:
    """The layers share one module, whose calls are counted."""
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    model = lively(transformers.AlbertModel(transformers.AlbertConfig(vocab_size=60, **sizes))).eval()
    inputs = {"input_ids": torch.randint(3, 50, (2, 9))}

    def fails(*_: Any) -> None:
        raise RuntimeError("in the first layer")

    with torch.no_grad(), va.intervene(model, inputs, va.Knockout(keys=(1, 4), layers=1)):
        expected = model(**inputs).last_hidden_state
        hook = model.encoder.albert_layer_groups[0].register_forward_hook(fails)
        with pytest.raises(RuntimeError, match="in the first layer"):
            model(**inputs)
        hook.remove()
        assert torch.equal(model(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("kind", ["Knockout", "ScaleHeads", "Patch"])
def test_gradients_behind_inference_mode(kind: str) -> None:
    """What a record, an edit or a run in inference mode made may be saved for a backward pass."""
    model, inputs, _ = model_of("llama")
    with torch.inference_mode():
        record = va.record_heads(model, inputs)
        edits = {
            "Knockout": va.Knockout(keys=(0, 2)),
            "ScaleHeads": va.ScaleHeads({1: [0]}, 0.5, mean=record),
            "Patch": va.Patch(record, {1: [0]}, queries="last"),
        }
        context = va.intervene(model, inputs, edits[kind])
    with context:
        with torch.inference_mode():
            model(**inputs)
        model(**inputs).logits.sum().backward()
    assert float(model.model.layers[0].self_attn.q_proj.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("kind", ["git", "GPT2LMHeadModel"])
def test_a_query_without_a_key_gives_zeros(kind: str) -> None:
    """GIT masks by the lowest finite number: a row whose visible keys are all cut must not attend to the masked ones."""
    if kind == "git":
        case = next(make for make in MADE if make.__name__ == "git")()
        model, inputs, path = case.model, case.inputs, "git.encoder.layer.0.attention.output.dense"
        real = nn.functional.pad(inputs["attention_mask"].bool(), (17, 0), value=True)
    else:
        decoder = DECODERS[kind]()
        model, inputs, path = decoder.model, decoder.inputs("left"), "transformer.h.0.attn.c_proj"
        real = inputs["attention_mask"].bool()
    model.eval()
    rows = torch.tensor([int(row.nonzero().max()) for row in real])
    outputs: list[Tensor] = []
    cut = va.intervene(model, inputs, va.Knockout(queries="last", keys=real, layers=0))
    with hooked(model.get_submodule(path), lambda x: outputs.append(x.detach()) or x, 4), cut:
        model(**inputs)
    (states,) = outputs
    assert float(states[[0, 1], rows].abs().max()) == 0.0
    assert float(states[[0, 1], rows - 1].abs().min()) > 0.0


def test_a_layer_with_two_maps_has_both_edited() -> None:
    """DiffLlama attends twice in a layer, with two halves of the values; there is no rule to explain their difference."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.DiffLlamaConfig(**sizes, num_hidden_layers=2, vocab_size=60)
    model = lively(transformers.DiffLlamaForCausalLM(config)).double().eval()
    model.generation_config.eos_token_id = None
    inputs = {"input_ids": torch.randint(3, 50, (2, 9))}
    cut, edited = torch.zeros(4, 9, 9), model.model.layers[1].self_attn
    cut[1:3, 3:9, :2] = -math.inf
    with torch.no_grad():
        with biased(model, lambda module, *_: cut if module is edited else 0.0):
            expected = model(**inputs).logits
        with va.intervene(model, inputs, va.Knockout(queries=(3, 9), keys=(0, 2), layers=1, heads=[1, 2])):
            torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
        both, ids = [va.ScaleHeads({0: [1]}, 0.0), va.Knockout(layers=0, heads=1)], inputs["input_ids"]
        outputs = []
        for edit in both:
            with va.intervene(model, inputs, edit):
                outputs.append(model(**inputs).logits)
                for _ in range(3):
                    ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
                assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), ids)
                ids = inputs["input_ids"]
        torch.testing.assert_close(*outputs, **CLOSE)
        assert not torch.allclose(outputs[0], model(**inputs).logits, atol=1e-3)
    for call in (lambda: va.record_heads(model, inputs), lambda: va.logit_parts(model, inputs, 7)):
        with pytest.raises(ValueError, match="model must attend once in a layer if .*; got layer 0, which does 2 times"):
            call()


def test_a_layer_that_adds_two_attentions_has_both_edited() -> None:
    for inside in (True, False):  # of one module
        model = stack("torch", "torch")
        model.blocks.extend(lively(TwoBranches(inside)) for _ in range(2))
        model, inputs = model.double().eval(), {name: x.double() for name, x in sequences().items()}
        queries, keys = (torch.zeros(trace_model(model, inputs).towers[0].shape, dtype=torch.bool) for _ in range(2))
        queries[:, 1:], keys[:, :2] = True, True
        with torch.no_grad(), dispatched(model), Cut(queries, keys) as cut:
            expected = model(**inputs)
        with torch.no_grad(), va.intervene(model, inputs, va.Knockout(queries=queries, keys=keys, heads=[0, 1])):
            torch.testing.assert_close(model(**inputs), expected, **CLOSE)
        assert cut.count == 6 and [call.layer for call in trace_model(model, inputs).calls] == [0, 1, 2, 2, 3, 3]


class Sloped(nn.Module):
    """Attention with a bias of distances and padding in one float mask, of which each layer and run makes its own."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.qkv, self.slope = nn.Linear(8, 24), slope

    def forward(self, x: Tensor, keep: Tensor, cut: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1])
        mask = (place - place[:, None]).abs().to(x) * -self.slope
        hidden = ~(keep[:, None, None] & keep[:, None, :, None])  # queries of padding attend evenly
        mask = mask.masked_fill(hidden, torch.finfo(x.dtype).min).masked_fill(cut, -math.inf)
        output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + output.transpose(1, 2).flatten(2)


class SlopedStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Sloped(slope) for slope in (0.3, 1.5))

    def forward(self, x: Tensor, keep: Tensor, cut: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, keep, cut)
        return x


def test_each_layer_and_run_has_its_own_float_mask() -> None:
    model, x = SlopedStack().double(), torch.randn(2, 6, 8, dtype=torch.float64)
    keep, cut = torch.ones(2, 6, dtype=torch.bool), torch.zeros(6, 6, dtype=torch.bool)
    keep[1, 4:] = False
    edges = cut.index_put((torch.tensor([[2], [3]]), torch.tensor([[0, 1, 3]])), torch.tensor(True))
    with va.intervene(model, {"x": x, "keep": keep, "cut": cut}, va.Knockout(queries=(2, 4), keys=[(0, 2), (3, 4)])):
        outputs = [model(x, real, cut) for real in (keep, keep.flip(0))]
    for output, real in zip(outputs, (keep, keep.flip(0)), strict=True):
        torch.testing.assert_close(output, model(x, real, edges), **CLOSE)


def test_compiled_models_run_as_plain_python() -> None:
    model, inputs, _ = model_of("llama")
    names = EDGES["llama"][0]
    with va.intervene(model, inputs, va.Knockout(**names)):
        expected = model(**inputs).logits
    compiled = torch.compile(model, backend="eager")
    with va.intervene(compiled, inputs, va.Knockout(**names)):
        assert torch.equal(compiled(**inputs).logits, expected)


def test_a_learned_score_is_cut_as_by_a_mask() -> None:
    model, inputs, _ = model_of("llama")
    va.nn.replace_attention(model, score="cosine")
    cut = EDGES["llama"][1](inputs)
    visible = torch.ones(9, 9, dtype=torch.bool).tril() & ~cut
    expected = model(**{**inputs, "attention_mask": visible}).logits
    with va.intervene(model, inputs, [va.Knockout(**EDGES["llama"][0]), va.ScaleHeads({0: [0]}, 1.0)]):
        actual = model(**inputs).logits
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert not torch.allclose(actual, model(**inputs).logits, atol=1e-3)


class SinkLayer(nn.Module):
    """Self-attention with a sink; `dense` writes it out, with scores `cut` at some edges and heads times `scales`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.sink = nn.Linear(8, 24), nn.Linear(8, 8), nn.Parameter(torch.tensor([0.4, -0.3]))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.out(va.score_attention(query, key, value, sink=self.sink).transpose(1, 2).flatten(2))

    def dense(self, x: Tensor, cut: Tensor, scales: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        logits = (query @ key.mT / 2).masked_fill(cut, -math.inf)
        sink = self.sink[:, None, None].expand(len(x), -1, x.shape[1], 1)
        maps = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        return x + self.out((maps @ value * scales[:, None, None]).transpose(1, 2).flatten(2))


class Sinks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SinkLayer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_edits_of_attention_with_a_sink() -> None:
    model, x = Sinks().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    cut = torch.zeros(5, 5, dtype=torch.bool)
    cut[4, 1:3] = True
    nothing, scales = torch.zeros_like(cut), torch.tensor([0.25, 1.0], dtype=torch.float64)
    expected = model.layers[1].dense(model.layers[0].dense(x, cut, torch.ones_like(scales)), nothing, scales)
    edits = [va.Knockout(queries=(4, 5), keys=(1, 3), layers=0), va.ScaleHeads({1: [0]}, 0.25)]
    with va.intervene(model, {"x": x}, edits):
        torch.testing.assert_close(model(x), expected, **CLOSE)
    other = torch.randn(2, 5, 8, dtype=torch.float64)
    record, after_first = va.record_heads(model, {"x": other}), model.layers[0](other) - other + x
    with va.intervene(model, {"x": x}, va.Patch(record, {0: None})):
        torch.testing.assert_close(model(x), model.layers[1](after_first), **CLOSE)
