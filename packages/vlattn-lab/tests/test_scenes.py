"""DigitScenes: what the captions say is checked here from boxes and pixels, without the package's own relations."""

import pytest
import torch

from vlattn_lab import DigitProcessor, digit_scans, digit_scenes, held_out_captions, swapped_pairs
from vlattn_lab.processor import DIGIT_WORDS

WORDS = {word: digit for digit, word in enumerate(DIGIT_WORDS)}
CLEARANCE = 4
RELATIONS = ("left", "right", "up", "down")


def parse(caption):
    """(first digit, "left" | "right" | "up" | "down", second digit)"""
    first, relation, of, article, second = caption.split()
    assert (relation, of) in (("left", "of"), ("right", "of"), ("up", "above"), ("down", "below"))
    assert article == "a"
    return WORDS[first], relation, WORDS[second]


def pixels_apart(boxes, digits, caption):
    """By how many pixels the caption holds; None where a digit it names is not there."""
    first, relation, second = parse(caption)
    centre = {int(digit): ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for digit, box in zip(digits, boxes, strict=True)}
    if first not in centre or second not in centre:
        return None
    right = float(centre[first][0] - centre[second][0])
    down = float(centre[first][1] - centre[second][1])
    return {"left": -right, "right": right, "up": -down, "down": down}[relation]


def apart(scenes):
    return [pixels_apart(*row) for row in zip(scenes.boxes, scenes.digits, scenes.captions, strict=True)]


def assert_same(one, two):
    assert one.captions == two.captions
    for name in ("images", "boxes", "digits", "input_ids", "label", "named"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


@pytest.mark.parametrize("split", ["train", "test", "fit", "validation"])
def test_the_same_seed_gives_the_same_tensors(split):
    state = torch.get_rng_state()
    assert_same(digit_scenes(50, split=split, seed=3), digit_scenes(50, split=split, seed=3))
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert digit_scenes(50, split=split, seed=3).captions != digit_scenes(50, split=split, seed=4).captions


def test_train_and_test_share_no_scan():
    train, test = digit_scans("train"), digit_scans("test")
    assert sorted([*train[2].tolist(), *test[2].tolist()]) == list(range(1797))
    assert torch.bincount(test[1]).min() >= 34
    drawn = digit_scenes(300, split="test")
    crops = DigitProcessor().regions(drawn.images, drawn.boxes)["region_features"].flatten(0, 1)
    assert torch.cdist(crops, test[0].flatten(1)).amin(1).max() < 1e-3
    from sklearn.datasets import load_digits

    assert torch.equal(train[0] * 16, torch.from_numpy(load_digits().images).float()[train[2]])


def test_validation_scans_are_a_fifth_of_the_training_scans():
    splits = {name: digit_scans(name) for name in ("train", "test", "fit", "validation")}
    places = {name: set(index.tolist()) for name, (_, _, index) in splits.items()}
    assert places["fit"] | places["validation"] == places["train"]
    assert not places["fit"] & places["validation"] and not places["train"] & places["test"]
    counts = {name: torch.bincount(digits, minlength=10) for name, (_, digits, _) in splits.items()}
    assert counts["validation"].tolist() == [-(-count // 5) for count in counts["train"].tolist()]
    drawn = digit_scenes(300, split="validation")
    crops = DigitProcessor().regions(drawn.images, drawn.boxes)["region_features"].flatten(0, 1)
    assert torch.cdist(crops, splits["validation"][0].flatten(1)).amin(1).max() < 1e-3
    held_out = held_out_captions()
    for split in ("fit", "validation"):  # what training does not say is not looked at, either
        captions = map(parse, digit_scenes(500, split=split).captions)
        assert not any(held_out[a, b, RELATIONS.index(relation)] for a, relation, b in captions)


def test_boxes_hold_all_the_ink_and_the_digit_they_are_labelled_with():
    scenes = digit_scenes(200)
    scans, digits, _ = digit_scans("test")
    for image, boxes, labels in zip(scenes.images, scenes.boxes.long(), scenes.digits, strict=True):
        outside = image.clone()
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels, strict=True):
            assert outside[y1:y2, x1:x2].sum() > 0, "an empty box, or one that another covers"
            its_scans = scans[digits == label]
            assert (its_scans == image[y1:y2, x1:x2]).flatten(1).all(1).any()
            outside[y1:y2, x1:x2] = 0
        assert outside.sum() == 0
        assert labels.unique().numel() == 4
    assert scenes.images.min() >= 0 and scenes.images.max() <= 1


def test_true_captions_are_true_and_name_two_regions():
    scenes = digit_scenes(500, seed=1)
    assert (scenes.label == 1).all()
    assert all(distance is not None and distance >= CLEARANCE for distance in apart(scenes))
    for digits, named, caption in zip(scenes.digits, scenes.named, scenes.captions, strict=True):
        first, _, second = parse(caption)
        assert {first, second} == set(digits[named].tolist()) and named.sum() == 2


@pytest.mark.parametrize("negative", ["digit", "relation", "order"])
def test_negatives_are_false_in_the_way_they_say(negative):
    true, false = digit_scenes(500, seed=1), digit_scenes(500, seed=1, negative=negative)
    assert torch.equal(true.images, false.images) and (false.label == 0).all()
    for right, wrong, distance in zip(true.captions, false.captions, apart(false), strict=True):
        (a, relation, b), (c, other, d) = parse(right), parse(wrong)
        if negative == "digit":
            assert distance is None and relation == other and (a == c) != (b == d)
        elif negative == "relation":
            assert distance <= 0 and relation != other and (a, b) == (c, d)
        else:
            assert distance <= -CLEARANCE and relation == other and (a, b) == (d, c)
    assert false.named.sum(1).unique().tolist() == ([1] if negative == "digit" else [2])


@pytest.mark.parametrize("negative", [None, "digit", "relation", "order"])
def test_training_never_says_a_held_out_caption(negative):
    vertical = {"left": False, "right": False, "up": True, "down": True}
    train = [parse(caption) for caption in digit_scenes(2000, split="train", negative=negative).captions]
    assert not any((a + b) % 5 == 0 or ((a + b) % 5 == 1 and vertical[r]) for a, r, b in train)
    assert len(set(train)) > 0.9 * int((~held_out_captions() & ~torch.eye(10, dtype=torch.bool)[..., None]).sum())
    if negative != "digit":
        assert all((a + b) % 5 < 2 for a, _, b in map(parse, digit_scenes(200, pairs="held_out", negative=negative).captions))


def test_swapped_pairs_have_the_same_words_and_scans_and_each_caption_is_true_of_its_own_scene_only():
    one, two = swapped_pairs(200, seed=5)
    processor = DigitProcessor()
    for a, b in zip(one.captions, two.captions, strict=True):
        assert sorted(a.split()) == sorted(b.split()) and a != b
    assert min(apart(one)) >= CLEARANCE and min(apart(two)) >= CLEARANCE
    for own, other in ((one, two), (two, one)):
        crossed = [pixels_apart(*row) for row in zip(own.boxes, own.digits, other.captions, strict=True)]
        assert max(crossed) <= -CLEARANCE
    crops = [processor.regions(scenes.images, scenes.boxes)["region_features"] for scenes in (one, two)]
    assert torch.equal(*crops) and torch.equal(one.images.sum((1, 2)), two.images.sum((1, 2)))


def test_inputs_and_processor_agree_and_words_come_back():
    scenes = digit_scenes(4)
    processor = DigitProcessor()
    inputs, called = scenes.inputs(), processor(scenes.captions, scenes.images, scenes.boxes)
    assert inputs.keys() == called.keys() and all(torch.equal(inputs[name], called[name]) for name in inputs)
    assert processor.convert_ids_to_tokens(scenes.input_ids[0]) == ["[CLS]", *scenes.captions[0].split(), "[SEP]"]
    padded = processor.words(["three left of a seven", "three above seven"])
    assert padded["attention_mask"].sum(1).tolist() == [7, 5]


def test_render_shows_ink_and_frames():
    scenes = digit_scenes(1)
    plain, framed = scenes.render(0, scale=4), scenes.render(0, scale=4, boxes=True)
    assert plain.shape == (128, 128, 3) and plain.dtype == torch.uint8
    assert plain[::4, ::4, 0].eq(((1 - scenes.images[0]) * 255).round()).all()
    x1, y1, x2, y2 = (scenes.boxes[0][scenes.named[0]][0] * 4).long().tolist()
    assert framed[y1, x1:x2].eq(torch.tensor([220, 30, 30])).all() and framed[y2 - 1, x1:x2, 0].eq(220).all()
    assert torch.equal(framed[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1], plain[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: digit_scenes(0), ValueError, "count"),
        (lambda: digit_scenes(2.0), TypeError, "count"),
        (lambda: digit_scenes(2, split="dev"), ValueError, "split"),
        (lambda: digit_scenes(2, negative="words"), ValueError, "negative"),
        (lambda: digit_scenes(2, pairs="new"), ValueError, "pairs"),
        (lambda: digit_scenes(2, seed="a"), TypeError, "seed"),
        (lambda: DigitProcessor().words("three"), TypeError, "captions"),
        (lambda: DigitProcessor().words(["three behind a seven"]), ValueError, "behind"),
        (lambda: DigitProcessor()(["a"], *[torch.zeros(2, 32, 32), torch.zeros(2, 4, 4)]), ValueError, "captions"),
        (lambda: DigitProcessor().regions(torch.zeros(2, 32), torch.zeros(2, 4, 4)), ValueError, "images"),
        (lambda: DigitProcessor().regions(torch.zeros(2, 32, 32), torch.zeros(2, 4, 3)), ValueError, "boxes"),
        (lambda: DigitProcessor().regions(torch.zeros(1, 32, 32), torch.tensor([[[28.0, 0, 36, 8]]])), ValueError, "boxes"),
        (lambda: digit_scenes(2).render(2), ValueError, "index"),
        (lambda: digit_scenes(2).render(0, scale=0), ValueError, "scale"),
    ],
)
def test_wrong_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
