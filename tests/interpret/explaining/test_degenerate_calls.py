"""Calls with nothing to explain: an empty batch, a score that does not depend on the model, a score that is no number."""

import pytest
import torch

import vlattn_fast as va
from tests.helpers.interpret.cases import CASES
from vlattn_fast.interpret import Explanation, explain
from vlattn_fast.interpret.relevancy.methods.registry import METHODS

NEEDS_SCORE = [name for name, method in METHODS.items() if method.needs_score]
ANY_MODEL = [name for name, method in METHODS.items() if not method.takes_logits]  # of any model that the cases have


def empty(inputs):
    return {name: value[:0] for name, value in inputs.items()}


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_an_empty_batch_with_a_target(case):
    """A callable is not called: its own indices and labels are of no row."""
    assert explain(case.model, empty(case.inputs), target=lambda outputs: 1 / 0).target is None
    no_image = dict(case.inputs, pixel_values=case.inputs["pixel_values"][:0])
    assert len(explain(case.model, no_image, target=[])) == 0
    assert len(explain(case.model, dict(no_image, input_ids=no_image["input_ids"][:1], attention_mask=None))) == 0
    with pytest.raises(ValueError, match="got 0 images and 3 texts"):
        explain(case.model, no_image)


@pytest.mark.parametrize("case", ["siglip", "vit"], indirect=True)
def test_an_empty_batch_can_be_stored_and_drawn(case, tmp_path):
    pytest.importorskip("matplotlib")
    got = explain(case.model, empty(case.inputs))
    assert len(Explanation.load(got.save(tmp_path / "empty.safetensors"))) == 0
    got.plot().savefig(tmp_path / "empty.png")
    assert "<html" in got.save_html(tmp_path / "empty.html").read_text()


@pytest.mark.parametrize("method", NEEDS_SCORE)
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_score_that_does_not_depend_on_the_model(case, method):
    rows = len(explain(case.model, case.inputs, method="attention"))
    parameter = torch.ones(rows, requires_grad=True)
    for target in (lambda outputs: parameter, lambda outputs: 2 * parameter + 1, lambda outputs: parameter.detach()):
        with pytest.raises(ValueError, match="^target must give scores that depend on the explained layers; got"):
            explain(case.model, case.inputs, target=target, method=method)


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_a_score_that_depends_on_layers_before_the_explained_ones_alone(case):
    """The first layer's output goes through no attention that counts."""

    def early(outputs):
        return outputs.hidden_states[1].sum((1, 2))

    inputs = dict(case.inputs, output_hidden_states=True)
    assert explain(case.model, inputs, target=early).relevancy["vision"].abs().sum() > 0
    for method in (va.methods.Gradient(start_layer=1), va.methods.Weighted(start_layer=1), "gradcam"):
        with pytest.raises(ValueError, match="depend on the explained layers"):
            explain(case.model, inputs, target=early, method=method)


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_a_score_of_one_tower(case):
    """One of two towers is enough; the row of the other one is its start, the read-out token."""
    got = explain(case.model, case.inputs, target=lambda outputs: outputs.image_embeds[:, 0])
    assert torch.equal(got.relevancy["text"], (case.inputs["input_ids"] == 58).float())
    assert (got.relevancy["vision"] != 0).sum() > 3


@pytest.mark.parametrize("method", ANY_MODEL)
@pytest.mark.parametrize("case", ["clip", "vit", "uniter"], indirect=True)
def test_a_score_that_is_no_number(case, method):
    rows = len(explain(case.model, case.inputs))

    def target(outputs):
        scores = outputs.logits_per_image.diagonal() if hasattr(outputs, "logits_per_image") else outputs.logits[:, 0]
        return torch.where(torch.arange(rows) == 1, torch.nan, scores)

    with pytest.raises(ValueError, match=r"^target must give scores that are numbers; got nan for samples \[1\]"):
        explain(case.model, case.inputs, target=target, method=method)


@pytest.mark.parametrize("case", ["vit", "clip"], indirect=True)
def test_weights_of_one(case):
    """Where all tokens have a weight, none lies beside the rows that are read."""
    for tower, row in explain(case.model, case.inputs).relevancy.items():
        real = case.inputs["attention_mask"].float() if tower == "text" else torch.ones_like(row)
        ones = explain(case.model, case.inputs, position={tower: real})
        mean = explain(case.model, case.inputs, position={tower: "mean"})
        torch.testing.assert_close(ones.relevancy[tower], real.sum(-1, keepdim=True) * mean.relevancy[tower])


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_rows_that_cannot_be_read(case):
    with pytest.raises(ValueError, match="position must name at least one tower; got an empty mapping"):
        explain(case.model, case.inputs, position={})
    tokens = explain(case.model, case.inputs).relevancy["vision"].shape[1]
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=f"position must be finite weights; got {value}"):
            explain(case.model, case.inputs, position=torch.ones(tokens).index_fill(0, torch.tensor(2), value))
