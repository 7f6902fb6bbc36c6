"""The vlattn command, on small random Hugging Face models saved to a temporary folder."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

typer = pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

from tests.helpers import saved_models  # noqa: E402
from tests.helpers.commands import said, vlattn  # noqa: E402
from vlattn_fast import cli  # noqa: E402
from vlattn_fast.checking import verify  # noqa: E402
from vlattn_fast.interpret.relevancy.methods.registry import METHODS  # noqa: E402
from vlattn_fast.interpret.result.figures import photos  # noqa: E402
from vlattn_fast.ops import OPERATORS  # noqa: E402


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return saved_models.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.slow
def test_explain_the_next_token_of_a_decoder(llava, picture, tmp_path):
    out = tmp_path / "out.html"
    result = vlattn("explain", "--model", llava, "--image", picture, "--text", "a red square", "--out", out, "--target", 5)
    assert result.exit_code == 0, result.output
    assert "(target 5)" in result.output and "square" in out.read_text() and "data:image/jpeg" in out.read_text()
    refused = vlattn("explain", "--model", llava, "--image", picture, "--text", "a", "--text", "red", "--out", out)
    assert refused.exit_code == 2 and "text must be one text for LlavaForConditionalGeneration; got 2" in said(refused)


@pytest.mark.slow
def test_constants_and_the_explained_number(llava, picture, tmp_path):
    run = ("explain", "--model", llava, "--image", picture, "--text", "a red square", "--answer", "blue circle")
    said_of = {}
    frozen = ("--freeze", "norms", "--freeze", "attention")
    for of, options in (("logit", ("--of", "logit", *frozen)), ("margin", ("--of", "margin"))):
        result = vlattn(*run, "--out", tmp_path / "out.html", *options)
        assert result.exit_code == 0, result.output
        said_of[of] = re.search(rf"token 0: {of} (\S+)", result.output)[1]
    assert said_of["logit"] != said_of["margin"]
    refused = vlattn(*run, "--out", tmp_path / "out.html", "--freeze", "norm")
    assert refused.exit_code == 2 and "freeze must be among norms, attention; got 'norm'" in said(refused)
    refused = vlattn(*run, "--out", tmp_path / "out.html", "--method", "rollout", "--of", "logit")
    assert (
        refused.exit_code == 2
        and "--of must be an option of a chosen method: rollout has one_hot, start_layer, sinks; got 'logit'" in said(refused)
    )


def test_options_of_methods_reach_those_that_have_them(monkeypatch, vit, picture, tmp_path):
    asked = []
    monkeypatch.setattr(cli, "explain_one", lambda options, methods, *rest: asked.append([each.label for each in methods]) or [])
    run = ("explain", "--model", vit, "--image", picture, "--out", tmp_path / "out.html")
    names = ("integrated_gradients", "smoothgrad", "occlusion", "rollout")
    given = ("--n-steps", 2, "--n-samples", 3, "--noise", 0.5, "--window", 4, "--fill", "none", "--seed", 1)
    result = vlattn(*run, *(word for name in names for word in ("--method", name)), *given)
    assert result.exit_code == 0, result.output
    assert asked == [
        [
            "integrated_gradients(n_steps=2)",
            "smoothgrad(n_samples=3, noise=0.5, seed=1)",
            "occlusion(window=4, fill=None)",
            "rollout",
        ]
    ]
    refused = vlattn(*run, "--method", "rollout", "--n-steps", 2)
    assert "--n-steps must be an option of a chosen method: rollout has one_hot, start_layer, sinks; got 2" in said(refused)
    assert refused.exit_code == 2 and len(asked) == 1


@pytest.mark.parametrize("command", ["explain", "evaluate"])
def test_each_option_of_a_method_is_one_of_the_command(command):
    flags = {flag for parameter in typer.main.get_command(cli.app).commands[command].params for flag in parameter.opts}
    for name, kind in METHODS.items():
        options = {f"--{option.replace('_', '-')}" for option in kind.option_names() if option not in kind.unlabelled}
        assert options <= flags, name


def test_a_long_text_is_no_title(bert, tmp_path):
    out = tmp_path / "out.html"
    assert vlattn("explain", "--model", bert, "--text", "a red " * 40, "--out", out).exit_code == 0
    title = re.search(r"<title>(.*)</title>", out.read_text())[1]
    assert len(title) == 80 and title.endswith("…")


def test_explain_texts_alone(bert, tmp_path):
    out = tmp_path / "out.png"
    result = vlattn("explain", "--model", bert, "--text", "a red square", "--text", "a circle", "--out", out)
    assert result.exit_code == 0, result.output
    assert out.exists() and "score 1:" in result.output


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if not kind.takes_logits])
def test_explain_a_classifier_as_png(vit, picture, tmp_path, method):
    out = tmp_path / "out.png"
    result = vlattn("explain", "--model", vit, "--image", picture, "--out", out, "--method", method, "--target", 3)
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_target_is_the_one_asked_for(vit, picture, tmp_path):
    """Another class, another score: the option reaches the model."""
    scores = set()
    for target in (0, 1):
        result = vlattn("explain", "--model", vit, "--image", picture, "--out", tmp_path / "x.png", "--target", target)
        assert f"(target {target})" in result.output
        scores.add(re.search(r"score 0: (\S+)", result.output).group(1))
    assert len(scores) == 2


def test_version():
    from importlib.metadata import version

    result = vlattn("--version")
    assert result.exit_code == 0 and result.output == f"vlattn_fast {version('vlattn_fast')}\n"


def test_the_part_that_the_model_saw_is_known(vit, picture):
    """The box cut out of the whole picture is what the pixels show."""
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(vit)
    seen = Image.open(picture).convert("RGB")
    inputs = processor(images=seen, return_tensors="pt")
    box = photos.seen_part(processor, seen.size)
    assert box == pytest.approx((4 / 32, 0, 28 / 32, 1), abs=5e-3)
    width, height = seen.size
    cut = seen.resize(
        (24, 24), Image.Resampling.BICUBIC, box=tuple(x * size for x, size in zip(box, (width, height) * 2, strict=True))
    )
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    shown = (inputs["pixel_values"][0] * std + mean).clamp(0, 1).permute(1, 2, 0)
    torch.testing.assert_close(shown, torch.from_numpy(np.asarray(cut) / 255).float(), atol=3e-2, rtol=0)
    processor.do_center_crop, processor.size = False, {"height": 24, "width": 24}
    assert photos.seen_part(processor, seen.size) == (0, 0, 1, 1)
    for tiles in ((1, 4, 3, 24, 24), (4, 3, 24, 24)):
        assert photos.seen_part(lambda picture, tiles=tiles: torch.zeros(tiles), seen.size) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "x.pdf"], "must end in .html or .png"),
        (["--out", "nowhere/x.png"], "there is no directory"),
        (["--out", "x.png"], "--image or --text must be given"),
        (["--out", "x.png", "--text", "a"], "--image must be given for ViTForImageClassification; got none"),
        (["--out", "x.png", "--image", "PICTURE", "--text", "a"], "--text must be left out for ViTForImageClassification; got"),
        (["--out", "x.png", "--image", "PICTURE", "--target", "7"], "target must be from 0 to 4"),
        (["--out", "x.png", "--image", "PICTURE", "--method", "magic"], "magic"),
        (["--out", "x.png", "--image", "PICTURE", "--device", "nowhere"], "--device nowhere"),
        (["--out", "x.png", "--image", "PICTURE", "--workers", "0"], "--dataset must be given with --workers; got none"),
        (["--out", "x.png", "--image", __file__], "which PIL cannot read"),
        (["--out", "x.png", "--image", "missing.png"], "missing.png"),
        (["--out", "x.png", "--image", "PICTURE", "--start-layer", "9"], "--start-layer must be from -2 to 1"),
        (["--out", "x.png", "--image", "PICTURE", "--device", "meta"], "--device meta: its tensors have no values"),
    ],
)
def test_explain_refuses(vit, picture, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    result = vlattn("explain", "--model", vit, *(picture if option == "PICTURE" else option for option in options))
    assert result.exit_code == 2
    assert words in said(result)


@pytest.mark.parametrize("command", ["explain", "explain --dataset", "evaluate", "probe"])
def test_a_model_that_is_not_there_is_named_before_the_file_to_write(picture, tmp_path, command):
    """Whoever mistypes a path makes no folder first."""
    inputs = ["--image", picture] if command == "explain" else ["--dataset", tmp_path]
    for out in (tmp_path / "nowhere" / "x.pdf", picture):
        result = vlattn(command.split()[0], "--model", tmp_path / "gone", *inputs, "--out", out)
        assert result.exit_code == 2 and "--model must be the directory or id of a Hugging Face model" in said(result), (
            result.output
        )


@pytest.mark.parametrize("command", ["explain", "verify", "bench", "demo"])
def test_what_cannot_be_written_is_refused_at_the_start(vit, picture, tmp_path, command, monkeypatch):
    monkeypatch.setattr(cli, "load_model", None)  # none of these gets so far
    monkeypatch.setattr(cli, "entry_points", None)
    lines = {
        "explain": ["--model", vit, "--image", picture],
        "verify": ["attention_map", "--fuzz", 1],
        "bench": ["attention_map", "--quick"],
        "demo": [],
    }
    folder = tmp_path / "folder.png"
    folder.mkdir()
    (tmp_path / "rows.json").write_text("{}")
    outs = {"explain": [folder, tmp_path / f"{'x' * 300}.png"], "verify": [folder], "bench": [picture, tmp_path / "rows.json"]}
    for out in outs.get(command, [picture, picture / "below"]):
        result = vlattn(command, *lines[command], "--out", out)
        assert result.exit_code == 2 and "out must be a " in said(result) and "; got" in said(result), result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "rows.json"]


def test_an_older_page_stays_where_a_run_is_refused(vit, picture, tmp_path):
    out = tmp_path / "out.html"
    out.write_text("older")
    assert vlattn("explain", "--model", vit, "--image", picture, "--out", out, "--target", 9).exit_code == 2
    assert out.read_text() == "older"


@pytest.mark.slow
def test_verify_passes_and_counts():
    result = vlattn("verify", "--backend", "streaming", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    for operator in OPERATORS:
        assert re.search(rf"^{operator} +streaming +float32 +[1-9]", result.output, re.M), result.output
    again = re.search(r"^the worst again: vlattn (verify .*)$", result.output, re.M)
    repeated = vlattn(*again[1].split())
    (row,) = re.findall(r"^\w+ +streaming .*$", repeated.output, re.M)
    assert row in result.output and row.split()[0] == again[1].split()[1]


def test_verify_runs_every_backend():
    results = verify.verify(dtypes=(torch.float32,), operators=("attention_map",))
    assert [result.backend for result in results] == list(cli.BACKENDS)


@pytest.mark.slow
def test_verify_fails_on_a_wrong_backend(monkeypatch):
    from vlattn_fast.backends.streaming import attention_map

    right = attention_map.forward
    monkeypatch.setattr(attention_map, "forward", lambda *inputs: right(*inputs) * 1.001)
    result = vlattn("verify", "--backend", "streaming", "--dtype", "float32")
    assert result.exit_code == 1
    assert re.search(r"^attention_map .* FAILED$", result.output, re.M)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "float8"], "--dtype must be one of"),
        (["--backend", "auto"], "--backend must be one of"),
        (["--device", "nowhere"], "--device nowhere"),
        (["softmax"], "OPERATOR must be one of score_attention"),
        (["--device", "meta"], "--device meta"),
        (["--seed", str(2**64)], "--seed must be a number of 64 bits"),
        (["--score", "distance"], "--score must be given with --fuzz"),
        (["--fuzz", "1", "--score", "nonsense"], "--score must be one of dot"),
        (["maxsim", "--fuzz", "1", "--score", "distance"], "OPERATOR must be score_attention with --score"),
    ],
)
def test_verify_refuses(options, words):
    result = vlattn("verify", *options)
    assert result.exit_code == 2
    assert words in said(result)


def test_the_demo_is_of_another_package(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "entry_points", lambda **asked: [])
    result = vlattn("demo", "--out", tmp_path)
    assert result.exit_code == 1 and said(result) == "vlattn demo needs the package vlattn_lab: pip install vlattn-lab "
    calls = []
    for passed in (True, False):
        entry = SimpleNamespace(load=lambda passed=passed: lambda out, costs: calls.append((out, costs)) or passed)
        monkeypatch.setattr(cli, "entry_points", lambda entry=entry, **asked: [entry] if asked == ASKED else [])
        assert vlattn("demo", "--out", tmp_path, "--no-costs").exit_code == (0 if passed else 1)
    assert calls == [(tmp_path, False)] * 2


ASKED = {"group": "vlattn_fast.commands", "name": "demo"}


def test_photos_are_upright(tmp_path):
    """Cameras store the picture as the sensor has it, and how it was held; transformers' own loader turns it, too."""
    from PIL import Image

    image, held = Image.new("RGB", (8, 4), "blue"), Image.Exif()
    image.paste("red", (0, 0, 4, 4))
    held[0x0112] = 6  # the orientation: its left is the top
    image.save(tmp_path / "photo.png", exif=held)
    upright = np.asarray(photos.open_image(tmp_path / "photo.png"))
    assert upright.shape == (8, 4, 3) and upright[0, 0, 0] == 255 and upright[-1, 0, 2] == 255


def test_a_tokenizer_without_padding(tmp_path):
    """As GPT-2's and Llama's."""
    words = saved_models.tokenizer()
    words.pad_token = None
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=len(words), n_positions=16, bos_token_id=0, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    result = vlattn("explain", "--model", tmp_path, "--text", "a red square", "--answer", "blue", "--out", tmp_path / "out.html")
    assert result.exit_code == 0 and "'blue'" in result.output, result.output
