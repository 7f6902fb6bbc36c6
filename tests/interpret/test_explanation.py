"""The Explanation object: what it hands out, writes, reads and draws."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.interpret.cases import CASES
from vlattn_fast.interpret import Explanation, explain


def made(**parts) -> Explanation:
    values = {
        "relevancy": {"vision": torch.rand(2, 13), "text": torch.rand(2, 6)},
        "image": torch.rand(2, 3, 4),
        "image_rows": [0, 1],
        "text": torch.tensor([[0.1, -0.4, 0.2], [0.3, 0.0, 0.0]]),
        "token_ids": [[7, 8, 9], [5]],
        "scores": torch.tensor([1.5, -2.0]),
        "target": [0, 1],
        "method": "weighted",
        "start_layer": -1,
    }
    return Explanation(**(values | parts))


def same(left: Explanation, right: Explanation) -> None:
    for name in ("text", "regions", "boxes", "scores"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None and b is None) or torch.equal(a, b)
    images = [e.image if isinstance(e.image, tuple) else () if e.image is None else (e.image,) for e in (left, right)]
    assert type(left.image) is type(right.image)
    assert all(torch.equal(a, b) for a, b in zip(*images, strict=True))
    assert list(left.relevancy) == list(right.relevancy)
    assert all(torch.equal(left.relevancy[t], right.relevancy[t]) for t in left.relevancy)
    for name in ("image_rows", "token_ids", "words", "target", "method", "start_layer"):
        assert getattr(left, name) == getattr(right, name)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"image": (torch.rand(2, 4), torch.rand(4, 2))},
        {"image": None, "image_rows": None, "regions": torch.rand(2, 3), "boxes": torch.rand(2, 3, 4)},
        {"words": [["a", "<b>", "c"], ["é"]]},
        {"text": None, "token_ids": None, "scores": None, "target": None},
        {"relevancy": {"vision": torch.rand(2, 13).expand(2, 13)[:, ::2]}},
        {"relevancy": {"vision": torch.rand(2, 13, dtype=torch.float64)}},
    ],
)
def test_save_and_load(tmp_path, parts):
    explanation = made(**parts)
    same(Explanation.load(explanation.save(tmp_path / "one.safetensors")), explanation)


def test_load_refuses_other_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must be a file that Explanation.save wrote"):
        Explanation.load(tmp_path / "other.safetensors")


def test_to_numpy():
    arrays = made().to_numpy()
    assert isinstance(arrays["relevancy"]["vision"], np.ndarray) and arrays["image"].shape == (2, 3, 4)
    assert "regions" not in arrays
    uneven = made(image=(torch.rand(2, 4), torch.rand(4, 2).bfloat16())).to_numpy()
    assert [part.shape for part in uneven["image"]] == [(2, 4), (4, 2)]


def test_tokens():
    explanation = made()
    assert explanation.tokens == [["7", "8", "9"], ["5"]]

    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return [f"w{i}" for i in ids]

    class Processor:
        tokenizer = Tokenizer()

    for tokenizer in (Tokenizer(), Processor()):
        assert explanation.with_tokens(tokenizer).tokens == [["w7", "w8", "w9"], ["w5"]]
    assert explanation.tokens == [["7", "8", "9"], ["5"]]
    with pytest.raises(ValueError, match="tokenizer must have text to name; got"):
        made(text=None, token_ids=None).with_tokens(Tokenizer())


def test_repr_is_short():
    assert repr(made()) == "Explanation(method='weighted', relevancy={'vision': (2, 13), 'text': (2, 6)}, target=[0, 1])"


# --- pictures ---


def pictures():
    from PIL import Image

    array = np.random.default_rng(0).random((20, 30, 3))
    return [
        None,
        array,
        torch.tensor(array).permute(2, 0, 1),
        (array * 255).astype(np.uint8),
        Image.fromarray((array * 255).astype(np.uint8)),
        Image.fromarray((array[..., 0] * 255).astype(np.uint8)),
        [array, array[:10]],
        torch.rand(2, 3, 20, 30),
        torch.tensor((array * 255).astype(np.uint8)),
    ]


@pytest.mark.parametrize("index", range(9))
def test_plot(index):
    from matplotlib.figure import Figure

    figure = made().plot(pictures()[index])
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 4
    maps = figure.axes[0].images
    if index in (1, 2, 3, 4, 8):
        under = maps[0].get_array()
        np.testing.assert_allclose(under / (255 if under.dtype == np.uint8 else 1), pictures()[1], atol=1 / 255)
    assert len(maps) == (1 if index == 0 else 2)
    drawn = maps[-1].get_array()
    assert drawn.shape == (3, 4) and drawn.min() == 0 and drawn.max() == 1
    bars = figure.axes[1].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], [0.1, -0.4, 0.2], rtol=1e-6)
    figure.canvas.draw()


def test_plot_of_rows_words_and_constants():
    constant = made(image=torch.full((2, 3, 4), 0.5), words=[["$a", "_b_", "^"], ["\\x"]])
    figure = constant.plot(rows=[1])
    assert len(figure.axes) == 2 and (figure.axes[0].images[0].get_array() == 0).all()
    figure.canvas.draw()
    constant.plot(rows=[0]).canvas.draw()
    with pytest.raises(ValueError, match="rows must be from 0 to 1; got 2"):
        constant.plot(rows=[2])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros(3), r"\(3,\)"),
        (np.zeros((4, 4, 7)), r"\(4, 4, 7\)"),
        ([np.zeros((4, 4, 3))] * 3, "got 3"),
        (torch.randn(3, 8, 8), "normalised"),
    ],
)
def test_bad_images(image, words):
    with pytest.raises(ValueError, match=words):
        made().plot(image)


def test_plot_of_several_images_and_of_regions():
    several = made(image=(torch.rand(2, 4), torch.rand(4, 2), torch.rand(2, 2)), image_rows=[0, 0, 1])
    figure = several.plot(torch.rand(3, 3, 8, 8))
    assert [len(axis.images) for axis in figure.axes] == [2, 2, 0, 2, 0, 0]
    figure.canvas.draw()
    corners = torch.rand(2, 3, 2) / 2
    regions = made(image=None, image_rows=None, regions=torch.rand(2, 3), boxes=torch.cat([corners, corners + 0.3], -1))
    figure = regions.plot(torch.rand(3, 8, 8))
    assert len(figure.axes[0].patches) == 3
    figure.canvas.draw()


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_html(case, tmp_path):
    explanation = explain(case.model, case.inputs)
    explanation = replace(explanation, words=[[f"<{i}> & http" for i in row] for row in explanation.token_ids])
    pixels = case.inputs["pixel_values"].sigmoid()
    page = explanation.save_html(tmp_path / "page.html", pixels, title="A <b> title").read_text("utf-8")
    assert page.count("data:image/png;base64,iVBOR") == 3
    bare = re.sub(r"base64,[^\"]+", "", page)
    assert "A &lt;b&gt; title" in bare and "&amp; http<" in bare and "<b> title" not in bare
    for outside in ("http:", "https:", "//", "<script", "<link", "@import", "url("):
        assert outside not in bare
    assert bare.count('class="words"') == 3 and "gradient" in bare
    without = Explanation({"text": torch.rand(1, 3)}).save_html(tmp_path / "bare.html").read_text("utf-8")
    assert "<img" not in without and "<span" not in without


@pytest.mark.parametrize("case", list(CASES), indirect=True)
def test_whole_way(case, tmp_path):
    explanation = explain(case.model, case.inputs)
    same(Explanation.load(explanation.save(tmp_path / "a.safetensors")), explanation)
    explanation.plot().canvas.draw()
    assert explanation.save_html(tmp_path / "a.html").stat().st_size > 2000


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, torch; before = set(sys.modules); import vlattn_fast.interpret; "
        "print({'matplotlib', 'jinja2', 'transformers', 'safetensors', 'PIL'} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
