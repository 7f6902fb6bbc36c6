"""Explanations that users make by hand: any floats, names and pictures, damaged files, and answers of hundreds of words."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.interpret.made import answered, made
from tests.interpret.result.test_page import data as data_of
from vlattn_fast.interpret import Explanation
from vlattn_fast.interpret.result.figures.labels import Labels
from vlattn_fast.interpret.result.numbers import choices


def cells(page: str) -> list[list[float | None]]:
    """Those of the first map of each choice."""
    data = data_of(page)
    views = [choice["views"][""] for choice in data["methods"][0]["choices"]]
    return [part["figures"][0]["maps"][0]["cells"] for part in views]


def long_answer(tokens: int, prompt: int = 5) -> Explanation:
    """An answer of so many words, whose t-th map has its peak at patch t modulo 4."""
    image = torch.zeros(1, tokens, 2, 2)
    image.flatten(2)[0, torch.arange(tokens), torch.arange(tokens) % 4] = 1.0
    text = torch.rand(1, tokens, prompt + tokens)
    words = [[f"▁w{i}" for i in range(prompt + tokens)]]
    relevancy = {"language": torch.cat([image.flatten(2), text], -1)}
    ids = [list(range(prompt, prompt + tokens))]
    return Explanation(relevancy, image, [0], text, words=words, scores=torch.rand(1, tokens), answer=ids)


def test_relevancy_alone_is_drawn():
    explanation = Explanation({"text": torch.tensor([[0.1, 0.4, 0.2]]), "vision": torch.rand(1, 9)})
    figure = explanation.plot()
    assert [axis.get_title() for axis in figure.axes] == ["text", "vision"]
    np.testing.assert_allclose(figure.axes[0].patches[0].get_data().values, [0.1, 0.4, 0.2], rtol=1e-6)
    figure.canvas.draw()
    each = Explanation({"text": torch.rand(2, 3, 5)}, answer=[[4, 5, 6], [7]])
    figure = each.plot()
    tables = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    np.testing.assert_allclose(tables[0], each.relevancy["text"][0])
    assert tables[1].shape == (1, 5)
    figure.canvas.draw()


def test_maps_without_rows_are_of_one_row_each():
    explanation = Explanation({"vision": torch.rand(2, 5)}, torch.rand(2, 2, 2))
    assert explanation.image_samples == [0, 1]
    drawn = [axis.images[0].get_array() for axis in explanation.plot().axes if axis.images]
    np.testing.assert_array_equal(drawn[1], explanation.image[1])
    assert {entry.part for entry in explanation.top()} == {"patch"}


def test_text_without_words_is_numbered():
    explanation = Explanation({"text": torch.rand(1, 4)}, text=torch.tensor([[0.25, 1.0]]))
    (sample,) = choices.read_samples(explanation)
    assert [word.text for word in sample.words] == ["0", "1"] and sample.choices[0].values.tolist() == [0.25, 1.0]
    explanation.plot().canvas.draw()


R = {"text": torch.rand(2, 4)}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"relevancy": torch.rand(2, 4)}, TypeError, "relevancy must be a dict of towers .*; got a torch.float32 tensor"),
        ({"relevancy": {}}, TypeError, "relevancy must be a dict of towers"),
        ({"relevancy": {"text": [[0.5]]}}, TypeError, r"relevancy\['text'\] must be a torch.Tensor"),
        ({"relevancy": {"text": torch.rand(4)}}, ValueError, r"relevancy\['text'\] must be floating point of shape"),
        ({"relevancy": {"text": torch.ones(2, 4).long()}}, ValueError, r"relevancy\['text'\] must be floating point of shape"),
        ({"relevancy": R | {"vision": torch.rand(3, 4)}}, ValueError, r"relevancy\['vision'\] must have 2 samples, .* got 3"),
        ({"image": torch.rand(3, 2, 2)}, ValueError, "image_samples must name the sample of each of the 3 maps of image"),
        ({"image": torch.rand(2, 2, 2), "image_samples": [0, 2]}, ValueError, r"image_samples must be from 0 to 1; got \[0, 2\]"),
        ({"image": torch.rand(2, 0, 2)}, ValueError, r"image must have maps with at least one patch; got one of \(0, 2\)"),
        ({"image": torch.rand(2, 4)}, TypeError, "image must be a tensor"),
        ({"target": [0.5, 1]}, TypeError, "target must hold only integers; got float 0.5"),
        ({"target": torch.rand(2)}, TypeError, "target must hold only integers; got float 0"),
        ({"token_ids": [["a"], ["b"]]}, TypeError, "token_ids must hold only integers; got str 'a'"),
        ({"tower_images": {"a": torch.rand(1, 2, 2)}}, ValueError, r"image_samples must name .* the 1 maps of tower_images"),
        ({"scores": torch.rand(3)}, ValueError, "scores must have 2 samples, as relevancy has; got 3"),
        ({"text": torch.rand(2, 2), "words": [["a", "b", "c"], ["d"]]}, ValueError, "words must be at most 2 per sample, .* got"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        Explanation(**({"relevancy": R} | fields))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [made, answered])
def test_every_method_takes_every_float(tmp_path, make, dtype):
    base = make()
    explanation = make(
        relevancy={name: values.to(dtype).requires_grad_() for name, values in base.relevancy.items()},
        **{name: getattr(base, name).to(dtype) for name in ("image", "text", "scores")},
    )
    dtypes = {value.dtype for value in explanation.to_numpy()["relevancy"].values()}
    assert dtypes == {np.dtype("float32" if dtype is torch.bfloat16 else str(dtype)[6:])}
    loaded = Explanation.load(explanation.save(tmp_path / "one.safetensors"))
    for name, values in explanation.relevancy.items():
        assert loaded.relevancy[name].dtype == dtype and torch.equal(loaded.relevancy[name], values)
    photo = torch.rand(3, 6, 6).to(dtype)
    explanation.plot(photo).canvas.draw()
    assert explanation.save_html(tmp_path / "one.html", photo).stat().st_size > 2000
    np.testing.assert_allclose(explanation.to_pandas().value.sum(), base.to_pandas().value.sum(), rtol=2e-2)
    assert all(
        line["rank"] == pytest.approx(1, abs=1e-5) for line in explanation.compare(loaded).table if line["rank"] == line["rank"]
    )


@pytest.mark.parametrize("labels", [torch.tensor([7, 281]), list(torch.tensor([7, 281])), np.array([7, 281])], ids=type)
def test_labels_of_tensors_are_shown_as_numbers(labels):
    assert [part.get_suptitle()[:4].strip() for part in made().plot(labels=labels).subfigs] == ["7", "281"]
    page = made().to_html(labels=labels)
    assert "<span>7</span>" in page and "<span>281</span>" in page and "tensor(" not in page


@pytest.mark.parametrize("labels", ["ab", {7, 8}, {0: "a", 1: "b"}, b"ab", (name for name in "ab")], ids=type)
def test_labels_without_an_order_are_refused(labels):
    with pytest.raises(TypeError, match="labels must be a name for each sample; got"):
        made().plot(labels=labels)


@pytest.mark.parametrize("of", [torch.tensor, np.array, lambda rows: [tuple(map(np.int64, row)) for row in rows]])
def test_integers_of_any_kind_are_saved_and_drawn(tmp_path, of):
    values = torch.rand(2, 1, 3)
    fields = {"token_ids": [[4, 5, 6], [7, 8, 9]], "answer": [[6], [9]], "text_positions": [[0, 1, 2], [0, 1, 2]]}
    explanation = Explanation({"language": values}, text=values, **{name: of(rows) for name, rows in fields.items()})
    again = Explanation.load(explanation.save(tmp_path / "one.safetensors"))
    for name, rows in fields.items():
        assert getattr(explanation, name) == getattr(again, name) == rows
    explanation.plot().canvas.draw()
    assert len(explanation.to_pandas()) and len(explanation.to_html())
    target = Explanation(R, target=of([[3, 281]])[0]).save(tmp_path / "two.safetensors")
    assert Explanation.load(target).target == [3, 281]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 1}, TypeError, "samples must be numbers from 0; got int 1"),
        ({"samples": [0.5]}, TypeError, "samples must be an int; got float 0.5"),
        ({"alpha": "much"}, TypeError, "alpha must be a real number"),
        ({"cmap": None}, ValueError, "cmap must be the name of a matplotlib colormap"),
        ({"crop": "left"}, ValueError, "crop must be x1, y1, x2, y2 relative to the image"),
        ({"image": np.zeros((0, 4, 3))}, ValueError, r"image must have at least one pixel; got shape \(0, 4, 3\)"),
        ({"image": torch.zeros(3, 0, 0)}, ValueError, "image must have"),
        ({"image": []}, ValueError, "image must be one image or 2 of them"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        made().plot(**options)


def test_bad_companions_are_named(tmp_path):
    for others in (made(), [1]):
        with pytest.raises(TypeError, match="others must be a sequence of explanations; got"):
            made().to_html(others=others)
    with pytest.raises(TypeError, match="other must be an Explanation; got int 3"):
        made().compare(3)
    with pytest.raises(ValueError, match="path must be a file that can be written; got"):
        made().save_html(tmp_path)


def test_a_comparison_of_nan_is_nan():
    left = Explanation({"text": torch.tensor([[0.1, torch.nan, 0.3], [0.1, 0.2, 0.3]])})
    right = Explanation({"text": torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])})
    for comparison in (left.compare(right), right.compare(left), left.compare(left)):
        assert comparison.rank["text"].isnan().tolist() == comparison.cosine["text"].isnan().tolist() == [True, False]
    assert [entry.position for entry in left.top(3)[:3]] == [2, 0, 1]  # NaN is last


def test_one_nan_does_not_hide_a_map(tmp_path):
    image = torch.rand(2, 3, 4)
    image[0, 1, 1] = torch.nan
    explanation = made(image=image, text=torch.tensor([[0.1, torch.nan, 0.2], [0.3, 0.0, 0.0]]))
    known = image[0][~image[0].isnan()]
    drawn = explanation.plot().axes[0].images[0]
    assert drawn.get_clim() == pytest.approx((0, known.max().item()))
    explanation.plot(np.ones((6, 8, 3))).savefig(tmp_path / "one.png")
    first, second = cells(explanation.to_html())
    assert first[5] is None and None not in first[:5] + first[6:] + second
    assert min(first[:5] + first[6:]) == 0 and max(first[:5] + first[6:]) == 1000


def test_load_names_what_is_broken(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    whole = made().save(tmp_path / "whole.safetensors")
    broken = tmp_path / "broken.safetensors"
    values = {f"relevancy.{name}": tensor for name, tensor in made().relevancy.items()}
    facts = json.dumps({"format": "vlattn_fast.explanation.7", "towers": {"relevancy": ["vision"]}})
    damages = [
        lambda: broken.write_bytes(whole.read_bytes()[:300]),
        lambda: broken.write_bytes(whole.read_bytes()[:-40]),
        lambda: broken.write_bytes(b""),
        lambda: safetensors.save_file(values, broken, metadata={"explanation": "{no json"}),
        lambda: safetensors.save_file(values, broken, metadata={"explanation": "[]"}),
        lambda: safetensors.save_file(values, broken, metadata={"explanation": facts}),
    ]
    for damage in damages:
        damage()
        with pytest.raises(ValueError, match=f"path must be a file that Explanation.save wrote .*; got {re.escape(str(broken))}"):
            Explanation.load(broken)
    with pytest.raises(ValueError, match=f"path must be a file .*; got {re.escape(str(tmp_path))}, which is a directory"):
        Explanation.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        Explanation.load(tmp_path / "none")


@pytest.mark.slow
def test_many_words_share_a_sheet():
    from vlattn_fast.interpret.result.figures import figure

    short, long = long_answer(40).plot(), long_answer(300).plot()
    assert len(short.axes) > 80 and len(long.axes) == 4  # sheet and table, each with a bar
    sheet = long.axes[0].images[0].get_array()
    (labels,) = (artist.labels for artist in long.axes[0].get_children() if isinstance(artist, Labels))
    assert [label for _, _, label in labels] == [f"w{i}" for i in range(5, 305)]
    brightness = sheet[..., :3].sum(-1).astype(int)
    for number in (0, 17, 299):
        x, y, _ = labels[number]
        tile = brightness[int(y) + 3 :, int(x) :][: figure._TILE, : figure._TILE]
        half = figure._TILE // 2
        quarters = [tile[i : i + half, j : j + half].mean() for i in (0, half) for j in (0, half)]
        assert int(np.argmax(quarters)) == number % 4  # where the word's map has its peak
    table = long.axes[2] if long.axes[2].get_yticklabels() else long.axes[1]
    assert len(table.get_xticklabels()) <= figure._NAMES and len(table.get_yticklabels()) <= figure._MANY
    assert long.get_size_inches()[1] < 40
    long.draw_without_rendering()


def test_a_sheet_lies_on_the_photo():
    explanation = long_answer(50)
    figure = explanation.plot(np.full((20, 40, 3), 0.5), crop=(0.5, 0, 1, 1))
    axis = figure.axes[0]
    (labels,) = (artist.labels for artist in axis.get_children() if isinstance(artist, Labels))
    assert [label for _, _, label in labels][:2] == ["", "w5"]  # the photo alone comes first
    sheet = axis.images[0].get_array()[..., :3]
    x, y = labels[1][:2]
    tile = sheet[y + 3 :][:36, x : x + 72]
    assert (tile[:, :36] == 128).all() and (tile[:18, 36:54] != 128).any() and (tile[27:, 63:] == 128).all()
    regions = replace(
        explanation,
        image=None,
        image_samples=None,
        regions=torch.rand(1, 50, 2),
        boxes=torch.tensor([[[0, 0, 0.5, 1], [0.5, 0, 1, 1]]]),
    )
    regions.plot(np.full((20, 40, 4), 0.5)).draw_without_rendering()
