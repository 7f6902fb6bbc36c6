"""`evaluate` against the published protocol written out, on planted models and on maps made by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers  # noqa: E402

import vlattn_fast as va  # noqa: E402
from tests.interpret.cases import CASES, TEXT, lively  # noqa: E402
from vlattn_fast.interpret.evaluation import TESTS  # noqa: E402
from vlattn_fast.interpret.perturbation import kept  # noqa: E402
from vlattn_fast.interpret.randomised import rank_correlation  # noqa: E402

STEPS = [0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1]


def made(name):
    torch.manual_seed(0)
    case = CASES[name]()
    lively(case.model).eval()
    return case.model, case.inputs


def trapezoid(steps, values):
    return sum((b - a) * (x + y) / 2 for a, b, x, y in zip(steps, steps[1:], values, values[1:], strict=False))


def rows(evaluation):
    return {(row["method"], row["test"], row["part"]): row for row in evaluation.table}


def certainty(outputs):
    return outputs.logits.softmax(-1)[:, 1]


# --- the published protocol ---


def uniter(regions, words):
    from vlattn_fast.models.uniter import UNITER, UNITERConfig

    torch.manual_seed(regions)
    config = UNITERConfig(**dict(TEXT, vocab_size=50), max_position_embeddings=24, region_dim=10, position_dim=7)
    ids = torch.randint(5, 50, (2, words + 2))
    ids[:, 0], ids[:, -1] = 2, 3
    features, positions = torch.randn(2, regions, 10), torch.rand(2, regions, 7)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "region_features": features,
        "region_positions": positions,
    }
    return lively(UNITER(config)).eval(), inputs


def literal(score, inputs, relevancy, names, test, part):
    """LXMERT's perturbation.py, one sample: the mean accuracy at each step."""
    found = []
    for step in STEPS:
        values = relevancy * -1 if test == "positive" else relevancy
        perturbed = dict(inputs)
        if part == "image":
            number = int((1 - step) * len(values))
            _, top = values.topk(k=number, dim=-1)
        else:
            number = int((1 - step) * (inputs["input_ids"].shape[1] - 2))
            _, top = values.topk(k=number, dim=-1)
            top = [0, *sorted(int(index) + 1 for index in top), inputs["input_ids"].shape[1] - 1]
        for name in names:
            perturbed[name] = inputs[name][:, top]
            if name.startswith("visual_") and number == 0:
                perturbed[name] = torch.zeros_like(inputs[name][:, :1])  # LXMERT of transformers 5 cannot run without a box
        with torch.no_grad():
            found.append(float(score(perturbed)))
    return found


@pytest.mark.parametrize(("regions", "words"), [(5, 10), (10, 20), (20, 5)])
def test_the_published_protocol(regions, words):
    model, inputs = uniter(regions, words)
    result = va.evaluate(model, [(inputs, 1, None)], tests=("positive", "negative"), accuracy=certainty)
    explanation = va.explain(model, inputs, target=1)
    for test in ("positive", "negative"):
        for part, names in (("image", ["region_features", "region_positions"]), ("text", ["input_ids", "attention_mask"])):
            curves = []
            for row in range(2):
                single = {name: value[row : row + 1] for name, value in inputs.items()}
                values = (explanation.regions if part == "image" else explanation.text)[row]
                curves.append(literal(lambda i: certainty(model(**i))[0], single, values, names, test, part))
            found = next(c for c in result.curves if (c["test"], c["part"]) == (test, part))
            assert found["steps"] == STEPS and found["samples"] == 2
            assert found["mean"] == pytest.approx(torch.tensor(curves).mean(0).tolist(), abs=1e-6)
            areas = torch.tensor([trapezoid(STEPS, curve) for curve in curves])
            row = rows(result)["gradient", test, part]
            assert row["value"] == pytest.approx(float(areas.mean()), abs=1e-6)
            assert row["sd"] == pytest.approx(float(areas.std()), abs=1e-6)


def test_the_product_is_truncated():
    for n, counts in ((5, [5, 3, 2, 1, 0, 0, 0, 0, 0]), (10, [10, 7, 5, 2, 1, 1, 0, 0, 0]), (20, [20, 15, 10, 5, 3, 3, 1, 1, 0])):
        assert [len(entries) for entries in kept(torch.arange(float(n)), "negative", STEPS)] == counts
    values = torch.tensor([0.3, -1.0, 2.0, 0.1])
    assert kept(values, "negative", [0.0, 0.5, 1.0]) == [[2, 0, 3, 1], [2, 0], []]
    assert kept(values, "positive", [0.0, 0.5, 1.0]) == [[1, 3, 0, 2], [1, 3], []]
    assert kept(values, "deletion", [0.0, 0.5, 1.0]) == [[2, 0, 3, 1], [3, 1], []]
    assert kept(values, "insertion", [0.0, 0.5, 1.0]) == [[], [2, 0], [2, 0, 3, 1]]


def test_boxes_of_lxmert_are_dropped_to_the_last():
    config = transformers.LxmertConfig(
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        l_layers=1,
        x_layers=2,
        r_layers=1,
        vocab_size=60,
        visual_feat_dim=10,
        num_qa_labels=5,
    )
    torch.manual_seed(0)
    model = lively(transformers.LxmertForQuestionAnswering(config)).eval()
    ids = torch.randint(5, 50, (1, 7))
    ids[:, 0], ids[:, -1] = 2, 3
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "visual_feats": torch.randn(1, 5, 10),
        "visual_pos": torch.rand(1, 5, 4),
    }
    read = lambda outputs: outputs.question_answering_score.softmax(-1)[:, 2]  # noqa: E731
    result = va.evaluate(model, [(inputs, 2, None)], tests=("positive",), accuracy=read)
    explanation = va.explain(model, inputs, target=2)
    for part, names in (("image", ["visual_feats", "visual_pos"]), ("text", ["input_ids", "attention_mask"])):
        values = (explanation.regions if part == "image" else explanation.text)[0]
        curve = literal(lambda i: read(model(**i))[0], inputs, values, names, "positive", part)
        assert all(math.isfinite(value) for value in curve)
        found = next(c for c in result.curves if c["part"] == part)
        assert found["mean"] == pytest.approx(curve, abs=1e-6)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_patches_become_the_mean_pixel(name):
    model, inputs = made(name)
    result = va.evaluate(model, [(inputs, None, None)], tests=("positive", "negative"), steps=[0, 0.3, 1])
    explanation = va.explain(model, inputs)
    for test in ("positive", "negative"):
        areas = []
        for row in range(2):
            values = explanation.image[row].flatten() * (-1 if test == "positive" else 1)
            curve = []
            for step in (0, 0.3, 1):
                pixels = torch.zeros_like(inputs["pixel_values"][row])
                for cell in values.topk(int((1 - step) * len(values))).indices.tolist():
                    y, x = divmod(cell, explanation.image.shape[2])
                    patch = (slice(None), slice(6 * y, 6 * y + 6), slice(6 * x, 6 * x + 6))
                    pixels[patch] = inputs["pixel_values"][row][patch]
                with torch.no_grad():
                    curve.append(float(model(pixel_values=pixels[None]).logits.argmax() == explanation.target[row]))
            areas.append(trapezoid([0, 0.3, 1], curve))
        assert rows(result)["gradient", test, "image"]["value"] == pytest.approx(sum(areas) / 2, abs=1e-6)
        text = rows(result)["gradient", test, "text"]
        assert (text["value"], text["samples"], text["left_out"]) == (None, 0, 2)


def test_clip_tells_texts_apart():
    model, inputs = made("clip")
    image = {**inputs, "pixel_values": inputs["pixel_values"][:1]}  # one image, three texts
    result = va.evaluate(model, [(image, 1, None)], tests=("deletion",), steps=[0, 0.5, 1])
    explanation = va.explain(model, image, target=1)
    curves = {"image": [], "text": []}
    with torch.no_grad():
        whole = model(**image).logits_per_image[0]
        values = explanation.image[0].flatten()
        for step in (0, 0.5, 1):
            gone = values.topk(int(step * len(values))).indices
            mask = torch.ones(16).index_fill(0, gone, 0).view(4, 4).repeat_interleave(6, 0).repeat_interleave(6, 1)
            logits = model(**{**image, "pixel_values": image["pixel_values"] * mask}).logits_per_image[0]
            curves["image"].append(float(logits.softmax(0)[1]))
            words = explanation.text[0, :4]
            gone = words.topk(int(step * 4)).indices + 1
            stay = [column for column in range(9) if column not in gone.tolist()]
            text = {name: inputs[name][1:2, stay] for name in ("input_ids", "attention_mask")}
            logits = whole.clone()
            logits[1] = model(**text, pixel_values=image["pixel_values"]).logits_per_image[0, 0]
            curves["text"].append(float(logits.softmax(0)[1]))
    for part, curve in curves.items():
        found = next(c for c in result.curves if c["part"] == part)
        assert found["mean"] == pytest.approx(curve, abs=1e-5)
        assert rows(result)["gradient", "deletion", part]["value"] == pytest.approx(trapezoid([0, 0.5, 1], curve), abs=1e-5)
    with pytest.raises(ValueError, match="inputs must have two texts or more"):
        va.evaluate(model, [({name: value[:1] for name, value in inputs.items()}, None, None)])


def test_a_callable_target_of_clip_is_measured_as_it_is():
    model, inputs = made("clip")
    similarity = lambda outputs: outputs.logits_per_image.diagonal()  # noqa: E731
    result = va.evaluate(model, [(inputs, similarity, None)], tests=("insertion",), steps=[0, 1])
    with torch.no_grad():
        whole = similarity(model(**inputs)).mean()
        empty = similarity(model(**{**inputs, "pixel_values": torch.zeros(3, 3, 24, 24)})).mean()
    (curve,) = (c for c in result.curves if c["part"] == "image")
    assert curve["mean"] == pytest.approx([float(empty), float(whole)], rel=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip", "bert", "uniter", "llava", "qwen2_5_vl"])
def test_a_batch_is_its_rows(name):
    """Rows with padding, several images or other lengths come out as they do alone."""
    model, inputs = made(name)
    pair = name in ("clip", "siglip")
    steps = [0, 0.5, 1]
    target = None if pair else 1
    whole = va.evaluate(model, [(inputs, target, None)], tests=("positive", "insertion"), steps=steps)
    table = [row for row in whole.table if row["value"] is not None]
    assert {row["part"] for row in table} == ({"text"} if name == "bert" else {"image", "text"})
    assert all(row["left_out"] == 0 for row in table)
    if not pair:
        other = va.evaluate(model, [(inputs, target, None)], tests=("positive", "insertion"), steps=steps, batch_size=1)
        for one, two in zip(whole.curves, other.curves, strict=True):
            assert one["mean"] == pytest.approx(two["mean"], abs=1e-4)
    if name in ("bert", "uniter", "llava"):
        batch = range(table[0]["samples"])
        singles = [({key: value[row : row + 1] for key, value in inputs.items()}, target, None) for row in batch]
        alone = va.evaluate(model, singles, tests=("positive", "insertion"), steps=steps)
        for one, two in zip(whole.curves, alone.curves, strict=True):
            assert one["mean"] == pytest.approx(two["mean"], abs=1e-4)


def test_a_decoder_keeps_the_token_that_it_reads():
    model, inputs = made("llava")
    single = {name: value[1:] for name, value in inputs.items()}  # words at 1, 2, 3, 20, 21 of 22 tokens; the last one is read
    result = va.evaluate(model, [(single, 7, None)], tests=("deletion",), steps=[0, 1])
    stay = [0, *range(4, 20), 21]
    text = {name: single[name][:, stay] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**text, pixel_values=single["pixel_values"]).logits[0, -1]
    (curve,) = (c for c in result.curves if c["part"] == "text")
    assert curve["mean"][1] == pytest.approx(float(logits.softmax(0)[7]), rel=1e-4)


def test_patches_of_qwen_are_merged_cells():
    model, inputs = made("qwen2_5_vl")
    first = torch.zeros(8)
    first[3] = 1

    def method(model, inputs, target):
        one = va.explain(model, inputs, target=target, method="attention")
        return SimpleNamespace(image=(first.view(2, 4), first.view(4, 2)), image_rows=one.image_rows)

    probability = lambda outputs: outputs.logits[:, -1].softmax(-1)[:, 7]  # noqa: E731
    result = va.evaluate(
        model, [(inputs, 7, None)], methods={"cell": method}, tests=("insertion",), steps=[0, 0.125], probability=probability
    )
    curves = []
    for row in range(2):
        pixels = torch.zeros_like(inputs["pixel_values"])
        cell = slice(32 * row + 12, 32 * row + 16)  # four patches a merged cell, in turn
        pixels[cell] = inputs["pixel_values"][cell]
        with torch.no_grad():
            curves.append([float(probability(model(**{**inputs, "pixel_values": p}))[row]) for p in (0 * pixels, pixels)])
    (curve,) = result.curves
    assert (curve["part"], curve["samples"]) == ("image", 2)
    assert curve["mean"] == pytest.approx(torch.tensor(curves).mean(0).tolist(), abs=1e-6)
    assert rows(result)["cell", "insertion", "text"]["left_out"] == 2


# --- planted models ---


class Planted(nn.Module):
    """Says class 1 while any of four patches has ink, and while any of two words is there. Nothing in it attends."""

    cells = [(0, 1), (1, 1), (2, 3), (3, 0)]
    words = [11, 12]

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(1, 1)

    def forward(self, pixel_values, input_ids, attention_mask=None):
        ink = pixel_values.unflatten(3, (4, 2)).unflatten(2, (4, 2)).abs().sum((1, 3, 5))
        seen = torch.stack([ink[:, y, x] > 0 for y, x in self.cells], 1).double().mean(1)
        said = torch.stack([(input_ids == word).any(1) for word in self.words], 1).double().mean(1)
        logit = 8 * seen * said - 2
        return SimpleNamespace(logits=torch.stack([-logit, logit], 1))


def planted_data(count=3):
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        pixels = 1 + torch.rand(2, 3, 8, 8, generator=generator)
        ids = torch.tensor([[1, 11, 20, 21, 12, 22, 2, 0], [1, 30, 31, 11, 32, 12, 33, 2]])
        boxes = [[[x / 4, y / 4, (x + 1) / 4, (y + 1) / 4] for y, x in Planted.cells]] * 2
        yield {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids > 0}, 1, boxes


def truth(sign=1.0):
    def method(model, inputs, target):
        image = torch.zeros(2, 4, 4)
        for y, x in Planted.cells:
            image[:, y, x] = sign
        ids = inputs["input_ids"]
        words = [row[(row > 2)] for row in ids]
        text = nn.utils.rnn.pad_sequence([torch.isin(w, torch.tensor(Planted.words)) * sign for w in words], batch_first=True)
        return SimpleNamespace(image=image, text=text)

    return method


def test_a_perfect_map_is_best_and_its_negative_worst():
    methods = {"truth": truth(), "random": "random", "opposite": truth(-1.0)}
    result = va.evaluate(Planted(), planted_data(20), methods=methods, tests=[t for t in TESTS if t != "sanity"], seed=3)
    table = rows(result)
    for test, best in (("positive", min), ("negative", max), ("insertion", max), ("deletion", min)):
        for part in ("image", "text"):
            values = {name: table[name, test, part]["value"] for name in methods}
            assert table["truth", test, part]["samples"] == 40 and table["truth", test, part]["left_out"] == 0
            assert sorted(values, key=values.__getitem__) == (list(methods) if best is min else list(methods)[::-1]), (test, part)
    for test in ("pointing", "iou", "mass"):
        assert table["truth", test, "image"]["value"] == 1.0
        assert table["opposite", test, "image"]["value"] == 0.0 or test == "iou"
        assert 0 < table["random", test, "image"]["value"] < 1
    assert table["opposite", "iou", "image"]["value"] == 0.0


def test_the_seed_fixes_what_is_random():
    one, two, three = (
        va.evaluate(Planted(), planted_data(), methods=("random",), tests=("positive", "mass"), seed=seed).table
        for seed in (0, 0, 1)
    )
    assert one == two != three


def test_words_can_be_kept():
    """With a callable, only the tokens that it names are removed."""
    keep_all = va.evaluate(
        Planted(),
        planted_data(),
        methods={"truth": truth()},
        tests=("positive",),
        words=lambda inputs: torch.zeros_like(inputs["input_ids"], dtype=torch.bool),
    )
    assert rows(keep_all)["truth", "positive", "text"]["left_out"] == 6
    model, inputs = made("bert")
    second = torch.zeros(3, 10, dtype=torch.bool)
    second[:, 2] = True
    result = va.evaluate(model, [(inputs, 0, None)], tests=("deletion",), steps=[0, 1], words=lambda inputs: second)
    with torch.no_grad():
        ends = model(
            input_ids=inputs["input_ids"][:, [0, 1, *range(3, 10)]], attention_mask=inputs["attention_mask"][:, 1:]
        ).logits.softmax(-1)[:, 0]
    (curve,) = result.curves
    assert curve["mean"][1] == pytest.approx(float(ends.double().mean()), abs=1e-5)
    with pytest.raises(ValueError, match="words must return bool"):
        va.evaluate(model, [(inputs, 0, None)], words=lambda inputs: second[:, 1:])


def test_sanity_sees_what_depends_on_weights():
    model, inputs = made("vit")

    def edges(model, inputs, target):
        return SimpleNamespace(image=inputs["pixel_values"].abs().mean(1).unfold(1, 6, 6).unfold(2, 6, 6).mean((-1, -2)))

    def weights(model, inputs, target):
        last = model.classifier.weight.detach().flatten()[:20]
        return SimpleNamespace(image=last.view(4, 5).expand(2, 4, 5))

    before = {name: value.clone() for name, value in model.state_dict().items()}
    methods = {"edges": edges, "weights": weights, "gradient": "gradient"}
    result = va.evaluate(model, [(inputs, None, None)], methods=methods, tests=("sanity",), sanity_stages=3)
    table, curves = rows(result), {row["method"]: row for row in result.curves}
    assert table["edges", "sanity", "image"]["value"] == pytest.approx(1.0)
    assert abs(table["weights", "sanity", "image"]["value"]) < 0.5  # the last layer, so it falls at once
    assert curves["weights"]["mean"][0] == curves["weights"]["mean"][2]
    assert abs(table["gradient", "sanity", "image"]["value"]) < 0.7
    assert curves["gradient"]["steps"] == pytest.approx([1 / 3, 2 / 3, 1])
    assert table["edges", "sanity", "text"]["left_out"] == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rank_correlation_is_spearmans():
    one, two = torch.tensor([1.0, 5.0, 5.0, 2.0]), torch.tensor([3.0, 4.0, 9.0, 0.0])
    ranks, others = [1, 3.5, 3.5, 2], [2, 3, 4, 1]
    assert rank_correlation(one, two) == pytest.approx(float(torch.corrcoef(torch.tensor([ranks, others]))[0, 1]))
    assert rank_correlation(one, one.exp()) == pytest.approx(1)
    assert rank_correlation(one, torch.ones(4)) is None and rank_correlation(one[:2], two[:2]) is None


# --- boxes ---


def boxes_only(image, boxes, tests=("pointing", "iou", "mass")):
    inputs = next(planted_data(1))[0]
    method = lambda model, inputs, target: SimpleNamespace(image=torch.tensor(image).expand(2, -1, -1))  # noqa: E731
    return rows(va.evaluate(Planted(), [(inputs, 1, boxes)], methods={"map": method}, tests=tests))


def test_boxes_on_maps_made_by_hand():
    image = [[0.0, 4.0], [1.0, -1.0]]  # cells of a quarter of the image; the mean is 1
    found = boxes_only(image, [[[0.5, 0.0, 1.0, 0.5]], [[0.0, 0.0, 0.75, 0.25], [0.25, 0.0, 0.75, 0.5]]])
    # Of the second row: the centre (0.75, 0.25) is on the edge of a box, which has it. The boxes cover 0.5 x 0.5 and the rest of
    # the first one, 0.25 x 0.25: 0.3125 of the image. The upper right cell has 0.125 of that.
    assert found["map", "pointing", "image"]["value"] == 1.0
    iou = [1.0, 0.125 / (0.3125 + 0.25 - 0.125)]
    assert found["map", "iou", "image"]["value"] == pytest.approx(sum(iou) / 2)
    assert found["map", "mass", "image"]["value"] == pytest.approx((4 / 5 + (4 * 0.5) / 5) / 2)
    missed = boxes_only(image, [[[0.0, 0.5, 0.5, 1.0]], None])
    for test, value in (("pointing", 0.0), ("iou", 0.0), ("mass", 0.2)):
        row = missed["map", test, "image"]
        assert (row["value"], row["sd"], row["samples"], row["left_out"]) == (pytest.approx(value), None, 1, 1)
    flat = boxes_only([[2.0, 2.0], [2.0, 2.0]], [[[0.0, 0.0, 0.5, 0.5]]] * 2)
    assert [flat["map", test, "image"]["value"] for test in ("pointing", "iou", "mass")] == [0.0, 0.0, 0.25]


def test_regions_have_their_own_boxes():
    scenes = va.lab.digit_scenes(6, seed=1) if pytest.importorskip("sklearn") else None
    model, _ = va.lab.load_uniter()
    boxes = [corners[named] / 32 for corners, named in zip(scenes.boxes, scenes.named, strict=True)]
    named = lambda model, inputs, target: SimpleNamespace(regions=scenes.named.double())  # noqa: E731
    found = rows(va.evaluate(model, [(scenes.inputs(), 1, boxes)], methods={"named": named}, tests=("pointing", "iou", "mass")))
    assert [found["named", test, "image"]["value"] for test in ("pointing", "iou", "mass")] == [1.0, 1.0, 1.0]


def test_without_boxes_samples_are_left_out():
    model, inputs = made("vit")
    found = rows(va.evaluate(model, [(inputs, None, None), (inputs, None, [[[0, 0, 1, 1]], None])], tests=("pointing",)))
    row = found["gradient", "pointing", "image"]
    assert (row["value"], row["samples"], row["left_out"]) == (1.0, 1, 3)
    single = {"pixel_values": inputs["pixel_values"][:1]}
    for boxes in ([[0, 0, 1, 1]], [[[0, 0, 1, 1]]], torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[[0.0, 0, 1, 1]]])):
        row = rows(va.evaluate(model, [(single, None, boxes)], tests=("pointing",)))["gradient", "pointing", "image"]
        assert row["samples"] == 1


# --- files, pictures, errors ---


def test_it_is_saved_and_read_back(tmp_path):
    pytest.importorskip("matplotlib")
    result = va.evaluate(Planted(), planted_data(), methods={"truth": truth(), "random": "random"}, tests=("positive", "mass"))
    again = va.Evaluation.load(result.save(tmp_path / "evaluation.json"))
    assert (again.table, again.curves, again.facts) == (result.table, result.curves, json.loads(json.dumps(result.facts)))
    assert again.value("truth", "mass") == 1.0
    assert "truth   mass       image   1.0000   0.0000        6         0" in str(again)
    figure = again.plot()
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["positive of the image", "positive of the text", "mass of the image"]
    assert len(figure.axes[0].lines) == 2 and len(figure.axes[2].patches) == 2
    with pytest.raises(ValueError, match="method, test and part must be"):
        again.value("truth", "iou")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="path must be a file that Evaluation.save wrote"):
        va.Evaluation.load(tmp_path / "other.json")


def test_the_model_is_left_as_it_was():
    model, inputs = made("vit")
    model.train()
    va.evaluate(model, [(inputs, None, None)], tests=("positive", "sanity"))
    assert model.training and all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_empty_data_set_has_empty_rows():
    model, inputs = made("vit")
    for dataset in ([], [({"pixel_values": inputs["pixel_values"][:0]}, None, None)]):
        result = va.evaluate(model, dataset)
        assert result.curves == [] and all(row["samples"] == row["left_out"] == 0 for row in result.table)


NAN = lambda model, inputs, target: SimpleNamespace(image=torch.full((2, 4, 5), float("nan")))  # noqa: E731
WRONG = lambda model, inputs, target: SimpleNamespace(image=torch.ones(2, 4, 4))  # noqa: E731


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"methods": "gradient"}, TypeError, "methods must be a sequence"),
        ({"methods": ()}, ValueError, "methods must name at least one"),
        ({"methods": ("gradient", "gradient")}, ValueError, "methods must have different names"),
        ({"methods": ("lime",)}, ValueError, "methods must be callables or among gradient, .*; got 'lime'"),
        ({"methods": ("weighted:none",)}, ValueError, "methods must be callables or among"),
        ({"methods": ("gradient:norm",)}, ValueError, "methods must be callables or among"),
        ({"methods": (3,)}, TypeError, "methods must be names and callables; got int"),
        ({"tests": "positive"}, TypeError, "tests must be a sequence"),
        ({"tests": ()}, ValueError, "tests must name at least one"),
        ({"tests": ("auc",)}, ValueError, "tests must be among positive"),
        ({"steps": [0.5]}, ValueError, "steps must be two or more increasing"),
        ({"steps": [0, 0.5, 0.5]}, ValueError, "steps must be two or more increasing"),
        ({"steps": [0, 2]}, ValueError, "steps must be two or more increasing"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"sanity_stages": True}, ValueError, "sanity_stages must be"),
        ({"methods": {"nan": NAN}}, ValueError, "methods must give finite maps"),
        ({"methods": {"wrong": WRONG}}, ValueError, r"methods must give maps on the grids \[\(4, 5\)\]"),
        ({"accuracy": lambda outputs: outputs.logits}, ValueError, "accuracy must return scores of shape"),
        ({"accuracy": lambda outputs: 1}, TypeError, "accuracy must return a tensor"),
    ],
)
def test_errors_of_arguments(arguments, kind, message):
    model, inputs = made("vit")
    with pytest.raises(kind, match=message):
        va.evaluate(model, [(inputs, None, None)], **arguments)


@pytest.mark.parametrize(
    ("item", "kind", "message"),
    [
        (("inputs", None), TypeError, r"dataset must give \(inputs, target, boxes or None\); got 2"),
        ((7, None, None), TypeError, "inputs must be a mapping"),
        (("inputs", 9, None), ValueError, "target must be from 0 to 4"),
        (("inputs", [0], None), ValueError, "target must be one index or 2"),
        (("inputs", None, [[[0, 0, 1, 1]]]), ValueError, "boxes must be None or one set of boxes for each of the 2 rows; got 1"),
        (("inputs", None, [[[0, 0, 2, 1]], None]), ValueError, "boxes must be x1 < x2"),
        (("inputs", None, [[[1, 0, 0, 1]], None]), ValueError, "boxes must be x1 < x2"),
        (("inputs", None, [[[0, 0, 1]], None]), ValueError, r"boxes must be \(K, 4\)"),
    ],
)
def test_errors_of_items(item, kind, message):
    model, inputs = made("vit")
    item = tuple(inputs if part == "inputs" else part for part in item)
    with pytest.raises(kind, match=message):
        va.evaluate(model, [item])
