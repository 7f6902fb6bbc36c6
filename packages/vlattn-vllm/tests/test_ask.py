"""What a request may ask for, and which tokens its groups have."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import vlattn_fast as va
from vlattn_vllm.ask import Ask, check_ask, groups_of_sets, groups_of_tokens, plain_edits


def ask(value: Any, pictures: tuple[tuple[int, int], ...] = ((2, 4), (6, 7))) -> Ask:
    return check_ask(value, layers=3, heads=4, prompt=9, pictures=pictures, most=29)


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


def test_edits_are_those_of_the_core_or_dicts() -> None:
    written = {"steer": [{"keys": [2, 4], "layers": [-1], "weight": 0}, {"queries": "answer", "heads": 3, "weight": 2.5}]}
    edits = {"steer": [va.Knockout(keys=(2, 4), layers=[-1]), va.Steer(queries="answer", heads=3, weight=2.5)]}
    assert plain_edits(edits["steer"])[0]["weight"] == 0
    for value in (written, edits):
        cut, more = ask(value).steer
        assert cut == ((2,), (0, 1, 2, 3), ((0, None),), ((2, 4),), 0)
        assert more == ((0, 1, 2), (3,), ((9, None),), ((0, None),), 2.5)
        assert Ask.read(json.loads(json.dumps(ask(value).written()))) == ask(value)
    alone = ask({"steer": [{"keys": "image", "weight": 0.5}], "statistics": []})
    assert alone.steer[0].keys == ((2, 4), (6, 7)) and alone.layers == alone.statistics == alone.groups == ()


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    """In each place, and in JSON afterwards."""
    one = np.int64(1)
    edits = [{"keys": np.array([0, 4]), "layers": np.arange(2), "heads": one, "weight": np.float32(0.5)}]
    value = {"layers": torch.arange(2), "groups": {"a": np.array([[0, 4]]), "b": [(np.int32(4), None)]}, "steer": edits}
    plain = {"layers": [0, 1], "groups": {"a": [[0, 4]], "b": [[4, None]]}}
    plain["steer"] = [{"keys": [0, 4], "layers": [0, 1], "heads": 1, "weight": 0.5}]
    assert check_ask({**value, "statistics": ["mass", "received"], "top": one}, 2, 4, 10, [], 20) == check_ask(
        {**plain, "statistics": ["mass", "received"], "top": 1}, 2, 4, 10, [], 20
    )
    steered = plain_edits([va.Steer(keys=(0, 4), heads=[1], weight=2.0)])
    assert json.loads(json.dumps(steered)) == steered
    with pytest.raises(TypeError, match="an int"):
        check_ask({"layers": [np.float64(0.5)]}, 2, 4, 10, [], 20)


def test_many_edits_have_few_groups() -> None:
    """Their number does not matter; tokens that the same edits name are one group, as is that of none, which does not count."""
    steer = [{"keys": [n, n + 1], "heads": [head], "weight": 0.5} for n in range(16) for head in range(4)]
    assert len(ask({"steer": steer}).steer) == 64
    groups, members = groups_of_sets([((0, 5),), ((3, 9), (12, None)), ((0, 5),)], 14)
    names = [members[:, number].tolist() for number in groups]
    first, both, second, none = [True, False, True], [True] * 3, [False, True, False], [False] * 3
    assert names == [first] * 3 + [both] * 2 + [second] * 4 + [none] * 3 + [second] * 2 and members.shape == (3, 4)


def test_no_groups_without_mass() -> None:
    assert ask({"statistics": ["entropy"]}).groups == ()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"top": 2}, "statistics must name 'received' if top is given"),
        ({"statistics": ["received"], "top": 0}, "top must be at least 1"),
        ({"compact": 1}, "compact must be True or False"),
        ({"statistics": []}, "statistics must name at least one"),
        ({"steer": []}, "steer must be a list of edits"),
        ({"steer": {"weight": 0}}, "steer must be a list of edits"),
        ({"steer": ["image"]}, "steer must be a list of edits"),
        ({"steer": [va.ScaleHeads({0: [1]}, 0.0)]}, "steer must be a list of edits"),
        ({"steer": [va.Knockout(keys=(0, 2), tower="vision")]}, "tower of an edit must be None at a server"),
        ({"steer": [va.Knockout(keys="last")]}, "keys of an edit must be among image, question, answer"),
        ({"steer": [{"keys": [0, 2]}]}, "weight among them"),
        ({"steer": [{"keys": [0, 2], "weight": 0, "tower": None}]}, "weight among them"),
        ({"steer": [{"keys": [0, 2], "weight": -1}]}, "weight must be at least 0"),
        ({"steer": [{"weight": 2, "layers": [0]}]}, "an edit must have queries, keys or heads"),
        ({"steer": [{"heads": [4], "weight": 2}]}, "a number of heads of an edit must be at most 3"),
        ({"steer": [{"heads": [], "weight": 2}]}, "heads of an edit must be a list of at least one number"),
        ({"steer": [{"keys": [40, 41], "weight": 2}]}, "a span of keys must lie within the 29 tokens"),
        ({"steer": [{"heads": [1], "weight": 2}], "statistics": [], "layers": [0]}, "must name one if layers are given"),
        ({"groups": {"a" * (1 << 16): [[0, 1]]}}, "must have at most 65536 bytes as JSON; got 65"),
        ({"steer": [{"keys": [n, n + 1], "weight": 0} for n in range(17)]}, "at most 16 groups of keys"),
        ({"steer": [{"queries": [0, n + 1], "weight": 2} for n in range(17)]}, "at most 16 groups of queries"),
        (["mass"], "must be a dict with some of layers, statistics, groups, top"),
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
        ({"groups": {"a": [[3, 1]]}}, "the end of a span of groups['a'] must be at least 4"),
        ({"groups": {"a": [[3, 3]]}}, "the end of a span of groups['a'] must be at least 4; got 3"),
        ({"groups": {"a": []}}, "groups['a'] must be a list of at least one [start, end]"),
        ({"groups": {"a": [[9000, 9005]]}}, "within the 29 tokens of the prompt and its longest answer; got [9000, 9005]"),
        ({"groups": {"a": [[29, None]]}}, "within the 29 tokens of the prompt and its longest answer; got [29, None]"),
        ({"groups": {"a": [[3, 30]]}}, "got [3, 30]. An end of None is the newest token"),
        ({"groups": "image|image"}, "groups must name each once; got ['image', 'image']"),
        ({"statistics": ["mass", "mass"]}, "statistics must name each once"),
        ({"groups": {"a": [[-1, 1]]}}, "the start of a span of groups['a'] must be at least 0"),
        ({"groups": {}}, "groups must have at least one group"),
        ({"groups": {str(n): [] for n in range(65)}}, "groups must be at most 64; got 65"),
        ({"groups": {1: [[0, 1]], "1": [[2, 3]]}}, "each with a string for its name"),
        ({"groups": {"a": [1, 3]}}, "groups['a'] must be a list of at least one [start, end]"),
        ({"groups": {"a": "1-3"}}, "groups['a'] must be a list of at least one [start, end]"),
        ({"statistics": ["entropy"], "groups": {"a": [[0, 1]]}}, "must name 'mass' if groups are given"),
    ],
)
def test_a_wrong_ask_is_named(value: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        ask(value)
    assert words in str(error.value)


def test_a_text_has_no_image_to_edit() -> None:
    with pytest.raises(ValueError, match="the prompt has no such token"):
        ask({"steer": [{"keys": "image", "weight": 0}]}, pictures=())
