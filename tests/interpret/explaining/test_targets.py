"""What a target may be, and a row that a method does not read: names of classes, callables of outputs and inputs, `read=`."""

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.cases import VISION, lively
from tests.helpers.interpret.encoder_cases import T5, text
from tests.interpret.explaining.test_rows_by_gradient import bert
from vlattn_fast.interpret import explain

PIXELS = {"pixel_values": torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))}


MASK = text()["attention_mask"]


def vit(**config: Any) -> Any:
    torch.manual_seed(0)
    return lively(transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, **config))).eval()


@pytest.mark.parametrize("method", ["gradient", "rollout", "occlusion"])
def test_a_masked_token_is_scored_at_its_place(method):
    """By its log-probability, as a callable gives it; another place for each sample by weights."""
    model, inputs = lively(transformers.BertForMaskedLM(transformers.BertConfig(**T5))).eval(), text(last=3)
    places, tokens = torch.tensor([1, 2]), torch.tensor([5, 7])

    def score(outputs):
        return outputs.logits[torch.arange(2), places].log_softmax(-1)[torch.arange(2), tokens]

    weights = torch.eye(inputs["input_ids"].shape[1])[places]
    want = explain(model, inputs, target=score, method=method, **({} if method == "occlusion" else {"position": weights}))
    got = explain(model, inputs, target=tokens.tolist(), position=weights, method=method)
    assert got.target == tokens.tolist()
    for name, row in want.relevancy.items():
        torch.testing.assert_close(got.relevancy[name], row, rtol=1e-4, atol=1e-7)


def test_what_a_masked_token_needs():
    class Words:
        unk_token, all_special_ids = None, ()

        def __call__(self, words, add_special_tokens):
            return {"input_ids": [int(word) for word in words.split()]}

        def convert_ids_to_tokens(self, ids):
            return [str(token) for token in ids]

    model, inputs = lively(transformers.BertForMaskedLM(transformers.BertConfig(**T5))).eval(), text(last=3)
    largest = model(**inputs).logits[:, -2].argmax(-1).tolist()
    assert explain(model, inputs, position=-2).target == largest
    assert explain(model, inputs, target="7", position=1, processor=Words()).target == [7, 7]
    with pytest.raises(ValueError, match="target must be one token; got '7 8', which has 2$"):
        explain(model, inputs, target="7 8", position=1, processor=Words())
    for position in (None, "mean"):
        with pytest.raises(ValueError, match=f"position must be the index of one token, .* got position={position!r}"):
            explain(model, inputs, target=7, position=position)
    for method in ("gradient", "occlusion"):  # occlusion has no explained token, but its score has a place
        with pytest.raises(ValueError, match=r"position must be from -\d+ to \d+; got 30"):
            explain(model, inputs, target=7, position=30, method=method)
    with pytest.raises(ValueError, match="position must be one token of each sample if each token has logits; got weights of"):
        explain(model, inputs, target=7, position=torch.full((inputs["input_ids"].shape[1],), 0.5))


@pytest.mark.parametrize("others", [None, {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}])
def test_classes_that_id2label_alone_names(others):
    model = vit(id2label={0: "dog", 1: "cat", 2: "owl"}, label2id=others)
    assert explain(model, PIXELS, target="cat").target == [1, 1]
    assert explain(model, PIXELS, target=["owl", "dog"]).target == [2, 0]
    with pytest.raises(ValueError, match="target must be one of 'dog', 'cat', 'owl'.* for ViTForImageClassification; got 'cow'"):
        explain(model, PIXELS, target="cow")


def test_a_name_of_two_classes_is_refused():
    """Of ImageNet's classes two are cranes, and two are maillots."""
    model = vit(id2label={0: "crane", 1: "cat", 2: "crane"})
    with pytest.raises(ValueError, match="target must name one class; got 'crane', the name of classes 0 and 2. Pass the index"):
        explain(model, PIXELS, target="crane")


def pooled(outputs: Any, inputs: Any) -> Tensor:
    mask = inputs["attention_mask"][..., None].to(outputs.last_hidden_state)
    return ((outputs.last_hidden_state * mask).sum(1) / mask.sum(1))[:, 3]


class Scorer:
    def __call__(self, outputs: Any, inputs: Any) -> Tensor:
        return pooled(outputs, inputs)

    def of_both(self, outputs: Any, inputs: Any) -> Tensor:
        return pooled(outputs, inputs)


def scaled(factor: float, outputs: Any, inputs: Any) -> Tensor:
    return factor * pooled(outputs, inputs)


@pytest.mark.parametrize(
    "target",
    [
        pooled,
        Scorer(),
        Scorer().of_both,
        functools.partial(scaled, 1.0),
        lambda outputs, inputs, index=3: pooled(outputs, inputs),
        lambda outputs, *, factor=1.0: factor * pooled(outputs, {"attention_mask": MASK}),
        lambda outputs, index=MASK: pooled(outputs, {"attention_mask": index}),
    ],
)
def test_a_callable_takes_outputs_or_outputs_and_inputs(target):
    model, inputs = bert()
    want = explain(model, inputs, target=lambda outputs: pooled(outputs, inputs))
    torch.testing.assert_close(explain(model, inputs, target=target).relevancy["text"], want.relevancy["text"])


def test_a_callable_of_three_is_refused():
    model, inputs = bert()
    message = r"target must be a callable of \(outputs\) or of \(outputs, inputs\); got one of 3 arguments"
    with pytest.raises(TypeError, match=message):
        explain(model, inputs, target=lambda outputs, inputs, more: outputs)


def test_evaluation_hands_a_callable_the_shortened_inputs():
    model, inputs = bert()
    with pytest.raises(RuntimeError, match="size of tensor"):
        va.evaluate(model, [(inputs, lambda outputs: pooled(outputs, inputs), None)], tests=["positive"])
    lengths = []

    def measured(outputs: Any, inputs: Any) -> Tensor:
        lengths.append(inputs["input_ids"].shape[1])
        return pooled(outputs, inputs)

    data = [(inputs, pooled, None)]
    evaluation = va.evaluate(model, data, tests=["positive", "sufficiency"], accuracy=measured, probability=measured)
    assert all(row["value"] == row["value"] for row in evaluation.table if row["part"] == "text")
    assert min(lengths) < inputs["input_ids"].shape[1] == max(lengths)


@pytest.mark.parametrize("method", ["input_gradient", "integrated_gradients"])
def test_read_beside_a_method_that_reads_no_row_is_said_and_ignored(method):
    model = vit(num_labels=3)
    want = explain(model, PIXELS, target=1, method=method)
    with pytest.warns(UserWarning, match=f"position=0 has no effect on method '{method}', which has no explained token"):
        got = explain(model, PIXELS, target=1, method=method, position=0)
    torch.testing.assert_close(got.relevancy, want.relevancy)
    with pytest.raises(ValueError, match="position must be one of cls, last, mean"):
        explain(model, PIXELS, target=1, method=method, position="first")


def test_a_loop_over_methods_with_read():
    model = vit(num_labels=3)
    with pytest.warns(UserWarning, match="position='cls' has no effect"):
        methods = ["gradient", "input_gradient", "rollout"]
        evaluation = va.evaluate(model, [(PIXELS, 1, None)], methods=methods, tests=["deletion"], position="cls")
    assert {row["method"] for row in evaluation.table} == set(methods)


@pytest.mark.parametrize("position", ["last", 2])
def test_attention_of_a_masked_language_model_asks_for_no_score(position: Any) -> None:
    """Each token has logits, and a method without a score takes none of them."""
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        attn_implementation="eager",
    )
    model, ids = transformers.BertForMaskedLM(config).eval(), torch.randint(4, 50, (2, 6))
    found = va.explain_layers(model, {"input_ids": ids}, method="attention", position=position)
    maps = torch.stack(model(ids, output_attentions=True).attentions)[..., 5 if position == "last" else 2, :].mean(2)
    torch.testing.assert_close(found.relevancy["tower0"], maps)
    assert (found.scores is None) == (position == "last")
