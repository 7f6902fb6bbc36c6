"""A file that `vlattn evaluate` writes is a section of docs/guides/which_method.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from PIL import Image
from typer.testing import CliRunner

import vlattn_fast as va
from tests.helpers.small_models import VISION
from vlattn_fast import cli
from vlattn_lab.pages.evaluations_of_others import evaluations_of_others


def saved(folder: Path) -> tuple[Path, Path]:
    """The folder of a small model, and a picture."""
    picture, model = folder / "picture.png", folder / "vit"
    Image.effect_noise((40, 30), 80).convert("RGB").save(picture)
    transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=5)).save_pretrained(model)
    transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(model)
    return model, picture


def test_a_file_of_evaluate_is_a_section_of_the_page(tmp_path):
    vit, picture = saved(tmp_path)
    dataset, folder = tmp_path / "data.jsonl", tmp_path / "evaluations"
    dataset.write_text(json.dumps({"image": str(picture), "boxes": [[0, 0, 1, 1]], "target": 2}))
    folder.mkdir()
    asked = ("--method", "gradient", "--method", "random", "--test", "pointing", "--test", "positive")
    words = ("evaluate", "--model", vit, "--dataset", dataset, "--out", folder / "mine.json", *asked)
    result = CliRunner().invoke(cli.app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    title, facts, table = evaluations_of_others(folder).split("\n\n")
    assert title == f"### mine: `ViTForImageClassification` ({vit.name})"
    assert facts.startswith("1 samples of data.jsonl, seed 0, float32 on CPU: ") and "transformers" in facts and "commit" in facts
    head, _, *lines = table.splitlines()
    assert head == "| method | pointing, image | positive, image |"
    value = va.Evaluation.load(folder / "mine.json").value("gradient", "pointing")
    assert lines[0].startswith(f"| `gradient` | {value:.3f} | ") and lines[1].startswith("| `random` |")
    whole = json.loads((folder / "mine.json").read_text())
    del whole["metadata"]["device"], whole["metadata"]["versions"]
    (folder / "old.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="old.json must be a file of a present `vlattn evaluate`; it lacks device, versions"):
        evaluations_of_others(folder)
    assert evaluations_of_others(tmp_path / "none") == "No file yet.\n"
