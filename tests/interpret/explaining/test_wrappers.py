"""What holds a model: pipelines and PEFT's wrapper change nothing in its explanation. tests/interpret/properties/ has others."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.interpret.cases import TEXT, lively
from vlattn_fast.interpret import explain


@pytest.fixture
def bert():
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return lively(model).eval(), {"input_ids": torch.randint(5, 50, (2, 7)), "attention_mask": mask}


def same(got, want):
    torch.testing.assert_close(got.relevancy["text"], want.relevancy["text"], rtol=1e-5, atol=1e-6)
    assert got.target == want.target


def test_pipeline(bert):
    from tokenizers import Tokenizer, models, pre_tokenizers

    model, inputs = bert
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    same(explain(pipeline, inputs), explain(model, inputs))


def test_peft(bert):
    """PEFT puts its layers into the model and keeps that as its base model; prompts it would prepend itself."""
    model, inputs = bert

    class Wrapped(nn.Module):
        def __init__(self, prompts: bool) -> None:
            super().__init__()
            self.inner, self.peft_config = model, {}
            self.active_peft_config = SimpleNamespace(is_prompt_learning=prompts, peft_type="PREFIX_TUNING")

        def get_base_model(self) -> nn.Module:
            return self.inner

    same(explain(Wrapped(False), inputs), explain(model, inputs))
    with pytest.raises(ValueError, match="model must take its prompts as inputs; got PEFT's PREFIX_TUNING"):
        explain(Wrapped(True), inputs)
