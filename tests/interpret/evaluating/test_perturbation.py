"""Curves of `evaluate` against the published protocol written out."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers

import vlattn_fast as va
from tests.helpers.interpret import small_models
from tests.helpers.interpret.cases import TEXT, lively
from tests.helpers.interpret.decoder_cases import pixtral
from tests.helpers.interpret.encoder_cases import git, vilt, visual_bert
from tests.helpers.interpret.evaluation_cases import made, rows
from tests.interpret.relevancy.test_linked import florence
from vlattn_fast.interpret.evaluating.curves import CURVES
from vlattn_fast.interpret.evaluating.perturbation import split

STEPS = [0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1]


def trapezoid(steps, values):
    return sum((b - a) * (x + y) / 2 for a, b, x, y in zip(steps, steps[1:], values, values[1:], strict=False))


def certainty(outputs):
    return outputs.logits.softmax(-1)[:, 1]


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


def kept(values, test, steps):
    return [stays["image"] for stays in CURVES[test].inputs({"image": values}, steps)]


def test_the_product_is_truncated():
    for n, counts in ((5, [5, 3, 2, 1, 0, 0, 0, 0, 0]), (10, [10, 7, 5, 2, 1, 1, 0, 0, 0]), (20, [20, 15, 10, 5, 3, 3, 1, 1, 0])):
        assert [len(entries) for entries in kept(torch.arange(float(n)), "negative", STEPS)] == counts
    values = torch.tensor([0.3, -1.0, 2.0, 0.1])
    assert kept(values, "negative", [0.0, 0.5, 1.0]) == [[2, 0, 3, 1], [2, 0], []]
    assert kept(values, "positive", [0.0, 0.5, 1.0]) == [[1, 3, 0, 2], [1, 3], []]
    assert kept(values, "deletion", [0.0, 0.5, 1.0]) == [[2, 0, 3, 1], [3, 1], []]
    assert kept(values, "insertion", [0.0, 0.5, 1.0]) == [[], [2, 0], [2, 0, 3, 1]]


def test_boxes_of_lxmert_are_dropped_to_the_last():
    small = small_models.made("lxmert")
    model, inputs = small.model, {name: x for name, x in small.batch([0]).items() if name != "visual_attention_mask"}
    read = lambda outputs: outputs.question_answering_score.softmax(-1)[:, 2]  # noqa: E731
    result = va.evaluate(model, [(inputs, 2, None)], tests=("positive",), accuracy=read)
    explanation = va.explain(model, inputs, target=2)
    for part, names in (("image", ["visual_feats", "visual_pos"]), ("text", ["input_ids", "attention_mask"])):
        values = (explanation.regions if part == "image" else explanation.text)[0]
        curve = literal(lambda i: read(model(**i))[0], inputs, values, names, "positive", part)
        assert all(math.isfinite(value) for value in curve)
        found = next(c for c in result.curves if c["part"] == part)
        assert found["mean"] == pytest.approx(curve, abs=1e-6)


def test_patches_of_a_padded_image_are_its_own():
    case = vilt()  # the second image has 4 x 2 patches, and as much padding beside them
    model, inputs = lively(case.model).eval(), {name: value[1:] for name, value in case.inputs.items()}
    best = int(va.explain(model, inputs, target=1).image[0].argmax())
    curve = []
    for stay in ([], [best], range(8)):
        pixels = torch.zeros_like(inputs["pixel_values"])
        for y, x in (divmod(cell, 2) for cell in stay):
            cell = ..., slice(6 * y, 6 * y + 6), slice(6 * x, 6 * x + 6)
            pixels[cell] = inputs["pixel_values"][cell]
        with torch.no_grad():
            curve.append(float(model(**{**inputs, "pixel_values": pixels}).logits.softmax(-1)[0, 1]))
    result = va.evaluate(model, [(inputs, 1, None)], tests=("insertion",), steps=[0, 1 / 8, 1])
    found = next(c for c in result.curves if c["part"] == "image")
    assert found["mean"] == pytest.approx(curve, abs=1e-6)


def test_patches_of_padded_images_of_a_batch():
    case = pixtral()  # 2 x 4 and 4 x 3 patches, padded to 4 x 4
    model, inputs, seen = lively(case.model).eval(), case.inputs(), []
    last = lambda model, inputs, target: SimpleNamespace(image=(torch.arange(8.0).view(2, 4), torch.arange(12.0).view(4, 3)))  # noqa: E731
    hook = lambda module, args, kwargs: seen.append(kwargs["pixel_values"])  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    va.evaluate(model, [(inputs, 7, None)], methods={"last": last}, tests=("insertion",), steps=[0, 1 / 8], batch_size=1)
    shown = [[(y // 8, x // 8) for y, x in (one[0, 0] != 0).nonzero().tolist()] for one in seen if len(one) == 1]
    assert [sorted(set(cells)) for cells in shown] == [[], [(1, 3)], [], [(3, 2)]]


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
    with pytest.raises(ValueError, match="inputs must have at least two texts"):
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


def test_visual_bert_keeps_the_token_that_it_reads():
    """As the published loop does: [CLS], the token before [SEP] and [SEP] stay, and the words between them go."""
    case = visual_bert("VisualBertForQuestionAnswering")
    model, inputs = lively(case.model).eval(), case.inputs
    result = va.evaluate(model, [(inputs, 1, None)], tests=("positive", "negative"), accuracy=certainty)
    relevancy = va.explain(model, inputs, target=1).relevancy["joint"]
    for test, sign in (("positive", -1), ("negative", 1)):
        curves = torch.zeros(2, len(STEPS))
        for row, read in enumerate((7, 4)):
            words = sign * relevancy[row, 1:read]
            for place, step in enumerate(STEPS):
                top = words.topk(int((1 - step) * len(words))).indices + 1
                stay = [0, *sorted(top.tolist()), *range(read, inputs["input_ids"].shape[1])]
                texts = {name: inputs[name][row : row + 1, stay] for name in ("input_ids", "attention_mask")}
                regions = {name: value[row : row + 1] for name, value in inputs.items() if name.startswith("visual_")}
                with torch.no_grad():
                    curves[row, place] = certainty(model(**texts, **regions))[0]
        found = next(c for c in result.curves if (c["test"], c["part"]) == (test, "text"))
        assert found["mean"] == pytest.approx(curves.mean(0).tolist(), abs=1e-6)


def test_regions_of_visual_bert_are_dropped():
    case = visual_bert()
    model, inputs = lively(case.model).eval(), {name: value[:1] for name, value in case.inputs.items()}  # two regions are padding
    result = va.evaluate(model, [(inputs, 1, None)], tests=("insertion",), steps=[0, 1 / 3, 1])
    (best,) = va.explain(model, inputs, target=1).regions[:, :3].argmax(-1, keepdim=True)
    curve = []
    for stay in ([], best, torch.arange(5)):
        regions = {name: value[:, stay] for name, value in inputs.items() if name.startswith("visual_")}
        with torch.no_grad():
            curve.append(float(model(**{**inputs, **regions}).logits.softmax(-1)[0, 1]))
    found = next(c for c in result.curves if c["part"] == "image")
    assert found["mean"] == pytest.approx(curve, abs=1e-6)


def test_a_decoder_is_read_behind_its_patches():
    case = git()
    model = lively(case.model).eval()
    result = va.evaluate(model, [(case.inputs, 7, None)], tests=("deletion",), steps=[0, 1])
    with torch.no_grad():
        logits = model(**case.inputs).logits
    whole = logits[[0, 1], [25, 22]].softmax(-1)[:, 7]  # 17 image tokens and 9 words, three of them padding in the second row
    for curve in result.curves:
        assert curve["mean"][0] == pytest.approx(float(whole.mean()), rel=1e-4)


@pytest.mark.parametrize("decoded", [None, 3, 20])
def test_a_decoder_is_read_behind_an_encoder(decoded):
    model, ids = florence(), torch.randint(3, 50, (2, 20))
    ids[:, :13] = 59
    inputs = {"pixel_values": torch.randn(2, 3, 24, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if decoded is not None:
        inputs["decoder_input_ids"] = torch.randint(3, 50, (2, decoded))
        inputs["decoder_attention_mask"] = torch.ones(2, decoded, dtype=torch.long)
    result = va.evaluate(model, [(inputs, 7, None)], tests=("deletion",), steps=[0, 1])
    start = {} if decoded is not None else {"decoder_input_ids": torch.full((2, 1), 2)}
    fewer = {**inputs, **start, "input_ids": ids[:, :13], "attention_mask": inputs["attention_mask"][:, :13]}
    with torch.no_grad():
        curve = [float(model(**one).logits[:, -1].softmax(-1)[:, 7].mean()) for one in ({**inputs, **start}, fewer)]
    found = next(c for c in result.curves if c["part"] == "text")
    assert found["mean"] == pytest.approx(curve, rel=1e-4)


def test_patches_of_qwen_are_merged_cells():
    model, inputs = made("qwen2_5_vl")
    first = torch.zeros(8)
    first[3] = 1

    def method(model, inputs, target):
        one = va.explain(model, inputs, target=target, method="attention")
        return SimpleNamespace(image=(first.view(2, 4), first.view(4, 2)), image_samples=one.image_samples)

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


def test_a_picture_without_patches_is_no_padding():
    """SmolVLM, as Idefics 3, leaves out pictures of zeros; then its placeholders would have no features."""
    from tools.tiny_models.inputs import inputs_of
    from tools.tiny_models.shrink import small_model

    model = small_model(transformers.SmolVLMForConditionalGeneration)
    made = (make() for make in inputs_of("image-text", model))
    inputs = next(
        one for one in made if one["pixel_values"].ndim == 5 and (one["input_ids"] == model.config.image_token_id).any()
    )
    options = dict(
        methods=["gradient"], tests=["deletion"], steps=(0.0, 1.0), probability=lambda outputs: outputs.logits[:, -1, 3]
    )
    got = va.evaluate(model, [(inputs, None, None)], **options).value("gradient", "deletion", "image")
    blank = torch.zeros_like(inputs["pixel_values"])
    blank[:, :, 0, 0, 0] = 1e-30
    with torch.no_grad():
        ends = [model(**{**inputs, "pixel_values": pixels}).logits[:, -1, 3] for pixels in (inputs["pixel_values"], blank)]
    assert got == pytest.approx(torch.stack(ends).mean().item(), abs=1e-6)


def test_a_mask_of_pixels_tells_the_size_of_each_picture_of_a_prompt():
    """As of Idefics: the second picture is 4 x 8 pixels, padded to 8 x 8; patches of 4 x 4."""
    pixels, mask = torch.rand(1, 2, 3, 8, 8), torch.ones(1, 2, 8, 8, dtype=torch.bool)
    mask[0, 1, 4:] = False
    shown = SimpleNamespace(image=(torch.zeros(2, 2), torch.zeros(1, 2)), image_samples=[0, 0])
    (sample,) = split(None, {"pixel_values": pixels, "pixel_attention_mask": mask}, 1, shown, None)
    left = sample.keeping((("image", (5,)),))["pixel_values"]  # the second patch of the second picture
    expected = torch.zeros_like(pixels)
    expected[0, 1, :, :4, 4:] = pixels[0, 1, :, :4, 4:]
    torch.testing.assert_close(left, expected)
