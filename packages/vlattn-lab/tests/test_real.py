"""`vlattn_lab.real` on small random models and fabricated rows, without the packages that carry trained models."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

import vlattn_fast as va
from vlattn_fast.interpret.relevancy.methods.registry import METHODS
from vlattn_lab.experiments.experiment import effects_table
from vlattn_lab.real import cuts, measures, models, page, sinks
from vlattn_lab.real.photos import SIDE, SOURCES, pixels, square
from vlattn_lab.real.reading_page import Readings
from vlattn_lab.weights import package

CHANNELS = (8, 6, 4)


def small() -> tuple[Dinov2Model, models.SaliencyHead]:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_ratio=2,
        image_size=SIDE,
        patch_size=14,
        use_mask_token=False,
    )
    head = models.SaliencyHead(12, CHANNELS)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model = Dinov2Model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False), head.eval().requires_grad_(False)


def as_exported(model: nn.Module, head: nn.Module) -> tuple[dict[str, torch.Tensor], list[tuple[str, str]]]:
    """The tensors as the ONNX file has them: matrices numbered, and named by nothing but the nodes of their products."""
    old = {new: name for name, new in models.RENAMED.items()}
    arrays, products = {}, [("/backbone/encoder/layer.0/attention/attention/MatMul", "/backbone/softmax_output")]
    for name, value in model.state_dict().items():
        for new, before in old.items():
            name = name.replace(new, before)
        if name == "embeddings.position_embeddings":
            arrays["onnx::Reshape_7"], arrays["onnx::Concat_3"] = value[:, 1:], value[:, :1]
        elif value.ndim == 2 and name.endswith(".weight"):
            matrix = f"onnx::MatMul_{len(arrays)}"
            arrays[matrix] = value.T.contiguous()
            products.append(
                (f"/backbone/{name.removesuffix('.weight').replace('.', '/').replace('layer/', 'layer.')}/MatMul", matrix)
            )
        else:
            arrays[f"backbone.{name}"] = value
    counts = {name for name in head.state_dict() if name.endswith("num_batches_tracked")}
    arrays |= {f"decoder.{name}": value for name, value in head.state_dict().items() if name not in counts}
    return arrays, products


def test_an_exported_graph_becomes_the_model_that_it_was():
    model, head = small()
    twin, twin_head = models.convert(*as_exported(model, head), heads=3)
    values = {**model.state_dict(), **head.state_dict()}
    assert all(torch.equal(value, values[name]) for name, value in {**twin.state_dict(), **twin_head.state_dict()}.items())
    picture = torch.randn(1, 3, SIDE, SIDE)
    assert torch.equal(twin(pixel_values=picture).last_hidden_state, model(pixel_values=picture).last_hidden_state)
    assert twin.config.num_attention_heads == 3 and not any(parameter.requires_grad for parameter in twin.parameters())


def test_a_graph_without_one_of_its_tensors_is_refused():
    arrays, products = as_exported(*small())
    with pytest.raises(RuntimeError, match="Missing key.*fc2.weight"):
        models.convert(arrays, [one for one in products if "layer.1/mlp/fc2" not in one[0]], heads=3)


def test_the_saliency_head_is_its_formula():
    _, head = small()
    states = torch.randn(2, 17, 12)
    picture = states[:, 1:].reshape(2, 4, 4, 12).movedim(-1, 1)
    for up, norm in ((head.upconv1, head.bn1), (head.upconv2, head.bn2), (head.upconv3, head.bn3)):
        picture = nn.functional.conv_transpose2d(picture, up.weight, up.bias, 2, 1)
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None]
        picture = ((picture - norm.running_mean[:, None, None]) * scale + norm.bias[:, None, None]).clamp(min=0)
    by_hand = (picture * head.final_conv.weight[0]).sum(1) + head.final_conv.bias
    torch.testing.assert_close(head(states), by_hand)
    assert head.saliency(states).shape == (2, SIDE, SIDE)


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(ModuleNotFoundError, match="no_such_package.*tools.environments real"):
        package("no_such_package")


def test_the_surest_box():
    saliency = torch.zeros(20, 20)
    saliency[7:13, 10:16] = 1
    assert measures.surest(saliency, patch=2, box=3) == (3, 5)  # rows 6 to 12, columns 10 to 16


def test_a_photo_is_the_square_in_its_middle():
    photo = square("china")
    assert photo.size == (427, 427) and pixels(photo).shape == (1, 3, SIDE, SIDE)
    white = Image.new("RGB", (5, 5), "white")
    torch.testing.assert_close(
        pixels(white, 2)[0, :, 0, 0], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    )


def test_the_scores_of_a_photo_and_their_evaluation():
    model, head = small()
    scene = measures.scene("china", model, head)
    outputs = model(**scene.inputs)
    states = outputs.last_hidden_state
    named = scene.scores["class token"]
    assert named.target(outputs).tolist() == pytest.approx([1.0])
    doubled = SimpleNamespace(last_hidden_state=2 * states)
    assert named.target(doubled).tolist() == pytest.approx([2.0])
    boxed = scene.scores["saliency in a box"]
    top, left = (14 * first for first in scene.box)
    saliency = head.saliency(states)[0]
    assert boxed.target(outputs).tolist() == pytest.approx([float(saliency[top : top + 56, left : left + 56].mean())])
    assert torch.equal(scene.mask, saliency > 0.5)
    grid = boxed.read[1:].view(16, 16)
    assert boxed.read[0] == 0 and int((grid > 0).sum()) == 16 and float(grid[scene.box]) == 1 / 16
    (row, random) = measures.evaluated(model, scene, "class token", {"attention": va.methods.Attention()})
    assert (row["method"], random["method"]) == ("attention", "random")
    assert set(row) == {"task", "score", "photo", "method", *measures.TESTS["class token"]}


def test_all_methods_but_those_of_decoders():
    model, head = small()
    scene = measures.scene("china", model, head)
    methods = measures.methods()
    assert {method.name for method in methods.values()} == set(METHODS) - {"tam", "occlusion"} and set(sinks.METHODS) <= set(
        methods
    )
    for name in ("gradient", "weighted", "input_gradient", "gradcam"):
        held = [method.freeze for label, method in methods.items() if method.name == name]
        assert held == [("norms", "attention"), ("norms",), ()][name == "gradcam" :], (name, held)
        assert methods[name].freeze == held[0] and methods[f"{name}(freeze=())"].freeze == ()
    boxed = scene.scores["saliency in a box"]
    for method in ("gradient", "input_gradient", "integrated_gradients"):
        explanation = measures.explain(model, scene.inputs, method, boxed.read, target=boxed.target)
        assert explanation.image.shape == (1, 16, 16)


def test_a_head_is_taken_out_as_if_its_part_of_the_projection_were_zero():
    model, head = small()
    scene = measures.scene("china", model, head)
    (row,) = cuts.head_rows(model, head, [scene])
    target, whole = scene.scores["class token"].target, cuts.run_of(model, head, scene.inputs)
    projection = model.encoder.layer[1].attention.o_proj
    with torch.no_grad():
        projection.weight[:, 8:12] = 0  # the columns of the last of three heads
        fall = 1 - target(model(**scene.inputs))
    change = (cuts.run_of(model, head, scene.inputs).saliency - whole.saliency).abs().mean()
    assert row["fall"][1][2] == pytest.approx(float(fall), abs=1e-5)
    assert row["change"][1][2] == pytest.approx(float(change), rel=1e-3) and float(change) > 0
    assert [len(numbers) for numbers in row["relevancy"]] == [3, 3]


def test_patches_that_are_read_most_are_those_of_the_maps():
    model, head = small()
    inputs = cuts.together([measures.scene(name, model, head) for name in ("china", "flower")])
    read, sizes = cuts.read_most(model, inputs), cuts.state_sizes(model, inputs)
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    for layer, attention in enumerate(outputs.attentions):
        torch.testing.assert_close(read[layer], 257 * attention[:, :, 1:].mean((1, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sizes, outputs.hidden_states[1].norm(dim=-1))
    masks = cuts.chosen(read, sizes)
    assert list(masks) == list(cuts.CUTS) and len(masks["random"]) == cuts.DRAWS
    counts = {name: {int(mask[0].sum()) for mask, _ in draws} for name, draws in masks.items()}
    assert counts == {**dict.fromkeys(cuts.CUTS, {cuts.PATCHES}), "class token": {1}, "most read in layer 0": {1}}
    assert not any(bool(mask[:, 0].any()) for name, draws in masks.items() for mask, _ in draws if name != "class token")
    ((most, layer),) = masks["most read in layer 0"]
    assert layer == 0 and most.int().argmax(1).tolist() == (read[0, :, 1:].argmax(1) + 1).tolist()


def test_sizes_of_tokens_and_maps_without_sinks():
    model, head = small()
    scene = measures.scene("china", model, head)
    sizes = sinks.token_sizes(model, scene.inputs)
    states = model(**scene.inputs, output_hidden_states=True).hidden_states[1][0]
    layer = model.encoder.layer[1]
    values = layer.attention.v_proj(layer.norm1(states)).norm(dim=-1)
    torch.testing.assert_close(sizes["states"][1], states.norm(dim=-1) / states.norm(dim=-1).median())
    torch.testing.assert_close(sizes["values"][1], values / values.median())
    torch.testing.assert_close(sizes["largest"][1], states.abs().amax(-1) / states.square().mean(-1).sqrt())
    assert torch.equal(sizes["read"], cuts.read_most(model, scene.inputs)[:, 0])
    rows = [*sinks.token_rows(model, [scene])]
    assert [row.get("token") for row in rows] == ["class token", "most read patch", None]
    assert rows[1]["read"] == pytest.approx(sizes["read"][:, 1:].amax(1).tolist(), abs=1e-3)
    for score, tests in sinks.TESTS.items():
        made = [*sinks.map_rows(model, scene, score)]
        assert [(row["method"], row["sinks"]) for row in made] == [(m, s) for m in sinks.METHODS for s in sinks.MODES]
        assert all(set(tests) <= set(row) for row in made)


def test_a_run_without_tokens_is_compared_with_the_whole_one():
    one = cuts.Run(torch.tensor([[[0.6, 0.7, 0.1]]]), torch.tensor([[3.0, 4.0]]))
    two = cuts.Run(torch.tensor([[[0.6, 0.1, 0.7]]]), torch.tensor([[3.0, 0.0]]))
    assert one.changes(two)[:, 0].tolist() == pytest.approx([0.4, 1 / 3, 1 - 9 / 25])


def test_rows_of_cuts_are_those_of_single_knockouts():
    model, head = small()
    scenes = [measures.scene(name, model, head) for name in ("china", "flower")]
    rows = {(row["photo"], row.get("tokens")): row for row in cuts.outlier_rows(model, head, scenes)}
    assert len(rows) == 2 * (1 + len(cuts.CUTS)) and len(rows["china", None]["read"]) == 2
    inputs, before = scenes[1].inputs, cuts.run_of(model, head, scenes[1].inputs)
    with va.intervene(model, inputs, va.Knockout(keys="special")):
        expected = before.changes(cuts.run_of(model, head, inputs))[:, 0].tolist()
    row = rows["flower", "class token"]
    assert [row[name] for name in cuts.CHANGES] == pytest.approx(expected, rel=1e-3, abs=1e-6) and row["change"] > 0


def test_the_words_of_a_sentence():
    torch.manual_seed(1)
    model = BertModel(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8))
    model.eval().requires_grad_(False)

    class Tokenizer:
        all_special_ids = [1, 2]

        def __call__(self, text, return_tensors):
            ids = torch.tensor([[1, *(int(word) for word in text.split()), 2]])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def convert_ids_to_tokens(self, ids):
            return [str(number) for number in ids]

    def embed(*ids):
        return model(input_ids=torch.tensor([ids])).last_hidden_state.mean(1)

    rows = {row["method"]: row for row in measures.word_rows(model, Tokenizer(), "5 6 7", "8 9")}
    other = embed(1, 8, 9, 2)
    whole, without = (nn.functional.cosine_similarity(one, other) for one in (embed(1, 5, 6, 7, 2), embed(1, 5, 7, 2)))
    by_mode = [row for row in sinks.word_rows(model, Tokenizer(), "5 6 7", "8 9") if row["task"] == "sink words"]
    assert [(row["method"], row["sinks"]) for row in by_mode] == [(m, s) for m in sinks.METHODS for s in sinks.MODES]
    assert by_mode[0]["values"] == pytest.approx(rows["gradient(freeze=())"]["values"])
    assert rows["left out"]["words"] == ["5", "6", "7"]
    assert rows["left out"]["values"][1] == pytest.approx(float(whole - without), abs=1e-6)
    assert len(rows["gradient"]["values"]) == 3 and {"rollout", "integrated_gradients"} <= set(rows)


def test_a_mean_is_over_real_tokens():
    states = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert measures.pooled(states, torch.tensor([[1, 1, 0]])).tolist() == [[2.0]]


def stored() -> page.Stored:
    return page.Stored(json.loads(page.ROWS.read_text(encoding="utf-8")))


def test_the_page_is_that_of_the_rows():
    text = page.PAGE.read_text(encoding="utf-8")
    assert effects_table(page.effects(stored())) in text and len(re.findall(r"[^\s|]*\w[^\s|]*", text)) <= 1200
    rows = stored().rows
    assert {row["part"] for row in rows} >= {"conversion", "class-token", "heads", "sentences"}
    assert not [row["commit"] for row in rows if not re.fullmatch("[0-9a-f]{12,}", row["commit"])]
    assert {row["photo"] for row in stored().of("photo")} == set(SOURCES)
    assert {row["tokens"] for row in stored().of("cut")} == set(cuts.CUTS)
    assert len(stored().of("sinks")) == len(SOURCES) * len(sinks.METHODS) * len(sinks.MODES) * len(sinks.TESTS)
    assert len(stored().of("sink words")) == 2 * len(sinks.METHODS) * len(sinks.MODES)
    changes = torch.tensor(stored().without_heads("change")).view(12, 6)
    assert changes.argmax() == 6 * cuts.HEAD[0] + cuts.HEAD[1], "the head that is drawn"


def test_readme_has_the_stored_numbers_of_pointing():
    readme = (page.ROOT / "README.md").read_text(encoding="utf-8")
    glyphs = [hit for group in Readings(stored().rows).values(page.POINTING["gradient"], "pointing") for hit in group]
    assert f"{len(glyphs) // 3} formulas | {sum(glyphs) / len(glyphs):.3f} |" in page.pointing()
    said = f"for {sum(glyphs)} of {len(glyphs)} characters of {len(glyphs) // 3} formulas the largest entry lies on the glyph"
    assert said in " ".join(readme.split())


def test_pictures_are_there_and_small():
    pictures = re.findall(r"^!\[.+\]\((.+)\)$", page.page(), re.M)
    assert pictures == [
        *(f"real-{page.slug(score)}.jpg" for score in measures.TESTS),
        "real-heads.png",
        "real-cuts.jpg",
        "real-formula.jpg",
    ]
    for picture in pictures:
        assert 0 < (page.PAGE.parent / picture).stat().st_size < 160_000


def test_a_lead_is_that_of_gradient():
    numbers = [("one", "pointing", 0.9, 0.8), ("one", "deletion", 0.3, 0.1), ("two", "pointing", 0.5, 0.75)]
    assert [page.lead(pair) for pair in numbers] == pytest.approx([0.1, -0.2, -0.25])


def test_figures_are_means_over_photos_and_ranks_over_heads():
    head = {"part": "heads", "task": "heads"}
    rows = [
        {"task": "evaluation", "score": "s", "method": "gradient", "pointing": 1.0},
        {"task": "evaluation", "score": "s", "method": "gradient", "pointing": 0.0},
        {"task": "evaluation", "score": "s", "method": "gradient", "pointing": None},
        {**head, "relevancy": [[1, 2], [3, 4]], "fall": [[1, 2], [3, 4]]},
        {**head, "relevancy": [[1, 2], [3, 4]], "fall": [[8, 6], [4, 2]]},
    ]
    report = page.Stored({"rows": rows})
    assert report.value("s", "gradient", "pointing") == 0.5
    assert page.evaluation(report, "s").splitlines()[-1] == "| `gradient` | 0.500 |"
    by_mean, each = report.heads()
    assert (by_mean, *each) == pytest.approx((-1.0, 1.0, -1.0))  # mean falls are 4.5, 4, 3.5, 3


def test_the_words_of_a_page():
    facts = {"task": "words", "sentence": "a dog runs", "beside": "b", "cosine": 0.5, "words": ["a", "dog", "runs"]}
    values = {"left out": [-0.1, 0.3, 0.1], "gradient": [1.0, 2.0, 1.0], "rollout": [3.0, 2.0, 1.0]}
    text = page.words(page.Stored({"rows": [{**facts, "method": name, "values": v} for name, v in values.items()]}), "a dog runs")
    assert "| method | a | dog | runs | Spearman with the falls |" in text
    assert "| fall without it | -0.20 | 0.60 | 0.20 |  |" in text and "| `rollout` | 0.50 | 0.33 | 0.17 | -0.50 |" in text
