"""`vlattn intervene` on small random models saved to a temporary folder."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

import torch
from PIL import Image
from transformers import GenerationConfig
from typer.testing import CliRunner

import vlattn_fast as va
from tests.helpers import saved_models
from vlattn_fast.cli import app
from vlattn_fast.interpret.explaining.loading import build_inputs, load_model
from vlattn_fast.interpret.intervening.intervene_command import cut_of, generated, scale_of


def run(*arguments: str):
    return CliRunner().invoke(app, ["intervene", *arguments], env={"COLUMNS": "400"})


@pytest.fixture
def photo(tmp_path: Path) -> str:
    Image.new("RGB", (24, 24), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


@pytest.mark.slow
def test_a_decoder_says_another_answer(tmp_path: Path, photo: str) -> None:
    model = saved_models.save_llava(tmp_path / "llava")
    GenerationConfig(suppress_tokens=[1, 2, 8]).save_pretrained(model)  # random weights say neither <end> nor <image>
    result = run("--model", str(model), "--image", photo, "--text", "a red", "--cut", "image->last:0-1", "--generate", "3")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first.startswith("unedited: '") and second.startswith("edited:   '")
    before, after = (float(each.split(", ")[0]) for each in first.split("probability ")[1].split(", with the edits "))
    assert 0 < before < 1 and 0 < after < 1 and before != after
    nothing = run("--model", str(model), "--image", photo, "--text", "a red", "--scale", "0:0:1", "--generate", "3")
    first, second = nothing.stdout.splitlines()
    assert second.split("'")[1] == first.split("'")[1]


def test_an_answer_that_ends_at_once_is_none(tmp_path: Path) -> None:
    model, processor = load_model(str(saved_models.save_llama(tmp_path / "llama")))
    inputs = build_inputs(model, processor, None, ["a red"])
    model.generation_config.eos_token_id = [*range(model.config.vocab_size)]
    assert generated(model, inputs, 1) is None


def test_scores_of_a_dual_encoder(tmp_path: Path, photo: str) -> None:
    folder = saved_models.save_clip(tmp_path / "clip")
    result = run(
        "--model", str(folder), "--image", photo, "--text", "a red square", "--cut", "image->all:-1", "--tower", "vision"
    )
    assert result.exit_code == 0, result.output
    model, processor = load_model(str(folder))
    inputs = build_inputs(model, processor, Image.open(photo), ["a red square"])
    with torch.no_grad():
        before = model(**inputs).logits_per_image.item()
        with va.intervene(model, inputs, va.Knockout(keys="image", layers=1)):
            after = model(**inputs).logits_per_image.item()
    assert result.stdout == f"score 0: {before:.6g} unedited, {after:.6g} edited (target 0)\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--cut or --scale must be given; got neither"),
        (["--cut", "last"], """--cut must be "KEYS->QUERIES[:LAYERS[:HEADS]]" in quotes, e.g. "image->last:10-15", with names"""),
        (["--cut", "words->last"], '--cut must be "KEYS->QUERIES'),
        (["--cut", "image->last:x"], '--cut must be "KEYS->QUERIES'),
        (["--cut", "image->last:3-1"], '--cut must be "KEYS->QUERIES'),
        (["--cut", "image->last:1:2:3"], '--cut must be "KEYS->QUERIES'),
        (["--cut", "image-"], "got 'image-'"),  # the shell took the rest for a file
        (["--cut", "last:image"], """information flows from keys to queries: "image->last"; got 'last:image'"""),
        (
            ["--cut", "last:image:0-1:3"],
            """information flows from keys to queries: "image->last:0-1:3"; got 'last:image:0-1:3'""",
        ),
        (["--cut", "all->all"], "queries, keys or heads must be given, since Knockout without them edits all attention"),
        (["--scale", "1:2"], "--scale must be LAYER:HEADS:FACTOR, e.g. 14:3,7:0; got '1:2'"),
        (["--cut", "image[0,0,12,12]->last"], "with x1 < x2 and y1 < y2 relative to the image, in [0, 1]; got ('image', (0.0,"),
        (["--cut", "image[0,0,x,1]->last"], "or a box image[x1,y1,x2,y2]; got"),
        (["--cut", "image->last:9"], "layers must be from -2 to 1 in tower 'language', which has 2; got 9"),
        (["--cut", "image->last", "--tower", "text"], "--tower must be one of 'language'; got 'text'"),
        (["--cut", "image->last", "--dtype", "int8"], "--dtype must be one of"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, tmp_path: Path, photo: str) -> None:
    model = saved_models.save_llava(tmp_path / "llava")
    result = run("--model", str(model), "--image", photo, "--text", "a red", *options)
    assert result.exit_code == 2 and message in result.output, result.output


def test_numbers_are_spans_and_lists() -> None:
    cut = cut_of("special->all:0,3-5:2", None)
    assert (cut.queries, cut.keys, cut.layers, cut.heads) == (None, "special", (0, 3, 4, 5), (2,))
    cut = cut_of("question - last->last:-3--2,-1", None)
    assert (cut.queries, cut.keys, cut.layers, cut.heads) == ("last", "question - last", (-3, -2, -1), None)
    assert cut_of("image:1->last", None).keys == "image:1"
    box = cut_of("image:0[0,0,.5,1]->image[.5,0,1,1]:0", None)
    assert (box.keys, box.queries, box.layers) == (("image:0", (0, 0, 0.5, 1)), ("image", (0.5, 0, 1, 1)), (0,))
    scale = scale_of("14:3,7:0.5", "vision")
    assert dict(scale.heads) == {14: (3, 7)} and scale.factor == 0.5 and scale.tower == "vision"
