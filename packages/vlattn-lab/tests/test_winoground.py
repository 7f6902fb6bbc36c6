"""The Winoground scores, against the batched ones of DigitScenes' own model and on tables made by hand."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vlattn_fast as va
import vlattn_lab as lab
from vlattn_fast.models import UNITER, UNITERConfig
from vlattn_lab import winoground
from vlattn_lab.winoground import run as command
from vlattn_lab.winoground.run import load_score, load_uniter_score, read_regions


def test_equals_the_batched_scores() -> None:
    model, _ = lab.load_uniter()
    one, two = lab.swapped_pairs(40, seed=3)
    sides = (one, two)
    table = {(a, b): lab.matching_score(model, sides[a], input_ids=sides[b].input_ids).tolist() for a in (0, 1) for b in (0, 1)}
    pairs = [(((0, i), (1, i)), ((0, i), (1, i))) for i in range(40)]
    got = winoground.evaluate(lambda image, caption: table[image[0], caption[0]][image[1]], pairs)
    assert got == lab.winoground_scores(model, count=40, seed=3)


def test_chance_and_ties() -> None:
    draw = random.Random(0)
    pairs = [((0, 1), (0, 1))] * 20000
    got = winoground.evaluate(lambda image, caption: draw.random(), pairs)
    for name, chance in (("text", 1 / 4), ("image", 1 / 4), ("group", 1 / 6)):
        assert got[name] == pytest.approx(chance, abs=0.02)
    assert winoground.evaluate(lambda image, caption: 1.0, pairs[:3]) == {"text": 0.0, "image": 0.0, "group": 0.0}
    assert winoground.evaluate(lambda image, caption: image == caption, pairs[:3]) == {"text": 1.0, "image": 1.0, "group": 1.0}


def test_a_local_copy(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "images" / f"ex_0_img_{i}.png")
    line = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "red", "caption_1": "blue"}
    line["collapsed_tag"] = "\u2028 ends no line"
    (tmp_path / "examples.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    channel = {"red": 0, "blue": 2}
    score = lambda image, caption: image.getpixel((0, 0))[channel[caption]]  # noqa: E731
    assert winoground.evaluate(score, winoground.load_pairs(tmp_path)) == {"text": 1.0, "image": 1.0, "group": 1.0}


def test_refusals(tmp_path) -> None:
    with pytest.raises(ValueError, match="pairs must hold at least one pair; got none"):
        winoground.evaluate(lambda image, caption: 1.0, [])
    with pytest.raises(ValueError, match="pairs must be of two images and two captions; got 1 and 2"):
        winoground.evaluate(lambda image, caption: 1.0, [((0,), (0, 1))])
    with pytest.raises(ValueError, match="directory must hold examples.jsonl"):
        list(winoground.load_pairs(tmp_path))
    for line in ("{", "[]", '{"image_0": "a"}'):
        (tmp_path / "examples.jsonl").write_text("\n" + line)
        with pytest.raises(ValueError, match="must have image_0, image_1, caption_0 and caption_1 in line 2; got"):
            list(winoground.load_pairs(tmp_path))
    (tmp_path / "examples.jsonl").write_text('{"image_0": "a", "image_1": "b", "caption_0": "", "caption_1": ""}')
    with pytest.raises(ValueError, match="image must be a file; got .*a.png, which does not exist"):
        list(winoground.load_pairs(tmp_path))


def test_nan_is_no_lost_pair() -> None:
    with pytest.raises(ValueError, match="score must give numbers that can be compared; got NaN in pair 2"):
        winoground.evaluate(lambda image, caption: float(image) if caption else 1.0, [((1, 2), (1, 1)), (("nan", 2), (1, 1))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_scores_of_a_pair_are_wrong(dtype):
    """Whichever of the two their bits put first."""

    def score(image, caption):
        value = torch.tensor(3.0, dtype=dtype)
        return value.nextafter(value + 1) if image == caption else value

    assert winoground.evaluate(score, [((0, 1), (0, 1))]) == {"text": 0.0, "image": 0.0, "group": 0.0}
    assert winoground.evaluate(lambda image, caption: 3 + 0.1 * (image == caption), [((0, 1), (0, 1))])["group"] == 1.0


# --- the command ---

WORDS = ["[PAD]", "[CLS]", "[SEP]", "red", "blue"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"image_size": 16, "patch_size": 8}


def save_copy(folder, tags):
    """A copy of Winoground with a pair for each entry of `tags`, all of a red and a blue image."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, tag in enumerate(tags):
        for j, colour in enumerate(("red", "blue")):
            Image.new("RGB", (20, 16), colour).save(folder / f"images/ex_{i}_img_{j}.png")
        names = {f"image_{j}": f"ex_{i}_img_{j}" for j in (0, 1)}
        lines.append(json.dumps({"id": i, **names, "caption_0": "red", "caption_1": "blue", **tag}))
    (folder / "examples.jsonl").write_text("\n".join(lines))
    return folder


def save_model(kind, folder):
    """A random model of a class of transformers, with its processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokens = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "model_max_length": 8}
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    text = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 8}
    torch.manual_seed(0)
    if kind == "CLIPModel":
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = transformers.CLIPConfig(text_config={**text, **ids}, vision_config={**SIZES, **IMAGES})
        processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(**size), words)
    elif kind == "BlipForImageTextRetrieval":
        ids = {"bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0, "encoder_hidden_size": 32}
        config = transformers.BlipConfig(text_config={**text, **ids}, vision_config={**SIZES, **IMAGES})
        processor = transformers.BlipProcessor(transformers.BlipImageProcessor(size={"height": 16, "width": 16}), words)
    else:
        config = transformers.ViltConfig(**text, **IMAGES)
        processor = transformers.ViltProcessor(transformers.ViltImageProcessor(size={"shortest_edge": 16}, size_divisor=8), words)
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("kind", ["CLIPModel", "BlipForImageTextRetrieval", "ViltForImageAndTextRetrieval"])
def test_the_score_of_a_saved_model_is_its_own(kind, tmp_path):
    model, processor = save_model(kind, tmp_path / "model")
    score = load_score(tmp_path / "model")
    for images, captions in winoground.load_pairs(save_copy(tmp_path / "copy", [{}])):
        for image in images:
            for caption in captions:
                with torch.no_grad():
                    output = model(**processor(images=image, text=caption, return_tensors="pt"))
                if kind == "CLIPModel":
                    own = output.logits_per_image[0, 0]
                else:
                    own = output.itm_score[0].log_softmax(0).diff()[0] if kind.startswith("Blip") else output.logits[0, 0]
                torch.testing.assert_close(score(image, caption), own)


def test_the_command_prints_scores_of_all_pairs_and_by_tag(tmp_path, capsys, monkeypatch):
    tags = [
        {"collapsed_tag": "Object", "num_main_preds": 1},
        {"collapsed_tag": "Relation"},
        {"collapsed_tag": "Object", "secondary_tag": ""},
    ]
    copy = save_copy(tmp_path / "copy", tags)
    channel = {"red": 0, "blue": 2}
    monkeypatch.setattr(
        command, "load_score", lambda folder: lambda image, caption: float(image.getpixel((0, 0))[channel[caption]])
    )
    Image.new("RGB", (20, 16), "red").save(copy / "images/ex_1_img_1.png")  # the relation's two images are alike
    command.main([str(copy), "--model", "anywhere"])
    assert capsys.readouterr().out.splitlines() == [
        "| pairs | number | text | image | group |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| chance |  | 0.250 | 0.250 | 0.167 |",
        "| all | 3 | 0.667 | 0.667 | 0.667 |",
        "| collapsed_tag: Object | 2 | 1.000 | 1.000 | 1.000 |",
        "| collapsed_tag: Relation | 1 | 0.000 | 0.000 | 0.000 |",
        "| num_main_preds: 1 | 1 | 1.000 | 1.000 | 1.000 |",
    ]


def test_the_command_runs_on_a_saved_model(tmp_path, capsys):
    save_model("CLIPModel", tmp_path / "model")
    copy = save_copy(tmp_path / "copy", [{}, {}])
    command.main([str(copy), "--model", str(tmp_path / "model")])
    expected = winoground.evaluate(load_score(tmp_path / "model"), winoground.load_pairs(copy))
    shown = " | ".join(f"{expected[name]:.3f}" for name in winoground.SCORES)
    assert f"| all | 2 | {shown} |" in capsys.readouterr().out


def test_the_command_says_what_is_missing(tmp_path, capsys):
    copy = save_copy(tmp_path / "copy", [{}])

    def error(*arguments):
        with pytest.raises(SystemExit):
            command.main([str(x) for x in arguments])
        return capsys.readouterr().err

    assert "directory must hold examples.jsonl and images/" in error(tmp_path, "--model", tmp_path)
    assert "model must be a folder with config.json, weights and processor; got" in error(copy, "--model", tmp_path / "none")
    model = tmp_path / "model"
    save_model("CLIPModel", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["Absent"]}))
    assert "must name a class of transformers" in error(copy, "--model", model)
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "copy/images/ex_0_img_1.png").unlink()
    assert "image must be a file" in error(copy, "--model", model)


def test_a_model_without_a_matching_score_says_so(tmp_path):
    save_model("ViltForMaskedLM", tmp_path)
    with pytest.raises(ValueError, match=r"model must score an image and a caption, in itm_score.*; got logits \(1, 3, 5\)"):
        load_score(tmp_path)(Image.new("RGB", (20, 16)), "red")


def test_published_uniter_is_explained_and_probed_on_region_files(tmp_path):
    """Against an attention written out on the file's numbers, of one layer and one head: relevancy by equations 5 and 6 of
    Chefer, Gur and Wolf (ICCV 2021), and what [CLS] gives to words and regions."""
    torch.manual_seed(0)
    sizes = UNITERConfig(5, 64, 1, 1, 48, initializer_range=0.1, max_position_embeddings=8, region_dim=6)
    model = UNITER.from_published(UNITER(sizes).state_dict())
    features, boxes = torch.rand(4, 6), torch.rand(4, 6)
    np.savez(tmp_path / "image.npz", features=features, norm_bb=boxes, conf=np.ones(4))
    ids, maps = torch.tensor([[1, 4, 2]]), []

    def written_out(module, query, key, value, attention_mask, **options):
        maps.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))
        maps[0].retain_grad()
        return (maps[0] @ value).transpose(1, 2), None

    inputs = {"input_ids": ids, **read_regions(tmp_path / "image.npz")}
    explanation = va.explain(model, inputs, target=1, method=va.methods.Gradient(freeze=()))
    report = va.probe(model, [(inputs, None)], tests=["modality"])
    model.uniter.encoder.layer[0].attention.self.attention_function = written_out
    model(ids, features[None], torch.cat([boxes, boxes[:, 4:5] * boxes[:, 5:]], -1)[None]).logits[0, 1].backward()
    row = (maps[0] * maps[0].grad).clamp(min=0)[0, 0, 0]
    torch.testing.assert_close(explanation.regions[0], row[3:])
    assert explanation.regions.max() > 0.01
    given = maps[0].detach()[0, 0, 0]
    for kind, part in (("text", given[:3]), ("image", given[3:])):
        assert report.value("modality", layer=0, head=0, kind=kind) == pytest.approx(part.sum().item(), abs=1e-6)


def test_published_uniter_reads_region_files(tmp_path, capsys):
    """A checkpoint that was fine-tuned for retrieval, which is judged by its rank alone."""
    model = UNITER(UNITERConfig(5, 64, 2, 1, 48, max_position_embeddings=8, region_dim=6)).eval()
    state = model.state_dict()
    weight, bias = state.pop("itm_output.weight"), state.pop("itm_output.bias")
    torch.save({**state, "rank_output.weight": weight[:1], "rank_output.bias": bias[:1]}, tmp_path / "uniter.pt")
    save_model("CLIPModel", tmp_path / "words")
    copy = save_copy(tmp_path / "copy", [{}, {}])
    stream = np.random.RandomState(0)
    (tmp_path / "regions").mkdir()
    files = {f"ex_{i}_img_{j}": (stream.rand(4, 6), stream.rand(4, 6)) for i in (0, 1) for j in (0, 1)}
    for name, (features, boxes) in files.items():
        np.savez(tmp_path / f"regions/{name}.npz", features=features, norm_bb=boxes, conf=np.ones(4))

    score = load_uniter_score(tmp_path / "uniter.pt", tmp_path / "regions", tmp_path / "words")
    features, boxes = (torch.from_numpy(x).float()[None] for x in files["ex_1_img_0"])
    hidden = model(
        torch.tensor([[1, 4, 2]]), features, torch.cat([boxes, boxes[..., 4:5] * boxes[..., 5:]], -1)
    ).last_hidden_state
    expected = model.uniter.pooler(hidden)[0] @ weight[0] + bias[0]
    torch.testing.assert_close(score("ex_1_img_0", "blue"), expected.detach())

    options = ["--regions", str(tmp_path / "regions"), "--tokenizer", str(tmp_path / "words")]
    command.main([str(copy), "--model", str(tmp_path / "uniter.pt"), *options])
    assert "| all | 2 |" in capsys.readouterr().out
    (tmp_path / "regions/ex_1_img_1.npz").unlink()
    with pytest.raises(SystemExit):
        command.main([str(copy), "--model", str(tmp_path / "uniter.pt"), *options])
    assert "regions must have a file for each image; got none at" in capsys.readouterr().err
    np.savez(tmp_path / "regions/ex_1_img_1.npz", features=stream.rand(4, 6), norm_bb=stream.rand(4, 5))
    with pytest.raises(ValueError, match=r"must have features .* and norm_bb \(R, 6\); got \(4, 6\) and \(4, 5\)"):
        score("ex_1_img_1", "red")
