"""Layers have one numbering, that of the model's blocks; each call of a shared module is a layer."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.stored_maps import Place, check, rows_of
from tests.helpers.interpret.tower_cases import METHODS, Block, Multihead, Stack, first_rows, sequences
from tests.interpret.relevancy.test_recurrences_of_models import IDS, INPUTS, made, near, of_last, stored
from tools.tiny_models.mixers import each_within
from tools.tiny_models.stored import Double, stored_rows
from vlattn_fast.interpret import explain, explain_layers
from vlattn_fast.interpret.intervening.traced_model import trace_model
from vlattn_fast.nn import capture_relevancy

HYBRIDS = [
    *("Jamba", "Bamba", "Zamba", "Zamba2", "Qwen3Next", "RecurrentGemma", "FalconH1", "NemotronH", "GraniteMoeHybrid", "MiniMax"),
    *("KimiLinear", "OlmoHybrid", "Lfm3", "Rwkv", "xLSTM"),
]
WHOLE = {"input_ids": IDS}


def mllama() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
    crosses = {"num_hidden_layers": 5, "cross_attention_layers": [1, 3], "num_key_value_heads": 2}
    return transformers.MllamaForCausalLM(transformers.MllamaTextConfig(**sizes, **crosses)).eval()


def relevancy(model: Any, explain: Any = va.explain_layers, **options: Any) -> Any:
    with each_within(model, Double):
        return explain(model, INPUTS, target=7, **options)


@pytest.mark.parametrize("kind", [*HYBRIDS, "Mllama"])
def test_a_layer_is_a_block_by_its_index(kind: str) -> None:
    model = mllama() if kind == "Mllama" else made(kind)
    seen = trace_model(model, WHOLE)
    attend = {call.layer: call.path for call in seen.calls}
    mix = {layer: place.strip("'") for _, layer, place in seen.mixing}
    blocks = "rwkv.blocks" if kind == "Rwkv" else "backbone.blocks" if kind == "xLSTM" else "model.layers"
    for layer, path in (attend | mix).items():
        assert path.startswith(f"{blocks}.{layer}.")
    if kind != "FalconH1":  # no rule has a map of one of its layers
        assert va.explain_layers(model, WHOLE, per="layer").layers == {"language": sorted(attend | mix)}
    if not attend:
        return
    last = sorted(attend)[-1]
    table = va.attribute_edges(model, WHOLE, {"first": (0, 4), "others": (4, 9)})
    assert {edge.layer for edge in table} == set(attend)
    assert va.information_flow(model, [(WHOLE, None)], window=1, keys=(0, 4)).layers == tuple(sorted(attend))
    assert set(va.record_heads(model, WHOLE).means) == set(attend)
    cut = va.Knockout(queries="last", keys=(0, 4), layers=last)
    states = [around(model, model.get_submodule(blocks)[last], edits) for edits in ([], [cut])]
    assert torch.equal(states[0][0], states[1][0]) and not torch.equal(states[0][1], states[1][1])


def around(model: Any, block: nn.Module, edits: list[Any]) -> list[Tensor]:
    """The states in front of a block and behind it."""
    states = list[Tensor]()

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states.extend([args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output])

    with torch.no_grad(), va.intervene(model, WHOLE, edits) if edits else nullcontext():
        handle = block.register_forward_hook(note, with_kwargs=True)
        model(**WHOLE, use_cache=False)
        handle.remove()
    return states


@pytest.mark.parametrize("kind", ["Zamba", "Zamba2", "Rwkv", "NemotronH", "Jamba", "RecurrentGemma"])
@pytest.mark.slow
def test_the_last_layer_is_the_same_for_all(kind: str, double: None) -> None:
    model = made(kind)
    alone = relevancy(model, per="layer", layers=[-1])
    (last,) = alone.layers["language"]
    assert last == relevancy(model, per="layer").layers["language"][-1]
    expected = alone.relevancy["language"][0] + of_last()
    for start_layer in (-1, last):
        method = va.methods.Gradient(start_layer=start_layer)
        near(relevancy(model, va.explain, method=method).relevancy["language"], expected)
        with each_within(model, Double), va.nn.capture_relevancy(model, method=method) as captured:
            scores = model(**INPUTS, use_cache=False).logits[:, -1, 7]
            near(captured.relevancy(scores.sum()).detach(), expected)


@pytest.mark.parametrize("kind", ["Zamba", "Rwkv"])
@pytest.mark.slow
def test_a_block_of_two_mixers_has_the_row_of_both(kind: str, double: None) -> None:
    maps, scores = stored(kind)
    model = made(kind)
    got = relevancy(model, per="layer")
    sizes = {"Zamba": [1, 2, 1, 2], "Rwkv": [2, 2]}[kind]
    assert got.layers == {"language": list(range(len(sizes)))}
    for row, of_block in zip(got.relevancy["language"], torch.arange(len(maps)).split(sizes), strict=True):
        expected = stored_rows([maps[number] for number in of_block], scores, of_last())
        near(row + of_last(), expected)
    by_number = relevancy(model, per="layer", layers=[1, -2]).relevancy["language"]
    torch.testing.assert_close(by_number, got.relevancy["language"][[1, len(sizes) - 2]], rtol=1e-9, atol=0)


def test_blocks_without_the_map_that_is_asked_for() -> None:
    with pytest.raises(
        ValueError, match=r"that mix tokens several times.*got 'rwkv.blocks.1.attention' and 'rwkv.blocks.1.feed_f.* in layer 1 "
    ):
        va.explain_layers(made("Rwkv"), WHOLE, per="head", layers=[1])
    zamba = made("Zamba")
    assert va.explain_layers(zamba, WHOLE, per="head", layers=[0, 2]).layers == {"language": [0, 2]}
    with pytest.raises(ValueError, match=r"in layer 3 of 'language'"):
        va.explain_layers(zamba, WHOLE, per="layer", layers=[0, 3], heads=[0])
    nemotron = made("NemotronH")  # recurrence, experts, attention, MLP
    for number in (1, -2, 3):
        with pytest.raises(
            ValueError, match=rf"layers must be among \[0, 2\], which mix tokens, in tower 'language'; got {number}"
        ):
            va.explain_layers(nemotron, WHOLE, per="layer", layers=[number])
    rows = [
        va.explain(nemotron, WHOLE, method=va.methods.Gradient(start_layer=number)).relevancy["language"] for number in (1, 2, -1)
    ]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[1], rows[2])
    with pytest.raises(ValueError, match=r"start_layer must be from -3 to 2"):
        va.explain(nemotron, WHOLE, method=va.methods.Gradient(start_layer=3))
    for number, why in ((0, "'model.layers.0.mixer' .*, without a softmax"), (1, "")):
        with pytest.raises(ValueError, match=rf"layers must be among \[2\], which have attention; got {number}, {why}"):
            va.intervene(nemotron, WHOLE, va.Knockout(queries="last", keys=(0, 2), layers=number))


def test_both_attentions_of_a_decoders_block_are_one_layer() -> None:
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    seen = trace_model(model, {"input_ids": IDS})
    assert [(call.layer, call.crosses) for call in seen.calls if "decoder" in call.path] == [
        *((0, False), (0, True)),
        *((1, False), (1, True)),
    ]


class Looped(Stack):
    """Runs its blocks in turn, three in all."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(x)
        for number in range(3):
            x = self.blocks[number % len(self.blocks)](x, attention_mask.bool())
        return self.head(x[:, 0])


def with_attention(attend: nn.Module) -> Block:
    block = Block("torch", 32)
    block.attend = attend
    return block


def one_attention() -> list[nn.Module]:
    shared = Block("torch", 32).attend
    return [with_attention(shared) for _ in range(3)]


def one_inner_attention() -> list[nn.Module]:
    blocks = [with_attention(Multihead(32)) for _ in range(3)]
    for block in blocks[1:]:
        block.attend.inside = blocks[0].attend.inside
    return blocks


def one_again() -> list[nn.Module]:
    first, second = Block("torch", 32), Block("torch", 32)
    return [first, second, first]


SHARED = {
    "attention": one_attention,
    "attention within": one_inner_attention,
    "block": lambda: [Block("torch", 32)] * 3,
    "first and last": one_again,
    "one that runs again": lambda: [Block("torch", 32)],
    "two that run in turn": lambda: [Block("torch", 32) for _ in range(2)],
}


def looped(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Looped()
    model.blocks = nn.ModuleList(SHARED[kind]())
    return lively(model).eval()


def target(outputs: Tensor) -> Tensor:
    return -outputs[:, 1]


@pytest.mark.parametrize("kind", SHARED)
def test_each_call_is_a_layer(kind):
    model, inputs = looped(kind), sequences()
    place = Place("blocks", first_rows(7), inputs["attention_mask"])
    check(model, inputs, {"tower0": place}, target, METHODS, position="cls", target=target)
    assert explain_layers(model, inputs, per="layer", position="cls", target=target).relevancy["tower0"].shape == (3, 2, 7)
    with pytest.raises(ValueError, match=r"start_layer must be from -3 to 2"):
        explain(model, inputs, method=va.methods.Gradient(start_layer=3), position="cls", target=target)


@pytest.mark.parametrize("kind", ["attention", "attention within", "first and last"])
def test_rows_of_training(kind):
    model, inputs = looped(kind).double(), sequences()
    inputs["x"] = inputs["x"].double()
    want = rows_of(model, inputs, target, {"tower0": Place("blocks", first_rows(7), inputs["attention_mask"])})["tower0"]
    with capture_relevancy(model) as captured:
        score = target(model(**inputs)).sum()
    torch.testing.assert_close(captured.relevancy(score, position="cls"), want, rtol=1e-9, atol=1e-12)
