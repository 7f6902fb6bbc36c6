"""Numbers of a caller's method for words: one for each word, or one for each column of `input_ids`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.evaluation_cases import Planted, made, planted_data, rows, truth
from tests.helpers.saved_models import tokenizer

TESTS = ("positive", "deletion")


def curves(model, data, **methods):
    """The curves of the text, by method and test."""
    found = va.evaluate(model, data, methods=methods, tests=TESTS)
    return {(one["method"], one["test"]): one["mean"] for one in found.curves if one["part"] == "text"}


def text(values):
    return lambda model, inputs, target: SimpleNamespace(text=values)


def by_word(values, words):
    """(B, T): the numbers (B, N) of the words (B, N) alone, with zeros behind shorter texts."""
    return nn.utils.rnn.pad_sequence([row[mask] for row, mask in zip(values, words, strict=True)], batch_first=True)


def test_a_number_for_each_column_of_a_planted_model():
    """Special tokens and padding are among the columns."""

    def columns(model, inputs, target):
        return SimpleNamespace(text=torch.isin(inputs["input_ids"], torch.tensor(Planted.words)).float())

    found = curves(Planted(), planted_data(2), truth=truth(), columns=columns)
    for test in TESTS:
        assert found["columns", test] == found["truth", test]


def left_padded(bos):
    """A decoder, a batch whose second prompt has two tokens of padding in front, and its words."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=60, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    ids = torch.randint(5, 60, (2, 8))
    ids[1, :2] = 0
    if bos:
        ids[0, 0], ids[1, 2] = 1, 1
    model = lively(transformers.LlamaForCausalLM(config)).eval()
    return model, {"input_ids": ids, "attention_mask": (ids != 0).long()}, ids > 1


@pytest.mark.parametrize("name", ["bert", "left-padded", "left-padded without a first token"])
def test_a_number_for_each_column_of_a_padded_batch(name):
    if name == "bert":
        model, inputs = made("bert")
        words = inputs["input_ids"] > 3
    else:
        model, inputs, words = left_padded(bos=name == "left-padded")
    values = torch.rand(inputs["input_ids"].shape)
    data = [(inputs, 1, None)]
    real = inputs["attention_mask"].bool()
    singles = [({key: value[row : row + 1, real[row]] for key, value in inputs.items()}, 1, None) for row in range(len(real))]
    numbers = iter([row[mask][None] for row, mask in zip(values, words, strict=True)])
    one_by_one = curves(model, singles, one=lambda model, inputs, target: SimpleNamespace(text=next(numbers)))
    found = curves(model, data, columns=text(values))
    for test in TESTS:
        assert found["columns", test] == pytest.approx(one_by_one["one", test], abs=1e-5)
    if name != "left-padded without a first token":  # where both are as wide as the longest text
        assert curves(model, data, columns=text(by_word(values, words))) == found


def test_what_may_be_words_and_columns_is_refused():
    """Zeros at the end may stand behind a shorter text, or be the last columns' numbers."""
    model, inputs, words = left_padded(bos=False)
    explained = va.explain(model, inputs, target=1)
    with pytest.raises(ValueError, match="methods must return an unambiguous text; got 8 entries of 'copied'"):
        va.evaluate(model, [(inputs, 1, None)], methods={"copied": text(explained.text)}, tests=("deletion",))
    whole = va.evaluate(model, [(inputs, 1, None)], methods={"method": lambda *asked: explained, "gradient": "gradient"})
    assert rows(whole)["method", "positive", "text"]["value"] == rows(whole)["gradient", "positive", "text"]["value"]


@pytest.mark.parametrize("width", [1, 5, 7, 9])
def test_a_text_of_another_width_is_refused(width):
    with pytest.raises(ValueError, match=rf"input_ids, 6 or 8 of them; got \({width},\) of 'bad'"):
        va.evaluate(Planted(), planted_data(1), methods={"bad": text(torch.rand(2, width))}, tests=("deletion",))
    with pytest.raises(ValueError, match=r"got \(\) of 'bad'"):
        va.evaluate(Planted(), planted_data(1), methods={"bad": text(torch.rand(2))}, tests=("deletion",))


def test_an_explanation_without_an_adapter_has_its_words_by_their_places():
    """With a tokenizer that knows no special token among them, the text of the explanation has all columns, [CLS]'s first."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
            torch.manual_seed(0)
            self.inner = lively(transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=60, **sizes)))

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids, attention_mask).logits

    model, ids = Wrapped().eval(), torch.randint(5, 60, (2, 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    how = {"position": {"tower0": "cls"}, "processor": tokenizer()}
    data = [(inputs, lambda outputs: outputs[:, 0], None)]
    relevancy = va.explain(model, inputs, target=data[0][1], **how).text
    assert relevancy.shape == ids.shape
    methods = {"gradient": "gradient", "words": text(relevancy[:, 1:-1])}
    found = va.evaluate(model, data, methods=methods, tests=("deletion",), **how)
    one, other = (rows(found)[name, "deletion", "text"] for name in methods)
    assert one["value"] == other["value"] and one["samples"] == 2


def test_words_that_may_go_have_their_own_numbers():
    """Without a record `words` may leave some out; the text of a method has them still."""
    second = lambda inputs: torch.isin(inputs["input_ids"], torch.tensor([21, 12, 32]))  # noqa: E731
    number = lambda model, inputs, target: SimpleNamespace(text=inputs["input_ids"][:, 1:-1].float())  # noqa: E731
    seen = []

    def probability(outputs, inputs):
        seen.extend(sorted(set(ids) & {21, 12, 32}) for ids in inputs["input_ids"].tolist())
        return torch.ones(len(inputs["input_ids"]))

    data = [(inputs, target, None) for inputs, target, _ in planted_data(1)]
    options = {"words": second, "probability": probability, "tests": ("deletion",), "steps": [0, 0.5, 1], "batch_size": 1}
    va.evaluate(Planted(), data, methods={"number": number}, **options)
    assert [12] in seen and [12, 32] in seen and [21] not in seen  # the largest number goes first


def test_arrays_are_taken_as_tensors_are():
    def arrays(model, inputs, target):
        shown = truth()(model, inputs, target)
        return SimpleNamespace(image=np.flip(np.flip(shown.image.numpy())), text=[row.numpy() for row in shown.text])

    found = va.evaluate(Planted(), planted_data(2), methods={"arrays": arrays, "truth": truth()})
    for test, part in (("positive", "image"), ("negative", "text"), ("pointing", "image")):
        assert rows(found)["arrays", test, part]["value"] == rows(found)["truth", test, part]["value"]


@pytest.mark.parametrize("values", [np.array([None, None]), [[1.0], [1.0, 2.0]], "words", [object(), object()]])
def test_what_is_no_array_is_refused_with_the_name_of_its_method(values):
    with pytest.raises((TypeError, ValueError), match="^methods must return .* of 'bad'$"):
        va.evaluate(Planted(), planted_data(1), methods={"bad": text(values)}, tests=("deletion",))
