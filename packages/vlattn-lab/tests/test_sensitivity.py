"""Tangents of maps, and what tells wrong maps from right ones."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

import vlattn_fast as va
from vlattn_lab.clip import load_clip
from vlattn_lab.scenes import digit_scenes
from vlattn_lab.sensitivity import auc, main, map_and_tangent, maps, right
from vlattn_lab.texts import SceneProcessor


def test_the_map_is_that_of_explain_and_its_tangent_that_of_differences():
    model, scenes = load_clip()[0].double(), digit_scenes(3, seed=11)
    inputs = dict(SceneProcessor()(scenes.images, scenes.captions))
    inputs["pixel_values"] = pixels = inputs["pixel_values"].double()
    change = torch.randn(pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    relevancy, tangent = map_and_tangent(model, inputs, change)
    shown = va.explain(model, inputs, method=va.methods.Gradient(freeze=())).image
    torch.testing.assert_close(relevancy, shown.flatten(1).to(relevancy))
    step = 1e-6 * change
    ahead, behind = (maps(model, {**inputs, "pixel_values": pixels + side * step}).detach() for side in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-5)


def test_a_map_is_right_if_its_peak_is_on_a_named_digit():
    scenes = digit_scenes(4, seed=0)
    region = torch.stack([scenes.named.int().argmax(1), (~scenes.named).int().argmax(1)])
    for regions, expected in zip(region, (True, False), strict=True):
        centre = scenes.boxes.take_along_dim(regions[:, None, None], 1)[:, 0, :2] + 4
        patch = (centre // 4).long()
        assert (right(torch.nn.functional.one_hot(patch[:, 1] * 8 + patch[:, 0], 64).float(), scenes) == expected).all()


def test_auc_counts_pairs():
    assert auc(torch.tensor([3.0, 1.0, 2.0, 3.0]), torch.tensor([True, False, False, False])) == pytest.approx(2.5 / 3)


def test_the_command_prints_a_line_for_each_signal(capsys):
    main(["--samples", "30"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].startswith("right: ") and "entropy" in lines[3]
