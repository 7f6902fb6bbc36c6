"""`compare`: explanations of methods, checkpoints or inputs under names of the caller; `Comparison` in a notebook."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import vlattn_fast as va
from tests.helpers.interpret.cases import CASES
from tests.helpers.interpret.made import answered, made

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from PIL import Image

WHITE = np.full((60, 80, 3), 255, np.uint8)


def peak(row: int, column: int) -> torch.Tensor:
    """Two maps (3, 4) with one strong patch."""
    return torch.full((2, 3, 4), 0.01).index_put(
        (torch.arange(2), torch.tensor([row] * 2), torch.tensor([column] * 2)), torch.tensor(1.0)
    )


def pictures_of(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))).astype(int) for one in found]


def test_two_checkpoints_on_one_photo(tmp_path):
    before, after = made(image=peak(0, 0)), made(image=peak(2, 3), scores=torch.tensor([2.5, 0.0]))
    found = va.compare({"before": before, "after <b>": after}, WHITE)
    page = found.save_html(tmp_path / "page.html", title="A & B").read_text()
    assert "<h1>A &amp; B</h1>" in page and "after &lt;b&gt;" in page and "after <b>" not in page
    assert "score 1.5<" in page and "score 2.5<" in page and page.count('<span class="note">values 0.01 to 1</span>') == 4
    first, second = pictures_of(page)[:2]
    assert first.shape == second.shape == (195, 260, 3)
    for picture, strong, weak in ((first, (20, 20), (180, 240)), (second, (180, 240), (20, 20))):
        assert picture[strong].min() < 120 and picture[weak].min() > 230
    figure = found.plot(samples=[0])
    figure.savefig(tmp_path / "figure.png")
    *maps, words = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    assert [axis.get_title(loc="left") for axis in maps] == ["before\nscore 1.5", "after <b>\nscore 2.5"]
    assert [label.get_text() for label in words.get_yticklabels()] == ["before", "after <b>"]
    assert [part.get_suptitle() for part in figure.subfigs] == ["7 8 9"] * 2
    assert repr(found) == "SideBySide('before', 'after <b>')" and "<iframe" in found._repr_html_()


def bars_of(figure) -> list:
    return [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]


def test_each_map_has_its_scale_and_colours():
    found = va.compare({"one": made(), "other": made(image=3 * torch.rand(2, 3, 4))}, WHITE, cmap="viridis")
    for figure, name in ((found.plot(samples=[0]), "viridis"), (found.plot(samples=[0], cmap="magma"), "magma")):
        ends = [one.image[0].max().item() for one in found.explanations.values()]
        assert [bar._colorbar.norm.vmax for bar in bars_of(figure)] == pytest.approx(ends)
        assert {bar._colorbar.cmap.name for bar in bars_of(figure)} == {name}
        assert [bar.get_xlabel().startswith("values ") for bar in bars_of(figure)] == [True, True]
    assert {bar._colorbar.norm.vmax for bar in bars_of(found.plot(samples=[0], common=True))} == {max(ends)}
    page = found.to_html(samples=[0])
    assert page.count("linear-gradient(") == 2 and found._repr_html_() != va.compare(found.explanations, WHITE)._repr_html_()
    with pytest.raises(ValueError, match="cmap must be the name of a matplotlib colormap"):
        va.compare({"a": made()}, cmap="rainbows").plot()


def test_a_frame_shows_the_part_that_the_model_saw():
    found = va.compare({"one": made(image=torch.zeros(2, 3, 4))}, WHITE, crop=(0.25, 0, 0.75, 1))
    (picture, _) = pictures_of(found.to_html())
    assert picture.shape == (195, 260, 3)
    for column in (65, 194):  # black and white dashes
        assert {0, 255} == set(picture[:, column].ravel().tolist())
    assert (picture[20:-20, 70:190] == 255).all() and (picture[:, :60] == 255).all()
    assert (pictures_of(va.compare({"one": made(image=torch.zeros(2, 3, 4))}, WHITE).to_html())[0] == 255).all()


def test_columns_are_aligned():
    """Photos of several shapes stand in columns of one width, in figures and pages."""
    photos = {"tall": np.full((90, 30, 3), 255, np.uint8), **{name: WHITE for name in "abcd"}}
    found = va.compare({name: made() for name in photos}, photos, crop=(0, 0, 1, 1))
    figure = found.plot(samples=[0])
    figure.canvas.draw()
    maps = [axis for axis in figure.axes if axis.images and axis.get_title(loc="left")]
    lefts = [axis.get_subplotspec().get_position(axis.figure).x0 for axis in maps]
    assert len(maps) == 5 and lefts[4] == lefts[0] and len(set(lefts)) == 4
    assert set(re.findall(r"grid-auto-columns: (\d+)px", found.to_html())) == {"260"}


def test_the_numbers():
    one, other = made(), made(method="rollout")
    found = va.compare({"gradient": one, "rollout": other, "of another model": made(token_ids=[[1, 2, 3], [4]])})
    want = [{"one": "gradient", "other": "rollout", **line} for line in one.compare(other).table]
    assert found.table == want and len(want) == 4
    page = found.to_html()
    assert all(f"<td>{line['cosine']}</td>" in page for line in want)


def test_inputs_with_photos_and_words_of_their_own():
    words = {"text": torch.rand(1, 2), "token_ids": [[1, 2]], "words": [["▁big", "▁cat"]]}
    one, other = made(image=peak(0, 0))[0], replace(made(image=peak(2, 3))[0], **words)
    red, green = (np.full((60, 80, 3), color, np.uint8) for color in ((255, 0, 0), (0, 255, 0)))
    page = va.compare({"one": one, "other": other}, {"one": red, "other": green}).to_html()
    first, second = pictures_of(page)
    assert first[180, 240, 0] > 240 > first[180, 240, 1] and second[20, 20, 1] > 240 > second[20, 20, 0]
    assert page.count("<table>") == 2 and "7 8 9 | big cat" in page


def test_words_of_an_answer_and_maps_of_one_scale():
    found = va.compare({"one": answered(), "other": answered(method="rollout")}, WHITE)
    page = found.to_html(common=True)
    assert page.count("<figure>") == 2 * 4 and "what is it?: giraffe" in page
    figure = va.compare({"one": answered(), "other": answered()}).plot(samples=iter([1]))
    assert len(figure.axes) - len(bars_of(figure)) == 2 * 3 and len(bars_of(figure)) == 4  # maps and a table of two words


def test_without_maps():
    words = dict(image=None, image_samples=None)
    found = va.compare({"a": made(**words), "b": made(**words)})
    assert len(found.plot(samples=[1]).axes) == 1 and "<figure>" not in found.to_html()
    mixed = va.compare({"with": made(), "without": made(**words)}, WHITE)
    assert mixed.to_html().count("<figure>") == 2


def test_every_region_is_drawn_without_a_photo():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]])
    one = va.Explanation({"vision": torch.tensor([[0.5, 1.0]])}, regions=torch.tensor([[0.5, 1.0]]), boxes=boxes)
    (picture,) = pictures_of(va.compare({"one": one}).to_html())
    half = len(picture) // 2
    quarters = [picture[i : i + half, j : j + half] for i in (0, half) for j in (0, half)]
    assert [bool((quarter == 255).all()) for quarter in quarters] == [False, True, True, False]


@pytest.mark.parametrize(
    ("explanations", "options", "error", "message"),
    [
        ([made()], {}, TypeError, "explanations must be a dict from names to explanations; got"),
        ({}, {}, TypeError, "explanations must be a dict from names to explanations; got"),
        ({"a": made(), 1: made()}, {}, TypeError, "explanations must be a dict from names to explanations; got"),
        ({"a": 3}, {}, TypeError, "got int 3 for 'a'"),
        ({"a": made(), "b": made()[0]}, {}, ValueError, r"the same number of samples; got {'a': 2, 'b': 1}"),
        ({"a": answered(), "b": made()}, {}, ValueError, "the same number of answer words"),
        ({"a": made()}, {"image": {"b": WHITE}}, ValueError, r"image must have the names \['a'\]; got \['b'\]"),
        ({"a": made(image=None, image_samples=None)}, {"image": WHITE}, ValueError, "image must be None for explanations"),
    ],
)
def test_bad_input(explanations, options, error, message):
    with pytest.raises(error, match=message):
        va.compare(explanations, **options)


def test_a_comparison_is_a_table_in_a_notebook():
    comparison = made().compare(made(method="rollout"))
    shown = comparison._repr_html_()
    assert shown.startswith("<table>") and shown.count("<tr>") == 1 + len(comparison.table)
    assert all(f"<td>{line['rank']}</td>" in shown for line in comparison.table)
    empty = va.Explanation({"text": torch.zeros(0, 3)})
    assert empty.compare(empty)._repr_html_().count("<tr>") == 1


@pytest.mark.parametrize("make", [made, answered])
def test_a_row_is_an_explanation_of_one_sample(make):
    whole = make()
    for number, one in enumerate(whole):
        assert len(one) == 1 and one.image_samples == [0] and torch.equal(one.image[0], whole.image[number])
        for tower, row in whole.relevancy.items():
            assert torch.equal(one.relevancy[tower][0], row[number])
        length = len(whole.token_ids[number])
        assert one.tokens == [whole.tokens[number]] and torch.equal(one.text[0], whole.text[number, ..., :length])
        assert [entry.value for entry in one.top(2)] == [entry.value for entry in whole.top(2) if entry.sample == number]
    assert torch.equal(whole[-1].scores, whole.scores[-1:]) and len(whole[:]) == 2 and len(whole[2:]) == 0
    assert [one.scores[0].tolist() for one in whole[::-1]] == whole.scores.flip(0).tolist()
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"must be from -2 to 1; got {index}"):
            whole[index]
    with pytest.raises(TypeError, match="must be the number of a sample, or a slice; got str 'a'"):
        whole["a"]


def test_maps_of_uneven_grids_and_several_images_of_a_row(tmp_path):
    maps = tuple(torch.rand(size) for size in ((2, 3), (3, 3), (3, 3), (4, 1)))
    whole = va.Explanation({"vision": torch.rand(3, 5)}, maps, [0, 1, 1, 2], contribution={"vision": torch.rand(3, 5)})
    one = whole[1]
    assert one.image_samples == [0, 0] and torch.equal(one.image, torch.stack(maps[1:3]))
    assert torch.equal(one.contribution["vision"], whole.contribution["vision"][1:2])
    again = va.Explanation.load(one.save(tmp_path / "one.safetensors"))
    assert torch.equal(again.image, one.image) and torch.equal(again.without_self("vision"), one.without_self("vision"))


@pytest.mark.parametrize("per", ["layer", "head"])
def test_a_row_of_maps_of_layers(per, tmp_path):
    case = CASES["clip"]()
    whole = va.explain_layers(case.model, case.inputs, per=per)
    for number, one in enumerate(whole):
        assert type(one) is type(whole) and len(one) == 1 and (one.layers, one.heads) == (whole.layers, whole.heads)
        for (place, part), (_, of_whole) in zip(one.items(), whole.items(), strict=True):
            assert torch.equal(part.image[0], of_whole.image[number]), place
            assert torch.equal(part.without_self("text")[0], of_whole.without_self("text")[number])
    again = type(whole).load(whole[1].save(tmp_path / "one.safetensors"))
    assert torch.equal(again.image, whole.image[..., 1:2, :, :]) and repr(again) == repr(whole[1])
    assert {name: part.shape for name, part in whole.self_relevancy.items()} == {
        name: row.shape for name, row in whole.relevancy.items()
    }
