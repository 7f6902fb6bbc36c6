"""`evaluate` on planted models and on maps made by hand, its files and its errors."""

import json
from types import SimpleNamespace

import pytest
import torch

import vlattn_fast as va
from tests.helpers.interpret.evaluation_cases import Planted, made, planted_data, rows, truth
from vlattn_fast.interpret.evaluating.box_scores import Truth, mass
from vlattn_fast.interpret.evaluating.plan import TESTS
from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation


def test_the_seed_fixes_what_is_random():
    one, two, three = (
        va.evaluate(Planted(), planted_data(), methods=("random",), tests=("positive", "deletion"), seed=seed).table
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


def test_sanity_leaves_out_the_row_that_is_not_finite():
    """The others of its batch stay."""
    model, inputs = made("vit")
    trained = model.classifier.weight.detach().clone()

    def broken(model, inputs, target):
        image = torch.arange(40.0).view(2, 4, 5).clone()
        if not torch.equal(model.classifier.weight, trained):
            image[0, 0, 0] = torch.nan
        return SimpleNamespace(image=image)

    result = va.evaluate(model, [(inputs, None, None)], methods={"broken": broken}, tests=("sanity",), sanity_stages=2)
    row = rows(result)["broken", "sanity", "image"]
    assert (row["value"], row["samples"], row["left_out"]) == (pytest.approx(1.0), 1, 1)


def test_sanity_hides_no_other_error():
    """Only relevancy that the randomised weights leave undefined is left out."""
    model, inputs = made("vit")
    trained = model.classifier.weight.detach().clone()

    def broken(model, inputs, target):
        if not torch.equal(model.classifier.weight, trained):
            raise ValueError("broken by itself")
        return SimpleNamespace(image=torch.arange(40.0).view(2, 4, 5))

    with pytest.raises(ValueError, match="broken by itself"):
        va.evaluate(model, [(inputs, None, None)], methods={"broken": broken}, tests=("sanity",))


def test_sanity_leaves_out_scores_that_are_no_numbers():
    model, inputs = made("vit")
    ran = []  # hooks go along with a copy
    model.register_forward_hook(lambda module, args, outputs: ran.append(module))

    def target(outputs):
        return outputs.logits[:, 1] * (1 if ran[-1] is model else torch.nan)

    methods = ("gradient", "random")
    result = va.evaluate(model, [(inputs, target, None)], methods=methods, tests=("sanity",), sanity_stages=2)
    assert rows(result)["gradient", "sanity", "image"]["left_out"] == 2


@pytest.mark.parametrize("target", [0, 1])
def test_logits_that_are_nan_are_neither_right_nor_wrong(target):
    """The largest of them would be the first."""

    class Broken(Planted):
        def forward(self, **inputs):
            outputs = super().forward(**inputs)
            outputs.logits[(inputs["pixel_values"] == 0).all(-1).all(-1).all(-1)] = torch.nan
            return outputs

    data = [(inputs, target, boxes) for inputs, _, boxes in planted_data(1)]
    for test in ("positive", "insertion"):
        with pytest.raises(
            ValueError, match="The model returned NaN for sample 0 of a batch with 0 of 16 entries of the image left. Pass steps="
        ):
            va.evaluate(Broken(), data, methods={"truth": truth()}, tests=(test,))


def test_rank_correlation_is_spearmans():
    one, two = torch.tensor([1.0, 5.0, 5.0, 2.0]), torch.tensor([3.0, 4.0, 9.0, 0.0])
    ranks, others = [1, 3.5, 3.5, 2], [2, 3, 4, 1]
    assert rank_correlation(one, two) == pytest.approx(float(torch.corrcoef(torch.tensor([ranks, others]))[0, 1]))
    assert rank_correlation(one, one.exp()) == pytest.approx(1)
    assert rank_correlation(one, torch.ones(4)) is None and rank_correlation(one[:2], two[:2]) is None


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


def test_a_region_without_area_counts_by_its_centre():
    """As padding has it that no mask tells of."""
    regions = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.2, 0.2, 0.2, 0.4], [0.0, 0.0, 0.0, 0.0], [0.9, 0.9, 0.9, 0.9]]).double()
    box = Truth.from_boxes(torch.tensor([[0.1, 0.1, 0.5, 0.5]]).double())
    assert mass(torch.tensor([1.0, 0.0, 0.0, 0.0]), regions, box) == pytest.approx(0.64)
    assert mass(torch.tensor([1.0, 2.0, 3.0, 4.0]), regions, box) == pytest.approx((0.64 + 2) / 10)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16])
def test_maps_of_other_dtypes_are_their_numbers(dtype):
    """Bytes cannot be negated, whole numbers have no mean, and that of 16 bits, 128.75, is rounded to one of the entries."""

    def method(model, inputs, target, dtype=dtype):
        return SimpleNamespace(image=torch.tensor([[0, 200], [186, 129]]).to(dtype).expand(2, -1, -1))

    def floats(model, inputs, target):
        return method(model, inputs, target, torch.float64)

    tests = [test for test in TESTS if test not in ("sanity", "synergy", "intervention")]
    result = va.evaluate(Planted(), planted_data(1), methods={"one": method, "floats": floats}, tests=tests)
    for test in tests:
        assert result.value("one", test) == result.value("floats", test), test


def test_without_boxes_samples_are_left_out():
    model, inputs = made("vit")
    found = rows(va.evaluate(model, [(inputs, None, None), (inputs, None, [[[0, 0, 1, 1]], None])], tests=("pointing",)))
    row = found["gradient", "pointing", "image"]
    assert (row["value"], row["samples"], row["left_out"]) == (1.0, 1, 3)
    single = {"pixel_values": inputs["pixel_values"][:1]}
    for boxes in ([[0, 0, 1, 1]], [[[0, 0, 1, 1]]], torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[[0.0, 0, 1, 1]]])):
        row = rows(va.evaluate(model, [(single, None, boxes)], tests=("pointing",)))["gradient", "pointing", "image"]
        assert row["samples"] == 1
    for boxes in ([], torch.zeros(0, 4), torch.zeros(0, 4).numpy(), [[]]):
        row = rows(va.evaluate(model, [(single, None, boxes)]))["gradient", "pointing", "image"]
        assert (row["samples"], row["left_out"]) == (0, 1)


def test_it_is_saved_and_read_back(tmp_path):
    pytest.importorskip("matplotlib")
    result = va.evaluate(Planted(), planted_data(), methods={"truth": truth(), "random": "random"}, tests=("positive", "mass"))
    again = va.Evaluation.load(result.save(tmp_path / "evaluation.json"))
    assert (again.table, again.curves, again.metadata) == (result.table, result.curves, json.loads(json.dumps(result.metadata)))
    assert again.value("truth", "mass") == 1.0
    assert "truth   mass       image   1.0000   0.0000        6         0" in str(again)
    figure = again.plot()
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["positive of the image", "positive of the text", "mass of the image"]
    assert len(figure.axes[0].lines) == 2 and len(figure.axes[2].patches) == 2
    assert figure.get_size_inches()[0] < 8  # legible on a page
    (row,) = [row for row in again.table if (row["method"], row["test"]) == ("random", "mass")]
    ((_, low), (_, high)) = figure.axes[2].containers[2].get_children()[-1].get_segments()[0]
    assert (high - low) / 2 == pytest.approx(row["sd"] / 6**0.5) and row["sd"] > 0  # the standard error of six samples
    with pytest.raises(ValueError, match="method, test and part must name an entry"):
        again.value("truth", "iou")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="path must be a file that Evaluation.save wrote"):
        va.Evaluation.load(tmp_path / "other.json")


@pytest.mark.parametrize("tests", [None, ("positive",), ("sanity",)])
def test_a_data_set_without_a_sample_is_refused(tests):
    model, inputs = made("vit")
    for dataset in ([], iter(()), [({"pixel_values": inputs["pixel_values"][:0]}, None, None)]):
        with pytest.raises(ValueError, match="dataset must hold at least one sample; got none"):
            va.evaluate(model, dataset, tests=tests)


def test_a_named_test_that_leaves_out_every_sample_is_refused():
    """As `probe` does. Unnamed, its record has no value."""
    model, inputs = made("vit")
    constant = lambda model, inputs, target: SimpleNamespace(image=torch.ones(2, 4, 5))  # noqa: E731
    impossible = [
        (("positive", "pointing"), "gradient", "'pointing' is impossible .*: no sample has boxes or a mask and a map of its"),
        (("sanity",), constant, "'sanity' is impossible .*: no sample has a finite map that is not constant, .*. Leave it out"),
        (("deletion",), lambda *_: SimpleNamespace(text=torch.ones(2, 3)), "'deletion' is impossible .* an entry to remove"),
    ]
    for tests, method, message in impossible:
        with pytest.raises(ValueError, match=message):
            va.evaluate(model, [(inputs, None, None)], methods={"map": method}, tests=tests)
    row = rows(va.evaluate(model, [(inputs, None, None)]))["gradient", "pointing", "image"]
    assert (row["value"], row["samples"], row["left_out"]) == (None, 0, 2)


NAN = lambda model, inputs, target: SimpleNamespace(image=torch.full((2, 4, 5), float("nan")))  # noqa: E731
WRONG = lambda model, inputs, target: SimpleNamespace(image=torch.ones(2, 4, 4))  # noqa: E731


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"methods": "gradient"}, TypeError, "methods must be a sequence"),
        ({"methods": ()}, ValueError, "methods must name at least one"),
        ({"methods": ("gradient", "gradient")}, ValueError, "methods must have different names"),
        ({"methods": ("lime",)}, ValueError, "methods must be callables, .* or among gradient, .*; got 'lime'"),
        ({"methods": ("weighted:none",)}, ValueError, "methods must be callables, objects of va.methods or among"),
        ({"methods": ("gradient:norm",)}, ValueError, "methods must be callables, objects of va.methods or among"),
        ({"methods": (3,)}, TypeError, "methods must be names, objects of va.methods and callables; got int"),
        ({"tests": "positive"}, TypeError, "tests must be None or a sequence of names; got"),
        ({"tests": ()}, ValueError, "tests must name at least one"),
        ({"tests": ("auc",)}, ValueError, "tests must be among positive"),
        ({"steps": [0.5]}, ValueError, "steps must be two or more increasing"),
        ({"steps": [0, 0.5, 0.5]}, ValueError, "steps must be two or more increasing"),
        ({"steps": 0.5}, TypeError, "steps must be two or more increasing .*; got 0.5"),
        ({"steps": ["half", 1]}, TypeError, "steps must be two or more increasing"),
        ({"steps": [0, 2]}, ValueError, "steps must be two or more increasing"),
        ({"steps": [0, 1], "tests": ("iou",)}, ValueError, "steps must be given with .* positive, .*; got tests iou"),
        ({"accuracy": len, "tests": ("deletion",)}, ValueError, "accuracy must be given with .* positive, negative; got"),
        ({"probability": len}, ValueError, "probability must be given with .* insertion, .*synergy; got tests positive,"),
        ({"methods": (len, "random"), "position": "first"}, ValueError, "position must be given with methods of explain"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"sanity_stages": True}, TypeError, "sanity_stages must be an int"),
        ({"sanity_stages": 10**6}, ValueError, "sanity_stages must be at most 1000"),
        ({"methods": {"nan": NAN}}, ValueError, "methods must return finite maps"),
        ({"methods": {"wrong": WRONG}}, ValueError, r"methods must return maps on the grids \[\(4, 5\)\]"),
        ({"accuracy": lambda outputs: outputs.logits}, ValueError, "accuracy must return scores of shape"),
        ({"accuracy": lambda outputs: 1}, TypeError, "accuracy must return a tensor"),
    ],
)
def test_errors_of_arguments(arguments, kind, message):
    model, inputs = made("vit")
    with pytest.raises(kind, match=message):
        va.evaluate(model, [(inputs, None, None)], **arguments)


def test_a_target_may_be_a_name():
    """As in `explain`."""
    model, inputs = made("vit")
    by_name, by_number = (
        va.evaluate(model, [(inputs, target, None)], tests=("deletion",)) for target in (["LABEL_1", "LABEL_3"], [1, 3])
    )
    assert by_name.table == by_number.table


@pytest.mark.parametrize(
    ("item", "kind", "message"),
    [
        (("inputs", None), TypeError, r"dataset must yield \(inputs, target, boxes or None\), or a mapping with 'inputs'; got 2"),
        ((7, None, None), TypeError, "inputs must be a mapping"),
        (("inputs", 9, None), ValueError, "target must be from 0 to 4"),
        (("inputs", "dog", None), ValueError, "target must be one of 'LABEL_0', .*; got 'dog'"),
        (("inputs", "similarity", None), ValueError, "target must be of one sample, .*; got 'similarity'"),
        (("inputs", [0], None), ValueError, "target must be one index or 2"),
        (("inputs", None, [[[0, 0, 1, 1]]]), ValueError, "one set of boxes or one mask for each of the 2 samples; got 1"),
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


def rival(**fields):
    return lambda model, inputs, target: SimpleNamespace(**fields)


ONE = torch.rand(1, 4, 4)
BAD_RIVALS = [
    (rival(image=ONE), ValueError, "methods must return one image for each of 2 samples of a batch; got 1 of 'bad'"),
    (rival(image=torch.rand(3, 4, 4)), ValueError, "one image for each of 2 samples of a batch; got 3 of 'bad'"),
    (rival(text=torch.rand(1, 8)), ValueError, "one text for each of 2 samples of a batch; got 1 of 'bad'"),
    (rival(regions=torch.rand(1, 8)), ValueError, "one regions for each of 2 samples of a batch; got 1 of 'bad'"),
    (rival(image=ONE, image_samples=[0, 1]), ValueError, r"image_samples, from 0 to 1, for each map; got \[0, 1\] for 1 maps"),
    (rival(image=ONE, image_samples=[2]), ValueError, r"image_samples, from 0 to 1, for each map; got \[2\] for 1 maps of 'bad'"),
    (lambda model, inputs, target: torch.rand(2, 4, 4), TypeError, r"an object with .image, .regions or .text; got Tensor of"),
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("bad", "error", "words"), BAD_RIVALS)
def test_a_rival_without_a_map_for_each_row_is_refused(bad, error, words, first):
    """Also where its maps come first, and tell the grids of a model without an adapter."""
    methods = {"bad": bad, "truth": truth()} if first else {"truth": truth(), "bad": bad}
    with pytest.raises(error, match=words):
        va.evaluate(Planted(), planted_data(1), methods=methods, tests=("pointing",))
