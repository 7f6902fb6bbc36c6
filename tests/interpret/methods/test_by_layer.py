"""Maps of single layers and heads, against the rows of stored maps, and small multiples of them."""

import re

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.cases import CASES, lively
from tests.helpers.interpret.decoder_cases import DECODERS
from tests.helpers.interpret.stored_maps import with_floats
from vlattn_fast.interpret import LayerExplanation, explain, explain_layers

pytestmark = pytest.mark.usefixtures("published")


def stored(model, inputs, score, prefix: str = "") -> list[tuple[Tensor, Tensor]]:
    """The maps (B, H, N, N) of each layer and the gradients there of a score."""
    model.set_attn_implementation("literal")  # eager, with softmax in float64
    try:
        outputs = model(**inputs, output_attentions=True)
        maps = getattr(outputs, prefix).attentions if prefix else outputs.attentions
        return list(zip(maps, torch.autograd.grad(score(outputs).sum(), maps), strict=True))
    finally:
        model.set_attn_implementation("sdpa")


def rows_of(maps, position: Tensor, method: str) -> Tensor:
    """(L, H, B, N), the rows at `position` (B,) of each map of the method."""
    samples = torch.arange(len(position))
    made = [(a * g).clamp(min=0) if method == "gradient" else a for a, g in maps]
    return torch.stack([one[samples, :, position].transpose(0, 1) for one in made]).detach()


@pytest.mark.parametrize("method", ["gradient", "attention"])
@pytest.mark.parametrize("case", ["clip", "vit", "bert"], indirect=True)
def test_each_layer_and_each_head(case, request, method):
    model, inputs = case.model.double(), with_floats(case.inputs, torch.float64)
    plain = explain(model, inputs)
    towers = {"clip": {"vision": "vision_model_output", "text": "text_model_output"}}
    of_case = towers.get(request.node.callspec.params["case"], {next(iter(plain.relevancy)): ""})
    by_head = explain_layers(model, inputs, method=method, per="head")
    by_layer = explain_layers(model, inputs, method=method, per="layer")
    assert isinstance(by_head, LayerExplanation) and (by_head.method, by_layer.method) == (method, method)
    torch.testing.assert_close(by_head.scores, plain.scores)
    assert by_head.target == plain.target
    for tower, prefix in of_case.items():
        maps = stored(model, inputs, lambda outputs: case.score(outputs, inputs), prefix)
        want = rows_of(maps, plain.position[tower], method)
        assert want.abs().amax((1, 2, 3)).min() > 1e-6  # no layer is zero throughout
        torch.testing.assert_close(by_head.relevancy[tower], want, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(by_layer.relevancy[tower], want.mean(1), rtol=1e-8, atol=1e-12)
        assert by_head.layers[tower] == [0, 1, 2] and by_head.heads[tower] == [0, 1, 2, 3]
        chosen = explain_layers(model, inputs, method=method, per="head", layers=[-1, 0], heads=[3, 1])
        torch.testing.assert_close(chosen.relevancy[tower], want[[2, 0]][:, [3, 1]], rtol=1e-8, atol=1e-12)
        assert chosen.layers[tower] == [2, 0] and chosen.heads[tower] == [3, 1]
        some = explain_layers(model, inputs, method=method, per="layer", layers=[1], heads=[2, 0])
        torch.testing.assert_close(some.relevancy[tower], want[[1]][:, [2, 0]].mean(1), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", ["clip", "llava", "uniter", "qwen2_5_vl"], indirect=True)
def test_one_map_is_an_explanation(case):
    """Its patches and words are those of its row."""
    plain, whole = explain(case.model, case.inputs), explain_layers(case.model, case.inputs, per="head")
    assert len(whole) == len(plain)
    one = whole.at(1, 2)
    for name, row in one.relevancy.items():
        assert torch.equal(row, whole.relevancy[name][1, 2]) and row.shape == plain.relevancy[name].shape
    assert (
        one.token_ids == plain.token_ids
        and one.image_samples == plain.image_samples
        and one.text_positions == plain.text_positions
    )
    for part in ("text", "regions", "image"):
        mine, other = getattr(one, part), getattr(plain, part)
        assert (mine is None) == (other is None)
        for one_map, like in zip(mine or (), other or (), strict=True) if isinstance(other, tuple) else [(mine, other)]:
            assert mine is None or (one_map.shape == like.shape and one_map.dtype == like.dtype)
    if one.text is not None:
        tower = whole.owners["text"]
        for row, places in enumerate(one.text_positions):
            assert torch.equal(one.text[row][: len(places)], one.relevancy[tower][row][places])
    torch.testing.assert_close(whole.at(1).relevancy, {name: row[1].mean(0) for name, row in whole.relevancy.items()})


def test_the_rows_of_a_whole_answer():
    model = lively(DECODERS["LlamaForCausalLM"]().model).eval().double()
    prompt, answer = [1, 4, 9, 11], [17, 30]
    got = explain_layers(model, {"input_ids": torch.tensor([prompt])}, answer=answer, per="head")
    whole = {"input_ids": torch.tensor([[*prompt, *answer]])}
    maps = stored(model, whole, lambda o: o.logits[0, 3:5].log_softmax(-1)[[0, 1], answer])
    want = sum(rows_of(maps, torch.tensor([place]), "gradient") for place in (3, 4))
    torch.testing.assert_close(got.relevancy["language"], want, rtol=1e-6, atol=1e-9)
    assert got.text.shape == (3, 4, 1, 5)


@pytest.mark.parametrize("case", ["siglip"], indirect=True)
def test_behind_a_pooling_head(case):
    """The pooling head's own row is carried into each layer's map."""
    model, inputs = case.model.double(), with_floats(case.inputs, torch.float64)
    got = explain_layers(model, inputs, method="attention", per="head")
    row = explain(model, inputs, method="attention").relevancy["vision"]  # that of the pooling head
    maps = stored(model, inputs, lambda outputs: case.score(outputs, inputs), "vision_model_output")
    want = torch.stack([torch.einsum("bn,bhnm->hbm", row, a) for a, _ in maps]).detach()
    torch.testing.assert_close(got.relevancy["vision"], want, rtol=1e-8, atol=1e-12)


def test_towers_of_different_depths():
    """A map of a layer that one tower lacks is that of the other alone."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48)
    text = dict(sizes, num_hidden_layers=2, num_attention_heads=2, vocab_size=60, bos_token_id=57, eos_token_id=58)
    vision = dict(sizes, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8)
    config = transformers.CLIPConfig(text_config=dict(text, max_position_embeddings=12), vision_config=vision)
    model = lively(transformers.CLIPModel(config)).eval()
    inputs = {"input_ids": torch.tensor([[57, 5, 6, 58], [57, 7, 8, 58]]), "pixel_values": torch.randn(2, 3, 16, 16)}
    got = explain_layers(model, inputs, per="head")
    assert {name: tuple(row.shape) for name, row in got.relevancy.items()} == {"vision": (3, 4, 2, 5), "text": (2, 2, 2, 4)}
    assert set(got.at(1, 1).relevancy) == {"vision", "text"} and set(got.at(2, 1).relevancy) == {"vision"}
    assert got.at(1, 3).text is None and got.at(1, 3).token_ids is None and got.at(1, 3).image.shape == (2, 2, 2)
    assert len([*got.items()]) == 12
    last = explain_layers(model, inputs, per="layer", layers=[-1])  # the first number is that of the text alone
    assert last.layers == {"vision": [2], "text": [1]} and last.image_samples == got.image_samples == [0, 1]
    with pytest.raises(ValueError, match=r"layers must be from -2 to 1 in tower 'text'; got 2"):
        explain_layers(model, inputs, per="layer", layers=[2])
    pytest.importorskip("matplotlib")
    got.plot()


@pytest.mark.parametrize("case", ["clip", "qwen2_5_vl"], indirect=True)
def test_saved_and_read_again(case, tmp_path):
    got = explain_layers(case.model, case.inputs, per="head", layers=[2, 0])
    again = LayerExplanation.load(got.save(tmp_path / "layers.safetensors"))
    assert repr(again) == repr(got) and (again.layers, again.heads, again.owners) == (got.layers, got.heads, got.owners)
    for name in ("text", "image"):
        mine, read = getattr(got, name), getattr(again, name)
        pairs = zip(mine, read, strict=True) if isinstance(mine, tuple) else [(mine, read)]
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match="not a file of Explanation. Load it with vlattn_fast.interpret.LayerExplanation.load"):
        va.Explanation.load(tmp_path / "layers.safetensors")
    explain(case.model, case.inputs).save(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="not a file of LayerExplanation. Load it with vlattn_fast.Explanation.load"):
        LayerExplanation.load(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_a_table_has_the_layer_and_the_head(case):
    pytest.importorskip("pandas")
    got = explain_layers(case.model, case.inputs, per="head", layers=[1])
    frame = got.to_pandas()
    assert list(frame.columns[:2]) == ["layer", "head"] and set(frame["layer"]) == {1} and set(frame["head"]) == {0, 1, 2, 3}
    row = frame[(frame["head"] == 2) & (frame["tower"] == "vision") & (frame["sample"] == 0)]
    assert sorted(row["value"]) == pytest.approx(sorted(got.image[0, 2, 0].flatten().tolist()), rel=1e-5)
    assert "head" not in explain_layers(case.model, case.inputs, per="layer").to_pandas().columns


@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_small_multiples(case, per, tmp_path):
    """One picture a map, over the photo; the strongest patch is the hottest place of its picture."""
    pytest.importorskip("matplotlib")
    import base64
    import io

    import numpy as np
    from PIL import Image

    got = explain_layers(case.model, case.inputs, per=per)
    photo = Image.new("RGB", (200, 200), "white")
    figure = got.plot(photo, samples=[0])
    figure.savefig(tmp_path / "layers.png")
    maps, words = figure.axes  # the words below the maps
    ticks = [label.get_text() for label in (*maps.get_yticklabels(), *maps.get_xticklabels())]
    names = {text.get_text() for text in maps.texts} | set(ticks)
    assert names == {*(f"layer {i}" for i in range(3)), *(f"head {h}" for h in range(4) if per == "head")}
    assert [label.get_text() for label in words.get_xticklabels()] == [str(token) for token in case.facts["tokens"][0]]
    page = got.save_html(tmp_path / "layers.html", [photo] * 3).read_text()
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(sources) == 3 * (3 if per == "layer" else 12)
    for number, (_, one) in enumerate(got.items()):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sources[number]))), dtype=float)
        assert pixels.shape == (112, 112, 3)
        darkness = 255 - pixels.mean(-1)  # white is left where a map is small
        y, x = divmod(int(one.image[0].argmax()), 4)
        patches = darkness.reshape(4, 28, 4, 28).mean((1, 3))
        assert patches[y, x] > 0.8 * patches.max() and patches.min() < 0.5 * patches.max()
    assert page.count("<tr>") == 3 * (1 + (3 if per == "layer" else 12))


@pytest.mark.parametrize("case", ["bert", "uniter"], indirect=True)
def test_multiples_without_maps(case, tmp_path):
    pytest.importorskip("matplotlib")
    got = explain_layers(case.model, case.inputs, per="layer")
    got.plot().savefig(tmp_path / "layers.png")
    assert "<table>" in got.to_html()
    with pytest.raises(ValueError, match="image must be None for an explanation without maps|image must be"):
        explain_layers(CASES["bert"]().model, CASES["bert"]().inputs, per="layer").plot(torch.zeros(4, 4, 3))


@pytest.mark.parametrize("case", ["vit"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": None}, "per must be one of"),
        ({"per": "token"}, "per must be one of"),
        ({"per": "layer", "layers": []}, "layers must be numbers that differ, at least one; got"),
        ({"per": "layer", "layers": [1, 1]}, r"layers must be numbers that differ, at least one; got \[1, 1\]"),
        ({"per": "layer", "layers": [2, -1]}, "layers must be numbers that differ in tower 'vision'"),
        ({"per": "layer", "layers": [3]}, "layers must be from -3 to 2 in tower 'vision'; got 3"),
        ({"per": "head", "heads": [-5]}, "heads must be from -4 to 3 in tower 'vision'; got -5"),
        ({"per": "head", "method": "rollout"}, "method must be 'gradient' or 'attention', which have a map of each layer; got"),
        ({"method": va.methods.InputGradient()}, "method must be 'gradient' or 'attention', .*; got 'input_gradient'"),
        (
            {"method": va.methods.Gradient(start_layer=1)},
            r"method must have neither start_layer nor through_connector; got 'gradient\(.*start_layer=1\)'",
        ),
        ({"method": va.methods.Gradient(through_connector=True)}, "neither start_layer nor through_connector"),
    ],
)
def test_bad_options(case, options, message):
    with pytest.raises(ValueError, match=message):
        explain_layers(case.model, case.inputs, **options)


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_bad_kinds(case):
    with pytest.raises(TypeError, match="layers must be"):
        explain_layers(case.model, case.inputs, per="layer", layers=2)
    with pytest.raises(TypeError, match="heads must be"):
        explain_layers(case.model, case.inputs, per="head", heads=["first"])
    got = explain_layers(case.model, case.inputs, per="layer")
    for name in ("overlay", "top", "compare"):
        with pytest.raises(
            ValueError, match=rf"{name} needs one map; got a LayerExplanation. Choose a map with at\(layer, head\)"
        ):
            getattr(got, name)(None)
    with pytest.raises(ValueError, match=r"layer and head must be among .*; got layer 7"):
        got.at(7)
    with pytest.raises(ValueError, match="head must be None for an explanation with per='layer'; got 0"):
        got.at(0, 0)
    with pytest.raises(ValueError, match="others must be empty for a LayerExplanation; got 1 explanations"):
        got.to_html(others=[got])
