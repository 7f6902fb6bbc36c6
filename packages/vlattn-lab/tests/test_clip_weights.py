"""The shipped weights of the CLIP model and of the two CLIPMapper reach what their reports say."""

import json

import pytest
import torch

from vlattn_lab import (
    SceneProcessor,
    caption_accuracy,
    digit_prompts,
    digit_questions,
    digit_scenes,
    load_captioner,
    load_clip,
    load_vqa,
    prompt_accuracy,
    question_accuracy,
    retrieval,
)
from vlattn_lab import clip as clip_model
from vlattn_lab import mapper as mapper_model
from vlattn_lab.checkout import ROOT
from vlattn_lab.mapper import answer, blind_accuracy, complete
from vlattn_lab.questions import PROMPTS, QUESTIONS
from vlattn_lab.weights import DATA

FILES = {"clip": clip_model.WEIGHTS, **mapper_model.WEIGHTS}
LOADERS = {"clip": load_clip, "vqa": load_vqa, "captions": load_captioner}


def report(name):
    return json.loads((DATA / FILES[name]).with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def clip():
    return load_clip()[0]


@pytest.fixture(scope="module")
def vqa():
    return load_vqa()[0]


@pytest.fixture(scope="module")
def captioner():
    return load_captioner()[0]


def test_all_weights_together_are_small():
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 8_000_000


@pytest.mark.parametrize("name", FILES)
def test_the_report_is_of_these_weights(name):
    stored = report(name)
    steps, seed, threads = (stored[key] for key in ("steps", "seed", "threads"))
    assert stored["command"] == f"python -m vlattn_lab.train {name} --steps {steps} --seed {seed} --threads {threads}"
    assert stored["cpu_seconds"] < 2 * 20 * 60, "20 minutes of two cores"
    sizes = clip_model.CONFIG if name == "clip" else {"clip": clip_model.CONFIG, "mapper": mapper_model.CONFIG[name]}
    assert stored["config"] == sizes
    model, processor = LOADERS[name]()
    assert not model.training and isinstance(processor, SceneProcessor) and processor.end == (name != "captions")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# Fresh scenes against the stored ones: 0.05 is more than three standard errors of 500 at 0.9.


def test_retrieval_is_what_is_stored(clip):
    stored, fresh = report("clip")["test"]["retrieval"], retrieval(clip, count=500, seed=1)
    assert fresh == pytest.approx(stored, abs=0.08)
    assert fresh["image_to_true_text"] > 0.9 and fresh["text_to_true_image"] > 0.9


@pytest.mark.parametrize("pairs", ["all", "seen", "held_out"])
def test_captions_are_told_from_wrong_ones(clip, pairs):
    stored, fresh = report("clip")["test"]["caption_accuracy"][pairs], caption_accuracy(clip, count=500, seed=1, pairs=pairs)
    assert fresh == pytest.approx(stored, abs=0.05)
    assert min(fresh.values()) > (0.85 if pairs == "held_out" else 0.9)


@pytest.mark.parametrize("pairs", ["all", "held_out"])
def test_questions_are_answered(vqa, pairs):
    stored = report("vqa")["test"]["question_accuracy"][pairs]
    fresh = question_accuracy(vqa, count=250, seed=1, pairs=pairs)
    assert fresh == pytest.approx(stored, abs=0.07)
    if pairs == "all":
        assert min(fresh.values()) > 0.8 and sum(fresh.values()) / len(QUESTIONS) > 0.93


def test_blind_answers_are_what_is_stored():
    stored, fresh = report("vqa")["test"]["blind_accuracy"], blind_accuracy(count=1000, learned=4000, seed=1)
    for name in ("kind", "text"):
        assert fresh[name] == pytest.approx(stored[name], abs=0.08)
        assert max(fresh[name].values()) < 0.7, "the questions tell their answers"


@pytest.mark.parametrize("pairs", ["all", "held_out"])
def test_prompts_are_continued_truly(captioner, pairs):
    stored = report("captions")["test"]["prompt_accuracy"][pairs]
    fresh = prompt_accuracy(captioner, count=250, seed=1, pairs=pairs)
    for name in ("true", "other_image"):
        assert fresh[name] == pytest.approx(stored[name], abs=0.08)
    if pairs == "all":
        assert min(fresh["true"].values()) > 0.85
        assert all(fresh["other_image"][kind] < 0.35 for kind in PROMPTS)


def test_answers_of_the_loaded_models_are_words(vqa, captioner):
    """As a user calls them."""
    asked = digit_questions(4, seed=2)
    processor = load_vqa()[1]
    logits = vqa(**processor(asked.images, asked.questions)).logits
    assert tuple(processor.answers[i] for i in logits.argmax(1)) == answer(vqa, asked)
    prompts = digit_prompts(4, seed=2)
    processor = load_captioner()[1]
    said = processor.decode(captioner.generate(**processor(prompts.images, prompts.questions)))
    assert said == complete(captioner, prompts)


def test_the_clip_model_takes_what_its_processor_gives(clip):
    scenes = digit_scenes(6, seed=2)
    output = clip(**load_clip()[1](scenes.images, scenes.captions))
    image, text = clip_model.embeddings(clip, scenes, clip_model.words_of(scenes))
    torch.testing.assert_close(output.logits_per_image, clip.logit_scale.exp() * image @ text.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_a_directory_without_weights_is_named(name, tmp_path):
    with pytest.raises(ValueError, match=rf"^directory must hold {FILES[name]}, .* {name}; got "):
        LOADERS[name](tmp_path)
    (tmp_path / FILES[name]).touch()
    with pytest.raises(ValueError, match=r"^directory must hold \w+\.json, "):
        LOADERS[name](tmp_path)


def test_the_page_says_what_is_stored():
    """Every row of the tables in docs/digitscenes.md, and the sentences around them."""
    page = " ".join((ROOT / "docs" / "digitscenes.md").read_text(encoding="utf-8").split())

    def percent(*shares):
        return " | ".join(f"{share:.1%}".replace("%", " %") for share in shares)

    asked, told, clip = (report(name)["test"] for name in ("vqa", "captions", "clip"))
    for kind in QUESTIONS:
        right, blind = asked["question_accuracy"], asked["blind_accuracy"]
        row = percent(right["all"][kind], right["held_out"][kind], blind["kind"][kind], blind["text"][kind])
        assert f"| `{kind}` | {row} |" in page
    for kind in PROMPTS:
        true = told["prompt_accuracy"]
        row = percent(true["all"]["true"][kind], true["held_out"]["true"][kind], true["all"]["other_image"][kind])
        assert f"| `{kind}` | {row} |" in page
    for kind in ("digit", "relation", "order"):
        row = percent(*(clip["caption_accuracy"][pairs][kind] for pairs in ("all", "seen", "held_out")))
        assert f"(`{kind}`) | {row} |" in page
    true_caption, true_image = (f"{100 * share:.0f} %" for name, share in clip["retrieval"].items() if "true" in name)
    assert f"true of the image in {true_caption}, and" in page and f"shows what the caption says in {true_image}." in page
    for name in ("uniter", *FILES):
        seconds = json.loads((DATA / f"{name}_digitscenes.json").read_text())["cpu_seconds"]
        assert f"{seconds:.0f} s ({name})" in page
    assert f"{asked['count']:,} of each kind of question" in page and f"{clip['count']:,} of each kind of caption" in page
