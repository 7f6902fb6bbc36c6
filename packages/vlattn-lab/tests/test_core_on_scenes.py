"""`va.evaluate`, `va.probe` and wrong arguments, on DigitScenes and the trained UNITER."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import vlattn_fast as va
import vlattn_lab as lab
from tests.helpers.small_models import rows


def test_regions_have_their_own_boxes():
    scenes = lab.digit_scenes(6, seed=1)
    model, _ = lab.load_uniter()
    boxes = [corners[named] / 32 for corners, named in zip(scenes.boxes, scenes.named, strict=True)]
    named = lambda model, inputs, target: SimpleNamespace(regions=scenes.named.double())  # noqa: E731
    found = rows(va.evaluate(model, [(scenes.inputs(), 1, boxes)], methods={"named": named}, tests=("pointing", "iou", "mass")))
    assert [found["named", test, "image"]["value"] for test in ("pointing", "iou", "mass")] == [1.0, 1.0, 1.0]


def test_digit_scenes() -> None:
    """The trained UNITER has a head that goes between a digit's word and its region."""
    model, _ = lab.load_uniter()
    report = va.probe(model, lab.probe_samples(80), tests=("coreference",))
    assert report.value("coreference", 1, 2) > 0.85 and report.value("coreference") > 0.85


@pytest.mark.parametrize(("name", "call"), [("count", lab.digit_scenes), ("seed", lambda x: lab.digit_questions(1, seed=x))])
def test_integers_of_more_than_64_bits(name: str, call: Callable[[int], Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be (at most|a float)"):
        call(10**30)
