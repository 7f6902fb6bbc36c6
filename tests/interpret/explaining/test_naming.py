"""The tokenizer that a caller passes is used: it names words, says which tokens are special, and encodes targets."""

import pytest
import torch
import transformers

from tests.helpers import saved_models
from tests.helpers.interpret.cases import lively
from vlattn_fast.interpret import explain

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
    for one in (words, images):
        explanation = explain(decoder, inputs, processor=one)
        assert explanation.tokens == [prompt.split() for prompt in PROMPTS]
        assert explanation.text_positions == [[1, 2, 3]] * 2
        torch.testing.assert_close(explanation.text, explanation.relevancy["language"][:, 1:4])
        answered = explain(decoder, inputs, answer="red circle <end>", processor=one)
        assert answered.tokens == [[*prompt.split(), "red", "circle", "<end>"] for prompt in PROMPTS]
    assert explain(decoder, inputs, processor=saved_models.image_processor()).words is None


def test_special_tokens_of_texts_that_the_config_does_not_name(words) -> None:
    torch.manual_seed(0)
    bert = lively(transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, vocab_size=8, num_labels=3)))
    inputs = words(["a red <pad> square", "a <end> red circle"], return_tensors="pt")
    assert explain(bert, inputs, processor=words).tokens == [["a", "red", "square"], ["a", "red", "circle"]]


def test_words_of_towers_without_an_adapter(words) -> None:
    """A classifier's and an encoder's tower have words as soon as a tokenizer says which ids are none."""
    torch.manual_seed(0)
    inputs = words(["a red <pad> square", "a <end> red circle"], return_tensors="pt")
    config = transformers.CamembertConfig(**SIZES, vocab_size=8, num_labels=3, pad_token_id=2)
    camembert = lively(transformers.CamembertForSequenceClassification(config)).eval()
    got = explain(camembert, inputs, processor=words)
    assert got.tokens == [["a", "red", "square"], ["a", "red", "circle"]]
    for row, text, places in zip(got.relevancy["tower0"], got.text, got.text_positions, strict=True):
        assert torch.equal(row[places], text)
    assert explain(camembert, inputs).text is None
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
    special = dict(vocab_size=8, pad_token_id=2, eos_token_id=1, decoder_start_token_id=0)
    config = transformers.BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, **heads, **special)
    bart = lively(transformers.BartForConditionalGeneration(config)).eval()
    got = explain(bart, inputs, answer="red circle", processor=words)
    assert got.tokens == [["a", "red", "square", "red", "circle"], ["a", "red", "circle", "red", "circle"]]
    encoder = got.relevancy["tower0"]
    for rows, text, places in zip(encoder, got.text, got.text_positions, strict=True):
        assert torch.equal(rows[:, places[:3]], text[:, :3])


def test_a_target_may_be_a_word(decoder, words) -> None:
    inputs = words(PROMPTS, return_tensors="pt")
    for target, ids in (("red", 4), (["square", "a"], [6, 3])):
        by_word, by_id = explain(decoder, inputs, target=target, processor=words), explain(decoder, inputs, target=ids)
        assert by_word.target == by_id.target == ([4, 4] if ids == 4 else ids)
        assert torch.equal(by_word.relevancy["language"], by_id.relevancy["language"])
    with pytest.raises(ValueError, match="target must be one token; got 'red square', which has 2. Pass answer='red square' to"):
        explain(decoder, inputs, target="red square", processor=words)
    with pytest.raises(ValueError, match="processor must have a tokenizer for a target that is a word; got none for 'red'"):
        explain(decoder, inputs, target="red")


def test_a_text_with_a_word_that_the_tokenizer_lacks_is_refused(decoder) -> None:
    words = saved_models.tokenizer()
    words.unk_token = "<pad>"  # it takes this token for such words
    inputs = words(PROMPTS, return_tensors="pt")
    with pytest.raises(
        ValueError, match="target must be text in the tokenizer's vocabulary; got 'green', for which it gives '<pad>'"
    ):
        explain(decoder, inputs, target="green", processor=words)
    with pytest.raises(
        ValueError, match="answer must be text in the tokenizer's vocabulary; got 'a green circle', for which it gives"
    ):
        explain(decoder, inputs, answer=["red", "a green circle"], processor=words)
    assert explain(decoder, inputs, target="<pad>", processor=words).target == [2, 2]


def test_what_holds_no_tokenizer_is_refused(decoder, words) -> None:
    for other, name in ((3, "int"), ("clip", "str")):
        with pytest.raises(TypeError, match=f"processor must be a tokenizer, a processor or an image processor .*; got {name}"):
            explain(decoder, words(PROMPTS, return_tensors="pt"), processor=other)
