"""Groups of tokens: a table of edges has each token once; boxes of the image name their patches."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.decoder_cases import DECODERS
from tests.helpers.interpret.edited_maps import llama, made
from vlattn_fast.interpret.intervening.token_sets import token_set
from vlattn_fast.interpret.intervening.traced_model import trace_model

GROUPS = ["image", "question", "last"]
LAST = 23, 21  # of each sample


def test_the_question_gives_way_to_the_last_token() -> None:
    model, inputs = made("llava")
    table = va.attribute_edges(model, inputs, GROUPS, target=7)
    assert table.groups == {"image": "image", "question": "question - last", "last": "last"}
    (tower,) = trace_model(model, inputs).towers
    sets = {name: token_set(name, group, tower).mask for name, group in table.groups.items()}
    named = {name: token_set(name, name, tower).mask for name in GROUPS}
    assert bool(named["question"][[0, 1], LAST].all()) and not bool(sets["question"][[0, 1], LAST].any())
    assert torch.equal(sum(each.int() for each in sets.values()), torch.stack([*named.values()]).any(0).int())
    apart = va.attribute_edges(model, inputs, {**sets, "question": sets["question"]}, target=7)
    torch.testing.assert_close(table.effects, apart.effects, rtol=0, atol=0)
    alone = va.attribute_edges(model, inputs, ["question"], target=7)  # nothing to give way to
    assert alone.groups == {"question": "question"}
    parts = sum(table.by_layer()[:, one, two] for one in (1, 2) for two in (1, 2))  # no edge is counted twice, and none is lost
    torch.testing.assert_close(parts, alone.by_layer()[:, 0, 0], rtol=1e-6, atol=1e-9)


def test_true_effects_and_curves_have_each_token_once() -> None:
    model, inputs = made("llava")
    edges = [(1, None, "question", "last"), (1, None, "last", "last")]
    true = va.intervene_each(model, inputs, edges, groups=GROUPS, target=7)
    again = va.intervene_each(model, inputs, va.attribute_edges(model, inputs, GROUPS, target=7)[:3])
    assert again.groups == true.groups

    def score() -> Tensor:
        return model(**inputs).logits[[0, 1], LAST, 7]

    with torch.no_grad():
        for effect, keys in zip(true.effects, ("question - last", "last"), strict=True):
            with va.intervene(model, inputs, va.Knockout(queries="last", keys=keys, layers=1)):
                torch.testing.assert_close(effect, true.scores - score(), rtol=0, atol=1e-9)
    curves = [
        va.information_flow(model, [(inputs, None)], window=1, queries="last", keys=keys).probability
        for keys in ("question", "question - last", "last")
    ]
    assert torch.equal(curves[0], curves[1]) and not torch.allclose(curves[0], curves[2])  # one group may flow to itself


def test_an_answer_keeps_its_tokens() -> None:
    """Of inputs with an answer "last" are the tokens that predict it, most of which are the answer's."""
    case = DECODERS["LlavaForConditionalGeneration"]()
    model, inputs = case.model.eval(), case.inputs("left")
    table = va.attribute_edges(model, inputs, ["last", "answer", *GROUPS[:2]], answer=[[5, 6, 7], [8, 9, 7]])
    groups = {"last": "last - answer", "answer": "answer", "image": "image", "question": "question - last"}
    assert table.groups == groups
    assert float(table.matrix("image", "answer").abs().max()) > 0


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": (0, 4), "b": [(2, 3), (3, 6)]}, r"got 'a' and 'b', which share tokens 2, 3 of sample 0 in tower 'language"),
        ({"end": (6, 9), "last": "last"}, "got 'last' and 'end', which share tokens 8 of sample 0"),
        ({"one": "last", "two": "last"}, "got 'one' and 'two', which share tokens 8 of sample 0"),
        (["text", "question"], "got 'text' and 'question', which share tokens"),
        ({"mask": torch.arange(18).view(2, 9) == 11, "b": (1, 3)}, "got 'mask' and 'b', which share tokens 2 of sample 1"),
    ],
)
def test_other_groups_that_overlap_are_refused(groups: Any, message: str) -> None:
    model, inputs = llama()
    with pytest.raises(ValueError, match=f"groups of a table must hold each token once; {message}"):
        va.attribute_edges(model, inputs, groups)
    first, second = groups if isinstance(groups, list) else groups.values()
    edge = (0, None, *groups)
    with pytest.raises(ValueError, match="groups of a table must hold each token once"):
        va.intervene_each(model, inputs, [edge], groups=groups)
    edits = [va.Knockout(queries=first, keys=second), va.Steer(queries=second, keys=first, weight=2.0)]
    with va.intervene(model, inputs, edits):  # edits may overlap
        model(**inputs)


def test_spans_of_a_curve_that_overlap_are_refused_and_one_span_may_flow_to_itself() -> None:
    model, inputs = llama()
    with pytest.raises(ValueError, match="groups of a table must .*; got 'queries' and 'keys', which share tokens 2 of sample 0"):
        va.information_flow(model, [(inputs, None)], window=1, queries=(2, 5), keys=(0, 3))
    for queries, keys in (((2, 5), (2, 5)), (None, (0, 3))):
        va.information_flow(model, [(inputs, None)], window=1, queries=queries, keys=keys)


def test_a_group_that_gives_all_its_tokens_away_is_named() -> None:
    model, inputs = llama()
    short = {name: value[:, :1] for name, value in inputs.items()}
    empty = "must have a token; got 'text - last', which is empty in tower 'language' of 1 tokens"
    with pytest.raises(ValueError, match=rf"groups\['words'\] {empty}"):
        va.attribute_edges(model, short, {"words": "text", "end": "last"})
    with pytest.raises(ValueError, match=f"keys {empty}"):
        va.information_flow(model, [(short, None)], window=1, keys="text")


def test_names_less_others_are_groups_of_edits() -> None:
    model, inputs = llama()
    mask = torch.zeros(9, dtype=torch.bool)
    mask[8] = True
    with pytest.raises(ValueError, match="got 'last - last', which is empty in tower 'language' of 9 tokens"):
        va.intervene(model, inputs, va.Knockout(keys="last - last"))
    both = [va.Knockout(queries="last", keys=keys, layers=1) for keys in ("text", "text - last")]
    with torch.no_grad():
        logits = []
        for edits in (both[0], both[1], [both[1], va.Knockout(queries="last", keys=mask, layers=1)]):
            with va.intervene(model, inputs, edits):
                logits.append(model(**inputs).logits)
    torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=0)
    assert not torch.allclose(logits[0], logits[1])


BOXES = {
    (0.0, 0.0, 0.5, 1.0): [0, 1, 4, 5, 8, 9, 12, 13],
    (0.3, 0.6, 0.7, 0.7): [9, 10],  # the third row has its centres at 5/8
    (0.625, 0.125, 0.875, 0.125 + 1e-9): [2, 3],  # centres on an edge are inside
}


def patches(family: str, inputs: dict[str, Any]) -> Tensor:
    """int64 (B, 16), the places of the 4 x 4 patches of each sample."""
    if family == "clip":
        return torch.arange(1, 17).expand(len(inputs["pixel_values"]), -1)
    return (inputs["input_ids"] == 55).nonzero()[:, 1].view(len(inputs["input_ids"]), -1)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("family", ["llava", "clip"])
def test_a_box_has_the_patches_whose_centres_lie_in_it(family: str, box: tuple[float, float, float, float]) -> None:
    model, inputs = made(family)
    places = patches(family, inputs)
    assert places.shape[1] == 16
    size = inputs["input_ids"].shape[1] if family == "llava" else 17
    mask = torch.zeros(len(places), size, dtype=torch.bool)
    for row, of_row in zip(mask, places, strict=True):
        row[of_row[BOXES[box]]] = True
    results = []
    for keys in (("image", box), mask, None):
        cut = va.Knockout(queries="last" if family == "llava" else "special", keys=keys)
        with torch.no_grad(), nullcontext() if keys is None else va.intervene(model, inputs, cut):
            results.append(getattr(model(**inputs), "logits" if family == "llava" else "logits_per_image"))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert not torch.allclose(results[0], results[2])


def test_boxes_are_groups_of_edges() -> None:
    model, inputs = made("llava")
    left, right = ((start, 0.0, start + 0.5, 1.0) for start in (0.0, 0.5))
    table = va.attribute_edges(model, inputs, {"left": ("image", left), "right": ("image:0", right), "last": "last"})
    halves = table.matrix("left", "last") + table.matrix("right", "last")
    torch.testing.assert_close(halves, va.attribute_edges(model, inputs, ["image", "last"]).matrix("image", "last"))
    effects = va.intervene_each(model, inputs, table.top(2))
    assert len(effects) == 2


@pytest.mark.parametrize(
    "keys, message",
    [
        (("image", (0.5, 0.0, 0.5, 1.0)), r"keys must be \('image', \(x1, y1, x2, y2\)\), .* in \[0, 1\]; got"),
        (("image", (0, 0, 12, 12)), r"keys must be \('image', "),
        (("text", (0.0, 0.0, 1.0, 1.0)), r"keys must be \('image', "),
        (("image", (0.4, 0.4, 0.6, 0.6)), r"keys must have a token; got \('image', \(0.4, 0.4, 0.6, 0.6\)\), which is empty in"),
    ],
)
def test_a_box_that_is_none_or_has_no_patch_is_refused(keys: Any, message: str) -> None:
    model, inputs = made("llava")
    with pytest.raises(ValueError, match=message):
        va.intervene(model, inputs, va.Knockout(queries="last", keys=keys))


def test_a_box_needs_patches() -> None:
    model, inputs = llama()
    with pytest.raises(ValueError, match=r"keys=\('image', \(0.0, 0.0, 0.5, 1.0\)\) has no meaning in tower"):
        va.intervene(model, inputs, va.Knockout(queries="last", keys=("image", (0.0, 0.0, 0.5, 1.0))))
