"""Edits of attention that a module writes out by hand: scores, their softmax, and its product with the values."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.edited_maps import hooked
from tests.helpers.interpret.tower_cases import HEADS, Stack, second

pytestmark = pytest.mark.usefixtures("double")  # GPT-J casts its queries to float32
CLOSE = {"rtol": 0, "atol": 1e-9}
Made = tuple[Any, dict[str, Any], str]  # the path of the output projections


def bloom() -> Made:
    model = t.BloomForCausalLM(t.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=60))
    return text(model, "transformer.h.{}.self_attention.dense")


def gptj() -> Made:
    sizes = dict(n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=64, vocab_size=60)
    model = t.GPTJForCausalLM(t.GPTJConfig(**sizes, bos_token_id=1, eos_token_id=2))
    return text(model, "transformer.h.{}.attn.out_proj")


def deberta() -> Made:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=60)
    config = t.DebertaV2Config(
        **sizes, relative_attention=True, pos_att_type=["c2p", "p2c"], max_position_embeddings=32, num_labels=5
    )
    return text(t.DebertaV2ForSequenceClassification(config), "deberta.encoder.layer.{}.attention.output.dense")


def text(model: Any, projection: str) -> Made:
    ids, mask = torch.randint(5, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    return lively(model).double().eval(), {"input_ids": ids, "attention_mask": mask}, projection


MODELS: dict[str, Callable[[], Made]] = {"bloom": bloom, "gptj": gptj, "deberta": deberta}
models = pytest.mark.parametrize("name", MODELS)


@models
def test_heads_are_slices_in_front_of_the_output_projection(name: str) -> None:
    model, inputs, projection = MODELS[name]()
    recorded: list[Tensor] = []
    with torch.no_grad():
        with hooked(model.get_submodule(projection.format(1)), lambda x: recorded.append(x.clone()) or x, 4):
            model(**inputs)
        other = {**inputs, "input_ids": inputs["input_ids"].flip(0)}
        run = va.record_heads(model, inputs)
        assert run.outputs is not None
        torch.testing.assert_close(run.outputs[1], recorded[0].transpose(1, 2), **CLOSE)

        def changed(states: Tensor) -> Tensor:
            states[:, :, 0] *= 0.25
            states[:, 2:5, 3] = recorded[0][:, 2:5, 3]
            return states

        with hooked(model.get_submodule(projection.format(1)), changed, 4):
            expected = model(**other).logits
        edits = [va.ScaleHeads({1: [0]}, 0.25), va.Patch(run, {1: [3]}, queries=(2, 5))]
        with va.intervene(model, other, edits):
            torch.testing.assert_close(model(**other).logits, expected, **CLOSE)


@models
def test_first_order_effects_are_finite_differences(name: str) -> None:
    model, inputs, _ = MODELS[name]()
    inputs["attention_mask"][:] = 1
    target = 3
    table = va.attribute_edges(model, inputs, {"a": (1, 4), "b": (4, 8)}, target=target)
    edge = next(each for each in table if (each.layer, each.head, each.from_, each.to) == (1, 2, "a", "b"))
    scores = []
    for weight in (math.exp(1e-4), math.exp(-1e-4)):
        cut = va.Steer(queries=(4, 8), keys=(1, 4), layers=1, heads=2, weight=weight)
        with torch.no_grad(), va.intervene(model, inputs, cut):
            logits = model(**inputs).logits
        scores.append(logits[:, target] if logits.ndim == 2 else logits[:, -1, target])
    assert edge.effect == pytest.approx(float(((scores[0] - scores[1]) / 2e-4).mean()), rel=1e-5) and abs(edge.effect) > 1e-5
    true = va.intervene_each(model, inputs, [edge], groups={"a": (1, 4), "b": (4, 8)}, target=target)
    with torch.no_grad(), va.intervene(model, inputs, va.Knockout(queries=(4, 8), keys=(1, 4), layers=1, heads=2)):
        logits = model(**inputs).logits
    torch.testing.assert_close(true.scores - true.effects[0], logits[:, target] if logits.ndim == 2 else logits[:, -1, target])


@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_a_cache_gives_what_whole_sequences_give(name: str) -> None:
    model, inputs, _ = MODELS[name]()
    inputs["attention_mask"][:] = 1
    edits = [va.Knockout(queries="answer", keys=(1, 5), heads=[0, 3]), va.ScaleHeads({2: [1]}, 0.5)]
    ids = inputs["input_ids"]
    with torch.no_grad(), va.intervene(model, inputs, edits):
        cached = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        for _ in range(5):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
            logits[:, model.config.eos_token_id] = -math.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, ids)
    plain = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert not torch.equal(plain, cached)


@models
def test_gradients_of_rows_without_a_key(name: str) -> None:
    model, inputs, _ = MODELS[name]()
    with va.intervene(model, inputs, va.Knockout(keys=(0, 9), heads=[0, 1])):
        model(**inputs).logits.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("kind", ["softmax", "a layer made on the way", "keywords", "einsum", "einsum of a list"])
def test_own_modules(kind: str) -> None:
    model, inputs = Stack(kind, "torch", kind).double().eval(), {"x": torch.randn(2, 7, 10).double()}
    inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    inputs["attention_mask"][1, 5:] = 0
    reference = Stack("torch", "torch", "torch").double().eval()
    reference.load_state_dict(model.state_dict())
    run = va.record_heads(reference, inputs, layers=[0, 2])
    edits: list[Any] = [
        va.Knockout(queries=(0, 4), keys=(1, 3), heads=range(1, HEADS)),
        va.Steer(keys=(4, 7), weight=0.5),
        va.ScaleHeads({0: [0], 2: [1]}, 0.5),
        va.Patch(run, {2: [0]}, queries=(0, 3)),
    ]
    outputs = []
    with torch.no_grad():
        for each in (model, reference):
            with va.intervene(each, inputs, edits):
                outputs.append(each(**inputs))
        assert float((outputs[0] - model(**inputs)).abs().max()) > 1e-3
    torch.testing.assert_close(*outputs, **CLOSE)
    rows, question = list[Tensor](), {"position": {"tower0": "cls"}, "target": second}
    for each in (model, reference):
        with va.intervene(each, inputs, edits):
            rows.append(va.explain(each, inputs, **question).relevancy["tower0"])
    torch.testing.assert_close(*rows, **CLOSE)
    assert float((rows[0] - va.explain(model, inputs, **question).relevancy["tower0"]).abs().max()) > 1e-3


def test_a_map_that_is_not_multiplied_is_refused() -> None:
    """The run before saw a product; the run with edits takes another way."""
    model, inputs = Stack("softmax").double().eval(), {"x": torch.randn(2, 7, 10).double(), "attention_mask": torch.ones(2, 7)}
    attend = model.blocks[0].attend
    edited = va.intervene(model, inputs, va.ScaleHeads({0: [0]}, 0.5))
    attend.times = lambda weights, v: weights.square() @ v
    with edited, pytest.raises(ValueError, match="got 'blocks.0.attend' .Heads., whose attention va.intervene does not support"):
        model(**inputs)
