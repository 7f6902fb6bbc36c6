"""A score that a caller takes from the outputs of a listed class: the row that is read is the one that its gradient names."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.helpers.interpret.cases import VISION, lively, one_hot
from tests.helpers.interpret.encoder_cases import PATCHES, T5, WORDS, pixels, text
from tests.helpers.interpret.stored_maps import METHODS, Place, assert_rows, check, layer_sums, rows_of
from tests.interpret.adapters.test_detectors import detr, pictures
from vlattn_fast.interpret import explain
from vlattn_fast.nn import capture_relevancy

pytestmark = pytest.mark.usefixtures("published")

IMAGE = PATCHES + 1
SUMS = layer_sums("encoder.layer", 3, "attention", "attention.output.LayerNorm")


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return lively(transformers.BertModel(transformers.BertConfig(**T5))).eval(), text()


def similarity(states: Tensor, weights: Tensor) -> Tensor:
    """(B,), the cosine of each text's mean state with the first one's, which is a constant."""
    pooled = nn.functional.normalize((weights.to(states)[..., None] * states).sum(1), dim=-1)
    return pooled @ pooled[0].detach().roll(1)


def shares(mask: Tensor) -> Tensor:
    return mask.double() / mask.sum(-1, keepdim=True)


@pytest.mark.parametrize("pool", ["mean of the words", "mean of all", "a word", "the last word"])
def test_text(pool):
    model, inputs = bert()
    mask = inputs["attention_mask"]
    weights = {
        "mean of the words": shares(mask),
        "mean of all": torch.full((2, WORDS), 1 / WORDS, dtype=torch.float64),
        "a word": one_hot(torch.tensor([3, 2]), WORDS),
        "the last word": one_hot(mask.sum(-1) - 1, WORDS),
    }[pool]
    score = lambda outputs: similarity(outputs.last_hidden_state, weights)  # noqa: E731
    real = None if pool == "mean of all" else mask
    check(model, inputs, {"text": Place("encoder.layer", weights, real, SUMS)}, score, METHODS, target=score)


def test_no_warning_and_no_position_of_a_mean():
    model, inputs = bert()
    mean = explain(model, inputs, target=lambda outputs: similarity(outputs.last_hidden_state, inputs["attention_mask"]))
    assert mean.position == {}
    word = explain(model, inputs, target=lambda outputs: outputs.last_hidden_state[:, 4, 0])
    assert word.position["text"].tolist() == [4, 4]


class MeanViT(transformers.ViTForImageClassification):
    """A caller's own head on a listed class, whose record reads the first token."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        states = self.vit(pixel_values).last_hidden_state
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.classifier(states[:, 1:].mean(1)))


def test_a_subclass_with_a_forward_of_its_own():
    model = lively(MeanViT(transformers.ViTConfig(**VISION, num_labels=3))).eval()
    row = torch.full((2, IMAGE), 1 / PATCHES, dtype=torch.float64)
    row[:, 0] = 0
    score = lambda outputs: outputs.logits[:, 1]  # noqa: E731
    check(model, pixels(), {"vision": Place("vit.layers", row)}, score, ("gradient", "rollout", "attention"), target=1)


def test_mean_of_patches_beside_a_text():
    words = dict(T5, eos_token_id=58, bos_token_id=57, pad_token_id=1)
    config = transformers.CLIPConfig(text_config=words, vision_config=VISION, projection_dim=16)
    model, inputs = lively(transformers.CLIPModel(config)).eval(), {**text(last=58), **pixels()}
    row = torch.full((2, IMAGE), 1 / PATCHES, dtype=torch.float64)
    row[:, 0] = 0
    score = lambda outputs: outputs.vision_model_output.last_hidden_state[:, 1:].mean(1)[:, 3]  # noqa: E731
    sums = layer_sums("vision_model.encoder.layers", 3, "", "layer_norm2")
    check(model, inputs, {"vision": Place("vision_model", row, None, sums)}, score, ("gradient", "rollout"), target=score)
    end = explain(model, inputs, target=score).relevancy["text"]  # the score does not depend on the texts
    torch.testing.assert_close(end, one_hot(torch.tensor([8, 5]), WORDS).to(end))


def test_decoder_whose_score_is_read_from_another_position():
    model = lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(**T5, num_key_value_heads=2))).eval()
    inputs = text()
    score = lambda outputs: outputs.logits[:, 4, 7]  # noqa: E731
    place = Place("model.layers", one_hot(torch.tensor([4, 4]), WORDS), inputs["attention_mask"])
    check(model, inputs, {"language": place}, score, ("gradient", "rollout", "attention"), target=score)


def test_state_of_an_earlier_layer():
    """Later layers have no part in the score: the row is named behind the last one that has."""
    model, inputs = bert()
    mask = inputs["attention_mask"]
    score = lambda outputs: similarity(outputs.hidden_states[-2], shares(mask))  # noqa: E731
    asked = {**inputs, "output_hidden_states": True}
    check(model, asked, {"text": Place("encoder.layer", shares(mask), mask)}, score, ("gradient",), target=score)
    with pytest.raises(ValueError, match="target must give scores that depend on the last layer for method 'rollout'"):
        explain(model, asked, target=score, method="rollout")


def test_object_query():
    model, inputs = detr("detr"), pictures(False)
    named = explain(model, inputs, target=lambda outputs: outputs.logits[:, 3, 1])
    read = explain(model, inputs, target=lambda outputs: outputs.logits[:, 3, 1], position=3)
    torch.testing.assert_close(named.relevancy, read.relevancy)
    assert named.position["queries"].tolist() == [3] * len(named)


@pytest.mark.parametrize(
    "pool", [lambda x: x.max(1).values, lambda x: (x.softmax(1) * x).sum(1), lambda x: x[:, 2] + 2 * x[:, 5]]
)
def test_no_mean_is_refused(pool):
    model, inputs = bert()
    with pytest.raises(
        ValueError,
        match="position must name the explained token of tower 'text'; got None, and after the last attention the score",
    ):
        explain(model, inputs, target=lambda outputs: pool(outputs.last_hidden_state)[:, :4].sum(1))
    explain(model, inputs, target=lambda outputs: pool(outputs.last_hidden_state)[:, :4].sum(1), position="mean")


def test_score_beside_the_pooling_head_is_refused():
    config = transformers.SiglipVisionConfig(**VISION)
    model = lively(transformers.SiglipVisionModel(config)).eval()
    explain(model, pixels(), target=lambda outputs: outputs.pooler_output[:, 0])
    with pytest.raises(ValueError, match="target must give scores that depend on the pooling head of tower 'vision'"):
        explain(model, pixels(), target=lambda outputs: outputs.last_hidden_state.mean(1)[:, 0])


def scored(outputs: Any, mask: Tensor) -> Tensor:
    return similarity(outputs.last_hidden_state, shares(mask))


def test_capture_relevancy():
    model, inputs = bert()
    model, mask = model.double().train(), inputs["attention_mask"]
    model.eval()
    with capture_relevancy(model) as captured:
        outputs = model(**inputs)
    got = captured.relevancy(scored(outputs, mask))
    place = Place("encoder.layer", shares(mask), mask)
    want = rows_of(model, inputs, lambda outputs: scored(outputs, mask), {"text": place})["text"]
    assert_rows(got.detach(), want, place)
    with capture_relevancy(model) as captured:
        outputs = model(**inputs)
    with pytest.raises(ValueError, match="position must name the explained token of tower 'text'"):
        captured.relevancy(outputs.last_hidden_state.max(1).values[:, :4].sum())
