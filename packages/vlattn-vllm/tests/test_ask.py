"""What a request may ask for, and which tokens its groups have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vlattn_vllm.ask import Ask, check_ask, groups_of_tokens


def ask(value: Any, pictures: tuple[tuple[int, int], ...] = ((2, 4), (6, 7))) -> Ask:
    return check_ask(value, layers=3, prompt=9, pictures=pictures, most=29)


def test_an_empty_ask_is_the_mass_of_image_question_and_answer_in_all_layers() -> None:
    got = ask({})
    assert got.layers == (0, 1, 2) and got.statistics == ("mass",)
    assert [name for name, _ in got.groups] == ["image", "question", "answer"]
    assert groups_of_tokens(got, 12).tolist() == [1, 1, 0, 0, 1, 1, 0, 1, 1, 2, 2, 2]


def test_a_text_has_no_image() -> None:
    assert groups_of_tokens(ask({}, pictures=()), 10).tolist() == [1] * 9 + [2]
    assert groups_of_tokens(ask({"groups": ["answer"]}), 10).tolist() == [-1] * 9 + [0]
    assert groups_of_tokens(ask({"groups": "answer|image"}), 10).tolist() == [-1, -1, 1, 1, -1, -1, 1, -1, -1, 0]


def test_spans() -> None:
    got = ask({"groups": {"a": [[0, 2], [3, 4]], "b": [[4, None]]}})
    assert groups_of_tokens(got, 7).tolist() == [0, 0, -1, 0, 1, 1, 1]
    assert ask({"groups": {"last": [[28, 29]], "answer": [[9, 28]]}}).groups == (("last", ((28, 29),)), ("answer", ((9, 28),)))


def test_an_ask_survives_json() -> None:
    got = ask({"layers": [2, 0], "statistics": ["mass", "received"], "groups": {"a": [(0, 2)], "b": [(4, None)]}})
    assert Ask.read(json.loads(json.dumps(got.written()))) == got


def test_no_groups_without_mass() -> None:
    assert ask({"statistics": ["entropy"]}).groups == ()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["mass"], "must be a dict with some of layers, statistics and groups; got"),
        ({"head": 1}, "must be a dict with some of"),
        ({"layers": []}, "layers must be a list of at least one number"),
        ({"layers": 1}, "layers must be a list"),
        ({"layers": "1"}, "layers must be a list"),
        ({"layers": [3]}, "must be at most 2; got 3"),
        ({"layers": [True]}, "must be an int"),
        ({"layers": [1, 1]}, "each layer once"),
        ({"statistics": ["argmax"]}, "statistics must"),
        ({"statistics": "mass"}, "statistics must"),
        ({"groups": "image|dog"}, "groups must"),
        ({"groups": {"a": [[1, 3]], "b": [[2, None]]}}, "'a' and 'b', which both have token 2"),
        ({"groups": {"a": [[0, None]], "b": [[5, 6]]}}, "both have token 5"),
        ({"groups": {"a": [[3, 1]]}}, "the end of a span of 'a' must be at least 4"),
        ({"groups": {"a": [[3, 3]]}}, "the end of a span of 'a' must be at least 4; got 3"),
        ({"groups": {"a": []}}, "groups['a'] must be a list of at least one [start, end]"),
        ({"groups": {"a": [[9000, 9005]]}}, "within the 29 tokens of the prompt and its longest answer; got [9000, 9005]"),
        ({"groups": {"a": [[29, None]]}}, "within the 29 tokens of the prompt and its longest answer; got [29, None]"),
        ({"groups": {"a": [[3, 30]]}}, "got [3, 30]. An end of None is the newest token"),
        ({"groups": "image|image"}, "groups must name each once; got ['image', 'image']"),
        ({"statistics": ["mass", "mass"]}, "statistics must name each once"),
        ({"groups": {"a": [[-1, 1]]}}, "the start of a span of 'a' must be at least 0"),
        ({"groups": {}}, "groups must have at least one group"),
        ({"groups": {str(n): [] for n in range(65)}}, "groups must be at most 64; got 65"),
        ({"groups": {1: [[0, 1]], "1": [[2, 3]]}}, "each with a string for its name"),
        ({"groups": {"a": [1, 3]}}, "groups['a'] must be a list of at least one [start, end]"),
        ({"groups": {"a": "1-3"}}, "groups['a'] must be a list of at least one [start, end]"),
        ({"statistics": ["entropy"], "groups": {"a": [[0, 1]]}}, "must name 'mass' where groups are given"),
    ],
)
def test_a_wrong_ask_is_named(value: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        ask(value)
    assert words in str(error.value)
