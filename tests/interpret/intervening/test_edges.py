"""Effects of edges: first order beside finite differences and the formula, true ones beside single knockouts."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.decoder_cases import DECODERS
from tests.helpers.interpret.edited_maps import biased, decoder, llama, made

GROUPS = ["image", "question", "last"]


def chosen_logit(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits[[0, 1], [23, 21], 7]


def exact(family: str) -> tuple[Any, dict[str, Any], dict[str, Tensor], Any, Any]:
    """A model without a step in float32; groups of other tokens in each sample; its score; the attention of its layers."""
    if family == "clip":
        model, inputs = made("clip")
        score = lambda: model(**inputs).logits_per_image.diagonal()  # noqa: E731
        batch, size, layers = 3, 17, [layer.self_attn for layer in model.vision_model.encoder.layers]
    else:
        model, inputs = decoder(family)
        score = lambda: model(**inputs).logits[:, -1, 7]  # noqa: E731
        (batch, size), (path, name) = inputs["input_ids"].shape, EXACT[family]
        layers = [layer.get_submodule(name) for layer in model.get_submodule(path)]
    groups = {name: torch.zeros(batch, size, dtype=torch.bool) for name in ("some", "later", "last")}
    groups["some"][:, 1:5], groups["later"][0, 5:-1], groups["later"][1:, 6:-1], groups["last"][:, -1] = True, True, True, True
    return model, inputs, groups, score, layers


EXACT = {
    "Blip2ForConditionalGeneration": ("language_model.model.decoder.layers", "self_attn"),
    "GPT2LMHeadModel": ("transformer.h", "attn"),
    "clip": ("", ""),
}
families = pytest.mark.parametrize("family", EXACT)


@families
@pytest.mark.parametrize(
    "edge", [(0, 1, "some", "later"), (1, 3, "later", "last"), (2, 0, "last", "last"), (1, 2, "some", "last")]
)
def test_first_order_effects_are_finite_differences_by_the_bias(family: str, edge: tuple[int, int, str, str]) -> None:
    model, inputs, groups, score, layers = exact(family)
    layer, head, from_, to = edge
    table = va.attribute_edges(model, inputs, groups, target=None if family == "clip" else 7)
    assert len(table) == 3 * 4 * 3 * 3 and table.effects.shape == (108, len(groups["some"]))
    step, size = 1e-5, groups["some"].shape[1]
    both = torch.zeros(len(groups["some"]), 4, size, size, dtype=torch.float64)
    both[:, head] = (groups[to][:, :, None] & groups[from_][:, None]).double()
    scores = []
    for sign in (step, -step):
        with torch.no_grad(), biased(model, lambda m, *_, sign=sign: sign * both if m is layers[layer] else 0.0):
            scores.append(score())
    (number,) = [i for i, e in enumerate(table) if (e.layer, e.head, e.from_, e.to) == edge]
    expected = (scores[0] - scores[1]) / (2 * step)
    torch.testing.assert_close(table.effects[number], expected, rtol=1e-6, atol=1e-9)
    assert table[number].effect == pytest.approx(float(table.effects[number].mean()), rel=1e-12)
    assert float(table.matrix(from_, to)[layer, head]) == pytest.approx(table[number].effect, rel=1e-5)
    if (family, edge) != ("clip", (2, 0, "last", "last")):  # the last layer's row of a patch is not read
        assert float(expected.abs().max()) > 1e-6


@families
def test_first_order_effects_are_the_formula_of_maps_and_their_gradients(family: str) -> None:
    """sum over the pairs of A (dA - sum_j A dA), from the maps of eager attention."""
    model, inputs, groups, score, layers = exact(family)
    with biased(model, lambda *_: 0.0) as stored:
        total = score().sum()
    maps = [stored[layer] for layer in layers]
    gradients = torch.autograd.grad(total, maps)
    table = va.attribute_edges(model, inputs, groups, target=None if family == "clip" else 7)
    for number, edge in enumerate(table):
        attention, gradient = maps[edge.layer][:, edge.head], gradients[edge.layer][:, edge.head]
        of_logits = attention * (gradient - (attention * gradient).sum(-1, keepdim=True))
        pairs = groups[edge.to][:, :, None] & groups[edge.from_][:, None]
        torch.testing.assert_close(table.effects[number], (of_logits * pairs).sum((1, 2)).detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_true_effects_are_those_of_single_knockouts(batch_size: int) -> None:
    model, inputs = made("llava")
    table = va.attribute_edges(model, inputs, GROUPS, target=7).top(5)
    true = va.intervene_each(model, inputs, table, batch_size=batch_size)
    assert not true.first_order and [e.layer for e in true] == [e.layer for e in table]
    with torch.no_grad():
        base = chosen_logit(model, inputs)
        torch.testing.assert_close(true.scores, base, rtol=0, atol=1e-9)
        for number, edge in enumerate(true):
            sides = {"queries": true.groups[edge.to], "keys": true.groups[edge.from_]}
            cut = va.Knockout(**sides, layers=edge.layer, heads=edge.head)
            with va.intervene(model, inputs, cut):
                expected = base - chosen_logit(model, inputs)
            torch.testing.assert_close(true.effects[number], expected, rtol=0, atol=1e-9)
            assert edge.effect == pytest.approx(float(expected.mean()), rel=1e-9)


def test_effects_on_an_answer_and_on_packed_pictures() -> None:
    """Copies of a batch keep the order of its packed patches."""
    case = DECODERS["Qwen2VLForConditionalGeneration"]()
    model, inputs = case.model.double().eval(), case.inputs()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    answer = [[5, 6, 7], [8, 9]]
    table = va.attribute_edges(model, inputs, [*GROUPS, "answer"], answer=answer)
    chosen = [edge for edge in table if edge.to == "answer" and edge.from_ == "image"][:5]
    assert len(chosen) == 5 and all(edge.effect != 0 for edge in chosen)
    true = va.intervene_each(model, inputs, chosen, groups=[*GROUPS, "answer"], answer=answer, batch_size=4)
    explained = va.explain(model, inputs, answer=answer, per_token=False)
    torch.testing.assert_close(true.scores, explained.scores, rtol=0, atol=1e-9)
    size = inputs["input_ids"].shape[1]
    ids, mask = explained_inputs(inputs, answer)
    words = [mask[row].nonzero()[:, 0][-len(answer[row]) :] for row in range(2)]
    spot = torch.zeros(ids.shape, dtype=torch.bool)
    for row, columns in enumerate(words):
        spot[row, columns] = True
    whole = {**inputs, "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == 98).int()}

    def score() -> Tensor:
        logits = model(**whole).logits.double().log_softmax(-1)
        return torch.stack([logits[row, columns - 1, answer[row]].sum() for row, columns in enumerate(words)])

    assert ids.shape[1] == size + 3
    with torch.no_grad():
        base = score()
        torch.testing.assert_close(true.scores, base, rtol=0, atol=1e-9)
        for number, edge in enumerate(chosen):
            cut = va.Knockout(queries=spot, keys="image", layers=edge.layer, heads=edge.head)
            with va.intervene(model, whole, cut):
                torch.testing.assert_close(true.effects[number], base - score(), rtol=0, atol=1e-9)


def explained_inputs(inputs: dict[str, Any], answer: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask with the answers behind the last real tokens."""
    size = inputs["input_ids"].shape[1] + max(map(len, answer))
    ids, mask = (torch.zeros(2, size, dtype=torch.long) for _ in range(2))
    for row, tokens in enumerate(answer):
        real = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist() + tokens
        ids[row, : len(real)], mask[row, : len(real)] = torch.tensor(real), 1
    return ids, mask


def test_edges_of_all_heads_and_of_a_chosen_tower() -> None:
    model, inputs = made("clip")
    groups = {"cls": "special", "patches": "image"}
    table = va.attribute_edges(model, inputs, groups)
    assert {edge.from_ for edge in table} == {"cls", "patches"} and len(table) == 3 * 4 * 2 * 2
    with torch.no_grad():
        base = model(**inputs).logits_per_image.diagonal()
        true = va.intervene_each(model, inputs, [(1, None, "patches", "cls")], groups=groups)
        with va.intervene(model, inputs, va.Knockout(queries="special", keys="image", layers=1, tower="vision")):
            expected = base - model(**inputs).logits_per_image.diagonal()
    torch.testing.assert_close(true.effects[0], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(table.scores, base, rtol=0, atol=1e-9)


def test_edges_between_towers_need_groups_of_both() -> None:
    sizes = dict(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, vocab_size=30, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    inputs = {"input_ids": torch.arange(5, 12)[None], "decoder_input_ids": torch.tensor([[0, 4, 3]])}
    for size, lacks in ((7, "'tower1', the tower of the queries"), (3, "'tower0', the tower of the keys")):
        first = torch.arange(size) < 2
        with pytest.raises(
            ValueError, match=f"groups must be of tokens that attend to one another: none is of tokens of {lacks}"
        ):
            va.attribute_edges(model, inputs, {"first": first, "rest": ~first}, tower=("tower1", "tower0"), target=3)


def test_a_table_is_a_sequence_and_a_data_frame() -> None:
    model, inputs = made("llava")
    table = va.attribute_edges(model, inputs, GROUPS, target=7)
    top = table.top(4)
    assert isinstance(top, va.EdgeTable) and len(top) == 4 and len(table[:7]) == 7
    sizes = [abs(edge.effect) for edge in top]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == max(abs(edge.effect) for edge in table)
    frame = top.to_pandas()
    assert list(frame.columns) == ["layer", "head", "from", "to", "effect"]
    assert frame["effect"].tolist() == [edge.effect for edge in top] and frame["to"].tolist() == [edge.to for edge in top]
    assert repr(top).startswith("4 edges, first-order effects:\nlayer ")
    assert bool(top.matrix("image", "last").isnan().any())
    assert table.rank_correlation(table) == pytest.approx(1.0) and top[:2].rank_correlation(top[:2]) is None
    edges = table[:10]
    turned = dataclasses.replace(edges, edges=tuple(dataclasses.replace(edge, effect=-edge.effect) for edge in edges))
    assert edges.rank_correlation(turned) == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="table must have the same 4 edges in the same order; got 108"):
        top.rank_correlation(table)
    axes = table.plot("image", "last").axes[0]
    assert axes.get_title() == "image -> last"
    drawn = torch.tensor(axes.get_images()[0].get_array().tolist())
    torch.testing.assert_close(drawn, table.matrix("image", "last"))


def test_the_flow_is_the_sum_over_heads_as_wide_as_drawn() -> None:
    model, inputs = made("llava")
    table = va.attribute_edges(model, inputs, GROUPS, target=7)
    flow = table.by_layer()
    for a, from_ in enumerate(GROUPS):
        for b, to in enumerate(GROUPS):
            torch.testing.assert_close(flow[:, a, b].float(), table.matrix(from_, to).sum(1))
    layers = va.intervene_each(model, inputs, [(1, None, "image", "last"), (1, 2, "image", "last")], groups=GROUPS, target=7)
    assert float(layers.by_layer()[1, 0, 2]) == layers[0].effect != layers[1].effect  # heads are not added to all heads
    assert int(layers.by_layer().isnan().sum()) == 2 * 9 - 1

    axes = table.plot_flow().axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == GROUPS and axes.yaxis_inverted()
    shown = {}
    for ribbon in axes.collections:
        (path,) = ribbon.get_paths()
        (left, right), height = (path.vertices[:, 0].min(), path.vertices[:, 0].max()), path.vertices[:, 1]
        ends = [height[path.vertices[:, 0] == end] for end in (left, right)]
        place = int(left), *(round(float(end.min() + end.max()) / 2) for end in ends)
        red, _, blue, _ = ribbon.get_facecolor()[0]
        shown[place] = float(ends[0].max() - ends[0].min()) * (1 if red > blue else -1)
        assert right == left + 1
    largest = float(flow.abs().max())
    assert len(shown) == int((flow != 0).sum()) > 9
    for place, width in shown.items():
        assert width == pytest.approx(0.6 * float(flow[place]) / largest, rel=1e-6)


def test_long_calls_show_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm.auto

    bars = []

    def bar(items: Any, desc: str, disable: bool | None, **options: Any) -> Any:
        bars.append((desc, len(items), disable))
        return items

    monkeypatch.setattr(tqdm.auto, "tqdm", bar)
    model, inputs = llama()
    edges = [(layer, head, "text", "last") for layer in range(3) for head in range(4)]
    va.intervene_each(model, inputs, edges, groups=["text", "last"], batch_size=5)
    va.information_flow(model, [(inputs, None)] * 2, window=1, keys="text", batch_size=2)
    va.record_heads(model, [inputs] * 3)
    windows = [("cutting windows", 2, None)] * 2
    assert bars == [("cutting edges", 3, None), ("samples", 2, None), *windows, ("recording", 3, None)]
    bars.clear()
    va.evaluate(model, [(inputs, 7, None)], methods=["attention"], tests=["intervention"])
    assert bars[0] == ("evaluating", 1, None) and {name for name, _, _ in bars} >= {"explaining", "cutting attention"}


def test_a_callable_target_gets_the_outputs_of_the_batch_as_it_was_given() -> None:
    """Though cuts of copies run at once where the target is an index."""
    model, inputs = made("llava")
    edges = [(0, 1, "image", "last"), (1, 0, "question", "last"), (2, 3, "image", "question")]

    def target(outputs: Any) -> Tensor:
        return outputs.logits[[0, 1], [23, 21], 7]

    called, by_index = (va.intervene_each(model, inputs, edges, groups=GROUPS, target=each) for each in (target, 7))
    torch.testing.assert_close(called.effects, by_index.effects, rtol=1e-9, atol=1e-12)
    table = va.attribute_edges(model, inputs, GROUPS, target=target)
    assert len(va.intervene_each(model, inputs, table.top(4))) == 4
    curve = va.information_flow(model, [(inputs, None)], window=1, target=target)
    torch.testing.assert_close(curve.base, by_index.scores, rtol=1e-9, atol=0)
    assert curve.probability.shape == (2, 3)
