"""The report, page and errors of `probe`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")

import transformers as hf

import vlattn_fast as va
from tests.helpers.interpret.probe_cases import planted, scenes
from tests.helpers.nn import models
from vlattn_fast.interpret.probing.layout import Layouts

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.slow
def test_the_report(tmp_path: Path) -> None:
    report = va.probe(planted(0), scenes(20))
    again = va.ProbeReport.load(report.save(tmp_path / "report.json"))
    assert again.table == report.table and again.metadata == report.metadata
    assert json.loads((tmp_path / "report.json").read_text())["format"] == "vlattn_fast.probe.1"
    with pytest.raises(ValueError, match="path must be a file that ProbeReport.save wrote"):
        va.ProbeReport.load(__file__)
    with pytest.raises(ValueError, match=r"must name an entry of the table; got \('modality', None, 7, None\)"):
        report.value("modality", 7)
    figure = report.plot()
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles[:4] == ["modality: text", "modality: image", "cross_modal", "coreference"] and "fusion" in titles
    image = next(axis for axis in figure.axes if axis.get_title() == "coreference").images[0].get_array()
    assert image.shape == (2, 4) and image[0, 0] == report.value("coreference", 0, 0)
    labels = {axis.get_ylabel() for axis in figure.axes} - {""}
    assert labels == {"layer", "attention", "share of inputs", "accuracy", "mutual information"}
    page = report.save_html(tmp_path / "report.html").read_text()
    assert "tests: modality, cross_modal, " in page and "special: True;" in page
    assert "data:image/png;base64," in page and page.count("<tr>") == len(report.table) + 1
    assert "http" not in page.split("data:image")[0].replace("http-equiv", "")
    frame = report.to_pandas()
    assert list(frame.columns) == list(report.table[0]) and len(frame) == len(report.table)
    assert "relation" in str(report) and "no relations in the labels" in str(report)


def test_left_out_are_counted_as_samples_are() -> None:
    """A phrase that names more regions than it leaves gives none of its two samples; texts of one word none in another order."""
    (inputs, labels), *_ = scenes(20)
    labels = [{"phrases": [*one["phrases"], ((1, 2), [0, 1, 2, 3])]} for one in labels]
    inputs = {**inputs, "input_ids": inputs["input_ids"].clone()}
    inputs["input_ids"][:5, 2] = inputs["input_ids"][:5, 1]  # nothing to exchange
    report = va.probe(planted(0), [(inputs, labels)], tests=("coreference", "linguistic"))
    row, order = (
        next(row for row in report.table if name in (row["test"], row["kind"])) for name in ("coreference", "word_order")
    )
    assert (row["samples"], row["left_out"]) == (80, 40) and (order["samples"], order["left_out"]) == (30, 10)
    assert " left_out " in str(report) and "      40" in str(report)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tests": "modality"}, "tests must be None or a sequence of names; got 'modality'"),
        ({"tests": ["heads"]}, "tests must be among modality, .* got 'heads'"),
        ({"tests": []}, "tests must name at least one"),
        ({"position": "last"}, "position must be one of .* got 'last'"),
        ({"parts": 3}, "parts must be a callable or None"),
        ({"modality": {"input_ids": "sound"}}, "modality must be one of .* got 'sound' for 'input_ids'"),
        ({"modality": "image"}, "modality must be a mapping of input names to 'text' or 'image'; got 'image'"),
        ({"special": "no"}, "special must be True or False; got str 'no'"),
        ({"seed": 1.5}, "seed must be an int; got float 1.5"),
        (
            {"tests": ["relation"]},
            "Test 'relation' is impossible with this model and data set: no relations in the labels. Leave it out of tests=",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        va.probe(planted(0), scenes(2), **arguments)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([None], "labels for each of 2 samples of the inputs; got 1"),
        ([3, None], "labels as a dict, a dataclass or None; got int"),
        ([{"phrase": []}, None], r"labels must be among phrases, relations, word_relations, sentence, variants; got"),
        ([{"phrases": [(1, 2, 3, 4)]}, None], "phrases must be .*, with or without a class; got"),
        ([{"phrases": [((2, 2), 0)]}, None], r"phrases must have a span \(start, stop\)"),
        ([{"phrases": [((1, 2), [])]}, None], "phrases must name a region each"),
        ([{"phrases": [((3, 5), 0)]}, None], r"phrases must name text tokens in input 2; got columns 3 to 4"),
        ([{"phrases": [((1.0, 2), 0)]}, None], r"phrases must have a span \(start, stop\) .* got \(1.0, 2\)"),
        ([{"phrases": [((1, 2), 0.5)]}, None], r"phrases must name regions by their numbers; got \(\(1, 2\), 0.5\)"),
        ([{"relations": [(0.9, 1, "on")]}, None], r"relations must name regions by their numbers; got \(0.9, 1, 'on'\)"),
        ([{"relations": [(0, 1, None)]}, None], "relations must be .* each"),
        ([{"word_relations": [((1, 2), (2, 3))]}, None], r"word_relations must be \(\(start, stop\), \(start, stop\), class"),
        ([{"word_relations": [((1, 2), (3, 5), "x")]}, None], r"word_relations must name text tokens in input 2; got columns 3"),
        ([{"variants": [3]}, None], "variants must be a dict of task -> input ids; got list"),
        ([{"variants": {"other": 3}}, None], "variants must give the input ids of the changed text; got 3 for 'other'"),
        ([{"variants": {"word_order": [3]}}, None], "variants must have tasks with names other than length"),
        ([{"sentence": {"a": 1}, "variants": {"a": [1]}}, None], "variants must have tasks with names other than .*, a; got 'a'"),
        ([None, {"phrases": [((1, 2), 6)]}], "regions must be among the 6 image tokens of input 3 without padding; got 6"),
        ([{"relations": [(0, 1)]}, None], "relations must be .* each"),
        ([{"sentence": "long"}, None], "sentence must be a dict"),
        ([{"sentence": False}, None], "sentence must be a dict"),
        ([{"sentence": {"length": 3}}, None], "tasks with names other than length, word_content, word_order; got 'length'"),
        ([{"phrases": 0}, None], "phrases must be a list; got 0"),
        ([{"relations": {"on": (0, 1)}}, None], "relations must be a list; got {'on'"),
    ],
)
def test_bad_labels(labels: Any, message: str) -> None:
    (inputs, _), *_ = scenes(2)
    with pytest.raises((TypeError, ValueError), match=message):
        va.probe(planted(0), [(inputs, None), (inputs, labels)])


def test_labels_of_other_types() -> None:
    """Numbers of NumPy and torch; a class that is missing; classes of several parts."""
    (inputs, _), *_ = scenes(30)
    plain = [{"phrases": [((1, 2), [0, 1])], "relations": [(0, 1, str(("a", row % 2)))]} for row in range(30)]
    others = [
        {
            "phrases": [((np.int64(1), 2), np.array([0, 1, 1]) if row % 2 else torch.tensor([0, 1]))],
            "relations": [(torch.tensor(0), np.int32(1), ("a", row % 2))],
            "sentence": {"mood": None},
        }
        for row in range(30)
    ]
    one, two = (va.probe(planted(0), [(inputs, labels)], tests=("coreference", "relation")) for labels in (plain, others))
    assert one.table == two.table and one.value("relation") is not None
    kinds = {row["kind"] for row in va.probe(planted(0), [(inputs, others)], tests=("linguistic",)).table}
    assert kinds == {"length", "word_content", "word_order"}


def test_words_stand_behind_the_image_too() -> None:
    """What the caller says of the sequence is about the input ids that stand in it, first or last, with padding among them."""

    class Turned(models.Joined):
        def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
            return self.encoder(torch.cat([self.project(features), self.embed(input_ids)], 1))

    ids, features = torch.randint(99, (12, 6)), torch.randn(12, 4, 20)
    texts, image = torch.zeros(12, 6), torch.ones(12, 4)
    texts[:, 1 + torch.randint(4, (1,)) :] = -1
    inputs, options = {"input_ids": ids, "features": features}, {"modality": {"features": "image"}, "tests": ("linguistic",)}
    seen = []
    for model, parts in ((models.Joined(True), [texts, image]), (Turned(True), [image, texts])):
        layout = Layouts(model, None, lambda inputs, parts=parts: torch.cat(parts, 1)).of(inputs, (12, 10))
        seen.append(layout.words_of(ids))
        va.probe(model, [(inputs, None)], parts=lambda inputs, parts=parts: torch.cat(parts, 1), **options)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], texts == 0)
    with pytest.raises(
        ValueError, match=r"parts must have all the text first or all of it last .* got text at \[0, 9\] of 10 tokens"
    ):
        va.probe(model, [(inputs, None)], parts=lambda inputs: torch.tensor([0] + [1] * 8 + [0]), **options)


def test_what_is_no_pair_or_no_stream() -> None:
    with pytest.raises(TypeError, match=r"dataset must yield \(inputs, labels\); got 3 of them"):
        va.probe(planted(0), [({}, None, None)])
    with pytest.raises(TypeError, match="dataset must yield inputs as a mapping"):
        va.probe(planted(0), [(3, None)])
    joined = models.Joined(False).eval()
    inputs = {"input_ids": torch.randint(99, (2, 5)), "features": torch.randn(2, 3, 20)}
    with pytest.raises(
        ValueError, match="must attend over words and image tokens in one stream; got none in Joined, but 7 other calls"
    ):
        va.probe(joined, [(inputs, [None, None])], modality={"features": "image"})
    for options in ({}, {"tests": ("modality",)}):
        with pytest.raises(ValueError, match="dataset must hold at least one sample; got none"):
            va.probe(planted(0), [], **options)
    model = hf.BertModel(hf.BertConfig(vocab_size=99, **models.DEEP))
    with va.nn.replace_attention(model, score="additive"):
        with pytest.raises(ValueError, match="model must attend by a dot product, .* got the score 'additive'"):
            va.probe(model, [(models.words(), [None, None])])
