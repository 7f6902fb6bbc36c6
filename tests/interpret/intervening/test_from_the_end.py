"""Negative numbers of layers and heads count from the end, as in `explain`."""

from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.interpret.edited_maps import llama
from tests.helpers.interpret.parallel_cases import made


@pytest.mark.parametrize(
    "edit",
    [
        lambda layer, head, run: va.Knockout(keys=(0, 4), layers=[layer(2), layer(0)], heads=head(3)),
        lambda layer, head, run: va.Steer(keys=(0, 4), layers=layer(2), heads=[head(0), 0, head(3)], weight=4.0),
        lambda layer, head, run: va.ScaleHeads({layer(2): [head(3)], layer(1): None}, 0.25),
        lambda layer, head, run: va.ScaleHeads({layer(0): head(1)}, 0.0, mean=run),
        lambda layer, head, run: va.Patch(run, {layer(2): [head(3), 3]}),
    ],
)
def test_an_edit_from_the_end_is_that_from_the_start(edit: Any) -> None:
    model, inputs = llama()
    with torch.no_grad():
        plain = model(**inputs).logits
        run = va.record_heads(model, {**inputs, "input_ids": inputs["input_ids"].flip(0)})
        logits = []
        for edits in (edit(lambda i: i, lambda i: i, run), edit(lambda i: i - 3, lambda i: i - 4, run)):
            with va.intervene(model, inputs, edits):
                logits.append(model(**inputs).logits)
    assert torch.equal(*logits) and not torch.allclose(plain, logits[0])


def test_records_edges_and_curves_count_from_the_end() -> None:
    model, inputs = llama()
    record = va.record_heads(model, inputs, layers=[-1, 2, -3])
    assert list(record.means) == [0, 2]
    groups = {"a": (0, 4), "last": "last"}
    asked = [(-1, -4, "a", "last"), va.Edge(-3, None, "a", "last")]
    true = va.intervene_each(model, inputs, asked, groups=groups)
    again = va.intervene_each(model, inputs, [(2, 0, "a", "last"), (0, None, "a", "last")], groups=groups)
    assert true.edges == again.edges and [(edge.layer, edge.head) for edge in true] == [(2, 0), (0, None)]
    curves = [va.information_flow(model, [(inputs, None)], window=1, keys=(0, 4), heads=heads) for heads in ([-1, 1], [1, 3])]
    assert torch.equal(curves[0].probability, curves[1].probability)


def test_a_tower_that_attends_to_another_counts_all_its_layers() -> None:
    """Mllama's cross-attention is in some layers of its decoder."""
    model, inputs = made("mllama")
    across = ("language", "vision")
    layers = list(va.record_heads(model, inputs, tower=across).means)
    depth = 1 + max(*layers, *va.record_heads(model, inputs, tower="language").means)
    missing = next(layer for layer in range(depth) if layer not in layers)
    with pytest.raises(
        ValueError, match=rf"layers must be among \{layers}, which have attention; got {missing}, which does not attend to"
    ):
        va.intervene(model, inputs, va.Knockout(heads=0, layers=missing - depth, tower=across))
    logits = []
    for layer in (layers[0], layers[0] - depth):
        with torch.no_grad(), va.intervene(model, inputs, va.Knockout(heads=0, layers=layer, tower=across)):
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)
