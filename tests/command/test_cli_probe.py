"""`vlattn probe` on a small random decoder saved to a temporary folder."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("sklearn")

from PIL import Image
from typer.testing import CliRunner

import vlattn_fast as va
from tests.helpers import saved_models
from vlattn_fast.cli import app
from vlattn_fast.interpret.probing.probe_dataset import TESTS


def run(*arguments: str):
    return CliRunner().invoke(app, ["probe", *arguments], env={"COLUMNS": "300"})


@pytest.mark.slow
def test_a_file_of_samples_or_its_folder(tmp_path: Path) -> None:
    model = str(saved_models.save_llava(tmp_path / "llava"))
    Image.new("RGB", (24, 24), "red").save(tmp_path / "red.png")
    row = {"text": "a red square", "image": "red.png", "relations": [[0, 1, "beside"]], "sentence": {"colour": "red"}}
    other = {**row, "text": "a blue circle", "relations": [[0, 4, "above"]], "sentence": {"colour": "blue"}, "id": 7}
    source = tmp_path / "samples.jsonl"
    source.write_text("\n".join(json.dumps(each) for each in [row, other] * 4) + "\n")
    result = run("--model", model, "--dataset", str(source), "--out", str(tmp_path / "report.json"))
    assert result.exit_code == 0, result.output
    report = va.ProbeReport.load(tmp_path / "report.json")
    assert report.metadata["inputs"] == 8 and report.value("relation") is not None
    assert report.value("modality", 0, 0, "text") + report.value("modality", 0, 0, "image") == pytest.approx(1.0)
    assert "linguistic" in result.output and f"wrote {tmp_path / 'report.json'}" in result.output
    shown = run("--model", model, "--dataset", str(tmp_path))
    assert shown.exit_code == 0 and result.stdout.startswith(shown.stdout) and "relation" in shown.stdout
    again = run("--model", model, "--dataset", str(source), "--out", str(tmp_path / "report.html"), "--test", "modality")
    assert again.exit_code == 0 and "data:image/png" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "line, options, message",
    [
        ("[]", [], "JSON object with a text in line 1; got []"),
        ('{"text": "a", "image": 5}', [], "dataset must have a path as image in line 1; got 5"),
        ('{"text": "a", "phrase": []}', [], "got ['phrase'] in line 1"),
        ("\n", [], "dataset must have at least one line; got none in"),
        ('{"text": "a"}\n\n{"text": "a", "image": "gone.png"}', [], "which does not exist, in line 3 of the dataset"),
        ('{"text": "a"}\n{"text": "a", "relations": 5}', [], "relations must be a list; got 5, in line 2 of the dataset"),
        ('{"text": "a"}', ["--test", "heads"], "--test must be among modality"),
        ('{"text": "a"}', ["--dtype", "int8"], "--dtype must be one of"),
        ('{"text": "a"}', ["--device", "nowhere"], "--device nowhere"),
        ('{"text": "a"}', ["--out", "report.png"], "--out must end in .html or .json; got report.png"),
        ('{"text": "a"}', ["--out", "gone/report.html"], "--out must be in a directory; there is no directory gone"),
        ('{"text": "a"}', ["--dataset", "samples.csv"], "dataset must be a .jsonl file, or a folder with one; got samples.csv"),
        ('{"text": "a"}', ["--dataset", "."], "a folder with one .jsonl file, or the file; got none in ."),
    ],
)
def test_refuses(line: str, options: list[str], message: str, tmp_path: Path) -> None:
    model = str(saved_models.save_bert(tmp_path / "bert"))
    (tmp_path / "samples.jsonl").write_text(line)
    given = {"--model": model, "--dataset": str(tmp_path / "samples.jsonl"), "--out": str(tmp_path / "out.json")}
    given.update(zip(options[::2], options[1::2], strict=True))
    result = run(*[word for pair in given.items() for word in pair])
    assert result.exit_code == 2 and message in result.output


def test_help_names_the_tests() -> None:
    shown = " ".join(run("--help").output.replace("│", " ").split())
    assert f"repeat it for several: {', '.join(TESTS)}" in shown
