"""Robot policies: an action is the score, and the policy's two towers are one sequence."""

import re

import pytest
import torch
import transformers

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.joint_maps import METHODS, beside, one_sequence
from tests.helpers.interpret.stored_maps import Kept, assert_rows

TEXT = dict(
    **dict(model_type="gemma", hidden_size=32, num_hidden_layers=3, intermediate_size=48, head_dim=8, vocab_size=60),
    **dict(num_attention_heads=4, num_key_value_heads=1),
)
VISION = dict(model_type="siglip_vision_model", hidden_size=32, num_hidden_layers=2, intermediate_size=48, patch_size=4)
CHUNK, JOINTS, DIMENSIONS, CAMERA = 3, 5, 4, 59


def policy():
    torch.manual_seed(0)
    vision = dict(VISION, image_size=8, num_attention_heads=4, vision_use_head=False)
    vlm = dict(model_type="paligemma", text_config=TEXT, vision_config=vision, projection_dim=32, image_token_id=CAMERA)
    sizes = dict(chunk_size=CHUNK, max_state_dim=JOINTS, max_action_dim=DIMENSIONS)
    config = transformers.PI0Config(vlm_config=vlm, dit_config=dict(TEXT, hidden_size=16), **sizes)
    model = lively(transformers.PI0ForConditionalGeneration(config)).eval().double()
    model.set_attn_implementation("literal")
    return model


def seen():
    """Two cameras, then one; the second task is shorter."""
    torch.manual_seed(1)
    ids = torch.tensor([[CAMERA] * 8 + [3, 4, 5, 6], [CAMERA] * 4 + [7, 8, 9, 10, 11, 0, 0, 0]])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(2, 2, 3, 8, 8).double(),
        "pixel_attention_mask": torch.tensor([[True, True], [True, False]]),
        "state": torch.randn(2, JOINTS).double(),
        "noise": torch.randn(2, CHUNK, DIMENSIONS).double(),
    }


def maps_of(model, inputs, score):
    """The maps of each layer over what the policy sees and its chunk, and their gradients."""
    kept = Kept(model)
    with kept.watching():
        outputs = model(**inputs, timestep=torch.full((2,), 0.5))
    towers = [[m for path, m in kept.maps if path.startswith(name)] for name in ("model.vlm.language_model", "model.dit")]
    slopes = [torch.autograd.grad(score(outputs.logits).sum(), of, retain_graph=True, allow_unused=True) for of in towers]
    sizes = (inputs["input_ids"].shape[1], 1 + CHUNK)
    zeros = [
        [torch.zeros_like(m) if g is None else g for m, g in zip(*pair, strict=True)] for pair in zip(towers, slopes, strict=True)
    ]
    return [
        (beside(first, second, sizes), beside(of_first, of_second, sizes))
        for first, second, of_first, of_second in zip(*towers, *zeros, strict=True)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_an_action_beside_stored_maps(method):
    model, inputs = policy(), seen()
    layers = maps_of(model, inputs, lambda velocity: -velocity[:, 1, 2])
    real = torch.cat([inputs["attention_mask"].bool(), torch.ones(2, 1 + CHUNK, dtype=torch.bool)], 1)
    want = one_sequence(method, layers, 12 + 2, real, 1 + CHUNK)
    asked = va.methods.Weighted(weighting="equal") if method == "weighted" else method
    got = va.explain(model, inputs, target=va.Action(dimension=2, step=1, time=0.5), method=asked)
    assert list(got.relevancy) == ["actions", "language"] and got.position["actions"].tolist() == [2, 2]
    assert_rows(got.relevancy["actions"], want[:, 12:], what=method)
    assert_rows(got.relevancy["language"], want[:, :12], what=method)


def test_frozen_keys_of_the_first_layer_are_its_towers():
    """They came through the vision tower, whose calls are not those of the language's tokens."""
    freeze = va.methods.Gradient(freeze=("norms", "attention"))
    got = va.explain(policy(), seen(), target=va.Action(dimension=2, step=1, time=0.5), method=freeze)
    assert list(got.relevancy) == ["actions", "language"]


def test_a_sum_over_the_steps_reads_their_mean():
    model, inputs = policy(), seen()
    layers = maps_of(model, inputs, lambda velocity: -velocity[..., 2].sum(1))
    row = torch.zeros(2, 16).double()
    row[:, 13:] = 1 / CHUNK
    for attention, gradient in reversed(layers):
        row = row + torch.einsum("bn,bnm->bm", row, (attention * gradient).relu().mean(1))
    got = va.explain(model, {**inputs, "timestep": torch.full((2,), 0.5)}, target=va.Action(dimension=2))
    assert_rows(got.relevancy["actions"], row[:, 12:])
    assert_rows(got.relevancy["language"], row[:, :12])
    called = va.explain(model, {**inputs, "timestep": torch.full((2,), 0.5)}, target=lambda o: -o.logits[..., 2].sum(1))
    assert_rows(called.relevancy["language"], got.relevancy["language"])


def test_rollout_tells_what_tokens_keep_of_themselves_from_what_they_are_brought():
    """Of a sum over the steps, whose row is a mean: half of it stays in each layer, the other half is what attention brings."""
    model, inputs = policy(), {**seen(), "timestep": torch.full((2,), 0.5)}
    row = torch.zeros(2, 16).double()
    row[:, 13:] = 1 / CHUNK
    contribution = torch.zeros_like(row)
    for attention, _ in reversed(maps_of(model, seen(), lambda velocity: -velocity[..., 2].sum(1))):
        mean = attention.mean(1)
        keeps, step = torch.where(mean.sum(-1) > 0, 0.5, 1.0), torch.einsum("bn,bnm->bm", row / 2, mean)
        row, contribution = row * keeps + step, contribution * keeps + step
    got = va.explain(model, inputs, target=va.Action(dimension=2), method="rollout")
    assert_rows(got.relevancy["actions"], row[:, 12:])
    assert_rows(got.contribution["actions"], contribution[:, 12:])


def test_cameras_are_pictures_and_tokens_have_names(tmp_path):
    got = va.explain(policy(), seen(), target=va.Action(2, 1, 0.5))
    language = got.relevancy["language"]
    assert got.image.shape == (3, 2, 2) and got.image_samples == [0, 0, 1] and got.photos == [0, 1, 2]
    for number, (row, first) in enumerate([(0, 0), (0, 4), (1, 0)]):
        assert_rows(got.image[number].flatten()[None], language[row, first : first + 4][None])
    assert got.token_ids == [[3, 4, 5, 6], [7, 8, 9, 10, 11]]
    assert got.token_names == ["state", "action 0", "action 1", "action 2"]
    entries = {entry.word: entry.value for entry in got[1].top(30) if entry.tower == "actions"}
    assert entries["state"] == pytest.approx(got.relevancy["actions"][1, 0].item())
    assert va.Explanation.load(got.save(tmp_path / "action.safetensors")).token_names == got.token_names


def test_a_state_of_several_tokens_names_the_joints():
    from vlattn_fast.interpret.adapters.actions import Actions

    tokens = Actions({"state": torch.zeros(1, 2), "noise": torch.zeros(1, 3, 4)}, (1, 5))
    assert tokens.fields(torch.zeros(1, 5))["token_names"] == ["joint 0", "joint 1", "action 0", "action 1", "action 2"]


@pytest.mark.parametrize(
    ("error", "message", "target", "changes"),
    [
        (ValueError, "dimension must be from 0 to 3, the last one in noise; got 4", dict(dimension=4, step=0, time=0.5), {}),
        (ValueError, "step must be from 0 to 2, the last one in noise; got 3", dict(dimension=0, step=3, time=0.5), {}),
        (ValueError, "inputs must hold 'state', the robot's state", dict(dimension=0, step=0, time=0.5), {"state": None}),
        (ValueError, "inputs must hold 'noise', the noisy actions", dict(dimension=0, step=0, time=0.5), {"noise": None}),
        (ValueError, "or as 'timestep' (B,) in inputs; got neither", dict(dimension=0), {}),
        (ValueError, "or as 'timestep' (B,) in inputs; got both", dict(dimension=0, time=0.5), {"timestep": torch.ones(2)}),
        (ValueError, "noise must have the steps", dict(dimension=0, time=0.5), {"noise": torch.zeros(2, 2, 4).double()}),
        (ValueError, "noise must be (B, steps, dimensions); got (3, 4)", dict(dimension=0), {"noise": torch.zeros(3, 4)}),
        (TypeError, "target must be a va.Action", None, {}),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(error, message, target, changes):
    with pytest.raises(error, match=re.escape(message)):
        va.explain(policy(), {**seen(), **changes}, target=target and va.Action(**target))


def test_evaluate_removes_patches_of_each_camera():
    model, inputs, action = policy(), seen(), va.Action(2, step=1, time=0.5)
    got = va.evaluate(model, [(inputs, action, None)], methods=["gradient"], tests=["positive"], steps=(0.0, 0.5, 1.0))
    maps = va.explain(model, inputs, target=action).image.flatten(1)
    timed = {**inputs, "timestep": torch.full((2,), 0.5).double()}
    cameras, areas = [[(0, 0), (0, 1)], [(1, 0)]], []
    for row, places in enumerate(cameras):
        values = torch.cat([part for part, owner in zip(maps, (0, 0, 1), strict=True) if owner == row])
        scores = []
        for share in (1.0, 0.5, 0.0):
            stays = torch.zeros(len(values)).double()
            stays[values.argsort()[: int(share * len(values))]] = 1
            pixels = inputs["pixel_values"].clone()
            for place, cells in zip(places, stays.view(-1, 2, 2), strict=True):
                pixels[place] *= cells.kron(torch.ones(4, 4).double())
            with torch.no_grad():
                scores.append(-model(**{**timed, "pixel_values": pixels}).logits[row, 1, 2])
        areas.append((scores[0] + 2 * scores[1] + scores[2]) / 4)
    assert got.value("gradient", "positive", "image") == pytest.approx(torch.stack(areas).mean().item(), abs=1e-6)
    assert got.value("gradient", "positive", "text") is not None


def test_edges_of_what_a_policy_sees():
    model, inputs, groups, action = policy(), seen(), ["image", "text"], va.Action(2, step=1, time=0.5)
    timed = {**inputs, "timestep": torch.full((2,), 0.5).double()}
    table = va.attribute_edges(model, inputs, groups, target=action, tower="language")
    called = va.attribute_edges(model, timed, groups, target=lambda outputs: -outputs.logits[:, 1, 2], tower="language")
    assert table.effects.abs().max() > 1e-3 and torch.equal(table.effects, called.effects)
    edges = [(0, None, "image", "text"), (1, 0, "text", "text")]
    true = va.intervene_each(model, inputs, edges, groups=groups, target=action, tower="language")
    with torch.no_grad():
        whole = model(**timed).logits[:, 1, 2]
        with va.intervene(model, timed, va.Knockout(queries="text", keys="image", layers=[0], tower="language")):
            cut = model(**timed).logits[:, 1, 2]
    torch.testing.assert_close(true.effects[0], cut - whole)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ("actions", "groups must be of tokens that attend to one another: tower=('actions', 'language') names tokens of two"),
        (("actions", "language"), "'model.dit.layers.0.self_attn' (GemmaAttention) attends to tokens of several towers"),
    ],
)
def test_edges_of_a_softmax_over_two_towers_are_refused(tower, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        va.attribute_edges(policy(), seen(), ["image", "last"], target=va.Action(2, step=1, time=0.5), tower=tower)


@pytest.mark.parametrize(
    ("error", "message", "values"),
    [
        (ValueError, "time must be from 0", dict(dimension=0, time=1.5)),
        (ValueError, "time must be from 0", dict(dimension=0, time=float("nan"))),
        (TypeError, "time must be a number", dict(dimension=0, time="1")),
        (ValueError, "dimension must be at least 0", dict(dimension=-1)),
        (TypeError, "step must be an int", dict(dimension=0, step=1.0)),
    ],
)
def test_an_action_checks_itself(error, message, values):
    with pytest.raises(error, match=message):
        va.Action(**values)
