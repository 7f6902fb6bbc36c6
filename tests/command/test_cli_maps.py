"""`vlattn explain` with several methods and through a connector, and `vlattn evaluate`, on small models saved to a folder."""

import html
import json
import re

import pytest

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

from tests.helpers import saved_models  # noqa: E402
from tests.helpers.commands import said, vlattn  # noqa: E402
from vlattn_fast import cli  # noqa: E402


@pytest.mark.slow
def test_a_target_may_be_a_word(vit, llava, bert, picture, tmp_path):
    out = tmp_path / "x.png"
    named = vlattn("explain", "--model", vit, "--image", picture, "--out", out, "--target", "LABEL_3")
    assert "(target 3)" in named.output, named.output
    word = vlattn("explain", "--model", llava, "--image", picture, "--text", "a red square", "--out", out, "--target", "blue")
    assert "(target 5)" in word.output, word.output
    refused = vlattn("explain", "--model", bert, "--text", "a red square", "--out", out, "--target", "blue")
    assert refused.exit_code == 2 and "--target must be one of 'LABEL_0'" in said(refused)


@pytest.mark.slow
def test_several_methods_on_one_page(vit, llava, picture, tmp_path):
    out = tmp_path / "page.html"
    asked = ("--method", "rollout", "--method", "gradient", "--method", "gradient")
    result = vlattn("explain", "--model", vit, "--image", picture, "--out", out, *asked)
    assert result.exit_code == 0, result.output
    data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)[1])
    assert [method["name"] for method in data["methods"]] == ["rollout", "gradient"]
    each = ("--method", "gradient", "--method", "rollout", "--method", "integrated_gradients", "--method", "gradcam")
    result = vlattn("explain", "--model", vit, "--image", picture, "--out", out, *each)  # each with its own defaults
    assert result.exit_code == 0, result.output
    data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)[1])
    assert [method["name"] for method in data["methods"]] == list(each[1::2])
    for options in (
        ("--image", picture, "--out", tmp_path / "x.png"),
        ("--dataset", picture.parent, "--out", tmp_path / "folder"),
    ):
        refused = vlattn("explain", "--model", vit, *options, *asked)
        assert (
            refused.exit_code == 2
            and "--method must be given once unless --out is one page (.html); got rollout, gradient" in said(refused)
        )


def test_through_the_connector(vit, llava, picture, tmp_path):
    out = tmp_path / "page.html"
    result = vlattn("explain", "--model", llava, "--image", picture, "--text", "a red", "--out", out, "--through-connector")
    assert result.exit_code == 0, result.output
    data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)[1])
    assert data["towers"] == ["language", "vision"]
    refused = vlattn("explain", "--model", vit, "--image", picture, "--out", out, "--through-connector")
    assert refused.exit_code == 2 and "must have an adapter with a connector for through_connector=True" in said(refused)


def test_a_run_goes_on_with_its_sinks(vit, picture, tmp_path):
    asked = ("explain", "--model", vit, "--dataset", picture.parent, "--out", tmp_path / "folder")
    begun, same, other = (vlattn(*asked, *more) for more in ((), ("--sinks", "keep"), ("--sinks", "remove")))
    assert begun.exit_code == same.exit_code == 0 and "skipped 1 (done before)" in same.output, same.output
    assert other.exit_code == 2 and '--sinks must be "keep", as in the earlier runs' in said(other)


def test_sinks_are_named_and_removed(vit, picture, tmp_path):
    asked = ("explain", "--model", vit, "--image", picture, "--out", tmp_path / "page.html")
    options = ((), ("--sinks", "keep"), ("--find-sinks",), ("--sinks", "remove"))
    plain, kept, found, removed = (vlattn(*asked, *more) for more in options)
    assert all(result.exit_code == 0 and "without content" not in result.output for result in (plain, kept))
    assert found.exit_code == 0 and found.output.count("without content") == 1
    line = next(line for line in removed.output.splitlines() if "without content" in line)
    assert line in html.unescape((tmp_path / "page.html").read_text())
    refused = vlattn(*asked, "--sinks", "drop")
    assert refused.exit_code == 2 and "--sinks must be one of ('keep', 'remove'); got 'drop'" in said(refused)
    refused = vlattn(*asked, "--sinks", "remove", "--method", "gradcam")
    assert refused.exit_code == 2 and "--sinks must be an option of a chosen method: gradcam has freeze, of" in said(refused)
    refused = vlattn(*asked[:3], "--dataset", picture.parent, "--out", tmp_path / "folder", "--find-sinks")
    assert refused.exit_code == 2 and "--find-sinks must be given without --dataset" in said(refused)


@pytest.mark.slow
def test_evaluate_prints_the_table(vit, picture, tmp_path):
    lines = [{"image": str(picture), "boxes": [[0, 0, 0.5, 1]], "target": 2, "id": "left"}, {"image": str(picture)}]
    dataset, out = tmp_path / "data.jsonl", tmp_path / "values.json"
    dataset.write_text("\n".join(json.dumps(line) for line in lines))
    asked = ("--method", "gradient", "--method", "random", "--test", "pointing", "--test", "positive")
    result = vlattn("evaluate", "--model", vit, "--dataset", dataset, "--out", out, *asked)
    assert result.exit_code == 0, result.output
    table = {(record["method"], record["test"], record["part"]): record for record in json.loads(out.read_text())["table"]}
    assert {key[:2] for key in table} == {
        (method, test) for method in ("gradient", "random") for test in ("pointing", "positive")
    }
    assert (table["gradient", "pointing", "image"]["samples"], table["gradient", "pointing", "image"]["left_out"]) == (1, 1)
    assert re.search(r"^random +pointing +image", result.output, re.M)
    facts = json.loads(out.read_text())["metadata"]
    assert (facts["model"], facts["checkpoint"]) == ("ViTForImageClassification", vit.name)
    assert (facts["dataset"], facts["dtype"], facts["seed"]) == ("data.jsonl", "float32", 0)
    assert facts["versions"]["transformers"] == transformers.__version__ and facts["device"].startswith("CPU: ")
    rows = tmp_path / "data.csv"
    rows.write_text(f'image,target,boxes\n{picture},2,"[[0, 0, 0.5, 1]]"\n')
    by_row = vlattn("evaluate", "--model", vit, "--dataset", rows, "--test", "pointing", "--out", tmp_path / "values.png")
    assert by_row.exit_code == 0 and re.search(r"^gradient +pointing +image +[01]\.0000 +- +1 +0", by_row.output, re.M), (
        by_row.output
    )
    weighted = ("--method", "weighted", "--method", "random", "--weighting", "norm", "--of", "logit", "--test", "pointing")
    result = vlattn("evaluate", "--model", vit, "--dataset", rows, "--out", out, *weighted)
    assert result.exit_code == 0, result.output
    methods = {record["method"] for record in json.loads(out.read_text())["table"]}
    assert methods == {"weighted(of=logit, weighting=norm)", "random"}
    dataset.write_text('{"image": "none.png", "id": "here"}')
    for option, wrong in (("--model", tmp_path / "gone"), ("--dataset", tmp_path / "gone"), ("--test", "positiv")):
        options = {"--model": vit, "--dataset": dataset, option: wrong}
        named = vlattn("evaluate", *(word for pair in options.items() for word in pair))
        assert named.exit_code == 2 and f"{option} must be" in said(named)
    for method, option, message in (
        ("rollout", ("--weighting", "norm"), "--weighting must be an option of a chosen method"),
        ("random", ("--start-layer", "1"), "--start-layer must be an option of a chosen method: random has none; got 1"),
    ):
        asked = ("--method", method, *option)
        refused = vlattn("evaluate", "--model", vit, "--dataset", dataset, *asked)
        assert refused.exit_code == 2 and message in said(refused)
    refused = vlattn("evaluate", "--model", vit, "--dataset", dataset)
    assert refused.exit_code == 2 and "which does not exist, in input 'here' of the dataset" in said(refused)


def test_a_stopped_run_says_how_to_go_on(vit, picture, tmp_path, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "explain_dataset", stopped)
    result = vlattn("explain", "--model", vit, "--dataset", picture.parent, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "holds what was written before; run the same command again to continue" in said(result)


@pytest.mark.parametrize("name", ["out.png", "out.html"])
@pytest.mark.slow
def test_a_map_of_each_head(vit, picture, tmp_path, name):
    out = tmp_path / name
    result = vlattn("explain", "--model", vit, "--image", picture, "--out", out, "--per", "head", "--target", 3)
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 3000
    if name.endswith("html"):
        assert out.read_text().count("<figure>") > 3
    else:
        other = tmp_path / "whole.png"
        vlattn("explain", "--model", vit, "--image", picture, "--out", other, "--target", 3)
        assert out.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("method", ["tam", "glimpse", "input_gradient"])
def test_an_answer_by_each_method(llava, picture, tmp_path, method):
    call = (
        "explain",
        "--model",
        llava,
        "--image",
        picture,
        "--text",
        "a red square",
        "--answer",
        "blue circle",
        "--method",
        method,
    )
    result = vlattn(*call, "--out", tmp_path / "out.html")
    assert result.exit_code == 0, result.output
    assert method in (tmp_path / "out.html").read_text()
    layers = vlattn(*call, "--out", tmp_path / "layers.png", "--per", "layer")
    assert layers.exit_code == 2 and "--method must be 'gradient' or 'attention'" in layers.output


def test_the_layers_of_an_answer(llava, picture, tmp_path):
    """They are those of all its words together."""
    out = tmp_path / "layers.html"
    call = ("explain", "--model", llava, "--image", picture, "--text", "a red square", "--answer", "blue circle")
    result = vlattn(*call, "--out", out, "--per", "layer")
    assert result.exit_code == 0, result.output
    assert out.read_text().count("<figure>") == 2


def test_maps_of_layers_are_of_one_method_and_one_input(vit, picture, tmp_path):
    call = ("explain", "--model", vit, "--image", picture, "--out", tmp_path / "out.html")
    result = vlattn(*call, "--per", "layer", "--method", "gradient", "--method", "attention")
    assert result.exit_code == 2 and "--per must be given with one --method" in result.output
    result = vlattn(*call, "--per", "token")
    assert result.exit_code == 2 and "--per must be one of" in result.output
    result = vlattn(*call, "--per", "layer", "--method", "gradcam")
    assert result.exit_code == 2 and "--method must be 'gradient' or 'attention'" in result.output


def test_evaluate_judges_answers(picture, tmp_path):
    """Of the file, of the command, and the model's own: each word is a sample."""
    llava, dataset, out = saved_models.save_llava(tmp_path / "llava"), tmp_path / "data.jsonl", tmp_path / "values.json"
    lines = [{"image": str(picture), "text": "a red", "answer": "blue square"}, {"image": str(picture), "text": "a circle"}]
    dataset.write_text("\n".join(json.dumps(line) for line in lines))
    for options, samples in ((("--answer", "red"), 3), (("--generate", "2"), 4)):
        asked = ("evaluate", "--model", llava, "--dataset", dataset, "--out", out, "--test", "positive", *options)
        result = vlattn(*asked)
        assert result.exit_code == 0, result.output
        stored = json.loads(out.read_text())
        assert max(row["samples"] for row in stored["table"]) <= samples
        words = [(one["item"], one["word"]) for one in stored["tokens"] if one["part"] == "image"]
        assert words[:2] == [(0, "blue"), (0, "square")] and (options[0] == "--generate" or words[2:] == [(1, "red")])
