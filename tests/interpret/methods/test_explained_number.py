"""`of`: a class, a token or an answer's token is explained by its logit, its log-probability or its margin."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.cases import in_double


def numbers(logits: Tensor, index: Tensor) -> dict[str, Tensor]:
    """Each of them (...), by the formula, from logits (..., C)."""
    logit = logits.gather(-1, index[..., None])[..., 0]
    rest = logits.exp().sum(-1) - logit.exp()
    return {"logit": logit, "log_probability": logit - logits.exp().sum(-1).log(), "margin": logit - rest.log()}


@pytest.mark.parametrize("of", ["logit", "log_probability", "margin"])
@pytest.mark.parametrize("case", ["vit", "llava"], indirect=True)
def test_of_a_target(case: Any, of: str) -> None:
    inputs = {name: value[:1] for name, value in in_double(case).items()}  # the second text has padding
    tower = "vision" if "ViT" in type(case.model).__name__ else "language"

    def score(outputs: Any) -> Tensor:
        logits = outputs.logits if outputs.logits.ndim == 2 else outputs.logits[:, -1]
        return numbers(logits, torch.full(logits.shape[:1], 1))[of]

    found = va.explain(case.model, inputs, target=1, method=va.methods.Gradient(of=of))
    expected = va.explain(case.model, inputs, target=score, method="gradient", position="cls" if tower == "vision" else "last")
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.relevancy[tower], expected.relevancy[tower], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["llava"], indirect=True)
def test_of_an_answer(case: Any) -> None:
    inputs = {name: value[:1] for name, value in in_double(case).items()}  # the second text has padding
    answer = torch.tensor([[5, 7, 9]] * len(inputs["input_ids"]))
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], 1)}
    if "attention_mask" in whole:
        whole["attention_mask"] = torch.cat([whole["attention_mask"], torch.ones_like(answer)], 1)
    before = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = case.model(**whole).logits[:, before - 1 : before + 2]
    for of, expected in numbers(logits, answer).items():
        found = va.explain(case.model, inputs, answer=answer, method=va.methods.Gradient(of=of))
        torch.testing.assert_close(found.scores, expected, rtol=1e-9, atol=1e-12)
        together = va.explain(case.model, inputs, answer=answer, method=va.methods.Gradient(of=of), per_token=False)
        torch.testing.assert_close(together.scores, expected.sum(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_a_similarity_has_no_probability(case: Any) -> None:
    with pytest.raises(ValueError, match="of must be 'logit' if the score is not one of several logits; got 'margin'"):
        va.explain(case.model, case.inputs, method=va.methods.Gradient(of="margin"))


@pytest.mark.parametrize("case", ["llava"], indirect=True)
def test_an_explanation_says_what_its_scores_are(case: Any, tmp_path: Any) -> None:
    inputs = {name: value[:1] for name, value in case.inputs.items()}
    answer = torch.tensor([[5, 7]])
    for of, shown in ((None, "log-probability"), ("logit", "logit"), ("margin", "margin")):
        method = va.methods.Gradient(of=of)
        found = va.explain(case.model, inputs, answer=answer, method=method)
        assert found.of == (of or "log_probability")
        found.save(tmp_path / "one.safetensors")
        assert va.Explanation.load(tmp_path / "one.safetensors").of == found.of
        assert f"{shown} " in found.to_html()
        assert va.explain(case.model, inputs, method=method).of == of


@pytest.mark.parametrize("case", ["llava"], indirect=True)
def test_of_edges(case: Any) -> None:
    """First order and the true effects are about the same number."""
    inputs = {name: value[:1] for name, value in in_double(case).items()}
    answer, groups = torch.tensor([[5, 7]]), ["image", "question", "last"]
    for of in ("logit", "log_probability", "margin"):
        table = va.attribute_edges(case.model, inputs, groups, answer=answer, of=of)
        expected = va.explain(case.model, inputs, answer=answer, per_token=False, method=va.methods.Gradient(of=of)).scores
        torch.testing.assert_close(table.scores, expected, rtol=1e-9, atol=0)
        (edge,) = va.intervene_each(case.model, inputs, table.top(1))
        ends = {"keys": table.groups[edge.from_], "queries": table.groups[edge.to]}
        ids = torch.cat([inputs["input_ids"], answer], 1)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad(), va.intervene(case.model, inputs, [va.Knockout(**ends, layers=edge.layer, heads=edge.head)]):
            logits = case.model(**whole).logits[:, -3:-1]
        assert abs(edge.effect - float(expected - numbers(logits, answer)[of].sum(1))) < 1e-6


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_evaluate_takes_methods_with_options(case: Any) -> None:
    methods = ["gradient", va.methods.Gradient(freeze=("norms",), of="margin"), va.methods.Weighted(weighting="norm")]
    found = va.evaluate(case.model, [(case.inputs, None, None)], methods=methods, tests=["positive"])
    named = {record["method"] for record in found.table}
    assert named == {"gradient", "gradient(freeze=norms, of=margin)", "weighted(weighting=norm)"}
    with pytest.raises(ValueError, match="methods must have different names"):
        va.evaluate(case.model, [(case.inputs, None, None)], methods=[va.methods.Gradient(), "gradient"], tests=["positive"])
