"""UNITER as a model: names as published, the published formula, padding, torch.compile, what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlattn_fast.models import UNITER, UNITERConfig

SMALL = UNITERConfig(
    vocab_size=11,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=9,
    region_dim=5,
    initializer_range=0.5,
)


def small(**changes):
    torch.manual_seed(0)
    return UNITER(replace(SMALL, **changes)).eval()


def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 11, (3, 6), generator=generator),
        "region_features": torch.randn(3, 4, 5, generator=generator),
        "region_positions": torch.rand(3, 4, 7, generator=generator),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3], dtype=torch.bool),
        "region_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]], dtype=torch.bool),
    }


def test_parameters_are_named_and_shaped_as_published():
    linear = {
        name: shape
        for name, shape in [
            *[(f"attention.self.{part}", (16, 16)) for part in ("query", "key", "value")],
            ("attention.output.dense", (16, 16)),
            ("intermediate.dense", (24, 16)),
            ("output.dense", (16, 24)),
        ]
    }
    wanted = {
        "embeddings.word_embeddings.weight": (11, 16),
        "embeddings.position_embeddings.weight": (9, 16),
        "embeddings.token_type_embeddings.weight": (2, 16),
        "img_embeddings.mask_embedding.weight": (2, 5),
    }
    linear = {f"encoder.layer.{layer}.{name}": shape for layer in range(2) for name, shape in linear.items()}
    linear |= {"img_embeddings.img_linear": (16, 5), "img_embeddings.pos_linear": (16, 7), "pooler.dense": (16, 16)}
    for name, shape in linear.items():
        wanted |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    norms = ["embeddings.LayerNorm", *(f"img_embeddings.{norm}" for norm in ("img_layer_norm", "pos_layer_norm", "LayerNorm"))]
    norms += [f"encoder.layer.{layer}.{part}.LayerNorm" for layer in range(2) for part in ("attention.output", "output")]
    for name in norms:
        wanted |= {f"{name}.weight": (16,), f"{name}.bias": (16,)}
    wanted = {f"uniter.{name}": shape for name, shape in wanted.items()} | {"itm_output.weight": (2, 16), "itm_output.bias": (2,)}
    assert {name: tuple(tensor.shape) for name, tensor in small().state_dict().items()} == wanted


def test_a_published_state_dict_loads_other_heads_aside():
    model = small()
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in model.state_dict().items()}
    state |= {"region_classifier.net.0.bias": torch.zeros(16), "feat_regress.bias": torch.zeros(5)}
    loaded = UNITER.from_published(state, num_attention_heads=2)
    assert replace(loaded.config, initializer_range=0.5) == SMALL and not loaded.training
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    for name in ("itm_output.bias", "uniter.img_embeddings.img_linear.weight", "uniter.encoder.layer"):
        lacking = {key: tensor for key, tensor in state.items() if not key.startswith(name)}
        with pytest.raises(ValueError, match=f"state_dict must be .*; got none of .*{name}"):
            UNITER.from_published(lacking, num_attention_heads=2)


def test_a_state_dict_keeps_its_dtype():
    model, inputs = small().double(), {name: x.double() if x.is_floating_point() else x for name, x in batch().items()}
    loaded = UNITER.from_published(model.state_dict(), num_attention_heads=2)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    mixed = {**model.state_dict(), "itm_output.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match="one dtype; got torch.float32, torch.float64"):
        UNITER.from_published(mixed, num_attention_heads=2)


def test_a_checkpoint_of_retrieval_scores_with_the_head_that_was_trained():
    """Its score is rank_output(pooled), whose sigmoid the training ranks; itm_output stays as the pre-training left it."""
    model, inputs = small(), batch()
    rank = torch.nn.Linear(16, 1)
    state = {**model.state_dict(), "rank_output.weight": rank.weight.detach(), "rank_output.bias": rank.bias.detach()}
    loaded = UNITER.from_published(state, num_attention_heads=2)
    score = rank(model.uniter.pooler(model(**inputs).last_hidden_state))
    torch.testing.assert_close(loaded(**inputs).logits, torch.cat([torch.zeros_like(score), score], 1))
    del state["itm_output.weight"], state["itm_output.bias"]
    assert torch.equal(UNITER.from_published(state, num_attention_heads=2).itm_output.weight[1:], rank.weight)


def test_the_head_of_masked_words():
    """Named as published, its weight that of the embeddings, and the formula of the published code."""
    model = small(masked_words=True)
    head = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name.startswith("cls.")}
    assert head == {
        "cls.predictions.bias": (11,),
        "cls.predictions.decoder.weight": (11, 16),
        "cls.predictions.transform.dense.weight": (16, 16),
        "cls.predictions.transform.dense.bias": (16,),
        "cls.predictions.transform.LayerNorm.weight": (16,),
        "cls.predictions.transform.LayerNorm.bias": (16,),
    }
    torch.nn.init.normal_(model.cls.predictions.bias)
    loaded = UNITER.from_published(model.state_dict(), num_attention_heads=2)
    assert loaded.config.masked_words and torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    states = model(**batch()).last_hidden_state[:, 2]
    transform = model.cls.predictions.transform
    hidden = F.layer_norm(F.gelu(transform.dense(states)), (16,), transform.LayerNorm.weight, transform.LayerNorm.bias, 1e-12)
    want = hidden @ model.uniter.embeddings.word_embeddings.weight.T + model.cls.predictions.bias
    torch.testing.assert_close(loaded.word_logits(states), want)
    assert loaded.cls.predictions.decoder.weight is loaded.uniter.embeddings.word_embeddings.weight
    with pytest.raises(ValueError, match="config.masked_words must be True"):
        small().word_logits(states)


def test_forward_is_the_formula_of_the_published_code():
    """BERT's post-norm layers over LayerNorm(word + position + type) and LayerNorm(LN(features) + LN(box) + type)."""
    model = small().double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch().items()}
    state = model.state_dict()

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    words, image, types = "uniter.embeddings", "uniter.img_embeddings", state["uniter.embeddings.token_type_embeddings.weight"]
    text = state[f"{words}.word_embeddings.weight"][inputs["input_ids"]] + state[f"{words}.position_embeddings.weight"][:6]
    regions = norm(f"{image}.img_layer_norm", linear(f"{image}.img_linear", inputs["region_features"]))
    regions = regions + norm(f"{image}.pos_layer_norm", linear(f"{image}.pos_linear", inputs["region_positions"]))
    x = torch.cat([norm(f"{words}.LayerNorm", text + types[0]), norm(f"{image}.LayerNorm", regions + types[1])], dim=1)
    hidden = ~torch.cat([inputs["attention_mask"], inputs["region_mask"]], dim=1)[:, None, None]
    for layer in ("uniter.encoder.layer.0", "uniter.encoder.layer.1"):
        q, k, v = (linear(f"{layer}.attention.self.{part}", x) for part in ("query", "key", "value"))
        q, k, v = (projected.view(3, 10, 2, 8).transpose(1, 2) for projected in (q, k, v))
        attention = (q @ k.mT / 8**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        out = (attention @ v).transpose(1, 2).reshape(3, 10, 16)
        x = norm(f"{layer}.attention.output.LayerNorm", linear(f"{layer}.attention.output.dense", out) + x)
        branch = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", x)))
        x = norm(f"{layer}.output.LayerNorm", branch + x)
    logits = linear("itm_output", torch.tanh(linear("uniter.pooler.dense", x[:, 0])))
    torch.testing.assert_close(model(**inputs).logits, logits)


def test_what_stands_in_padding_changes_nothing():
    model, inputs = small(), batch()
    plain = model(**inputs)
    garbage = dict(inputs)
    garbage["input_ids"] = torch.where(inputs["attention_mask"], inputs["input_ids"], 9)
    for name, filling in (("region_features", torch.nan), ("region_positions", 1e30)):
        garbage[name] = torch.where(inputs["region_mask"][..., None], inputs[name], filling)
    assert torch.equal(model(**garbage).logits, plain.logits)
    alone = model(inputs["input_ids"][2:, :3], inputs["region_features"][2:, [0, 2]], inputs["region_positions"][2:, [0, 2]])
    torch.testing.assert_close(alone.logits, plain.logits[2:])
    ones = {name: inputs[name] for name in ("input_ids", "region_features", "region_positions")}
    torch.testing.assert_close(model(**ones, attention_mask=torch.ones(3, 6, dtype=torch.long)).logits, model(**ones).logits)


def test_attention_has_the_dropout_of_the_config():
    model, inputs = small(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0).train(), batch()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    assert torch.equal(model.eval()(**inputs).logits, model(**inputs).logits)


def test_masked_regions_take_the_mask_embedding():
    model, inputs = small(), batch()
    masked = torch.zeros(3, 4, dtype=torch.bool)
    masked[:, 0] = True
    replaced = inputs["region_features"].clone()
    replaced[:, 0] = model.uniter.img_embeddings.mask_embedding.weight[1]
    wanted = model(**{**inputs, "region_features": replaced})
    assert torch.equal(model(**inputs, masked_regions=masked).logits, wanted.logits)


@pytest.mark.slow
def test_compiles_to_one_graph():
    model, inputs = small(), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"input_ids": [[1, 2]]}, TypeError),
        ({"input_ids": torch.ones(3, 6)}, ValueError),
        ({"input_ids": torch.full((3, 6), 11)}, ValueError),
        ({"input_ids": torch.ones(3, 10, dtype=torch.long)}, ValueError),
        ({"region_features": torch.zeros(3, 4, 6)}, ValueError),
        ({"region_features": torch.zeros(2, 4, 5)}, ValueError),
        ({"region_positions": torch.zeros(3, 3, 7)}, ValueError),
        ({"region_positions": None}, TypeError),
        ({"attention_mask": torch.ones(3, 5, dtype=torch.bool)}, ValueError),
        ({"attention_mask": torch.ones(3, 6)}, ValueError),
        ({"region_mask": [True]}, TypeError),
        ({"masked_regions": torch.ones(3, 5, dtype=torch.bool)}, ValueError),
    ],
)
def test_wrong_input_is_named(changes, error):
    with pytest.raises(error, match=f"^{next(iter(changes))} must .*; got "):
        small()(**{**batch(), **changes})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"hidden_size": 17}, ValueError),
        ({"hidden_act": "tanh"}, ValueError),
        ({"num_hidden_layers": 0}, ValueError),
        ({"vocab_size": 1.5}, TypeError),
        ({"hidden_dropout_prob": 1.0}, ValueError),
        ({"attention_probs_dropout_prob": None}, TypeError),
        ({"initializer_range": -0.1}, ValueError),
    ],
)
def test_wrong_config_is_named(changes, error):
    with pytest.raises(error, match=f"^{next(iter(changes))} must .*; got "):
        replace(SMALL, **changes)
