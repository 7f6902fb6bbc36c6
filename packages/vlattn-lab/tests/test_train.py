"""The trainings at a few steps: they run, learn, repeat themselves and leave weights that load."""

import json
import os
import stat

import pytest
import torch

from vlattn_fast.models import CLIPMapper
from vlattn_lab import (
    SceneProcessor,
    digit_scans,
    digit_scenes,
    held_out_captions,
    hybrid,
    is_true,
    load_captioner,
    load_clip,
    load_uniter,
    load_vqa,
)
from vlattn_lab import lxmert as lxmert_model
from vlattn_lab import scenes as scenes_module
from vlattn_lab.processor import DIGIT_WORDS, VOCABULARY
from vlattn_lab.questions import PROMPTS, QUESTIONS, ask
from vlattn_lab.scenes import sample_scenes
from vlattn_lab.train import clip, lxmert, mapper, run, uniter
from vlattn_lab.twins import load_twin

LOADERS = {"uniter": load_uniter, "clip": load_clip, "vqa": load_vqa, "captions": load_captioner}
LOADERS |= {"lxmert": lxmert_model.load_lxmert}
LOADERS |= {"twin": lambda folder: (load_twin(folder), None)}
LOADERS |= {kind: lambda folder, kind=kind: (hybrid.load(kind, folder), None) for kind in hybrid.WEIGHTS}


@pytest.fixture(scope="module")
def untrained_clip(tmp_path_factory):
    """A directory with CLIP weights of one step, on which the others are trained."""
    directory = tmp_path_factory.mktemp("clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.EVALUATED, "clip", 4)
        run.main(["clip", "--steps", "1", "--threads", "1", "--output", str(directory)])
    return directory


@pytest.mark.parametrize("name", LOADERS)
def test_two_steps_write_weights_and_a_report_that_belong_together(name, untrained_clip, tmp_path, monkeypatch, capsys):
    count = 8
    monkeypatch.setitem(run.EVALUATED, name, count)
    monkeypatch.setattr(mapper, "LEARNED", 50)
    more = {"clip": untrained_clip} if name in ("vqa", "captions") else {}
    options = ["--clip", str(untrained_clip)] if more else []
    run.main([name, "--steps", "2", "--seed", "7", "--threads", "1", "--output", str(tmp_path), *options])
    training = run.TRAININGS[name]
    report = json.loads((tmp_path / training.weights).with_suffix(".json").read_text())
    assert (report["steps"], report["seed"], report["threads"]) == (2, 7, 1) and report["torch"] == torch.__version__
    repeated = " ".join([name, "--steps 2 --seed 7 --threads 1", *options])  # on these CLIP weights, not the shipped ones
    assert report["command"] == f"python -m vlattn_lab.train {repeated}"
    last = "step 1: contrast" if name == "clip" else "step 2: "  # of the second part, where there are two
    assert last in capsys.readouterr().out
    model, _ = LOADERS[name](tmp_path)
    assert not model.training
    assert report["test"] == {"count": count, "seed": 0, **training.evaluate(model, count=count)}
    again = training.train(2, seed=7, log_every=0, **more)
    stored = {key: tensor.half().float() if training.half else tensor for key, tensor in again.state_dict().items()}
    for key, tensor in model.state_dict().items():
        assert torch.equal(stored[key], tensor), key


def test_weights_have_the_rights_of_other_files(tmp_path, monkeypatch):
    """The umask's; safetensors alone would let nobody but the owner read them."""
    monkeypatch.setitem(run.EVALUATED, "uniter", 4)
    before = os.umask(0o027)
    try:
        run.main(["uniter", "--steps", "1", "--threads", "1", "--output", str(tmp_path)])
    finally:
        os.umask(before)
    assert {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        ".safetensors": 0o640,
        ".json": 0o640,
    }


def learn(parameters, losses, steps=12):
    """(the losses at each step on the same input, the parameters that none of them reaches)"""
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    history = []
    for _ in range(steps):
        parts = losses()
        history.append({name: loss.item() for name, loss in parts.items()})
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
    return history, {name for name, parameter in parameters.items() if parameter.grad is None}


def named(model, heads):
    return dict(model.named_parameters(prefix="model")) | dict(heads.named_parameters(prefix="heads"))


UNUSED = {  # heads that a recipe does not train
    "located": {f"heads.{head}.{part}" for head in ("region", "pixels") for part in ("weight", "bias")},
    "pretraining": {f"heads.{head}.{part}" for head in ("there", "centre", "apart") for part in ("weight", "bias")},
}


@pytest.mark.parametrize("recipe", uniter.RECIPES)
def test_every_loss_of_lxmert_falls_and_reaches_every_parameter(recipe):
    torch.manual_seed(0)
    model, heads = lxmert_model.build(lxmert_model.CONFIG), uniter.TrainingHeads(uniter.CONFIG.hidden_size)
    scenes = sample_scenes(uniter.RECIPES[recipe].kinds, "train", None, torch.Generator().manual_seed(0))
    generator = torch.Generator()
    history, still = learn(
        named(model, heads), lambda: uniter.losses(model, heads, scenes, generator.manual_seed(1), lxmert.observe, recipe)
    )
    assert {*history[0]} == {*uniter.RECIPES[recipe].weights}
    assert all(history[-1][name] < history[0][name] for name in history[0]), history
    assert still == UNUSED[recipe]


@pytest.mark.parametrize("recipe", uniter.RECIPES)
def test_every_loss_of_uniter_falls_and_reaches_every_parameter(recipe):
    torch.manual_seed(0)
    model, heads = uniter.UNITER(uniter.CONFIG), uniter.TrainingHeads(uniter.CONFIG.hidden_size)
    scenes = sample_scenes(uniter.RECIPES[recipe].kinds, "train", None, torch.Generator().manual_seed(0))
    generator = torch.Generator()
    history, still = learn(
        named(model, heads), lambda: uniter.losses(model, heads, scenes, generator.manual_seed(1), recipe=recipe)
    )
    assert {*history[0]} == {*uniter.RECIPES[recipe].weights}
    assert all(history[-1][name] < history[0][name] for name in history[0]), history
    assert still == UNUSED[recipe] | {"model.uniter.img_embeddings.mask_embedding.weight"}, "a masked region is 0 here"


def test_a_recipe_without_locations_masks_regions():
    """One region of each scene that is told of it is 0 in the model's inputs, and no other; words are masked elsewhere."""
    model, heads = uniter.UNITER(uniter.CONFIG), uniter.TrainingHeads(uniter.CONFIG.hidden_size)
    kinds, regions, _ = uniter.RECIPES["pretraining"]
    scenes, seen = sample_scenes(kinds, "train", None, torch.Generator().manual_seed(0)), []
    assert not kinds[: uniter.MASKED + regions].any() and (kinds[uniter.MASKED + regions :] == 0).double().mean() == 0.5
    observe = lambda model, inputs: seen.append(inputs) or uniter.observe(model, inputs)  # noqa: E731
    uniter.losses(model, heads, scenes, torch.Generator().manual_seed(1), observe, "pretraining")
    hidden = (seen[0]["region_features"] == 0).all(-1)
    words = (seen[0]["input_ids"] == uniter.MASK_ID).any(1)
    assert torch.equal(hidden.sum(1), torch.tensor([0] * uniter.MASKED + [1] * regions + [0] * (128 - uniter.MASKED - regions)))
    assert hidden.any(0).all() and torch.equal(words, torch.arange(128) < uniter.MASKED)


def test_every_loss_of_clip_falls_and_reaches_every_parameter():
    torch.manual_seed(0)
    model, heads = clip.build_clip(clip.CONFIG), clip.TrainingHeads(64, 64)
    clip.place(model)
    scenes = digit_scenes(16, split="train")
    history, still = learn(named(model, heads), lambda: clip.losses(model, heads, scenes, torch.Generator().manual_seed(1)))
    assert all(history[-1][name] < history[0][name] for name in clip.WEIGHTS), history
    assert not still


@pytest.mark.parametrize(("task", "kinds", "losses"), [("vqa", QUESTIONS, "question"), ("captions", PROMPTS, "prompt")])
def test_every_loss_of_the_mapper_falls_and_reaches_every_parameter(task, kinds, losses):
    torch.manual_seed(0)
    encoders = clip.build_clip(clip.CONFIG)
    model = CLIPMapper(encoders.vision_model, encoders.text_model, **mapper.CONFIG[task], freeze_encoders=False)
    heads = mapper.TrainingHeads(mapper.CONFIG[task]["hidden_size"])
    scenes = digit_scenes(16, split="train")
    asked, rows = ask(scenes, kinds, prompts=task == "captions", generator=torch.Generator().manual_seed(0))
    assert torch.equal(scenes.images[rows], asked.images)
    states = model.encode_image(scenes.images[:, None]).detach()[rows]
    history, still = learn(
        {name: parameter for name, parameter in named(model, heads).items() if not name.startswith("model.vision.")},
        lambda: getattr(mapper, f"{losses}_losses")(model, heads, asked, states),
    )
    assert history[0].keys() == ({"answer", "centre", "about", "apart"} if task == "vqa" else {"answer", "centre", "about"})
    assert all(history[-1][name] < history[0][name] for name in history[0]), history
    assert still == (set() if task == "vqa" else {"heads.apart.weight", "heads.apart.bias"})


def test_a_question_is_trained_on_the_digits_it_is_about(monkeypatch):
    """What the heads are held to, by brute force over texts and boxes."""
    encoders = clip.build_clip(clip.CONFIG)
    model = CLIPMapper(encoders.vision_model, encoders.text_model, **mapper.CONFIG["vqa"])
    scenes = digit_scenes(12, split="train")
    asked, rows = ask(scenes, QUESTIONS, generator=torch.Generator().manual_seed(0))
    wanted: list[torch.Tensor] = []
    for name in ("smooth_l1_loss", "binary_cross_entropy_with_logits"):
        plain = getattr(torch.nn.functional, name)
        monkeypatch.setattr(
            mapper.F, name, lambda given, target, plain=plain, **more: wanted.append(target) or plain(given, target, **more)
        )
    mapper.question_losses(model, mapper.TrainingHeads(64), asked, model.encode_image(scenes.images[:, None])[rows])
    centres, about, apart = wanted
    place = []
    for digits, boxes in zip(asked.digits.tolist(), asked.boxes.tolist(), strict=True):
        places = [((x1 + x2) / 64, (y1 + y2) / 64) for x1, y1, x2, y2 in boxes]
        place.append(dict(zip((DIGIT_WORDS[digit] for digit in digits), places, strict=True)))
    sought = []
    for question, said, kind, places in zip(asked.questions, asked.answers, asked.kinds, place, strict=True):
        sought += [places[word] for word in question.split() if word in places]
        sought += [places[said]] if kind == "what" else []
    for row in torch.nonzero(torch.tensor([kind == "there" for kind in asked.kinds])).flatten().tolist():
        sought += [place[row][DIGIT_WORDS[digit]] for digit in asked.digits[row].tolist()]
    assert centres.tolist() == [list(centre) for centre in sought]
    named = [digits[named].sort().values for digits, named in zip(asked.digits, asked.named, strict=True)]
    assert all(torch.equal(torch.nonzero(row).flatten(), digits) for row, digits in zip(about, named, strict=True))
    compared = [
        (question.split(), places)
        for question, kind, places in zip(asked.questions, asked.kinds, place, strict=True)
        if kind == "is"
    ]
    offsets = [[places[words[2]][i] - places[words[-1]][i] for i in (0, 1)] for words, places in compared]
    torch.testing.assert_close(apart, torch.tensor(offsets))


def test_digits_that_make_a_text_true_are_those_of_is_true():
    scenes = digit_scenes(12, split="train")
    asked, _ = ask(scenes, PROMPTS, prompts=True, generator=torch.Generator().manual_seed(0))
    texts = [f"{question} {said}" for question, said in zip(asked.questions, asked.answers, strict=True)]
    words = SceneProcessor().words(texts)
    rows = torch.tensor([kind != "which" for kind in asked.kinds])
    last = words["attention_mask"].sum(1)[rows] - 2
    fitting, sayable = mapper.fitting_digits(asked, words["input_ids"], rows, last)
    held_out = held_out_captions()
    for n, row in enumerate(torch.nonzero(rows).flatten().tolist()):
        said = asked.answers[row].split()
        for digit in range(10):
            other = " ".join([*said[:-1], DIGIT_WORDS[digit]])
            assert fitting[n, digit] == is_true(asked.questions[row], other, asked.digits[row], asked.boxes[row])
            sentence = f"{DIGIT_WORDS[digit]} {texts[row].split('is ')[1]}" if asked.kinds[row] == "what" else f"{texts[row]}"
            named = [DIGIT_WORDS.index(word) for word in sentence.split() if word in DIGIT_WORDS][:2]
            relation = [word for word in sentence.split() if word in ("left", "right", "up", "down")][0]
            first, second = (digit, named[1]) if asked.kinds[row] == "what" else (named[0], digit)
            index = ("left", "right", "up", "down").index(relation)
            assert sayable[n, digit] == ~held_out[first, second, index]


def test_crowds_have_all_their_ink_in_boxes_that_do_not_overlap():
    images, digits, boxes = clip.crowd(20, torch.Generator().manual_seed(0))
    scans, labels, _ = digit_scans("train")
    for image, labelled, image_boxes in zip(images, digits.tolist(), boxes.long().tolist(), strict=True):
        rest, free = image.clone(), torch.ones(32, 32, dtype=torch.bool)
        for digit, (x1, y1, x2, y2) in zip(labelled, image_boxes, strict=True):
            assert free[y1:y2, x1:x2].all() and free[y1:y2, x1:x2].shape == (8, 8)
            assert (scans[labels == digit] == image[y1:y2, x1:x2]).flatten(1).all(1).any()
            free[y1:y2, x1:x2], rest[y1:y2, x1:x2] = False, 0
        assert rest.sum() == 0
    assert len({tuple(corner) for corner in (boxes[..., :2] % 4).flatten(0, 1).tolist()}) == 16, "every place on a patch"


def test_patches_are_told_the_digit_they_show():
    """By the ink itself: a patch has a class where one digit's box covers at least half of it, and none where only a part."""
    scenes = digit_scenes(20)
    digits, centres = clip.patch_truth(scenes.digits, scenes.boxes)
    assert digits.shape == (20, 64) and centres.shape == (20, 64, 2)
    for n in range(20):
        owner = torch.full((32, 32), -1)
        for region, (x1, y1, x2, y2) in enumerate(scenes.boxes[n].long().tolist()):
            owner[y1:y2, x1:x2] = region
        for patch in range(64):
            y, x = 4 * (patch // 8), 4 * (patch % 8)
            inside = owner[y : y + 4, x : x + 4].flatten()
            counts = torch.bincount(inside[inside >= 0], minlength=4)
            if counts.sum() == 0:
                assert digits[n, patch] == clip.BACKGROUND
            elif counts.max() < 8:
                assert digits[n, patch] == clip.UNSURE
            else:
                regions = [region for region in range(4) if counts[region] == counts.max()]
                assert digits[n, patch] in scenes.digits[n][regions]
                x1, y1, x2, y2 = scenes.boxes[n][scenes.digits[n].tolist().index(digits[n, patch])].tolist()
                assert centres[n, patch].tolist() == [(x1 + x2) / 64, (y1 + y2) / 64]


def test_masked_words_are_one_of_the_captions_three_parts():
    ids = digit_scenes(300).input_ids
    masked, where = uniter.mask_words(ids, torch.Generator().manual_seed(0))
    assert {tuple(torch.nonzero(row).flatten().tolist()) for row in where} == {(1,), (2, 3), (5,)}
    assert torch.equal(masked, torch.where(where, VOCABULARY.index("[MASK]"), ids))


def test_bent_scans_are_scans_still(monkeypatch):
    scenes = digit_scenes(40, split="train")
    features, digits = scenes.inputs()["region_features"], scenes.digits.flatten()
    state = torch.get_rng_state()
    bent, again, other = (uniter.bent(features, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert torch.equal(bent, again) and not torch.equal(bent, other) and bent.shape == features.shape
    assert bent.min() >= 0 and bent.max() <= 1
    scans, changed = (torch.nn.functional.normalize(crops.flatten(0, 1), dim=-1) for crops in (features, bent))
    assert ((scans * changed).sum(-1) < 0.999).double().mean() > 0.9, "each crop has its own map"
    assert (digits[(scans @ changed.T).argmax(0)] == digits).double().mean() > 0.8, "most are like a scan of the same digit"
    for name in ("BEND", "MOVE"):
        monkeypatch.setattr(uniter, name, 0.0)
    torch.testing.assert_close(uniter.bent(features, torch.Generator()), features, rtol=0, atol=1e-5)


def test_choices_are_made_without_the_test_scans(tmp_path, monkeypatch):
    """--validate trains on one part of the training scans and measures on the other; rows are stored once for each command."""
    seen, rows = set(), tmp_path / "rows" / "rows.json"
    monkeypatch.setattr(scenes_module, "digit_scans", lambda split: seen.add(split) or digit_scans(split))
    monkeypatch.setitem(run.EVALUATED, "uniter", 8)
    for seed in ("0", "1", "1"):
        options = ["--steps", "1", "--seed", seed, "--threads", "1", "--output", str(tmp_path), "--rows", str(rows)]
        run.main(["uniter", *options, "--validate"])
    assert seen == {"fit", "validation"}
    stored = json.loads(rows.read_text())
    assert [row["seed"] for row in stored] == [0, 1] and {"commit", "seconds", "validation"} <= stored[0].keys()
    assert stored[0]["command"] == "python -m vlattn_lab.train uniter --steps 1 --seed 0 --threads 1 --validate"
    assert all(accuracies.keys() == {"seen"} for accuracies in list(stored[0]["validation"].values())[2:])
    run.main(["uniter", *options])
    assert seen == {"fit", "validation", "train", "test"} and len(json.loads(rows.read_text())) == 3
    assert "config" not in stored[0] and load_uniter(tmp_path)[0].config == uniter.CONFIG


def test_a_training_batch_is_balanced():
    kinds = uniter.RECIPES["located"].kinds
    masked, matching = kinds[: uniter.MASKED], kinds[uniter.MASKED :]
    assert (masked == 0).all() and torch.bincount(matching).tolist() == [48, 16, 16, 16]


@pytest.mark.parametrize("name", LOADERS)
def test_wrong_steps_are_named(name):
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        run.TRAININGS[name].train(0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--seed", "-1"], "--seed must be at least 0; got -1"),
        (["--threads", "0"], "--threads must be at least 1; got 0"),
        (["--output", "FILE"], "--output must be a directory that can be written; got"),
        (["--rows", "FILE"], "--rows must be a JSON list that trainings wrote; got"),
    ],
)
def test_what_is_wrong_ends_a_training_at_its_start(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "run", None)
    (tmp_path / "file").write_text('["a row"]')
    given = [str(tmp_path / "file") if option == "FILE" else option for option in options]
    output = [] if "--output" in given else ["--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        run.main(["uniter", *given, *output])
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_model_must_be_named(capsys):
    with pytest.raises(SystemExit):
        run.main(["--steps", "1"])
    assert "uniter,lxmert,clip,vqa,captions" in capsys.readouterr().err
