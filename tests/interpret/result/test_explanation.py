"""The Explanation object: what it hands out, writes, reads and draws."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from tests.helpers import programs
from tests.helpers.interpret.cases import CASES
from tests.helpers.interpret.made import ANSWERS, PROMPTS, answered, made
from vlattn_fast.interpret import Explanation, explain
from vlattn_fast.interpret.probing.report import ProbeReport
from vlattn_fast.interpret.result.numbers.choices import read_samples


def flat(explanation: Explanation) -> dict[str, torch.Tensor]:
    """Every tensor by a name that tells its place, kinds of containers included."""
    tensors = {}
    for name in ("relevancy", "image", "text", "regions", "boxes", "scores", "position", "contribution", "tower_images"):
        value = getattr(explanation, name)
        for key, part in value.items() if isinstance(value, dict) else [(None, value)]:
            parts = part if isinstance(part, tuple) else () if part is None else (part,)
            tensors |= {(name, key, type(part).__name__, i): one for i, one in enumerate(parts)}
    return tensors


def same(left: Explanation, right: Explanation) -> None:
    a, b = flat(left), flat(right)
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("image_samples", "token_ids", "words", "target", "method", "start_layer", "answer"):
        assert getattr(left, name) == getattr(right, name)
    assert left.per_token == right.per_token and (left.position is None) == (right.position is None)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"image": (torch.rand(2, 4), torch.rand(4, 2))},
        {"image": None, "image_samples": None, "regions": torch.rand(2, 3), "boxes": torch.rand(2, 3, 4)},
        {"words": [["a", "<b>", "c"], ["é"]]},
        {"text": None, "token_ids": None, "scores": None, "target": None},
        {"relevancy": {"vision": torch.rand(2, 13).expand(2, 13)[:, ::2]}},
        {"relevancy": {"vision": torch.rand(2, 13, dtype=torch.float64)}},
        {"tower_images": {"a.b": torch.rand(2, 2, 2), "c": (torch.rand(2, 4), torch.rand(4, 2))}},
        {"tower_images": {}, "position": {}},
        {"contribution": {"vision": torch.rand(2, 13)}},
    ],
)
def test_save_and_load(tmp_path, parts):
    explanation = made(**parts)
    same(Explanation.load(explanation.save(tmp_path / "one.safetensors")), explanation)


def test_an_answer_is_saved_and_loaded(tmp_path):
    for parts in ({}, {"image": (torch.rand(3, 2, 3), torch.rand(3, 1, 2))}):
        explanation = answered(**parts)
        same(Explanation.load(explanation.save(tmp_path / "one.safetensors")), explanation)


def test_save_refuses_what_cannot_be_written(tmp_path):
    explanation = Explanation({"text": torch.ones(1, 3)})
    for path in (tmp_path, tmp_path / "none" / "one.safetensors"):
        with pytest.raises(ValueError, match="path must be a file that can be written; got"):
            explanation.save(path)
        with pytest.raises(ValueError, match="path must be a file that can be written; got"):
            ProbeReport([], {}).save(path)
    if Path("/proc/self").is_dir():  # a folder that is there and takes no file
        for save in (explanation.save, explanation.save_html):
            with pytest.raises(ValueError, match="path must be a file that can be written; got .*: nothing can be made in /proc"):
                save("/proc/x")


def test_to_numpy():
    arrays = made().to_numpy()
    assert isinstance(arrays["relevancy"]["vision"], np.ndarray) and arrays["image"].shape == (2, 3, 4)
    assert "regions" not in arrays
    uneven = made(image=(torch.rand(2, 4), torch.rand(4, 2).bfloat16())).to_numpy()
    assert [part.shape for part in uneven["image"]] == [(2, 4), (4, 2)]
    answer = answered(tower_images={"vision": torch.rand(2, 3, 4, 4)}).to_numpy()
    assert answer["image"].shape == (2, 3, 2, 3) and answer["scores"].shape == (2, 3)
    assert answer["position"]["language"].dtype == np.int64 and answer["tower_images"]["vision"].shape == (2, 3, 4, 4)


class Tokenizer:
    def convert_ids_to_tokens(self, ids):
        return [f"w{i}" for i in ids]


def test_tokens():
    explanation = made()
    assert explanation.tokens == [["7", "8", "9"], ["5"]]

    class Processor:
        tokenizer = Tokenizer()

    for tokenizer in (Tokenizer(), Processor()):
        assert explanation.with_tokens(tokenizer).tokens == [["w7", "w8", "w9"], ["w5"]]
    assert explanation.tokens == [["7", "8", "9"], ["5"]]
    with pytest.raises(ValueError, match="with_tokens needs an explanation with text; got one without token_ids"):
        made(text=None, token_ids=None).with_tokens(Tokenizer())


def test_an_answers_tokens():
    explanation = answered()
    assert explanation.per_token and not made().per_token and made().answer_tokens is None and made().self_relevancy == {}
    assert explanation.tokens == [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert explanation.answer_tokens == ANSWERS
    assert replace(explanation, words=None).answer_tokens == [["14", "15", "16"], ["21", "22"]]
    assert replace(explanation, words=None, token_ids=None).answer_tokens == [["14", "15", "16"], ["21", "22"]]

    assert explanation.with_tokens(Tokenizer()).answer_tokens == [["w14", "w15", "w16"], ["w21", "w22"]]


def test_what_a_read_row_puts_on_itself():
    explanation = answered()
    positions = explanation.position["language"][..., None]
    assert torch.equal(explanation.self_relevancy["language"], torch.zeros(2, 3, 14).scatter(2, positions, 1.25))
    parts = {name: getattr(explanation, name).sum(1) for name in ("image", "text")}
    summed = replace(explanation, relevancy={"language": explanation.relevancy["language"].sum(1)}, **parts)
    for row in range(2):
        place = explanation.position["language"][row]
        expected = torch.zeros(14).scatter(0, place, summed.relevancy["language"][row, place])
        assert not summed.per_token and torch.equal(summed.self_relevancy["language"][row], expected)
    alone = made(position={"text": torch.tensor([5, 2])})
    entries = alone.relevancy["text"].gather(1, torch.tensor([[5], [2]]))
    assert torch.equal(alone.self_relevancy["text"], torch.zeros(2, 6).scatter(1, torch.tensor([[5], [2]]), entries))
    mean = made(contribution={"text": torch.full((2, 6), 0.25)})
    torch.testing.assert_close(mean.self_relevancy["text"], mean.relevancy["text"] - 0.25)
    with pytest.raises(ValueError, match="must have the shape of relevancy"):
        made(contribution={"text": torch.ones(2, 5)})


def test_repr_is_short():
    assert repr(made()) == "Explanation(method='weighted', relevancy={'vision': (2, 13), 'text': (2, 6)}, target=[0, 1])"


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
        [array, array[::2, ::2]],
        torch.rand(2, 3, 20, 30),
        torch.tensor((array * 255).astype(np.uint8)),
    ]


def titles(figure) -> list[str]:
    """Of the rows of a figure, and of its panels."""
    return [part.get_suptitle() for part in figure.subfigs] + [axis.get_title() for axis in figure.axes if axis.get_title()]


def written(axis) -> dict[str, float]:
    """The words of a panel with the opacity of their colour."""
    from matplotlib.text import Text

    texts = [text for text in axis.findobj(Text) if text.get_bbox_patch() is not None]
    return {text.get_text(): text.get_bbox_patch().get_facecolor()[3] for text in texts}


@pytest.mark.parametrize("index", range(9))
def test_plot(index):
    from matplotlib.figure import Figure

    explanation = made()
    figure = explanation.plot(pictures()[index])
    assert isinstance(figure, Figure)
    row = [axis for axis in figure.axes if axis.figure is figure.subfigs[0]]
    assert len(row) == (3 if index == 0 else 4)  # photo, overlay, words, colour bar
    overlay, words = row[-3], row[-2]
    if index in (1, 2, 3, 4, 8):
        for axis in (row[0], overlay):
            np.testing.assert_allclose(axis.images[0].get_array() / 255, pictures()[1], atol=1 / 255)
    drawn = overlay.images[-1]
    values = explanation.image[0].numpy()
    np.testing.assert_array_equal(drawn.get_array(), values)
    assert drawn.get_clim() == (0, values.max()) and drawn.get_cmap().name == "inferno"
    if index > 0:
        alpha = drawn.get_alpha()
        share = values / values.max()
        most = 0.85 * (1 - np.sort(share, None)[1] / 2)  # nine tenths are larger
        assert alpha.shape == (3, 4) and alpha.max() == pytest.approx(most)
        np.testing.assert_allclose(alpha, most * np.minimum(1, 1.5 * share) ** 1.5, rtol=1e-5)
        assert alpha.argmin() == values.argmin() and (np.diff(alpha.ravel()[values.ravel().argsort()]) >= 0).all()
    assert written(words) == pytest.approx({"7": 0.25, "8": 1.0, "9": 0.5})
    assert titles(figure) == ["7 8 9   score 1.5", "5   score -2"]
    figure.canvas.draw()


def test_one_scale_for_all_rows_and_words():
    for explanation in (made(image=torch.stack([torch.rand(3, 4), 3 * torch.rand(3, 4)])), answered()):
        figure = explanation.plot(np.ones((30, 40, 3)), common=True)
        ranges = {axis.images[1].get_clim() for axis in figure.axes if len(axis.images) == 2}
        words = [choice.patches[0].values for sample in read_samples(explanation) for choice in sample.choices]
        assert ranges == {(0, max(map(np.max, words)))}
        apart = explanation.plot(np.ones((30, 40, 3)))
        assert len({axis.images[1].get_clim() for axis in apart.axes if len(axis.images) == 2}) > 1


def test_the_largest_value_does_not_vanish_on_white():
    from vlattn_fast.interpret.result.figures.figure import colors

    for name in ("inferno", "magma", "plasma", "viridis"):
        brightness = np.asarray(colors(name).colors)[:, :3] @ [0.2126, 0.7152, 0.0722]
        assert (np.diff(brightness) >= -1e-3).all() and brightness[-1] < 0.8
    with pytest.raises(ValueError, match="cmap must be the name of a matplotlib colormap, such as .*; got 'rainbows'"):
        made().plot(cmap="rainbows")


def test_plot_of_rows_words_and_constants():
    constant = made(image=torch.full((2, 3, 4), 0.5), words=[["$a", "_b_", "^"], ["\\x"]])
    figure = constant.plot(samples=[1])
    assert len(figure.axes) == 3 and titles(figure) == ["\\x   score -2"]
    figure.canvas.draw()
    constant.plot(np.ones((4, 4)), samples=[0]).canvas.draw()
    with pytest.raises(ValueError, match="samples must be from 0 to 1; got 2"):
        constant.plot(samples=[2])


def test_labels_name_the_rows():
    assert titles(made().plot(labels=["cat", "$dog"])) == ["cat   score 1.5", "$dog   score -2"]
    bare = made(text=None, token_ids=None)
    assert titles(bare.plot()) == ["target 0   score 1.5", "target 1   score -2"]
    assert titles(made(text=None, token_ids=None, target=None, scores=None).plot()) == ["sample 0", "sample 1"]
    with pytest.raises(ValueError, match="labels must be 2, one per sample; got 1"):
        made().plot(labels=["cat"])


def test_an_installed_font_has_the_letters_that_matplotlibs_own_lacks(monkeypatch, tmp_path):
    """STIXGeneral, which matplotlib brings, has one syllable of Japanese."""
    before = dict(matplotlib.rcParams)
    shown = [(made(words=[["of", "の", "$"], ["の"]]), None), (made(text=None, token_ids=None), ["の", "row"])]

    def draw():
        for explanation, labels in shown:
            explanation.plot(labels=labels).savefig(tmp_path / "words.png")

    monkeypatch.setattr("vlattn_fast.interpret.result.figures.figure._FONTS", ("No such font",))
    with pytest.warns(UserWarning, match="Glyph 12398 .*missing"):
        draw()
    monkeypatch.setattr("vlattn_fast.interpret.result.figures.figure._FONTS", ("No such font", "STIXGeneral"))
    draw()  # a warning is an error
    assert dict(matplotlib.rcParams) == before


def test_words_are_joined_in_a_picture():
    figure = made(words=[["▁a", "▁gir", "affe"], ["▁b"]]).plot(samples=[0])
    assert written(figure.axes[1]) == pytest.approx({"a": 0.5, "giraffe": 1.0})  # 0.1 and -0.4 + 0.2


def test_a_crop_places_the_map():
    figure = made().plot(np.ones((20, 40, 3)), samples=[0], crop=(0.25, 0, 0.75, 1))
    overlay = figure.axes[1]
    assert overlay.images[1].get_extent() == [10, 30, 20, 0]
    assert overlay.get_xlim() == (-0.5, 39.5) and overlay.get_ylim() == (20, 0)
    tiles = made(image=torch.rand(3, 2, 2), image_samples=[0, 0, 1])
    figure = tiles.plot(np.ones((20, 40, 3)), samples=[0], crop=[(0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 1)])
    assert [image.get_extent() for image in figure.axes[1].images[1:]] == [[0, 20, 20, 0], [20, 40, 20, 0]]
    for crop in ((0, 0, 1), (0.5, 0, 0.5, 1), [(0, 0, 1, 1)] * 3, (0, 0, float("nan"), 1)):
        with pytest.raises(ValueError, match="crop must be x1, y1, x2, y2 relative to the image"):
            made().plot(np.ones((20, 40, 3)), crop=crop)
    with pytest.raises(ValueError, match="crop must be None for an explanation without maps; got"):
        made(image=None, image_samples=None).to_html(crop=(0, 0, 1, 1))
    with pytest.raises(ValueError, match="alpha must be .*; got 1.5"):
        made().plot(alpha=1.5)


def test_plot_of_an_answer():
    explanation = answered()
    figure = explanation.plot(np.ones((20, 30, 3)))
    scores = ["log-probability -0.875 (p 0.42)", "log-probability -3 (p 0.05)"]
    assert titles(figure)[:2] == [f"what is it?   {scores[0]}", f"who   {scores[1]}"]
    assert titles(figure)[2:] == ["a   p 0.61", "giraffe   p 0.69", "me   p 0.37", "</s>   p 0.14"]
    maps = [axis.images[1] for axis in figure.axes if len(axis.images) == 2]
    np.testing.assert_allclose(maps[1].get_array(), explanation.image[0, 1:].sum(0), rtol=1e-6)
    tables = [axis for axis in figure.axes if axis.get_xticklabels() and axis.get_xticklabels()[0].get_text() in ("what", "who")]
    assert [label.get_text() for label in tables[0].get_xticklabels()] == ["what", "is", "it", "?", "a", "giraffe"]
    assert [label.get_text() for label in tables[0].get_yticklabels()] == ["a", "giraffe"]
    table = tables[0].images[0].get_array()
    np.testing.assert_allclose(table[1, :5], explanation.text[0, 1:, :5].sum(0), rtol=1e-6)
    assert table.mask.tolist() == [[False] * 5 + [True], [False] * 6]  # words that came later
    figure.canvas.draw()
    for parts in ({"image": None, "image_samples": None}, {"text": None, "token_ids": None, "words": None}):
        answered(**parts).plot().canvas.draw()


def test_plot_of_a_sound():
    """A line for each word on its own scale, and some seconds below, not the middle of each stretch."""
    strips = torch.zeros(2, 3, 1, 300)
    strips[0, :, 0, 150] = torch.tensor([0.25, 0.0, -0.125])  # the answer's words are its first token, and the others together
    for common, most in ((False, [1.0, -1.0]), (True, [1.0, -0.5])):
        figure = answered(image=strips, seconds=[6.0, 6.0]).plot(common=common)
        axis = next(axis for axis in figure.axes if axis.get_xlabel().startswith("seconds"))
        drawn = axis.images[0]
        assert drawn.get_array()[:, 150].tolist() == most and drawn.get_extent()[:2] == [0.0, 6.0]
        assert [text.get_text() for text in axis.get_xticklabels()] == ["0", "1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros(3), r"\(3,\)"),
        (np.zeros((4, 4, 7)), r"\(4, 4, 7\)"),
        ([np.zeros((4, 4, 3))] * 3, "got 3"),
        (torch.randn(3, 8, 8), "normalised"),
        (np.full((4, 4), 256), "must be bytes, or floats from 0 to 1; got 256 to 256"),
        (np.full((4, 4), -1), "got -1 to -1"),
    ],
)
def test_bad_images(image, words):
    with pytest.raises(ValueError, match=words):
        made().plot(image)


def test_pictures_of_other_depths():
    """Sixteen bits are not white from 256 on, and True is white."""
    Image = pytest.importorskip("PIL.Image")
    deep = Image.fromarray(np.array([[0, 0x1234], [0x80FF, 0xFFFF]], dtype=np.uint16))
    for image, grey in ((deep, [[0, 0x12], [0x80, 0xFF]]), (np.array([[False, True]]), [[0, 255]])):
        shown = made().plot(image).axes[0].images[0].get_array()
        np.testing.assert_array_equal(shown, np.repeat(np.array(grey)[..., None], 3, 2))
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"image must have 8 or 16 bits a channel; got an image of mode '{mode}'"):
            made().plot(Image.new(mode, (4, 4)))


@pytest.mark.slow
def test_nothing_of_a_long_text_is_cut_off():
    """All words are in the picture, however many, and as much of the title as there is room for, with the score."""
    pytest.importorskip("matplotlib")
    words = [[f"word{i}" for i in range(120)] for _ in range(2)]
    bare = {"image": None, "image_samples": None, "relevancy": {"text": torch.rand(2, 120)}, "position": None}
    explanation = made(**bare, text=torch.rand(2, 120), token_ids=None, words=words)
    labels = ["words " * 13, "W" * 300]
    for figure, inches in ((explanation.plot(labels=labels), 3.4), (answered().plot(labels=labels[:1] * len(answered())), 11.5)):
        figure.draw_without_rendering()
        whole = figure.bbox
        for part in figure.subfigs:
            box = part._suptitle.get_window_extent()
            assert (
                whole.x0 <= box.x0
                and box.x1 <= whole.x1
                and part._suptitle.get_text().endswith((" score 1.5", " score -2", "(p 0.42)", "(p 0.05)"))
            )
            for axis in part.axes:
                for artist in axis.artists:
                    box = artist.get_window_extent()
                    assert whole.y0 <= box.y0 and box.y1 <= whole.y1 and whole.x0 <= box.x0 and box.x1 <= whole.x1
        assert figure.get_size_inches()[0] == pytest.approx(inches)


def test_plot_of_several_images_and_of_regions():
    several = made(image=(torch.rand(2, 4), torch.rand(4, 2), torch.rand(2, 2)), image_samples=[0, 0, 1])
    figure = several.plot(torch.rand(3, 3, 8, 8), crop=(0, 0, 1, 1))
    rows = [[len(a.images) for a in figure.axes if a.figure is part and a.get_subplotspec()] for part in figure.subfigs]
    assert rows == [[1, 2, 1, 2, 0], [1, 2, 0]]  # photo and overlay of each, then words
    figure.canvas.draw()
    corners = torch.rand(2, 3, 2) / 2
    regions = made(image=None, image_samples=None, regions=torch.rand(2, 3), boxes=torch.cat([corners, corners + 0.3], -1))
    figure = regions.plot(torch.rand(3, 8, 8))
    assert len(figure.axes[1].patches) == 3
    drawn = [image.get_array().item() for image in figure.axes[1].images[1:]]
    assert drawn == regions.regions[0].tolist()
    x1, y1, x2, y2 = (8 * regions.boxes[0, 0]).tolist()
    assert figure.axes[1].images[1].get_extent() == pytest.approx([x1, x2, y2, y1])
    figure.canvas.draw()


@pytest.mark.parametrize("case", list(CASES), indirect=True)
def test_whole_way(case, tmp_path):
    explanation = explain(case.model, case.inputs)
    same(Explanation.load(explanation.save(tmp_path / "a.safetensors")), explanation)
    explanation.plot().canvas.draw()
    assert explanation.save_html(tmp_path / "a.html").stat().st_size > 2000


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, torch; before = set(sys.modules); import vlattn_fast.interpret; "
        "print({'matplotlib', 'jinja2', 'transformers', 'safetensors', 'pandas', 'PIL'} & (set(sys.modules) - before))"
    )
    done = programs.run(code)
    assert done.stdout.strip() == "set()"
