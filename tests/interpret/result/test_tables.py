"""The largest entries, the data frame, and the comparison of two explanations."""

from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch

from tests.helpers.interpret.made import answered, made
from vlattn_fast.interpret import Explanation
from vlattn_fast.interpret.result.numbers.table import Entry


def test_top_of_rows():
    image = torch.arange(24.0).reshape(2, 3, 4)
    found = made(image=image, words=[["a", "b", "c"], ["d"]]).top(2)
    assert [(e.sample, e.tower, e.part, e.position, e.place, e.word, round(e.value, 3)) for e in found] == [
        (0, "vision", "patch", 11, (0, 2, 3), None, 11.0),
        (0, "vision", "patch", 10, (0, 2, 2), None, 10.0),
        (0, "text", "word", 2, None, "c", 0.2),
        (0, "text", "word", 0, None, "a", 0.1),
        (1, "vision", "patch", 11, (1, 2, 3), None, 23.0),
        (1, "vision", "patch", 10, (1, 2, 2), None, 22.0),
        (1, "text", "word", 0, None, "d", 0.3),
    ]
    assert all(e.answer is None for e in found)


def test_top_of_an_answer():
    explanation = answered()
    found = explanation.top(1)
    assert [(e.sample, e.answer) for e in found] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for entry in found:
        image, text = explanation.image[entry.sample, entry.answer], explanation.text[entry.sample, entry.answer]
        assert entry.value == max(image.max(), text.max()) < 1  # not the position that is read
        if entry.part == "patch":
            assert image[entry.place[1:]] == entry.value and entry.place[0] == entry.sample
        else:
            assert text[entry.position] == entry.value and explanation.tokens[entry.sample][entry.position] == entry.word


def test_top_of_other_towers():
    corners = torch.rand(1, 3, 2) / 2
    boxes = torch.cat([corners, corners + 0.3], -1)
    regions = Explanation({"joint": torch.rand(1, 7)}, regions=torch.tensor([[0.1, 0.9, 0.2]]), boxes=boxes)
    assert [(e.tower, e.part, e.position) for e in regions.top(1)] == [("joint", "region", 1)]
    unknown = Explanation({"tower0": torch.tensor([[0.1, 1.0, 0.3]])}, position={"tower0": torch.tensor([1])})
    assert unknown.top(1) == [Entry(0, None, "tower0", "token", 2, None, None, pytest.approx(0.3))]
    through = answered(
        relevancy={"language": torch.rand(2, 3, 14), "vision": torch.rand(2, 3, 16)},
        image=torch.zeros(2, 3, 4, 4),
        tower_images={"language": torch.full((2, 3, 2, 3), 2.0)},
    )
    assert {(e.tower, e.part, e.value) for e in through.top(1)} == {("vision", "patch", 0.0), ("language", "patch", 2.0)}


def test_top_of_several_towers_is_in_one_order():
    two = Explanation({"text": torch.tensor([[0.0, 0.3, 0.1]]), "vision": torch.tensor([[0.2, 0.0, torch.nan]])})
    found = [round(entry.value, 3) for entry in two.top(3)]
    assert found[:5] == [0.3, 0.2, 0.1, 0.0, 0.0] and found[5] != found[5]


def test_top_refuses():
    assert made().top(0) == []
    with pytest.raises(ValueError, match="k must be at least 0; got -1"):
        made().top(-1)
    with pytest.raises(TypeError, match="k must be an int; got float"):
        made().top(1.5)


def test_data_frame():
    explanation = answered()
    frame = explanation.to_pandas()
    assert list(frame) == ["sample", "answer", "answer_word", "tower", "part", "position", "image", "y", "x", "word", "value"]
    assert len(frame) == 3 * (6 + 7) + 2 * (6 + 3)
    patches = frame[(frame.part == "patch") & (frame["sample"] == 1) & (frame.answer == 1)]
    np.testing.assert_allclose(patches.pivot(index="y", columns="x", values="value"), explanation.image[1, 1])
    words = frame[(frame.part == "word") & (frame["sample"] == 0) & (frame.answer == 2)]
    assert list(words.word) == explanation.tokens[0] and words.x.isna().all()
    np.testing.assert_allclose(words.value, explanation.text[0, 2])
    plain = made().to_pandas()
    said = {(sample, n, word) for sample, words in enumerate(explanation.answer_tokens) for n, word in enumerate(words)}
    assert {*zip(frame["sample"], frame.answer, frame.answer_word, strict=True)} == said
    assert plain.answer.isna().all() and plain.answer_word.isna().all() and isinstance(plain, pandas.DataFrame)
    assert len(Explanation({"vision": torch.zeros(0, 5)}).to_pandas()) == 0


def test_compare():
    left = made()
    noise = {name: torch.rand(2, value.shape[1]) for name, value in left.relevancy.items()}
    found = left.compare(replace(left, relevancy=noise))
    for name, values in noise.items():
        cosine = torch.cosine_similarity(left.relevancy[name].double(), values.double())
        torch.testing.assert_close(found.cosine[name].double(), cosine, atol=1e-6, rtol=0)
        ranks = [part.argsort().argsort().double() for part in (left.relevancy[name], values)]
        for row in range(2):
            expected = torch.corrcoef(torch.stack([ranks[0][row], ranks[1][row]]))[0, 1]
            torch.testing.assert_close(found.rank[name][row].double(), expected, atol=1e-6, rtol=0)
    assert [(line["tower"], line["sample"]) for line in found.table] == [("vision", 0), ("vision", 1), ("text", 0), ("text", 1)]
    same = left.compare(left)
    assert all(line["cosine"] == line["rank"] == 1.0 for line in same.table)


def test_compare_leaves_out_what_says_nothing():
    """Padding, tokens that come later, and the entry of the position that is read."""
    left = Explanation({"language": torch.tensor([[1.0, 2.0, 9.0, 0.0, 0.0]])}, position={"language": torch.tensor([2])})
    right = replace(left, relevancy={"language": torch.tensor([[2.0, 1.0, 9.0, 0.0, 0.0]])})
    assert left.compare(right).table == [{"tower": "language", "sample": 0, "cosine": 0.8, "rank": -1.0}]
    answer = answered().compare(answered())
    assert answer.cosine["language"].shape == (2, 3) and {"sample", "answer"} < answer.table[0].keys()


def test_equal_values_share_their_rank():
    left = Explanation({"text": torch.tensor([[1.0, 1.0, 2.0, 3.0]])})
    right = Explanation({"text": torch.tensor([[1.0, 2.0, 3.0, 3.0]])})
    ranks = np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3.5, 3.5])[0, 1]
    assert left.compare(right).rank["text"].item() == pytest.approx(ranks)


def test_compare_refuses_and_takes_empty_batches():
    with pytest.raises(ValueError, match=r"other must have the towers and shapes \{'vision': \(2, 13\), .*\}; got \{'text'"):
        made().compare(Explanation({"text": torch.rand(2, 6)}))
    empty = Explanation({"text": torch.zeros(0, 6)})
    assert empty.compare(empty).table == [] and empty.top() == []
    zero = Explanation({"text": torch.zeros(1, 6)})
    assert zero.compare(zero).cosine["text"].isnan().all()
