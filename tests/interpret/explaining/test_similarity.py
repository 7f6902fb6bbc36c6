"""`target="similarity"`: two texts, or pictures, that an encoder embeds, from Python and from the shell."""

import json
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.helpers import saved_models
from tests.helpers.commands import said, vlattn
from tests.helpers.interpret.cases import VISION, lively, one_hot
from tests.helpers.interpret.encoder_cases import T5, WORDS, text
from tests.helpers.interpret.stored_maps import Place, check
from vlattn_fast.interpret import explain, load_explanations

pytestmark = pytest.mark.usefixtures("published")

METHODS = ("gradient", "rollout", "attention")


def cosine(states: Tensor, weights: Tensor) -> Tensor:
    """Of each of two texts with the other one, which is a constant."""
    first, second = (weights.to(states)[:, None] @ states)[:, 0]
    product = lambda one, other: torch.nn.functional.cosine_similarity(one, other.detach(), dim=0)  # noqa: E731
    return torch.stack([product(first, second), product(second, first)])


@pytest.mark.parametrize("read", [None, "mean", "cls", "last", 2])
def test_two_texts(read):
    model, inputs = lively(transformers.BertModel(transformers.BertConfig(**T5))).eval(), text(last=3)
    mask = inputs["attention_mask"]
    weights = mask.double() / mask.sum(-1, keepdim=True)
    if read in ("cls", "last", 2):
        weights = one_hot(
            {"cls": torch.zeros(2, dtype=torch.long), "last": mask.sum(-1) - 1, 2: torch.tensor([2, 2])}[read], WORDS
        )
    place = Place("encoder.layer", weights, mask)
    score = lambda outputs: cosine(outputs.last_hidden_state, weights)  # noqa: E731
    check(model, inputs, {"text": place}, score, METHODS, target="similarity", position=read)


def test_two_pictures():
    model = lively(transformers.ViTModel(transformers.ViTConfig(**VISION))).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 24, 24)}
    row = one_hot(torch.zeros(2, dtype=torch.long), 17)
    score = lambda outputs: cosine(outputs.last_hidden_state, row)  # noqa: E731
    check(model, inputs, {"vision": Place("layers", row)}, score, METHODS, target="similarity", position="cls")


def test_what_is_refused():
    model, inputs = transformers.BertModel(transformers.BertConfig(**T5)), text()
    one = {name: value[:1] for name, value in inputs.items()}
    with pytest.raises(ValueError, match="target='similarity' needs two texts or images, or pairs of them; got 1"):
        explain(model, one, target="similarity")
    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(**T5))
    with pytest.raises(ValueError, match="target='similarity' needs outputs with last_hidden_state"):
        explain(classifier, inputs, target="similarity")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: Any) -> Any:
    """A sentence encoder with its tokenizer, as sentence-transformers saves them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    sizes = dict(T5, vocab_size=len(saved_models.WORDS), pad_token_id=2)
    lively(transformers.BertModel(transformers.BertConfig(**sizes))).save_pretrained(folder)
    saved_models.tokenizer().save_pretrained(folder)
    return folder


def test_a_page_of_two_texts(encoder, tmp_path):
    run = ("explain", "--model", encoder, "--text", "a red square", "--text", "a blue circle", "--out", tmp_path / "page.html")
    result = vlattn(*run, "--target", "similarity", "--position", "mean")
    assert result.exit_code == 0, result.output
    assert "score 0:" in result.output and "score 1:" in result.output and "square" in (tmp_path / "page.html").read_text()
    refused = vlattn(*run)
    assert (
        refused.exit_code == 2 and "--target must be a callable" in said(refused) and "'similarity' of two texts" in said(refused)
    )
    assert "--position must be one of cls, last, mean" in said(vlattn(*run, "--target", "similarity", "--position", "middle"))


def test_a_data_set_of_pairs(encoder, tmp_path):
    texts = [["a red square", "a blue circle"], ["a red red", "a blue square"], ["a red square"]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"text": pair}) + "\n" for pair in texts))
    run = ("explain", "--model", encoder, "--dataset", tmp_path / "pairs.jsonl", "--out", tmp_path / "out")
    result = vlattn(*run, "--target", "similarity", "--position", "cls")
    assert result.exit_code == 1 and "done 2, failed 1" in result.output, result.output
    explanations = load_explanations(tmp_path / "out")
    assert [len(one) for one in explanations] == [2, 2] and "two texts" in explanations.failures[0]["error"]
    alone = vlattn(*run[:-2], "--target", "similarity", "--position", "mean", "--out", tmp_path / "out")
    assert alone.exit_code == 2 and '--position must be "cls", as in the earlier runs' in said(alone)
