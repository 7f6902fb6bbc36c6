"""Questions and prompts about DigitScenes: every answer is checked here from boxes, without the package's own relations."""

from collections import Counter

import pytest
import torch

import vlattn_fast as va
from vlattn_lab import SceneProcessor, digit_prompts, digit_questions, example_question, is_true, load_captioner
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import EXAMPLE, PROMPTS, QUESTIONS
from vlattn_lab.texts import ANSWERS, TEXT_VOCABULARY

DIGIT = {word: digit for digit, word in enumerate(DIGIT_WORDS)}
CLEARANCE = 4


def scene_of(asked, row):
    """digit -> (x, y) of its centre"""
    boxes = asked.boxes[row].tolist()
    return {int(digit): ((x1 + x2) / 2, (y1 + y2) / 2) for digit, (x1, y1, x2, y2) in zip(asked.digits[row], boxes, strict=True)}


def pixels(scene, first, relation, second):
    """By how many pixels `first` is left of, right of, up above or down below `second`."""
    right = scene[first][0] - scene[second][0]
    down = scene[first][1] - scene[second][1]
    return {"left of": -right, "right of": right, "up above": -down, "down below": down}[relation]


def related(scene, relation, second):
    """(digits for which it holds, digits for which nobody can say)"""
    apart = {digit: pixels(scene, digit, relation, second) for digit in scene if digit != second}
    return {d for d, by in apart.items() if by >= CLEARANCE}, {d for d, by in apart.items() if 0 < by < CLEARANCE}


def answer(question, scene):
    """(the answer, the digits that question and answer name), by the words of the question"""
    words = question.split()
    relation, second = " ".join(words[-4:-2]), DIGIT[words[-1]]
    if words[:3] == ["is", "there", "a"]:
        return ("yes", {second}) if second in scene else ("no", set())
    if words[0] == "what":
        holds, unsure = related(scene, relation, second)
        assert len(holds) == 1 and not unsure, "another answer may be right"
        return DIGIT_WORDS[min(holds)], {second} | holds
    if words[0] == "how":
        holds, unsure = related(scene, relation, second)
        assert not unsure, "another answer may be right"
        return DIGIT_WORDS[len(holds)], {second} | holds
    first = DIGIT[words[2]]
    by = pixels(scene, first, relation, second)
    assert words[:2] == ["is", "a"] and (by >= CLEARANCE or by <= 0), "another answer may be right"
    return "yes" if by > 0 else "no", {first, second}


def held_out(first, second, relation):
    rest = (first + second) % 5
    return rest == 0 or (rest == 1 and relation in ("up above", "down below"))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", QUESTIONS)
def test_answers_are_the_only_true_ones(kind, split):
    asked = digit_questions(300, kind=kind, split=split, seed=1)
    assert len(asked) == len(asked.answers) == 300 and set(asked.kinds) == {kind}
    assert set(asked.answers) <= set(ANSWERS)
    for row, (question, said) in enumerate(zip(asked.questions, asked.answers, strict=True)):
        right, named = answer(question, scene_of(asked, row))
        assert said == right
        assert set(asked.digits[row][asked.named[row]].tolist()) == named
    starts = {"what": "what is ", "is": "is a ", "there": "is there a ", "many": "how many are "}
    assert all(question.startswith(starts[kind]) for question in asked.questions)
    counts = Counter(asked.answers)
    if kind in ("is", "there"):
        assert 100 < counts["yes"] < 200, "as many are to be answered with no"
    elif kind == "many":
        assert {"zero", "one", "two", "three"} == set(counts) and min(counts.values()) > 15
    else:
        assert len(counts) == 10


def sentence(question, said):
    """What a prompt and its answer say together, or None"""
    if not question:
        return said
    if question.startswith("where is a "):
        return f"{question[len('where is a ') :]} {said}"
    assert question.startswith("what is ")
    return f"{said[2:]} {question[len('what is ') :]}" if said.startswith("a ") else None


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_answers_to_prompts_are_true(kind, split):
    asked = digit_prompts(300, kind=kind, split=split, seed=1)
    for row, (question, said) in enumerate(zip(asked.questions, asked.answers, strict=True)):
        scene, named = scene_of(asked, row), set(asked.digits[row][asked.named[row]].tolist())
        if kind == "which":
            assert question == "which digits are there" and [DIGIT[word] for word in said.split()] == sorted(scene)
            assert named == set(scene)
        else:
            words = sentence(question, said).split()
            first, second = DIGIT[words[0]], DIGIT[words[4]]
            assert words[3] == "a" and pixels(scene, first, " ".join(words[1:3]), second) >= CLEARANCE
            assert named == {first, second}
        assert is_true(question, said, asked.digits[row], asked.boxes[row])


def test_is_true_says_what_the_boxes_say():
    """Every sentence about a scene, by each kind of prompt."""
    asked = digit_prompts(3, kind="caption", seed=4)
    for row in range(3):
        scene = scene_of(asked, row)
        about = (asked.digits[row], asked.boxes[row])
        for a in range(10):
            for b in range(10):
                for relation in ("left of", "right of", "up above", "down below"):
                    there = a in scene and b in scene and a != b
                    true = there and pixels(scene, a, relation, b) >= CLEARANCE
                    first, second = DIGIT_WORDS[a], DIGIT_WORDS[b]
                    assert is_true("", f"{first} {relation} a {second}", *about) == true
                    assert is_true(f"where is a {first}", f"{relation} a {second}", *about) == true
                    assert is_true(f"what is {relation} a {second}", f"a {first}", *about) == true
        digits = [DIGIT_WORDS[digit] for digit in sorted(scene)]
        assert is_true("which digits are there", " ".join(digits), *about)
        for wrong in (digits[::-1], digits[:3], [*digits, digits[0]]):
            assert not is_true("which digits are there", " ".join(wrong), *about)
        for said in ("", "left", f"{digits[0]} left of {digits[1]}", "a a a a a", f"left of a {digits[0]}"):
            assert not is_true("", said, *about)
        assert not is_true(f"what is left of a {digits[0]}", digits[1], *about), "the answer has an article"
    with pytest.raises(ValueError, match="question must be .*; got 'who is there'"):
        is_true("who is there", "a three", *about)


@pytest.mark.parametrize("sample", [digit_questions, digit_prompts])
def test_training_relates_no_held_out_pair(sample):
    def pairs(asked):
        for kind, question, said in zip(asked.kinds, asked.questions, asked.answers, strict=True):
            if kind in ("caption", "where", "what", "is"):
                named = kind == "what" and sample is digit_questions
                words = (sentence(question, f"a {said}" if named else said) if kind != "is" else question[5:]).split()
                yield DIGIT[words[0]], DIGIT[words[4]], " ".join(words[1:3])

    train = list(pairs(sample(1200, split="train", seed=2)))
    assert len(train) > 500 and not any(held_out(*pair) for pair in train)
    kept = list(pairs(sample(200, seed=2, pairs="held_out")))
    assert len(kept) > 80 and all(held_out(*pair) for pair in kept)


@pytest.mark.parametrize("sample", [digit_questions, digit_prompts])
def test_the_same_seed_gives_the_same_questions_in_equal_parts(sample):
    state = torch.get_rng_state()
    one, two = sample(50, seed=3), sample(50, seed=3)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert (one.questions, one.answers, one.kinds) == (two.questions, two.answers, two.kinds)
    for name in ("images", "boxes", "digits", "named"):
        assert torch.equal(getattr(one, name), getattr(two, name)) and len(getattr(one, name)) == 50
    assert sample(50, seed=4).questions != one.questions
    assert sorted(Counter(one.kinds).values()) == [12, 12, 13, 13]


def test_the_processor_gives_ids_and_takes_them_back():
    asked = digit_questions(8, seed=1)
    processor = SceneProcessor()
    inputs = processor(asked.images, asked.questions)
    assert torch.equal(inputs["pixel_values"][:, 0], asked.images)
    assert processor.answers == ANSWERS and TEXT_VOCABULARY[-1] == "[END]"
    for ids, mask, question in zip(inputs["input_ids"], inputs["attention_mask"], asked.questions, strict=True):
        words = processor.convert_ids_to_tokens(ids)
        assert words[: int(mask.sum())] == ["[START]", *question.split(), "[END]"]
        assert set(words[int(mask.sum()) :]) <= {"[PAD]"} and not mask[int(mask.sum()) :].any()
    assert processor.decode(inputs["input_ids"]) == list(asked.questions)
    prompts = SceneProcessor(end=False).words(["", "where is a three"])
    assert prompts["input_ids"].shape == (2, 5) and prompts["attention_mask"].sum(1).tolist() == [1, 5]
    assert processor.convert_ids_to_tokens(prompts["input_ids"][1].tolist())[-1] == "three"


def test_a_photo_and_a_text_are_the_inputs_of_their_scene():
    """Up to the 255 greys of a photo, at any size that it is drawn in."""
    asked = digit_prompts(2, seed=EXAMPLE, kind="which")
    processor = SceneProcessor(end=False)
    for index, scale in ((0, 1), (1, 10)):
        inputs = processor(images=asked.photo(index, scale=scale), text=asked.questions[index])
        assert (inputs["pixel_values"][0, 0] - asked.images[index]).abs().max() < 1 / 255
        assert torch.equal(inputs["input_ids"], processor.words(asked.questions[index : index + 1])["input_ids"])
    photo, question = example_question()
    first = digit_prompts(1, seed=EXAMPLE, kind="which")
    assert photo.tobytes() == first.photo().tobytes() and question == first.questions[0]


def test_an_answer_in_words_is_explained_as_its_ids():
    model, processor = load_captioner()
    photo, question = example_question()
    inputs = processor(images=photo, text=question)
    answer = processor.decode(model.generate(**inputs))
    assert is_true(
        question, answer[0], *(getattr(digit_prompts(1, seed=EXAMPLE, kind="which"), x)[0] for x in ("digits", "boxes"))
    )
    ids = [processor.tokenizer(answer[0], add_special_tokens=False)["input_ids"]]
    assert processor.tokenizer(answer[0])["input_ids"][1:-1] == ids[0]
    said, numbered = (va.explain(model, inputs, answer=one, processor=processor) for one in (answer, ids))
    assert torch.equal(said.image, numbered.image) and said.words[0][-4:] == answer[0].split()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: digit_questions(0), ValueError, "count"),
        (lambda: digit_questions(2.0), TypeError, "count"),
        (lambda: digit_questions(2, seed="a"), TypeError, "seed"),
        (lambda: digit_questions(2, kind="where"), ValueError, "kind"),
        (lambda: digit_prompts(2, kind="is"), ValueError, "kind"),
        (lambda: digit_prompts(2, pairs="new"), ValueError, "pairs"),
        (lambda: digit_prompts(2, split="dev"), ValueError, "split"),
        (lambda: SceneProcessor().words("three"), TypeError, "text"),
        (lambda: SceneProcessor().words(["who is there"]), ValueError, "text"),
        (lambda: SceneProcessor().words(["[PAD]"]), ValueError, "text"),
        (lambda: SceneProcessor().words(["a " * 15]), ValueError, "text"),
        (lambda: SceneProcessor()(torch.zeros(1, 32, 32), ["a", "a"]), ValueError, "text"),
        (lambda: SceneProcessor()(torch.zeros(2, 32, 32), "a"), TypeError, "text"),
        (lambda: SceneProcessor()(torch.zeros(1, 1, 32, 32), ["a"]), ValueError, "images"),
        (lambda: SceneProcessor()(torch.zeros(1, 32, 32), ["a"], return_tensors="np"), ValueError, "return_tensors"),
    ],
)
def test_wrong_input_is_named(call, error, words):
    with pytest.raises(error, match=f"^{words} must .*; got "):
        call()
