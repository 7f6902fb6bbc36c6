"""The tokenizer that a caller passes is used: it names words, says which tokens are special, and encodes targets."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.helpers import saved_models  # noqa: E402
from tests.helpers.interpret.cases import lively  # noqa: E402
from vlattn_fast.interpret import explain  # noqa: E402

PROMPTS = ["a red square", "a blue circle"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def words():
    return saved_models.tokenizer()


@pytest.fixture(scope="module")
def decoder():
    """Its config names other special tokens than the tokenizer: "red" and "blue"."""
    torch.manual_seed(0)
    special = {"bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 2}
    return lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=8, **special)))


def test_a_tokenizer_names_the_words(decoder, words) -> None:
    inputs = words(PROMPTS, return_tensors="pt")
    assert explain(decoder, inputs).tokens == [["0", "3", "6", "1"], ["0", "3", "7", "1"]]  # by the config
    images = transformers.CLIPProcessor(saved_models.image_processor(), words)
    for one in ({"tokenizer": words}, {"processor": words}, {"processor": images}, {"tokenizer": images}):
        explanation = explain(decoder, inputs, **one)
        assert explanation.tokens == [prompt.split() for prompt in PROMPTS]
        assert explanation.places == [[1, 2, 3]] * 2
        torch.testing.assert_close(explanation.text, explanation.relevancy["language"][:, 1:4])
        answered = explain(decoder, inputs, answer="red circle <end>", **one)
        assert answered.tokens == [[*prompt.split(), "red", "circle", "<end>"] for prompt in PROMPTS]
    assert explain(decoder, inputs, processor=saved_models.image_processor()).words is None


def test_special_tokens_of_texts_that_the_config_does_not_name(words) -> None:
    torch.manual_seed(0)
    bert = lively(transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, vocab_size=8, num_labels=3)))
    inputs = words(["a red <pad> square", "a <end> red circle"], return_tensors="pt")
    assert explain(bert, inputs, tokenizer=words).tokens == [["a", "red", "square"], ["a", "red", "circle"]]


def test_a_target_may_be_a_word(decoder, words) -> None:
    inputs = words(PROMPTS, return_tensors="pt")
    for target, ids in (("red", 4), (["square", "a"], [6, 3])):
        by_word, by_id = explain(decoder, inputs, target=target, tokenizer=words), explain(decoder, inputs, target=ids)
        assert by_word.target == by_id.target == ([4, 4] if ids == 4 else ids)
        assert torch.equal(by_word.relevancy["language"], by_id.relevancy["language"])
    with pytest.raises(ValueError, match="target must be one token; got 'red square', which is 2. Pass answer='red square' to"):
        explain(decoder, inputs, target="red square", tokenizer=words)
    with pytest.raises(ValueError, match="tokenizer must be given for a target that is a word; got None beside 'red'"):
        explain(decoder, inputs, target="red")


def test_a_target_may_be_the_name_of_a_class() -> None:
    torch.manual_seed(0)
    names = dict(enumerate(["cat", "dog", "fish", "owl", "bee", "ant"]))
    config = transformers.ViTConfig(**saved_models.VISION, id2label=names, label2id={name: i for i, name in names.items()})
    model, inputs = lively(transformers.ViTForImageClassification(config)), {"pixel_values": torch.randn(2, 3, 24, 24)}
    assert explain(model, inputs, target="fish").target == [2, 2]
    assert explain(model, inputs, target=["owl", "cat"]).target == [3, 0]
    with pytest.raises(ValueError, match="target must be one of 'cat', 'dog', 'fish', 'owl', 'bee', ... for ViTFor.*; got 'cow'"):
        explain(model, inputs, target="cow")


def test_what_holds_no_tokenizer_is_refused(decoder, words) -> None:
    inputs = words(PROMPTS, return_tensors="pt")
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer or a processor of Hugging Face; got int"):
        explain(decoder, inputs, tokenizer=3)
    with pytest.raises(TypeError, match="processor must be a processor of Hugging Face; got str"):
        explain(decoder, inputs, processor="clip")
