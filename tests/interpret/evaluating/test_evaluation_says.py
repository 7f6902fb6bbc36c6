"""What `evaluate` and `probe` say while they run, and when they are printed."""

import pytest
import torch
import transformers as hf
from torch import nn

import vlattn_fast as va
from tests.helpers.interpret.evaluation_cases import Planted, planted_data, rows, truth
from tests.helpers.saved_models import tokenizer
from vlattn_fast.interpret.probing.report import ProbeReport


class Wrapped(nn.Module):
    """A classifier of texts within a class of the user's."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = hf.BertConfig(vocab_size=60, num_labels=3, **sizes)
        self.inner = hf.BertForSequenceClassification(config)

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids, attention_mask).logits


def test_a_wrapped_text_model_asks_for_its_tokenizer():
    model, ids = Wrapped().eval(), torch.randint(5, 60, (2, 8))
    data = [({"input_ids": ids, "attention_mask": torch.ones(2, 8).long()}, lambda outputs: outputs[:, 0], None)]
    options = {"position": {"tower0": "cls"}, "methods": ("gradient", "random")}
    hint = "no sample has a map with an entry to remove; pass processor= to find the words"
    result = va.evaluate(model, data, **options)
    row = rows(result)["gradient", "positive", "text"]
    assert (row["samples"], row["left_out"], row["note"]) == (0, 2, hint)
    assert rows(result)["gradient", "positive", "image"]["note"] == "no sample has a map with an entry to remove"
    assert rows(result)["random", "positive", "text"]["note"] is None
    assert str(result).splitlines()[2].endswith(f"-        0         2  {hint}")
    with pytest.raises(ValueError, match=f"Test 'positive' is impossible .*: {hint}. Leave it out of tests="):
        va.evaluate(model, data, **{**options, "methods": ("gradient",)}, tests=("positive",))
    named = va.evaluate(model, data, **options, processor=tokenizer())
    assert rows(named)["gradient", "positive", "text"]["samples"] == 2


class Stubborn(Planted):
    """Its answer is always the same; its probability follows the picture."""

    def forward(self, pixel_values, input_ids, attention_mask=None):
        outputs = super().forward(pixel_values, input_ids, attention_mask)
        return type(outputs)(logits=outputs.logits + torch.tensor([0.0, 5.0]))


class Deaf(Planted):
    def forward(self, pixel_values, input_ids, attention_mask=None):
        outputs = super().forward(torch.ones_like(pixel_values), input_ids, attention_mask)
        return type(outputs)(logits=outputs.logits)


@pytest.mark.parametrize(("kind", "measure", "parts"), [(Stubborn, "accuracy", {"image", "text"}), (Deaf, None, {"image"})])
def test_answers_that_never_change_are_noted(kind, measure, parts):
    found = va.evaluate(
        kind(), planted_data(2), methods={"truth": truth(), "random": "random"}, tests=("positive", "deletion", "iou")
    )
    for (_, test, part), row in rows(found).items():
        of = {"positive": "accuracy", "deletion": "probability"}.get(test)
        same = of is not None and part in parts and measure in (None, of)
        said = f"the {of} is the same whatever is removed of the {part}: this value cannot compare maps"
        assert row["note"] == (said if same else None) and row["value"] is not None
        assert not same or said in str(found)


def test_a_report_of_heads_alone_shows_each_layer():
    fields = {"chance": None, "control": None, "samples": 3, "left_out": 1, "note": None}
    table = [
        {"test": "modality", "kind": kind, "layer": layer, "head": head, "value": 0.1 * layer + 0.2 * head + share, **fields}
        for kind, share in (("text", 0.0), ("image", 0.05))
        for layer in range(2)
        for head in range(3)
    ]
    lines = str(ProbeReport(table)).splitlines()
    assert len(lines) == 5
    assert lines[2].split() == "modality text 1 0.3000 - - 3 1 mean of 3 heads, 0.5000 in head 2".split()
    whole = {"test": "coreference", "kind": None, "layer": None, "head": None, "value": 0.75, **fields}
    heads = [{**whole, "layer": 0, "head": head} for head in range(3)]
    assert len(str(ProbeReport([whole, *heads])).splitlines()) == 2
